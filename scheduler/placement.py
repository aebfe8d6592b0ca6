"""Which worker serves a request."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.prefill_queue import Forecast
from scheduler.request import Request
from scheduler.worded import Worded


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What placement knows about one worker."""

    worker_id: str
    num_outstanding_tokens: int
    """Prompt and output tokens its requests may still need."""
    num_requests: int
    draining: bool = False
    """Whether it only finishes the requests it has."""
    tokens_per_decode: float = 1.0
    """Mean output tokens per decode: more than one where drafts are accepted."""
    silent: bool = False
    """Whether it has not reported for long: it may hang, and its load is out of date."""
    dead: bool = False
    """Whether its engine has failed; it is about to be replaced."""
    on_trial: bool = False
    """Whether it has, or is kept for, a request under which an engine died, and so nothing else."""
    token_s: float | None = None
    """Seconds of a token in a full step, as profiled; None if it was not."""
    slowness: float = 1.0
    """How long its steps take lately compared with the profile."""
    slow: bool = False
    """Whether that has long been much more than for other workers."""
    max_num_seqs: float = math.inf
    """Requests that run at the same time; more wait."""
    forecast: Forecast | None = None
    """What becomes of the request that is to be placed, on this worker; None if nothing is known of
    its queue."""

    @property
    def takes_requests(self) -> bool:
        """Whether it is neither dead nor draining."""
        return not (self.dead or self.draining)

    @property
    def is_serving(self) -> bool:
        """Whether it takes requests and reports."""
        return self.takes_requests and not self.silent

    def finish_s(self, request: Request, token_s: float) -> float:
        """Predicted seconds until it has done all its work and `request`, in full steps.

        Drafts that are accepted shorten the work. `token_s` is for a worker without a profile.
        """
        num_tokens = self.num_outstanding_tokens + request.num_outstanding_tokens()
        own_s = token_s if self.token_s is None else self.token_s
        return num_tokens / self.tokens_per_decode * own_s * self.slowness


class PlacementReason(Worded):
    """Why a request was placed where it was."""

    ONLY = "only", "no other worker took new requests"
    OTHERS_SILENT = "others_silent", "the other workers had stopped reporting"
    OTHERS_SLOW = "others_slow", "the steps of the other workers took much longer than predicted"
    OTHERS_FULL = "others_full", "the other workers had no seat or no KV cache for it"
    OTHERS_LATE = "others_late", "on the other workers it, or another request, would be late"
    PREFIX = "prefix", "most of its prompt that is cached anywhere is cached there"
    SOONEST_TOKEN = "soonest_token", "its first token was predicted to come soonest there"
    SOONEST = "soonest", "it was predicted to be done with its work first"
    FEWEST_REQUESTS = (
        "fewest_requests",
        "as much work outstanding as the next, in fewer requests",
    )
    TIE = "tie", "equal to the next worker; the order of their ids decided"
    ALL_SILENT = "all_silent", "all workers had stopped reporting; it was the best of them"
    TRIAL = "trial", "an engine died under the request, which was tried alone on an idle worker"


@dataclass(frozen=True, slots=True)
class Placed:
    """The answer to a client whose request has a worker."""

    worker_id: str
    prefix_format: str = ""
    """What the hashes of the worker's blocks are of, as in `PrefixDelta`; empty if it has none."""
    forecast: Forecast | None = None
    """What was predicted for it there; None if nothing was."""
    yields: bool = False
    """Whether it yields there to requests of tenants that have had less than its own."""


class RefusalReason(Worded):
    """Why a request was not placed."""

    NO_WORKER = "no_worker", "no worker takes new requests"
    NO_IDLE_WORKER = (
        "no_idle_worker",
        "an engine died under the request, and no worker was idle to try it alone",
    )
    POISON = "poison", "an equal request has made engines fail"
    QUEUED = "queued", "the workers are busy, and other requests have precedence"
    OVERLOAD = "overload", "the workers could not serve the request in time"
    TOO_LONG = "too_long", "no worker could ever meet the request's time to first token"
    QUOTA = "quota", "a quota of its tenant is used up"


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer to a client whose request has no worker."""

    reason: RefusalReason
    retry_after_s: float
    """Seconds until the client should ask again."""
    detail: str = ""
    """What was found, if the reason does not say all."""

    @property
    def is_final(self) -> bool:
        """Whether the request fails; otherwise it waits and is placed again."""
        return self.reason not in (
            RefusalReason.NO_WORKER,
            RefusalReason.NO_IDLE_WORKER,
            RefusalReason.QUEUED,
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """The choice of a worker, with the next best one and the reason."""

    chosen: WorkerLoad
    runner_up: WorkerLoad | None
    reason: PlacementReason
    num_closed: int
    """Number of workers left out because they took no such request."""


def place(request: Request, workers: Iterable[WorkerLoad]) -> Placement | None:
    """Choose the worker for `request`: the one that is predicted to be done first.

    Among equals the one with fewer requests wins, then the smaller id, so that equal loads give
    equal choices. A worker on which it would wait for a slot comes after those with free ones, then
    one that is slow, and a silent one is the last resort. A request under which an engine died is
    tried on an idle worker, which takes nothing else meanwhile. None if no worker takes it.
    """
    workers = list(workers)
    if request.num_engine_deaths:
        open_to_it = [w for w in workers if w.takes_requests and not w.num_requests]
    else:
        open_to_it = [w for w in workers if w.takes_requests and not w.on_trial]
    if not open_to_it:
        return None
    token_s = min((w.token_s for w in open_to_it if w.token_s is not None), default=1.0)
    ranked = sorted(
        ((_rank(worker, request, token_s), worker) for worker in open_to_it),
        key=lambda pair: pair[0],
    )
    chosen = ranked[0][1]
    return Placement(
        chosen=chosen,
        runner_up=ranked[1][1] if len(ranked) > 1 else None,
        reason=_reason(request, ranked),
        num_closed=len(workers) - len(open_to_it),
    )


def keep_for_trial(request: Request, workers: Iterable[WorkerLoad]) -> WorkerLoad | None:
    """The worker that gets nothing new until it is idle and can try `request` alone.

    None unless another one serves meanwhile.
    """
    placement = place(
        dataclasses.replace(request, num_engine_deaths=0), [w for w in workers if w.is_serving]
    )
    return placement.chosen if placement and placement.runner_up else None


class _Rank(NamedTuple):
    """Smaller is better."""

    silent: bool
    slow: bool
    full: bool
    num_late: int
    cost_s: float
    finish_s: float
    num_requests: int
    worker_id: str


CACHE_WEIGHT = 2.0
"""Seconds of waiting that a second of computing is worth: it also takes time from all that come
later, and evicts what others have cached."""
UNKNOWN = Forecast()


def _cost_s(forecast: Forecast) -> float:
    return forecast.ttft_s + CACHE_WEIGHT * forecast.prefill_s


def _rank(worker: WorkerLoad, request: Request, token_s: float) -> _Rank:
    forecast = worker.forecast or UNKNOWN
    return _Rank(
        worker.silent,
        worker.slow,
        worker.num_requests >= worker.max_num_seqs or not forecast.fits,
        forecast.num_late + forecast.is_late,
        forecast.prefill_s if forecast.is_late else _cost_s(forecast),
        worker.finish_s(request, token_s),
        worker.num_requests,
        worker.worker_id,
    )


def _reason(request: Request, ranked: list[tuple[_Rank, WorkerLoad]]) -> PlacementReason:
    if request.num_engine_deaths:
        return PlacementReason.TRIAL
    if len(ranked) == 1:
        return PlacementReason.ONLY
    (chosen, chosen_load), (runner_up, runner_up_load) = ranked[:2]
    if chosen.silent:
        return PlacementReason.ALL_SILENT
    for differs, reason in (
        (runner_up.silent, PlacementReason.OTHERS_SILENT),
        (runner_up.slow > chosen.slow, PlacementReason.OTHERS_SLOW),
        (runner_up.full > chosen.full, PlacementReason.OTHERS_FULL),
        (runner_up.num_late > chosen.num_late, PlacementReason.OTHERS_LATE),
        (_has_more_cached(chosen_load, runner_up_load), PlacementReason.PREFIX),
        (runner_up.cost_s > chosen.cost_s, PlacementReason.SOONEST_TOKEN),
        (runner_up.finish_s > chosen.finish_s, PlacementReason.SOONEST),
        (runner_up.num_requests > chosen.num_requests, PlacementReason.FEWEST_REQUESTS),
    ):
        if differs:
            return reason
    return PlacementReason.TIE


def _has_more_cached(worker: WorkerLoad, other: WorkerLoad) -> bool:
    if worker.forecast is None or other.forecast is None:
        return False
    return worker.forecast.num_cached_tokens > other.forecast.num_cached_tokens
