"""What workers and draft workers report of themselves."""

from dataclasses import dataclass

from workers.drafts.draft_client import DraftCounts
from workers.drafts.draft_stream import (
    DraftWorkerAddress,
)
from workers.step_history import StepSummary


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of one worker's device, with its number of threads."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class DraftStats:
    """What came of drafts, since the engine's start."""

    counts_of: dict[str, DraftCounts]
    """By drafter."""
    acceptance_rate: float
    """Share of the drafts verified lately that were right."""
    tokens_per_span: float
    """Output tokens that a decode gave lately, drafts included."""
    draft_worker: str | None
    """Incarnation of the draft worker that makes them."""
    silent_s: float
    """How long it has owed an answer and given none."""

    @property
    def counts(self) -> DraftCounts:
        """Of all drafters together."""
        return sum(self.counts_of.values(), DraftCounts())


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's requests, as it tells the GlobalScheduler."""

    worker_id: str
    outstanding: dict[str, int]
    """Tokens that each live request may still need, by request id."""
    finished: tuple[str, ...]
    """Requests that ended since the last report."""
    draining: bool
    drafts: DraftStats | None = None
    """None without speculation."""


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
    """Share of the KV cache in use, 0 to 1."""
    memory_bytes: int
    """Resident memory of its process."""
    draining: bool
    drafts: DraftStats | None = None
    """None without speculation."""


@dataclass(frozen=True, slots=True)
class WorkerSteps:
    """Steps of one worker."""

    worker_id: str
    steps: list[StepSummary]
    peaks: Peaks | None
    """Of its device; None if they were not measured."""


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
    """Of the time since the report before, how much it spent drafting."""
    memory_bytes: int
    silent: bool = False
    """Has not reported for long: perhaps it is stopped or dead."""


@dataclass(frozen=True, slots=True)
class DraftWorkerReport:
    """What a draft worker tells the GlobalScheduler of itself."""

    address: DraftWorkerAddress
    status: DraftWorkerStatus
