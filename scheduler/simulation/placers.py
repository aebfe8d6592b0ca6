"""What chooses the worker of a request in a simulation: ours, and the ways of others.

All see the same: the workers' loads and prefix caches as of their last reports, and what was placed
since.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random
from typing import Protocol, runtime_checkable

from scheduler.admission import Admission
from scheduler.fleet import Fleet
from scheduler.placement import Placed, RefusalReason, Refused, WorkerLoad, place
from scheduler.request import Request

RETRY_S = 1.0
"""Time after which a request asks again that no worker takes."""


class Placer(Protocol):
    """Chooses workers."""

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed | Refused:
        """The answer to a request: one that is not final has it ask again."""


@runtime_checkable
class ReportedPlacer(Placer, Protocol):
    """Chooses workers, and is told of their reports."""

    def report(
        self, worker_id: str, live: Collection[str], ended: Mapping[str, int], now: float
    ) -> None:
        """A worker reports its requests, and the output tokens of those that have ended."""


@dataclass(slots=True)
class PredictedSeconds:
    """Ours, as the GlobalScheduler chooses."""

    admission: Admission | None = None
    """The rule by which it refuses requests; None serves all."""

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed | Refused:
        """Where it is on time, harms nobody and takes least."""
        placement = place(request, fleet.loads_for(request, loads, now))
        if placement is None:
            return Refused(RefusalReason.NO_WORKER, RETRY_S)
        if self.admission and (refused := self.admission.refusal(request, placement)):
            return refused
        return Placed(placement.chosen.worker_id)


@dataclass(slots=True)
class RoundRobin:
    """Each in turn."""

    turn: int = 0

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed:
        """The next one."""
        self.turn += 1
        return Placed(loads[self.turn % len(loads)].worker_id)


@dataclass(slots=True)
class RandomWorker:
    """Any."""

    random: Random = field(default_factory=lambda: Random(0))

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed:
        """Any of them."""
        return Placed(self.random.choice(loads).worker_id)


class LeastOutstandingTokens:
    """The fewest tokens that requests may still need."""

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed:
        """The least loaded one."""
        return Placed(min(loads, key=_tokens).worker_id)


@dataclass(slots=True)
class PowerOfTwo:
    """The one with fewer requests of two that are drawn: Ray Serve's default."""

    random: Random = field(default_factory=lambda: Random(0))

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed:
        """The less loaded of two."""
        two = self.random.sample(loads, min(2, len(loads)))
        return Placed(min(two, key=_requests).worker_id)


@dataclass(slots=True)
class SessionHash:
    """All calls of a session on one worker, whatever its load, by consistent hashing."""

    sessions: Mapping[str, str]
    """Session of each request, by id; a request without one is one itself."""

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed:
        """The worker with the highest hash of session and worker (rendezvous hashing)."""
        session = self.sessions.get(request.request_id, request.request_id)
        highest = max(
            loads, key=lambda load: blake2b(f"{session} {load.worker_id}".encode()).digest()
        )
        return Placed(highest.worker_id)


@dataclass(slots=True)
class PrefixAffinity:
    """The most of the prompt cached, unless loads differ too much: SGLang's and Ray Serve LLM's.

    Where the longest prefix is a smaller share of the prompt than `min_match`, or the numbers of
    requests differ by more than `abs_threshold` and by more than `rel_threshold` times, the one
    with the fewest requests. With an infinite `abs_threshold` it is affinity alone.
    """

    min_match: float = 0.5
    abs_threshold: float = 32
    rel_threshold: float = 1.0001
    random: Random = field(default_factory=lambda: Random(0))

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed:
        """The longest prefix, or the fewest requests."""
        most = max(load.num_requests for load in loads)
        fewest = min(load.num_requests for load in loads)
        is_balanced = most - fewest <= self.abs_threshold or most <= self.rel_threshold * fewest
        cached = fleet.num_cached_tokens(request, [load.worker_id for load in loads])
        longest = max(cached.values(), default=0)
        if is_balanced and longest and longest > self.min_match * request.num_prompt_tokens:
            loads = [load for load in loads if cached.get(load.worker_id) == longest]
        return Placed(
            min(loads, key=lambda load: (*_requests(load), self.random.random())).worker_id
        )


@dataclass(slots=True)
class WeightedScore:
    """A weighted sum of tokens to prefill and tokens held, as Dynamo's and llm-d's scorers."""

    prefill_weight: float = 1.0
    random: Random = field(default_factory=lambda: Random(0))

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed:
        """The lowest sum."""
        cached = fleet.num_cached_tokens(request, [load.worker_id for load in loads])

        def score(load: WorkerLoad) -> tuple[float, float]:
            num_new, num_held = fleet.num_queued_tokens(load.worker_id)
            num_new += request.num_prompt_tokens - cached.get(load.worker_id, 0)
            return self.prefill_weight * num_new + num_held, self.random.random()

        return Placed(min(loads, key=score).worker_id)


def _tokens(load: WorkerLoad) -> tuple[int, int]:
    return load.num_outstanding_tokens, load.num_requests


def _requests(load: WorkerLoad) -> tuple[int, int]:
    return load.num_requests, load.num_outstanding_tokens
