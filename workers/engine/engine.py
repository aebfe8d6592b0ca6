"""The inference engine of a worker: what it can do and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scheduler.prefill_queue import QueueReport
from scheduler.prefix_index import PrefixDelta
from scheduler.stage_policy import ALONE, StageReport, WorkerPolicy
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.engine_request import EngineRequest, Grammar
from workers.reports import DraftStats
from workers.token_stream import StreamAddress


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step produced for one client."""

    num_new_tokens: dict[str, int]
    """Number of new tokens, by request id."""
    finish_reasons: Mapping[str, str | Exception]
    """Why requests ended in this step, by request id; an error is not in `frames`."""
    frames: list[bytes]
    """Token ids, logprobs and statistics, encoded for the client to decode."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at this moment."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Fraction of the KV cache in use."""
    drafts: DraftStats | None = None
    """None without speculation."""
    token_s: float | None = None
    """Seconds of a token in a full step, by its profile; None without one."""
    slowness: float = 1.0
    """How long its steps take lately compared with the profile."""
    policy: WorkerPolicy = ALONE
    """The bounds of its steps."""


class Engine(Protocol):
    """Generates tokens; used from one thread only, except `prepare`."""

    async def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar before a request with it is queued; GrammarRefused if it cannot be."""

    def add_request(self, request: EngineRequest, client: StreamAddress) -> None:
        """Queue a request whose outputs go to `client`; ValueError if it is malformed."""

    def abort_requests(self, request_ids: list[str]) -> None:
        """Forget these requests and free their memory; unknown ids are ignored."""

    def has_requests(self) -> bool:
        """Whether a step would find work."""

    def running(self) -> list[str]:
        """Ids of the requests that are not waiting; also called while a step hangs."""

    def step(self) -> tuple[dict[StreamAddress, StepOutput], bool]:
        """Compute one step: its output for each client, and whether the model ran."""

    def recover(self, error: Exception) -> list[str]:
        """Go on after a step that failed with `error`: gives the requests that are the cause, which
        are gone. The others lose nothing. Raises `error` if the engine cannot go on."""

    def predicted_step_s(self) -> float:
        """How long the current step was predicted to take; infinite if nothing predicts steps. Also
        called while a step hangs."""

    def assign_draft_worker(self, draft_worker: DraftWorkerAddress | None) -> None:
        """Take drafts from this draft worker from now on."""

    def follow_policy(self, policy: WorkerPolicy | None) -> None:
        """Keep to these bounds from the next step on, while they are set again from time to time;
        None if nobody sets them."""

    def stats(self) -> EngineStats:
        """Count what runs and waits."""

    def queue(self) -> QueueReport:
        """What placement is to know of its requests."""

    def stages(self, queue: QueueReport) -> StageReport:
        """What the stage policy is to know of its requests, of which this is the queue."""

    def take_prefix(self) -> PrefixDelta | None:
        """What has changed in the prefix cache since the last call; None if that is not told."""

    def prefix_is_due(self) -> bool:
        """Whether so much has changed there that a report should not wait."""

    def resync_prefix(self) -> None:
        """Have the next `take_prefix` tell all that the prefix cache has."""

    def record(self, path: Path) -> None:
        """Write every decision from now on to a new file; called before the first request."""

    def shutdown(self) -> None:
        """Release everything."""
