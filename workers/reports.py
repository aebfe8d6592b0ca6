"""What workers and draft workers report of themselves, and who sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.prefill_queue import QueueReport
from scheduler.prefix_index import PrefixDelta
from scheduler.stage_policy import ALONE, StageReport, WorkerPolicy
from scheduler.task import StepReport
from workers.drafts.draft_client import DraftCounts
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.start import PhaseTime
from workers.step_history import StepSummary


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak rates of one worker's device, with its number of threads."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class DraftStats:
    """Drafts and their acceptance."""

    counts_of: dict[str, DraftCounts]
    """Counts since the engine's start, by drafter."""
    acceptance_rate: float
    """Fraction of the drafts verified lately that were accepted."""
    tokens_per_decode: float
    """Output tokens per decode lately, drafts included."""
    draft_worker: str | None
    """Incarnation of the assigned draft worker."""
    silent_s: float
    """How long it has owed an answer and sent none."""

    @property
    def counts(self) -> DraftCounts:
        """Counts of all drafters together."""
        return sum(self.counts_of.values(), DraftCounts())


@dataclass(frozen=True, slots=True)
class TargetCounts:
    """Requests with targets that a worker has ended since its start."""

    num_judged: int = 0
    num_met: int = 0
    """Those that met all of their targets, from when they came to the worker."""

    def __add__(self, other: "TargetCounts") -> "TargetCounts":
        return TargetCounts(self.num_judged + other.num_judged, self.num_met + other.num_met)

    def __sub__(self, other: "TargetCounts") -> "TargetCounts":
        return TargetCounts(self.num_judged - other.num_judged, self.num_met - other.num_met)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's requests, as it reports them to the GlobalScheduler."""

    worker_id: str
    outstanding: dict[str, int]
    """Tokens that each live request may still need, by request id."""
    finished: Mapping[str, int | None]
    """Requests that ended since the last report, with the tokens that they gave on this worker;
    None for one that was aborted or failed, whose tokens say nothing of a length."""
    draining: bool
    drafts: DraftStats | None = None
    """None without speculation."""
    on_trial: bool = False
    """Whether an engine has died under one of its requests."""
    token_s: float | None = None
    """Seconds of a token in a full step, by its profile; None without one."""
    slowness: float = 1.0
    """How long its steps take lately compared with the profile."""
    death: str = ""
    """Why its engine is dead; empty while it lives."""
    prefix: PrefixDelta | None = None
    """What has changed in its prefix cache since the last report; None if it does not tell."""
    queue: QueueReport = field(default_factory=QueueReport)
    """What has still to be prefilled there."""
    stages: StageReport = field(default_factory=StageReport)
    """What its requests are to the stage policy."""
    targets: TargetCounts = TargetCounts()


@dataclass(frozen=True, slots=True)
class Stall:
    """A step that takes much longer than expected."""

    took_s: float
    expected_s: float
    suspects: frozenset[str]
    """Requests that it computes and that have got no token from this engine."""

    def __str__(self) -> str:
        return f"a step has been running for {self.took_s:.1f} s, expected {self.expected_s:.2f} s"


@dataclass(frozen=True, slots=True)
class ReportAnswer:
    """What the GlobalScheduler answers to a worker's report."""

    draft_worker: DraftWorkerAddress | None = None
    """The draft worker that drafts for it."""
    unfit: str = ""
    """Why it must be replaced; empty if it need not be."""
    others_serve: bool = False
    """Whether another worker takes requests."""
    resync_prefix: bool = False
    """Whether its next report is to tell all that its prefix cache has."""
    policy: WorkerPolicy | None = None
    """The bounds of its steps from now on; None if nobody sets them."""
    num_workers_wanted: int | None = None
    """How many workers there should be; None if others decide on that."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker at this moment."""

    worker_id: str
    pid: int
    cpus: tuple[int, ...]
    """The cores it is pinned to; empty if it is not."""
    num_running: int
    num_waiting: int
    num_outstanding_tokens: int
    num_steps: int
    """Steps since the start that ran the model."""
    kv_cache_usage: float
    """Fraction of the KV cache in use."""
    memory_bytes: int
    """Resident memory of its process."""
    draining: bool
    drafts: DraftStats | None = None
    """None without speculation."""
    silent: bool = False
    """Whether it has not reported for long, as placement sees it."""
    on_trial: bool = False
    """Whether placement keeps it for a request under which an engine died."""
    slow: bool = False
    """Whether its steps have long been much longer than predicted, unlike those of others."""
    slowness: float = 1.0
    """How long its steps take lately compared with what was predicted."""
    policy: WorkerPolicy = ALONE
    """The bounds of its steps."""
    start: Mapping[str, PhaseTime] = field(default_factory=dict)
    """What each phase of its start took, by `StartPhase`."""


@dataclass(frozen=True, slots=True)
class WorkerSteps:
    """Steps of one worker."""

    worker_id: str
    steps: list[StepSummary]
    peaks: Peaks | None
    """Peaks of its device; None if they were not measured."""


@dataclass(frozen=True, slots=True)
class DraftWorkerStatus:
    """A draft worker at one moment."""

    draft_worker_id: str
    pid: int
    drafters: tuple[str, ...]
    num_contexts: int
    """Requests that it knows."""
    num_drafts: int
    """Draft tokens sent since the start."""
    busy_share: float
    """Fraction of the time since the previous report that it spent drafting."""
    memory_bytes: int
    silent: bool = False
    """Whether it has not reported for long: perhaps it is stopped or dead."""


@dataclass(frozen=True, slots=True)
class DraftWorkerReport:
    """A draft worker, as it reports itself to the GlobalScheduler."""

    address: DraftWorkerAddress
    status: DraftWorkerStatus


@dataclass(frozen=True, slots=True)
class DraftReportAnswer:
    """What the GlobalScheduler answers to a draft worker's report."""

    peers: list[DraftWorkerAddress]
    """The other draft workers, with which it shares memories."""
    num_wanted: int | None = None
    """How many draft workers there should be; None if others decide on that."""


class WorkerObserver:
    """Sees what a worker does, called in its engine's thread; this one does nothing."""

    def took_step(self, step: StepReport) -> None:
        """The engine computed a step that a scheduler of ours decided."""

    def saw_stats(self, stats: Any) -> None:
        """The engine took a step, after which vLLM's scheduler has these `SchedulerStats`."""

    def reported(self, report: WorkerReport) -> None:
        """The worker reports its load: it has changed, or some time has passed."""
