"""One planner, driven by hand: what it learns, records and reports of each step."""

import io
import math

import pytest

from scheduler.cost_model import CostModel
from scheduler.policy import StepPolicy
from scheduler.prefill_queue import QueuedPrefill
from scheduler.replay import replay
from scheduler.request import Request, RequestState, Slo
from scheduler.step_planner import StepPlanner
from scheduler.task import BatchPlan, Stage, StageTask, StepReport, StepView
from scheduler.work import ModelWork
from tests.scheduler.scenes import (
    LIMITS,
    TOKEN_S,
    cost_model,
    decoding,
    prefilling,
    view,
    waiting,
)

WORK = ModelWork(
    body_flops_per_token=10.0,
    head_flops_per_logit=0.0,
    flops_per_pair=0.0,
    body_bytes=7.0,
    head_bytes=0.0,
    kv_bytes_per_token=0.0,
)

DECODE = StageTask("d", Stage.DECODE, 1, 105, True)


def take(planner: StepPlanner, scene: StepView, now: float, measured_s: float = 0.1) -> BatchPlan:
    """One step from plan to end."""
    plan = planner.plan(scene, now)
    planner.end(planner.begin(scene, plan, now), measured_s, {})
    return plan


def test_a_step_is_reported_as_it_was_planned_computed_and_measured() -> None:
    reports: list[StepReport] = []
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model(), on_step=reports.append)
    planner.calibrate(None, WORK)
    scene = view([decoding("d")], [waiting("w", 50, arrival_s=2.0)], step=7)
    plan = planner.plan(scene, 5.0)
    computed = (StageTask("d", Stage.DECODE, 1, 105, True),)

    step = planner.begin(
        scene, plan, 5.0, tasks=computed, preempted=frozenset({"w"}), decided_s=0.25
    )
    planner.end(step, 0.5, {"d": 1})

    assert reports == [
        StepReport(
            step=7,
            began_s=5.0,
            plan=plan,
            tasks=computed,
            measured_s=0.5,
            decided_s=0.25,
            num_new_tokens={"d": 1},
            preempted=frozenset({"w"}),
            num_flops=10.0,
            num_bytes=7.0,
        )
    ]


def test_what_is_not_given_is_as_planned() -> None:
    reports: list[StepReport] = []
    planner = StepPlanner(LIMITS, StepPolicy(), on_step=reports.append)

    plan = take(planner, view([decoding("d")]), 5.0)

    assert (reports[0].tasks, reports[0].preempted) == (plan.tasks, frozenset())


def test_it_learns_from_what_was_computed() -> None:
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model())
    scene = view([decoding("d")])
    before_s = planner.plan(scene, 5.0).predicted_s

    for _ in range(20):
        take(planner, scene, 5.0, 2 * before_s)

    assert planner.plan(scene, 5.0).predicted_s > 1.5 * before_s


def test_one_that_does_not_learn_leaves_its_cost_model_alone() -> None:
    model = cost_model()
    planner = StepPlanner(LIMITS, StepPolicy(), model, learns=False)

    take(planner, view([decoding("d")]), 5.0, 9.0)

    assert model.to_dict() == cost_model().to_dict()
    assert not planner.needs_each_step


def test_a_step_planned_while_another_runs_knows_nothing_of_it() -> None:
    file, scene = io.StringIO(), view([decoding("d")])
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model())
    planner.record(file)
    first = planner.begin(scene, planner.plan(scene, 5.0), 5.0)
    second_plan = planner.plan(scene, 5.1)
    second = planner.begin(scene, second_plan, 5.1)
    planner.end(first, 3.0, {})
    planner.end(second, 3.0, {})

    assert second_plan.predicted_s == first.plan.predicted_s
    assert take(planner, scene, 9.0).predicted_s > second_plan.predicted_s
    assert all(report.plan == plan for report, plan in replay(file.getvalue().splitlines()))


@pytest.mark.parametrize("learns", [True, False])
def test_a_record_begins_with_what_was_learnt_before(learns: bool) -> None:
    file, scene = io.StringIO(), view([decoding("d")], [waiting("w", 300)])
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model(), learns=learns)
    for _ in range(5):
        take(planner, scene, 5.0, 0.5)

    planner.record(file)
    plans = [take(planner, scene, 6.0, 0.5) for _ in range(5)]

    assert [plan for _, plan in replay(file.getvalue().splitlines())] == plans
    assert (len(set(plans)) > 1) == learns


def test_the_queueing_time_of_a_request_is_reported_once() -> None:
    reports: list[StepReport] = []
    planner = StepPlanner(LIMITS, StepPolicy(), on_step=reports.append)
    state = RequestState(Request("r", 100, 9, slo_class="chat"), arrival_s=2.0)

    take(planner, view([], [state]), 5.0)
    state.num_computed_tokens = 50
    take(planner, view([state]), 6.0)
    planner.finish("r", 3)
    take(planner, view([], [waiting("r", 70, arrival_s=6.5)]), 7.0)  # another of its name

    assert [report.queued_s for report in reports] == [(("chat", 3.0),), (), (("", 0.5),)]


def test_a_request_that_came_too_late_for_the_view_has_queued_too() -> None:
    reports: list[StepReport] = []
    planner = StepPlanner(LIMITS, StepPolicy(), on_step=reports.append)
    computed, late = (StageTask("r", Stage.PREFILL, 70, 70, True),), [waiting("r", 70)]

    step = planner.begin(view(), planner.plan(view(), 5.0), 5.0, tasks=computed, late=late)
    planner.end(step, 0.1, {})

    assert [report.queued_s for report in reports] == [(("", 5.0),)]


def test_decodes_and_accepted_drafts_make_the_tokens_per_decode() -> None:
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model())
    acceptance = planner.acceptance
    scene = view([decoding("d", num_drafts=2)])
    for _ in range(200):
        acceptance.chances("d", "suffix", [0.9, 0.9])
        acceptance.offer("d", "suffix", [0.9, 0.9])
        acceptance.verified("d", 2, 2)
        take(planner, scene, 5.0)

    assert acceptance.tokens_per_decode == pytest.approx(3.0, rel=0.05)


def test_a_calibrated_planner_predicts_by_its_profile() -> None:
    planner = StepPlanner(LIMITS, StepPolicy())
    profile = CostModel([0.5, 0, 0, 0, 0, 0], token_knots=(0,), sample_knots=(0,))

    planner.calibrate(profile, WORK)

    assert planner.plan(view([decoding("d")]), 5.0).predicted_s == 0.5


def test_its_pace_is_that_of_its_steps_compared_with_its_profile() -> None:
    planner = StepPlanner(LIMITS, StepPolicy())
    take(planner, view([decoding("d")]), 5.0, measured_s=9.0)
    without = planner.pace.slowness(14.0), planner.token_s()
    planner.calibrate(cost_model(), WORK)
    profiled_s = planner.plan(view([decoding("d")]), 20.0).predicted_s
    token_s = planner.token_s()
    now = 20.0
    for _ in range(2000):  # whatever the cost model learns meanwhile
        take(planner, view([decoding("d")]), now, measured_s=4 * profiled_s)
        now += 4 * profiled_s

    assert without == (1.0, None)
    assert planner.pace.slowness(now) == pytest.approx(4.0, rel=0.2)
    assert token_s
    assert planner.token_s() == pytest.approx(token_s, rel=0.2)


def test_its_queue_is_all_that_must_be_computed_before_a_next_token() -> None:
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model())
    slo = Slo(ttft_s=9.0, tpot_s=0.5)
    preempted = decoding("p", slo=slo, num_output_tokens=5, last_token_s=1.0)
    preempted.num_computed_tokens = 0
    scene = view(
        [decoding("d", slo=slo), prefilling("half", 70, 30)],
        [preempted, waiting("w", 50, slo=slo, arrival_s=2.0, cached=20, priority=1)],
    )

    queue = planner.queue_report(scene, 5.0)

    assert queue.prefills == {
        "half": QueuedPrefill(40, 70, math.inf),
        "p": QueuedPrefill(105, 105, 1.0 + 0.5 - 5.0),
        "w": QueuedPrefill(30, 50, 2.0 + 9.0 - 5.0, 1),
    }
    assert (queue.num_decodes, queue.tpot_s) == (1, 0.5)
    assert queue.num_tokens == 105 + 70 + 105 + 50
    assert queue.cost.seconds(1000, 1000) == pytest.approx(1000 * TOKEN_S, rel=0.01)


def test_its_prefills_cost_what_its_pace_is_and_as_profiled_after_a_pause() -> None:
    planner = StepPlanner(LIMITS, StepPolicy(), learns=True)
    planner.calibrate(cost_model(), WORK)
    profiled = planner.queue_report(view(), 0.0).cost.token_s
    now = 20.0
    for _ in range(200):
        measured_s = 4 * planner.cost_model.profiled(planner.cost_model.shape_of([DECODE]))
        take(planner, view([decoding("d")]), now, measured_s)
        now += measured_s
    slowness = planner.pace.slowness(now)

    assert slowness > 1.5
    busy, idle = (planner.queue_report(view(), at).cost.token_s for at in (now, now + 100))
    assert busy == pytest.approx(slowness * profiled, rel=0.2)
    assert idle == pytest.approx(profiled, rel=0.2)
