"""A request on its way through workers: what it has lost, and when it is quiet."""

import asyncio
import math
import time
from dataclasses import dataclass, field

from ray.serve.handle import DeploymentResponse

from cluster.observe.request_history import Attempt, RequestRecord
from scheduler.placement import RefusalReason
from workers.engine_request import EngineRequest
from workers.errors import (
    ClientLost,
    EngineDead,
    EngineStalled,
    OutputsLost,
    StepFailed,
    WorkerDraining,
    WorkerSilent,
)

PROGRESS_TOKENS = 8
"""New tokens after which a loss of its worker has nothing to do with the one before."""
QUIET_S = 1.0
"""Time without a token after which the GlobalScheduler is asked about a request's worker. That is
the case of requests that wait, too; the question is the same for all of them."""
NO_WORKER = ""
"""Worker id of a call that Serve holds until a worker is up, which then answers `WrongWorker`.
Serve counts the calls it holds, so that autoscaling starts workers."""


@dataclass(slots=True)
class LiveRequest:
    """A request that was submitted and has not ended."""

    record: RequestRecord
    request: EngineRequest
    tried: set[str] = field(default_factory=set)
    """Workers on which it was placed; it is placed there again only if there is no other."""
    worker_id: str = NO_WORKER
    """Worker of its current attempt."""
    heard_s: float = math.inf
    """When its current attempt began or gave the latest token, by the monotonic clock."""
    num_tokens_before: int = 0
    """Tokens that came before its current attempt."""
    num_fruitless: int = 0
    """Attempts that lost their workers since it last made progress."""
    num_workers_lost: int = 0
    """Workers whose process ended under it since then."""
    num_silences: int = 0
    """Workers that fell silent under it since then."""
    num_engine_deaths: int = 0
    """Engines that died under it, perhaps because of it."""
    lost: asyncio.Future[Exception] | None = None
    """Set when its current attempt is given up."""
    waits_for: RefusalReason = RefusalReason.NO_WORKER
    """Why it has no worker yet, while it has none."""
    yields: bool = False
    """Whether it yields on its worker to those of tenants that have had less."""
    response: DeploymentResponse[str | Exception] | None = None
    task: asyncio.Task[None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request_id(self) -> str:
        """Its id to the client; each attempt has another."""
        return self.record.request.request_id

    def begin_attempt(self) -> EngineRequest:
        """The request under a new id for each attempt: it fences off a lost worker's outputs."""
        record = self.record
        attempt_id = f"{self.request_id}.{len(record.attempts)}"
        record.attempts.append(Attempt(attempt_id, time.time()))
        self.num_tokens_before = record.num_output_tokens
        self.worker_id = NO_WORKER
        return self.request.for_attempt(
            attempt_id, record.progress(), self.num_engine_deaths, len(record.attempts) - 1
        )

    def is_quiet(self, now: float) -> bool:
        """Whether nothing has come of its attempt for long, and for longer after each silence."""
        on_worker = self.worker_id != NO_WORKER
        return on_worker and now - self.heard_s > QUIET_S * 2**self.num_silences

    def count_loss(self, error: Exception) -> None:
        """Count the loss of its worker, and the death of an engine if it may be the cause.

        That is so if its step failed or hung before it gave a token, or if a process ended under it
        that was not the first without progress: nodes are lost and processes are killed for reasons
        of their own.
        """
        num_new_tokens = self.record.num_output_tokens - self.num_tokens_before
        if num_new_tokens >= PROGRESS_TOKENS:
            self.num_fruitless = self.num_workers_lost = self.num_silences = 0
        match error:
            case WorkerDraining():
                return
            case WorkerSilent():  # it may be busy only, as all others may be
                self.num_silences += 1
                return
            case StepFailed() | EngineStalled():
                self.num_engine_deaths += 1
            case EngineDead() | ClientLost() | OutputsLost():
                pass
            case _:
                self.num_engine_deaths += bool(self.num_workers_lost or self.num_engine_deaths)
                self.num_workers_lost += 1
        self.num_fruitless += 1
