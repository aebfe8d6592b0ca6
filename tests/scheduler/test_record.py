"""What a record keeps, and that replaying it decides the same."""

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.policy import StepPolicy
from scheduler.record import Recorder, arrivals, replay
from scheduler.request import Request, RequestState, Slo
from scheduler.task import Limits, Stage, StageTask, StepReport, StepView
from tests.scheduler.scenes import LIMITS, cost_model, decoding, waiting
from tests.scheduler.test_policy import NOW, POLICIES, scenes

seconds = st.floats(1e-6, 10.0)


def write(
    policy: StepPolicy,
    limits: Limits,
    steps: list[tuple[StepView, float]],
    *,
    ahead: int = 0,
    executed: tuple[StageTask, ...] | None = None,
) -> tuple[list[str], list[StepReport]]:
    """A record of these views and the times that their steps took; the cost model learns `ahead`
    steps late, as under async scheduling."""
    file, model = io.StringIO(), cost_model(1e-6)
    recorder = Recorder(file, policy, limits, model)
    scheduler = policy.make(limits, model)
    reports: list[StepReport] = []
    late: list[tuple[StepView, StepReport, int]] = []

    def end_step() -> None:
        view, report, num_observed = late.pop(0)
        tasks = report.plan.tasks if executed is None else executed
        recorder.write_step(view, report, tasks, num_observed)
        model.observe(model.shape_of(tasks), report.measured_s)

    for number, (view, measured_s) in enumerate(steps):
        now = NOW + number / 3
        plan = scheduler.plan(view, now)
        reports.append(StepReport(view.step, now, plan, measured_s, 1e-4 / 3))
        late.append((view, reports[-1], recorder.num_steps))
        if len(late) > ahead:
            end_step()
    while late:
        end_step()
    return file.getvalue().splitlines(), reports


@st.composite
def histories(draw: st.DrawFn) -> tuple[Limits, list[tuple[StepView, float]]]:
    limits, first = draw(scenes())
    views = [first, *(draw(scenes())[1] for _ in range(draw(st.integers(0, 4))))]
    return limits, [(view, draw(seconds)) for view in views]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@given(history=histories(), ahead=st.integers(0, 2))
@settings(deadline=None, max_examples=25)
def test_a_replay_plans_what_was_planned(
    policy: StepPolicy, history: tuple[Limits, list[tuple[StepView, float]]], ahead: int
) -> None:
    limits, steps = history

    lines, reports = write(policy, limits, steps, ahead=ahead)

    replayed = list(replay(lines))
    assert [report for report, _ in replayed] == reports
    assert [plan for _, plan in replayed] == [report.plan for report in reports]


def steady() -> list[tuple[StepView, float]]:
    """Ten steps of two that decode, while a third waits, on a machine that gets slower."""
    steps = []
    for step in range(10):
        running = [decoding("a", num_output_tokens=5 + step), decoding("b", slo=Slo(1.0, 0.05))]
        view = StepView(step, running, [waiting("c", 700, slo=Slo(200.0, 0.1))], 100)
        steps.append((view, 0.02 + 0.002 * step))
    return steps


def test_what_was_executed_teaches_not_what_was_planned() -> None:
    task = StageTask("a", Stage.PREFILL, 400, 400, True)
    lines, reports = write(StepPolicy(), LIMITS, steady(), executed=(task,))
    as_planned, _ = write(StepPolicy(), LIMITS, steady())

    assert [plan for _, plan in replay(lines)] == [report.plan for report in reports]
    assert reports[-1].plan != list(replay(as_planned))[-1][1]


def tampered(lines: list[str], step: int, change: dict[str, Any]) -> list[str]:
    documents = [json.loads(line) for line in lines]
    next(document for document in documents if document.get("step") == step).update(change)
    return [json.dumps(document) for document in documents]


@pytest.mark.parametrize(
    ("change", "first_wrong"),
    [
        ({"now": NOW + 500}, 4),
        ({"num_free_kv_blocks": 1}, 4),
        ({"waiting": []}, 4),
        ({"tasks": []}, 4),
        ({"predicted_s": 0.25}, 4),
        ({"measured_s": 0.001}, 5),  # teaches the next step another time
    ],
)
def test_a_changed_record_is_noticed(change: dict[str, Any], first_wrong: int) -> None:
    lines, _ = write(StepPolicy(), LIMITS, steady())

    wrong = [
        report.step for report, plan in replay(tampered(lines, 4, change)) if report.plan != plan
    ]

    assert wrong[0] == first_wrong


def test_a_record_is_strict_json_whose_requests_are_written_once() -> None:
    lines, _ = write(StepPolicy(), LIMITS, steady())

    def refuse(name: str) -> None:
        raise AssertionError(name)

    documents = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [document["request"][0] for document in documents if "request" in document] == [
        "a",
        "b",
        "c",
    ]


def test_a_last_line_that_was_cut_off_is_left_out() -> None:
    lines, reports = write(StepPolicy(), LIMITS, steady())

    assert len(list(replay([*lines[:-1], lines[-1][:50]]))) == len(reports) - 1
    with pytest.raises(ValueError, match="line 3 of the record is no JSON"):
        list(replay([*lines[:2], lines[2][:5], *lines[3:]]))


@pytest.mark.parametrize("lines", [[], ["{}"], ["[1]"], ['{"format": "another"}', "{}"]])
def test_what_is_no_record_is_refused(lines: list[str]) -> None:
    with pytest.raises(ValueError, match="no record of decisions"):
        list(replay(lines))


def test_arrivals_are_the_requests_in_their_order() -> None:
    file, model = io.StringIO(), cost_model()
    recorder = Recorder(file, StepPolicy(), LIMITS, model)
    states = [
        RequestState(Request("late", 30, 9, slo_class="chat"), 12.5),
        RequestState(Request("early", 20, 9), 10.0, num_output_tokens=2),
        RequestState(Request("unseen", 10, 9, slo_class="batch"), 11.0),
    ]
    view = StepView(1, states[1:2], [states[0], states[2]], 10)
    plan = StepPolicy().make(LIMITS, model).plan(view, 20.0)
    recorder.write_step(view, StepReport(1, 20.0, plan, 0.1, 0.0), plan.tasks, 0)
    recorder.write_finish("late", 7)
    recorder.write_finish("never written", 3)

    assert list(arrivals(file.getvalue().splitlines())) == [
        {"arrival_s": 0.0, "input_length": 20, "output_length": 2, "class": ""},
        {"arrival_s": 1.0, "input_length": 10, "output_length": 1, "class": "batch"},
        {"arrival_s": 2.5, "input_length": 30, "output_length": 7, "class": "chat"},
    ]


def test_a_request_id_that_comes_again_is_another_request() -> None:
    first, second = waiting("a", 100), waiting("a", 50)
    steps = [(StepView(step, [], [state], 100), 0.1) for step, state in enumerate([first, second])]

    lines, reports = write(StepPolicy(), LIMITS, steps)

    assert [report for report, _ in replay(lines)] == reports
    assert [row["input_length"] for row in arrivals(lines)] == [100, 50]


def test_infinite_times_come_back() -> None:
    lines, _ = write(StepPolicy(), LIMITS, [(StepView(1, [], [waiting("a")], 100), 0.1)])

    [(report, plan)] = replay(lines)

    assert report.plan.limit_s == plan.limit_s == math.inf
