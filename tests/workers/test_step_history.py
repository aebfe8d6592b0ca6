import time
from math import inf

import pytest

from scheduler.task import BatchPlan, Deferral, Reason, Stage, StageTask, StepReport
from workers.step_history import ENTRY_BYTES, STEP_BYTES, StepHistory

NOW = 1_000.0
WALL_AHEAD_S = 500.0


@pytest.fixture(autouse=True)
def clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: NOW)
    monkeypatch.setattr(time, "time", lambda: NOW + WALL_AHEAD_S)


def taken(
    number: int,
    tasks: dict[str, tuple[Stage, int]],
    *,
    deferred: dict[str, Reason] | None = None,
    new: dict[str, int] | None = None,
    preempted: tuple[str, ...] = (),
) -> StepReport:
    """The step `number`, which begins as many seconds after 0 and takes half a second."""
    spans = tuple(
        StageTask(name, stage, num_tokens, 100, True) for name, (stage, num_tokens) in tasks.items()
    )
    deferrals = tuple(Deferral(name, reason) for name, reason in (deferred or {}).items())
    plan = BatchPlan(spans, deferrals, preempted, predicted_s=0.4, limit_s=inf)
    return StepReport(
        step=number,
        began_s=float(number),
        plan=plan,
        tasks=spans,
        measured_s=0.5,
        decided_s=0.001,
        num_new_tokens=new or {},
        preempted=frozenset(preempted),
        num_flops=6.0,
        num_bytes=8.0,
    )


def history(*steps: StepReport, max_bytes: int = 1 << 20) -> StepHistory:
    history = StepHistory(max_bytes)
    for step in steps:
        history.add(step)
    return history


DECODE, PREFILL, VERIFY = (Stage.DECODE, 1), (Stage.PREFILL, 30), (Stage.VERIFY, 4)


def test_a_summary_counts_requests_tokens_and_reasons_by_stage() -> None:
    [summary] = history(
        taken(
            1,
            {"a": DECODE, "b": DECODE, "c": PREFILL, "d": VERIFY},
            deferred={"x": Reason.KV, "y": Reason.KV, "z": Reason.TIME},
            new={"a": 1, "b": 1, "d": 3},
        )
    ).summaries(0.0, 10)

    assert summary.num_requests == {Stage.DECODE: 2, Stage.PREFILL: 1, Stage.VERIFY: 1}
    assert summary.num_tokens == {Stage.DECODE: 2, Stage.PREFILL: 30, Stage.VERIFY: 4}
    assert summary.deferred == {Reason.KV: 2, Reason.TIME: 1}
    assert summary.num_new_tokens == 5
    assert (summary.began_s, summary.measured_s, summary.predicted_s) == (501.0, 0.5, 0.4)
    assert (summary.num_flops, summary.num_bytes) == (6.0, 8.0)


def test_only_the_latest_steps_since_a_time_are_returned() -> None:
    steps = history(*(taken(number, {"a": DECODE}) for number in range(10)))

    assert [s.step for s in steps.summaries(505.0, 100)] == [5, 6, 7, 8, 9]
    assert [s.step for s in steps.summaries(505.6, 100)] == [6, 7, 8, 9]
    assert [s.step for s in steps.summaries(0.0, 3)] == [7, 8, 9]
    assert steps.summaries(600.0, 3) == []


def test_spans_hold_the_tokens_of_each_request_by_the_wall_clock() -> None:
    [span] = history(taken(3, {"a": DECODE, "c": PREFILL})).spans(0.0)

    assert span == ("step", 503.0, 503.5, {"a": 1, "c": 30})


def test_a_request_sees_its_parts_its_waits_and_its_preemptions_and_no_other_step() -> None:
    steps = history(
        taken(1, {"other": DECODE}),
        taken(2, {"other": DECODE}, deferred={"r": Reason.SEATS}),
        taken(3, {"r": PREFILL, "other": DECODE}, new={"r": 1}),
        taken(4, {"other": DECODE}, deferred={"r": Reason.PREEMPTED}, preempted=("r",)),
        taken(5, {"r": PREFILL}, preempted=("other",)),
        taken(6, {"r": VERIFY, "other": DECODE}, new={"r": 3, "other": 1}),
        taken(7, {"other": DECODE}),
    ).of_request("r")

    assert [(s.step, s.reason, s.preempted, s.num_new_tokens, s.num_others) for s in steps] == [
        (2, Reason.SEATS, False, 0, 1),
        (3, None, False, 1, 1),
        (4, Reason.PREEMPTED, True, 0, 1),
        (5, None, False, 0, 0),
        (6, None, False, 3, 1),
    ]
    assert [s.task.stage if s.task else None for s in steps] == [
        None, Stage.PREFILL, None, Stage.PREFILL, Stage.VERIFY,
    ]  # fmt: skip


def test_what_vllm_preempts_by_itself_waits_for_the_kv_cache() -> None:
    """It is in the plan's tasks then, and in no deferral."""
    [step] = history(taken(1, {"a": DECODE}, preempted=("r",))).of_request("r")

    assert (step.task, step.reason, step.preempted) == (None, Reason.KV, True)


def test_the_oldest_steps_are_forgotten_when_there_is_no_room() -> None:
    waits = {str(number): Reason.KV for number in range(97)}
    steps = history(
        *(taken(number, {"a": DECODE, "b": DECODE}, deferred=waits) for number in range(10)),
        max_bytes=3 * (STEP_BYTES + 99 * ENTRY_BYTES + 97 * 2 + 1),
    )

    assert [s.step for s in steps.summaries(0.0, 100)] == [7, 8, 9]
