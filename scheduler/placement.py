"""Which worker serves a request."""

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.request import Request
from scheduler.worded import Worded


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What placement knows of one worker."""

    worker_id: str
    num_outstanding_tokens: int
    """Prompt and output tokens its requests may still need."""
    num_requests: int
    draining: bool = False
    """Finishes what it has and takes nothing new."""
    tokens_per_span: float = 1.0
    """Mean output tokens per decode: more than one where drafts are accepted."""
    silent: bool = False
    """Has not reported for long: perhaps it hangs, and its load is out of date."""

    @property
    def num_expected_spans(self) -> float:
        """Outstanding tokens divided by tokens per decode: accepted drafts shorten the work."""
        return self.num_outstanding_tokens / self.tokens_per_span


class PlacementReason(Worded):
    """Why a request was placed where it was."""

    ONLY = "only", "no other worker took new requests"
    OTHERS_SILENT = "others_silent", "the other workers had stopped reporting"
    MIN_TOKENS = "least_tokens", "it had the least work outstanding"
    FEWEST_REQUESTS = (
        "fewest_requests",
        "as much work outstanding as the next, in fewer requests",
    )
    TIE = "tie", "equal to the next worker; the order of their ids decided"
    ALL_SILENT = "all_silent", "all workers had stopped reporting; it was the best of them"


@dataclass(frozen=True, slots=True)
class Placed:
    """The answer to a client whose request has a worker."""

    worker_id: str


class RefusalReason(Worded):
    """Why a request was placed nowhere."""

    NO_WORKER = "no_worker", "no worker takes new requests"
    OVERLOAD = "overload", "the workers could not serve the request in time"
    QUOTA = "quota", "the share of this tenant is used up"


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer to a client whose request has no worker."""

    reason: RefusalReason
    retry_after_s: float
    """Seconds until the client should ask again."""

    @property
    def is_final(self) -> bool:
        """Whether the request fails; otherwise it waits and is placed again."""
        return self.reason is not RefusalReason.NO_WORKER


@dataclass(frozen=True, slots=True)
class Placement:
    """A choice, and what it was made from."""

    chosen: WorkerLoad
    runner_up: WorkerLoad | None
    reason: PlacementReason
    num_draining: int
    """Workers that were left out because they are draining."""


def place(request: Request, workers: Iterable[WorkerLoad]) -> Placement | None:
    """Choose the worker for `request`: the one with the least outstanding tokens.

    Tokens count for less where drafts are accepted, which shortens the work. Among equals the one
    with fewer requests wins, then the smaller id, so that the same view gives the same choice. A
    silent worker is the last resort. None when no worker takes new requests.
    """
    workers = list(workers)
    candidates = sorted((worker for worker in workers if not worker.draining), key=_rank)
    if not candidates:
        return None
    chosen, *others = candidates
    return Placement(
        chosen,
        others[0] if others else None,
        _reason(chosen, others),
        len(workers) - len(candidates),
    )


def _rank(worker: WorkerLoad) -> tuple[bool, float, int, str]:
    return worker.silent, worker.num_expected_spans, worker.num_requests, worker.worker_id


def _reason(chosen: WorkerLoad, others: list[WorkerLoad]) -> PlacementReason:
    if not others:
        return PlacementReason.ONLY
    if chosen.silent:
        return PlacementReason.ALL_SILENT
    runner_up = others[0]
    if runner_up.silent:
        return PlacementReason.OTHERS_SILENT
    if chosen.num_expected_spans < runner_up.num_expected_spans:
        return PlacementReason.MIN_TOKENS
    if chosen.num_requests < runner_up.num_requests:
        return PlacementReason.FEWEST_REQUESTS
    return PlacementReason.TIE
