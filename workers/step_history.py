"""The latest steps of a worker, kept to answer what was computed when, how long it took and why."""

import itertools
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from scheduler.task import Reason, Stage, StageTask, StepReport
from workers.timeline import Span, wall_clock_ahead_s

MAX_BYTES = 64 << 20
"""Memory of the steps that are kept: a quarter of an hour of eight requests at 50 ms a step."""
STEP_BYTES, ENTRY_BYTES = 1400, 400
"""Memory of a step, and of each of its requests beside the characters of its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """One step, its requests counted."""

    step: int
    began_s: float
    """Wall-clock time of its beginning."""
    measured_s: float
    predicted_s: float
    limit_s: float
    """Longest duration that the targets of its requests allow; infinite if they set none."""
    decided_s: float
    num_requests: dict[Stage, int]
    num_tokens: dict[Stage, int]
    num_new_tokens: int
    deferred: dict[Reason, int]
    num_flops: float
    num_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStep:
    """What one step did for one request."""

    step: int
    began_s: float
    """Wall-clock time of its beginning."""
    measured_s: float
    predicted_s: float
    limit_s: float
    num_others: int
    """Other requests with a task in it."""
    task: StageTask | None
    """Task of the request; None if it had none."""
    reason: Reason | None
    """Why it had none."""
    num_new_tokens: int
    preempted: bool
    """Whether its KV cache was freed for others before this step."""


class StepHistory:
    """The reports of a worker's latest steps; the engine's thread adds to it, others read it."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._steps: deque[StepReport] = deque()
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def add(self, step: StepReport) -> None:
        """Keep a step, and drop the oldest ones beyond the limit."""
        self._steps.append(step)
        self._num_bytes += _num_bytes(step)
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= _num_bytes(self._steps.popleft())

    def summaries(self, since_s: float, most: int) -> list[StepSummary]:
        """The latest `most` steps that ended after `since_s`, a wall-clock time."""
        newest = itertools.islice(self._newest(since_s), most)
        return [_summary(step, began_s) for step, began_s in newest][::-1]

    def spans(self, since_s: float) -> list[Span]:
        """All steps that ended after `since_s` for a timeline, with the tokens of each request."""
        return [
            Span(
                "step",
                began_s,
                began_s + step.measured_s,
                {task.request_id: task.num_tokens for task in step.tasks},
            )
            for step, began_s in self._newest(since_s)
        ][::-1]

    def of_request(self, request_id: str, since_s: float = 0.0) -> list[RequestStep]:
        """All steps after a time that had a task of a request, or that it waited through."""
        seen = (_seen_by(request_id, step, began_s) for step, began_s in self._newest(since_s))
        return [step for step in seen if step is not None][::-1]

    def _newest(self, since_s: float) -> Iterator[tuple[StepReport, float]]:
        """Steps that ended after a time, newest first, with the wall-clock time they began at."""
        ahead_s = wall_clock_ahead_s()
        for step in reversed(self._steps.copy()):
            began_s = step.began_s + ahead_s
            if began_s + step.measured_s <= since_s:
                return
            yield step, began_s


def _num_bytes(step: StepReport) -> int:
    """The memory that a step takes."""
    ids = [*step.preempted, *(task.request_id for task in step.tasks)]
    ids += [deferral.request_id for deferral in step.plan.deferred]
    return STEP_BYTES + ENTRY_BYTES * len(ids) + sum(map(len, ids))


def _seen_by(request_id: str, step: StepReport, began_s: float) -> RequestStep | None:
    """What a step did for a request; None if it neither ran nor waited."""
    task = next((task for task in step.tasks if task.request_id == request_id), None)
    reasons = (reason for name, reason in step.plan.deferred if name == request_id)
    reason = None if task else next(reasons, None)
    preempted = request_id in step.preempted
    if task is None and reason is None and not preempted:
        return None
    return RequestStep(
        step=step.step,
        began_s=began_s,
        measured_s=step.measured_s,
        predicted_s=step.plan.predicted_s,
        limit_s=step.plan.limit_s,
        num_others=len(step.tasks) - (task is not None),
        task=task,
        reason=None if task else reason or Reason.KV,
        num_new_tokens=step.num_new_tokens.get(request_id, 0),
        preempted=preempted,
    )


def _summary(step: StepReport, began_s: float) -> StepSummary:
    num_tokens: Counter[Stage] = Counter()
    for task in step.tasks:
        num_tokens[task.stage] += task.num_tokens
    return StepSummary(
        step=step.step,
        began_s=began_s,
        measured_s=step.measured_s,
        predicted_s=step.plan.predicted_s,
        limit_s=step.plan.limit_s,
        decided_s=step.decided_s,
        num_requests=dict(Counter(task.stage for task in step.tasks)),
        num_tokens=dict(num_tokens),
        num_new_tokens=sum(step.num_new_tokens.values()),
        deferred=dict(Counter(deferral.reason for deferral in step.plan.deferred)),
        num_flops=step.num_flops,
        num_bytes=step.num_bytes,
    )
