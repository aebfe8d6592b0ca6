"""What happened to a request, in words that say why it took as long as it did."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence

from rich.table import Table

from cluster.observe.explanation import AttemptTrace, Explanation
from cluster.observe.phases import Phase, phases
from cluster.observe.request_history import Attempt, Refusal, RequestRecord
from scheduler.placement import Placement, WorkerLoad
from scheduler.prefill_queue import Forecast
from scheduler.task import Reason, Stage
from workers.step_history import RequestStep


def describe_refusal(refusal: Refusal) -> list[str]:
    """A call that was refused, in sentences."""
    whose = "the client's error" if refusal.outcome == "invalid" else "not the client's error"
    return [
        f"{refusal.call_id} was refused at {_clock(refusal.refused_s)} with status "
        f"{refusal.status} ({whose}); no worker was asked.",
        f"The answer was: {refusal.message.strip()}",
    ]


def describe(explanation: Explanation) -> list[str]:
    """What happened to a request, in sentences: a summary, then each attempt."""
    record = explanation.record
    lines = [_headline(record), _targets(record)]
    for number, (attempt, trace) in enumerate(
        zip(record.attempts, explanation.attempt_traces, strict=True), start=1
    ):
        if len(record.attempts) > 1:
            lines.append(f"Attempt {number} of {len(record.attempts)}:")
        lines += _attempt(record, attempt, trace, is_first=number == 1)
    if record.error:
        verb = "was ended" if record.outcome == "unread" else "failed"
        lines.append(f"It {verb}: {record.error}")
    return lines


def steps_table(steps: Sequence[RequestStep], arrived_s: float, each: bool = False) -> Table:
    """A table with a row for each step, or (unless `each`) for each run of alike steps."""
    table = Table("after", "steps", "what", "tokens", "new", "others", "predicted", "measured")
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
    state = f"ended by {record.outcome}" if record.outcome else "is still in flight"
    return (
        f"{request.request_id}: {request.num_prompt_tokens} prompt tokens, at most "
        f"{request.max_tokens} more, priority {request.priority}, tenant "
        f"{request.tenant or 'none'}; arrived at {_clock(record.arrived_s)} and {state} after "
        f"{record.num_output_tokens} tokens"
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
    record: RequestRecord, attempt: Attempt, trace: AttemptTrace, is_first: bool
) -> list[str]:
    lines = [*_queued(attempt), _placed(trace.placement), *_predicted(attempt)]
    for worker_id, steps in trace.steps.items():
        began_s = record.arrived_s if is_first else attempt.began_s
        for phase in phases(steps, began_s):
            lines.append(f"  on {worker_id}, {_phase(phase)}")
        lines += _preemptions(steps, record.arrived_s)
    if not trace.steps:
        lines.append(
            "  no worker remembers a step of it: its worker has died, the step policy is vllm, "
            "or it is too long ago"
        )
    if attempt.lost:
        lines.append(f"  it lost this worker: {attempt.lost}")
    return lines


def _placed(placement: Placement | None) -> str:
    if placement is None:
        return "  placed on a worker, but the GlobalScheduler does not remember why"
    text = f"  placed on {_load(placement.chosen)}: {placement.reason.text}"
    if placement.runner_up:
        text += f"; runner-up {_load(placement.runner_up)}"
    if placement.num_closed:
        text += f"; {_count(placement.num_closed, 'worker')} did not take it"
    return text


def _load(load: WorkerLoad) -> str:
    return (
        f"{load.worker_id} ({load.num_outstanding_tokens} outstanding tokens in "
        f"{_count(load.num_requests, 'request')}, {load.tokens_per_decode:.2f} tokens per decode, "
        f"steps {load.slowness:.1f} times as long as profiled"
        + (f"; {_forecast(load.forecast)})" if load.forecast else ")")
    )


def _forecast(forecast: Forecast) -> str:
    text = (
        f"predicted: first token after {_ms(forecast.ttft_s)}, "
        f"{_count(forecast.num_cached_tokens, 'token')} cached, the rest in "
        f"{_ms(forecast.prefill_s)} of prefill"
    )
    if forecast.num_late:
        text += f", {_count(forecast.num_late, 'request')} late because of it, itself included"
    if not forecast.fits:
        text += ", no room in the KV cache"
    return text


def _queued(attempt: Attempt) -> Iterator[str]:
    if attempt.queued_s:
        yield (
            f"  waited {_ms(attempt.queued_s)} for its turn: the workers were busy, and its tenant "
            "had its share of them, or other requests of it went first"
        )


def _predicted(attempt: Attempt) -> Iterator[str]:
    """What was predicted for an attempt, beside what came of it."""
    if (forecast := attempt.forecast) is None or attempt.ttft_s == math.inf:
        return
    found = attempt.num_cached_tokens
    yield (
        f"  its first token came {_ms(attempt.ttft_s)} after that (predicted "
        f"{_ms(forecast.ttft_s)}), with {'an unknown number' if found is None else found} of its "
        f"tokens found cached (predicted {forecast.num_cached_tokens})"
    )


def _phase(phase: Phase) -> str:
    text = f"{phase.name} {_ms(phase.seconds)}"
    if num_steps := sum(step.task is not None for step in phase.steps):
        text += f": {_count(phase.num_tokens, 'token')} in {_count(num_steps, 'step')}"
    if phase.num_drafts:
        text += f", {phase.num_accepted} of {phase.num_drafts} drafts accepted"
    if waited := phase.waited_s:
        reasons = ", ".join(f"{_ms(s)} because {reason.text}" for reason, s in waited.items())
        text += f"; waited {reasons}"
    return text


def _preemptions(steps: Sequence[RequestStep], arrived_s: float) -> Iterator[str]:
    for index, step in enumerate(steps):
        if step.preempted:
            again = next((s for s in steps[index:] if s.task), None)
            back = f"after {again.began_s - step.began_s:.3f} s" if again else "not yet"
            yield (
                f"  preempted {step.began_s - arrived_s:.3f} s after its arrival (step "
                f"{step.step}): {Reason.PREEMPTED.text}; it was computed again {back}"
            )


def _runs(steps: Sequence[RequestStep]) -> Iterator[list[RequestStep]]:
    for _, run in itertools.groupby(steps, _kind):
        yield list(run)


def _kind(step: RequestStep) -> str:
    """The kind of a step: alike steps have the same. A decode with drafts is like one without."""
    if step.preempted:
        return "preempted"
    if step.task is None:
        return f"deferred: {step.reason}"
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
