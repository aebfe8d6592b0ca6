"""What happened to a request, told so that a person can tell why it took as long as it did."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from cluster.observe.phases import Phase, phases
from cluster.observe.request_history import Attempt, Refusal, RequestRecord
from scheduler.placement import Placement, PlacementReason, WorkerLoad
from scheduler.task import Reason, Stage
from workers.step_history import RequestStep

WAITS = {
    Reason.TIME: "the step was as long as others' targets allow",
    Reason.TOKENS: "the step had all the tokens it may have",
    Reason.SEATS: "as many requests ran as may (max_num_seqs)",
    Reason.KV: "the KV cache had no room",
    Reason.TPOT: "with it, those that run would miss their time per token",
    Reason.OVERDUE: "its target was missed already; others could still meet theirs",
    Reason.BEHIND: "one before it in the queue had to go first",
    Reason.PREEMPTED: "its KV cache was taken for others",
}

CHOICES = {
    PlacementReason.ONLY: "no other worker took new requests",
    PlacementReason.OTHERS_SILENT: "the others had not reported for long",
    PlacementReason.MIN_TOKENS: "it had the least to do",
    PlacementReason.FEWEST_REQUESTS: "as little to do as the next one, in fewer requests",
    PlacementReason.TIE: "as good as the next one",
    PlacementReason.ALL_SILENT: "none had reported for long, and it had the least to do",
}


@dataclass(frozen=True, slots=True)
class AttemptTrace:
    """What is known of one attempt at a request."""

    placement: Placement | None
    """None if the GlobalScheduler has forgotten it, or has restarted."""
    steps: dict[str, list[RequestStep]]
    """By worker; of the one it ran on, unless that has died."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A request and the trail of each of its attempts."""

    record: RequestRecord
    attempt_traces: list[AttemptTrace]


def tell_refusal(refusal: Refusal) -> list[str]:
    """What became of a call that came to nothing, in sentences."""
    whose = "the client's error" if refusal.outcome == "invalid" else "no fault of the client"
    return [
        f"{refusal.call_id} was refused at {_clock(refusal.refused_s)} with status "
        f"{refusal.status} ({whose}); no worker was asked.",
        f"The answer was: {refusal.message.strip()}",
    ]


def tell(explanation: Explanation) -> list[str]:
    """What became of a request, in sentences: its ends first, then attempt by attempt."""
    record = explanation.record
    lines = [_headline(record), _targets(record)]
    for number, (attempt, trail) in enumerate(
        zip(record.attempts, explanation.attempt_traces, strict=True), start=1
    ):
        if len(record.attempts) > 1:
            lines.append(f"Attempt {number} of {len(record.attempts)}:")
        lines += _attempt(record, attempt, trail, is_first=number == 1)
    if record.error:
        lines.append(f"It failed: {record.error}")
    return lines


def steps_table(steps: Sequence[RequestStep], arrived_s: float, each: bool = False) -> Table:
    """A row for each step, or (unless `each`) for each run of alike ones."""
    table = Table("after", "steps", "what", "tokens", "new", "beside", "predicted", "measured")
    for run in _runs(steps) if not each else ([step] for step in steps):
        first, last = run[0], run[-1]
        numbers = f"{first.step}" if len(run) == 1 else f"{first.step}-{last.step}"
        others = sorted({run_step.num_others for run_step in (first, last)})
        table.add_row(
            f"{first.began_s - arrived_s:.3f} s",
            numbers,
            _what(run),
            str(sum(step.task.num_tokens for step in run if step.task)),
            str(sum(step.num_new_tokens for step in run)),
            "-".join(map(str, others)),
            _ms(sum(step.predicted_s for step in run)),
            _ms(sum(step.measured_s for step in run)),
        )
    return table


def _headline(record: RequestRecord) -> str:
    request = record.request
    state = f"ended by {record.outcome}" if record.outcome else "is still going on"
    return (
        f"{request.request_id}: {request.num_prompt_tokens} prompt tokens, at most "
        f"{request.max_tokens} more, priority {request.priority}; arrived at "
        f"{_clock(record.arrived_s)} and {state} after {record.num_output_tokens} tokens"
        + (f" and {record.e2e_s:.3f} s." if record.num_output_tokens else ".")
    )


def _targets(record: RequestRecord) -> str:
    slo, met = record.request.slo, record.attainment()
    took = {"ttft": record.ttft_s, "tpot": record.tpot_s}
    parts = []
    for name, target_s in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s)):
        text = f"{name.upper()} {_ms(took[name])}"
        if target_s < math.inf:
            verdict = {True: "met", False: "MISSED"}.get(met.get(name, took[name] <= target_s))
            text += f" of {_ms(target_s)} ({verdict})"
        parts.append(text)
    named = f"class {record.request.slo_class}" if record.request.slo_class else "no class"
    return f"Targets, {named}: {', '.join(parts)}."


def _attempt(
    record: RequestRecord, attempt: Attempt, trail: AttemptTrace, is_first: bool
) -> list[str]:
    lines = [_placed(trail.placement)]
    for worker_id, steps in trail.steps.items():
        began_s = record.arrived_s if is_first else attempt.began_s
        for phase in phases(steps, began_s):
            lines.append(f"  on {worker_id}, {_phase(phase)}")
        lines += _preemptions(steps, record.arrived_s)
    if not trail.steps:
        lines.append(
            "  no worker remembers a step of it: its worker is gone, the step policy is vllm's, "
            "or it is too long ago"
        )
    if attempt.lost:
        lines.append(f"  it lost that worker: {attempt.lost}")
    return lines


def _placed(placement: Placement | None) -> str:
    if placement is None:
        return "  placed on a worker, but the GlobalScheduler does not remember why"
    text = f"  placed on {_load(placement.chosen)}: {CHOICES[placement.reason]}"
    if placement.runner_up:
        text += f"; runner-up {_load(placement.runner_up)}"
    if placement.num_draining:
        text += f"; {placement.num_draining} were draining"
    return text


def _load(load: WorkerLoad) -> str:
    return (
        f"{load.worker_id} ({load.num_outstanding_tokens} outstanding tokens in "
        f"{_count(load.num_requests, 'request')}, {load.tokens_per_span:.2f} tokens a decode)"
    )


def _phase(phase: Phase) -> str:
    text = f"{phase.name} {_ms(phase.seconds)}"
    if num_steps := sum(step.task is not None for step in phase.steps):
        text += f": {_count(phase.num_tokens, 'token')} in {_count(num_steps, 'step')}"
    if phase.num_drafts:
        text += f", {phase.num_accepted} of {phase.num_drafts} drafts accepted"
    if waited := phase.waited_s:
        reasons = ", ".join(f"{_ms(s)} because {WAITS[reason]}" for reason, s in waited.items())
        text += f"; waited {reasons}"
    return text


def _preemptions(steps: Sequence[RequestStep], arrived_s: float) -> Iterator[str]:
    for index, step in enumerate(steps):
        if step.preempted:
            again = next((s for s in steps[index:] if s.task), None)
            back = f"after {again.began_s - step.began_s:.3f} s" if again else "not yet"
            yield (
                f"  preempted {step.began_s - arrived_s:.3f} s after its arrival (step "
                f"{step.step}): its KV cache was taken for others; it was computed again {back}"
            )


def _runs(steps: Sequence[RequestStep]) -> Iterator[list[RequestStep]]:
    for _, run in itertools.groupby(steps, _kind):
        yield list(run)


def _kind(step: RequestStep) -> str:
    """What makes steps alike: a decode with drafts is one like that without."""
    if step.preempted:
        return "preempted"
    if step.task is None:
        return f"waits: {step.reason}"
    return "decode" if step.task.stage is Stage.VERIFY else str(step.task.stage)


def _what(run: Sequence[RequestStep]) -> str:
    num_verifies = sum(step.task is not None and step.task.stage is Stage.VERIFY for step in run)
    if num_verifies == len(run):
        return "verify"
    return f"{_kind(run[0])}, {num_verifies} verify" if num_verifies else _kind(run[0])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _ms(seconds: float) -> str:
    if seconds == math.inf:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{int(seconds % 1 * 1e3):03}"
