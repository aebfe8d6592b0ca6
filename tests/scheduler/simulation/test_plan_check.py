from dataclasses import replace

import pytest

from scheduler.policy import StepPolicy
from scheduler.simulation.plan_check import BrokenPlan, check
from scheduler.task import BatchPlan, Deferral, Limits, Reason, Stage, StageTask
from tests.scheduler.scenes import LIMITS, cost_model, decoding, view, waiting

SCENE = view([decoding("d", num_drafts=2)], [waiting("w", 50)])
DECODE = StageTask("d", Stage.DECODE, 1, 105, True)
VERIFY = StageTask("d", Stage.VERIFY, 3, 107, True)
PREFILL = StageTask("w", Stage.PREFILL, 50, 50, True)
W_WAITS = Deferral("w", Reason.TIME)


def plan(
    *tasks: StageTask, deferred: tuple[Deferral, ...] = (), preempted: tuple[str, ...] = ()
) -> BatchPlan:
    return BatchPlan(tasks, deferred, preempted, predicted_s=0.0, limit_s=1.0)


@pytest.mark.parametrize("policy", ["hybrid", "static", "decode_first", "prefill_first"])
def test_plans_of_every_policy_pass(policy: str) -> None:
    scheduler = StepPolicy(name=policy).make(LIMITS, cost_model())  # type: ignore[arg-type]

    check(scheduler.plan(SCENE, 5.0), SCENE, LIMITS)


@pytest.mark.parametrize(
    "good",
    [
        plan(DECODE, PREFILL),
        plan(VERIFY, deferred=(W_WAITS,)),
        plan(PREFILL, deferred=(Deferral("d", Reason.PREEMPTED),), preempted=("d",)),
    ],
)
def test_a_plan_within_the_limits_passes(good: BatchPlan) -> None:
    check(good, SCENE, LIMITS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (plan(DECODE), r"each request once.*\['w'\] are not or unknown"),
        (plan(DECODE, PREFILL, deferred=(W_WAITS,)), "each request once"),
        (plan(DECODE, DECODE, PREFILL), "each request once"),
        (plan(DECODE, PREFILL, StageTask("x", Stage.DECODE, 1, 9, True)), "unknown requests"),
        (plan(DECODE, StageTask("w", Stage.PREFILL, 51, 51, True)), "but 50 tokens are left"),
        (plan(StageTask("d", Stage.VERIFY, 4, 108, True), PREFILL), "but 3 tokens are left"),
        (plan(DECODE, StageTask("w", Stage.PREFILL, 0, 0, False)), "but 50 tokens are left"),
        (plan(DECODE, StageTask("w", Stage.PREFILL, 50, 60, True)), "does not fit"),
        (plan(DECODE, StageTask("w", Stage.PREFILL, 50, 50, False)), "does not fit"),
        (plan(DECODE, PREFILL, preempted=("w",)), "w is preempted but does not run"),
    ],
)
def test_a_broken_plan_is_named(bad: BatchPlan, message: str) -> None:
    with pytest.raises(BrokenPlan, match=message):
        check(bad, SCENE, LIMITS)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (replace(LIMITS, max_num_batched_tokens=50), "51 tokens in a step; at most 50 fit"),
        (replace(LIMITS, max_num_seqs=1), "2 requests run; at most 1 can"),
    ],
)
def test_limits_hold_for_all_requests_together(limits: Limits, message: str) -> None:
    with pytest.raises(BrokenPlan, match=message):
        check(plan(DECODE, PREFILL), SCENE, limits)
