"""The latest steps of a worker, kept so that one can ask what was computed, how long, and why."""

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from scheduler.task import Reason, Stage, StageTask, StepReport
from workers.timeline import Span, wall_clock_ahead_s

MAX_STEPS = 20_000
MAX_ENTRIES = 400_000
"""Tasks and deferrals of all steps that are kept, some 100 bytes each."""


@dataclass(frozen=True, slots=True)
class TakenStep:
    """A step as it was planned, computed and measured."""

    report: StepReport
    tasks: tuple[StageTask, ...]
    """What was computed: the plan, but for what vLLM knew better."""
    num_new_tokens: Mapping[str, int]
    """Output tokens that it gave, by request id."""
    preempted: frozenset[str] = frozenset()
    """Requests whose KV cache was taken before it."""
    queued_s: tuple[tuple[str, float], ...] = ()
    """Of each request that got its first tokens here, its service class and how long it waited."""
    num_flops: float = 0.0
    """Floating point operations that the model's shape asks for; 0 if it is not known."""
    num_bytes: float = 0.0
    """Bytes of weights and KV cache that the model's shape has it move; 0 if not known."""

    @property
    def num_entries(self) -> int:
        """The room it takes in a history."""
        return 1 + len(self.tasks) + len(self.report.plan.deferred)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """One step, its requests counted."""

    step: int
    began_s: float
    """By the wall clock."""
    measured_s: float
    predicted_s: float
    limit_s: float
    """How long it might last by the targets of those in it; infinite if they set none."""
    decided_s: float
    num_requests: dict[Stage, int]
    num_tokens: dict[Stage, int]
    num_new_tokens: int
    deferred: dict[Reason, int]
    num_flops: float
    num_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStep:
    """What one step was to one request."""

    step: int
    began_s: float
    """By the wall clock."""
    measured_s: float
    predicted_s: float
    limit_s: float
    num_others: int
    """Other requests that had a part in it."""
    task: StageTask | None
    """Its part; None if it had none."""
    reason: Reason | None
    """Why it had none."""
    num_new_tokens: int
    preempted: bool
    """Its KV cache was taken for others before this step."""


class StepHistory:
    """Written by the engine's thread, read by others."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._steps: deque[TakenStep] = deque()
        self._max_entries = max_entries
        self._num_entries = 0

    def add(self, step: TakenStep) -> None:
        """Keep a step, and forget the oldest where there is no room."""
        self._steps.append(step)
        self._num_entries += step.num_entries
        while len(self._steps) > MAX_STEPS or self._num_entries > self._max_entries:
            self._num_entries -= self._steps.popleft().num_entries

    def summaries(self, since_s: float, most: int) -> list[StepSummary]:
        """The steps that ended after a time, by the wall clock; only the latest `most` of them."""
        newest = itertools.islice(self._newest(since_s), most)
        return [_summary(step, began_s) for step, began_s in newest][::-1]

    def spans(self, since_s: float) -> list[Span]:
        """The same for a timeline: all of them, with the tokens of each request."""
        return [
            Span(
                "step",
                began_s,
                began_s + step.report.measured_s,
                {task.request_id: task.num_tokens for task in step.tasks},
            )
            for step, began_s in self._newest(since_s)
        ][::-1]

    def of_request(self, request_id: str, since_s: float = 0.0) -> list[RequestStep]:
        """All steps after a time that a request had a part in, or waited through."""
        seen = (_seen_by(request_id, step, began_s) for step, began_s in self._newest(since_s))
        return [step for step in seen if step is not None][::-1]

    def _newest(self, since_s: float) -> Iterator[tuple[TakenStep, float]]:
        """Steps that ended after a time, newest first, and when they began, by the wall clock."""
        ahead_s = wall_clock_ahead_s()
        for step in reversed(self._steps.copy()):
            began_s = step.report.began_s + ahead_s
            if began_s + step.report.measured_s <= since_s:
                return
            yield step, began_s


def _seen_by(request_id: str, step: TakenStep, began_s: float) -> RequestStep | None:
    """What a step was to a request; None if nothing."""
    report = step.report
    task = next((task for task in step.tasks if task.request_id == request_id), None)
    reasons = (reason for name, reason in report.plan.deferred if name == request_id)
    reason = None if task else next(reasons, None)
    preempted = request_id in step.preempted
    if task is None and reason is None and not preempted:
        return None
    return RequestStep(
        step=report.step,
        began_s=began_s,
        measured_s=report.measured_s,
        predicted_s=report.plan.predicted_s,
        limit_s=report.plan.limit_s,
        num_others=len(step.tasks) - (task is not None),
        task=task,
        reason=None if task else reason or Reason.KV,
        num_new_tokens=step.num_new_tokens.get(request_id, 0),
        preempted=preempted,
    )


def _summary(step: TakenStep, began_s: float) -> StepSummary:
    num_tokens: Counter[Stage] = Counter()
    for task in step.tasks:
        num_tokens[task.stage] += task.num_tokens
    report = step.report
    return StepSummary(
        step=report.step,
        began_s=began_s,
        measured_s=report.measured_s,
        predicted_s=report.plan.predicted_s,
        limit_s=report.plan.limit_s,
        decided_s=report.decided_s,
        num_requests=dict(Counter(task.stage for task in step.tasks)),
        num_tokens=dict(num_tokens),
        num_new_tokens=sum(step.num_new_tokens.values()),
        deferred=dict(Counter(deferral.reason for deferral in report.plan.deferred)),
        num_flops=step.num_flops,
        num_bytes=step.num_bytes,
    )
