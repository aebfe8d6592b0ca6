"""The latest steps of a worker, kept so that one can ask what was computed, how long, and why."""

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.task import Reason, Stage, StageTask, StepReport
from workers.timeline import Span

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
        return [_summary(step, ahead_s) for step, ahead_s in self._since(since_s)[-most:]]

    def spans(self, since_s: float) -> list[Span]:
        """The same for a timeline: all of them, with the tokens of each request."""
        return [
            Span(
                "step",
                step.report.began_s + ahead_s,
                step.report.began_s + step.report.measured_s + ahead_s,
                {task.request_id: task.num_tokens for task in step.tasks},
            )
            for step, ahead_s in self._since(since_s)
        ]

    def of_request(self, request_id: str, since_s: float = 0.0) -> list[RequestStep]:
        """All steps after a time that a request had a part in, or waited through."""
        found = []
        for step, ahead_s in self._since(since_s):
            tasks = {task.request_id: task for task in step.tasks}
            task = tasks.get(request_id)
            reasons = dict(step.report.plan.deferred)
            preempted = request_id in step.preempted
            if task is None and request_id not in reasons and not preempted:
                continue
            found.append(
                RequestStep(
                    step=step.report.step,
                    began_s=step.report.began_s + ahead_s,
                    measured_s=step.report.measured_s,
                    predicted_s=step.report.plan.predicted_s,
                    limit_s=step.report.plan.limit_s,
                    num_others=len(tasks) - (task is not None),
                    task=task,
                    reason=None if task else reasons.get(request_id, Reason.KV),
                    num_new_tokens=step.num_new_tokens.get(request_id, 0),
                    preempted=preempted,
                )
            )
        return found

    def _since(self, since_s: float) -> list[tuple[TakenStep, float]]:
        """Steps that ended after a time by the wall clock, and how far that is ahead of theirs."""
        ahead_s = time.time() - time.monotonic()
        found = []
        for step in reversed(self._steps.copy()):
            if step.report.began_s + step.report.measured_s + ahead_s <= since_s:
                break
            found.append((step, ahead_s))
        return found[::-1]


def _summary(step: TakenStep, ahead_s: float) -> StepSummary:
    num_tokens: Counter[Stage] = Counter()
    for task in step.tasks:
        num_tokens[task.stage] += task.num_tokens
    report = step.report
    return StepSummary(
        step=report.step,
        began_s=report.began_s + ahead_s,
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
