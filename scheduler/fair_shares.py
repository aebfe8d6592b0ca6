"""Fair shares of busy workers: whose request goes next, and whose waits.

A tenant's share of the predicted seconds of device time is proportional to its weight. While a
worker has room every request goes at once. When none has, requests wait, and the next to go is of
the tenant that has had least: start-time fair queueing (P. Goyal, H. Vin, H. Cheng 1997), for
servers that run many requests at the same time. What a tenant has had, divided by its weight, is
what its ended requests took and what those that run are predicted to take. The first part is lifted
to the virtual time, the least of those that wait, whenever a tenant asks that had nothing waiting:
so nobody saves up for later, and a tenant that comes to workers full of another's requests goes
first until it has as many.

Requests wait at their clients, which ask again: what is kept here is soft. One that stops asking is
passed over, then forgotten.
"""

import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from scheduler.placement import RefusalReason, Refused, WorkerLoad
from scheduler.request import Request

HOLD_S = 0.3
"""A worker on which a prefill would wait for longer than this, and than it takes itself, has no
room: whatever is placed there is in the way of what comes later."""
RESERVE_SHARE = 1 / 8
"""Share of a worker's seats that is kept for tenants that have had less than others."""
YIELDS = 1 << 30
"""Added to the priority of a request that yields to those of tenants that have had less; more than
any priority that a client gives, or a tenant could pass others by its own."""
MAX_PRIORITY = 1 << 29
MIN_RETRY_S, MAX_RETRY_S = 0.05, 5.0
"""Least and most time until a waiting request asks again."""
FIRST_RETRY_S = 0.1
"""Most time for the first of each tenant: while it may go and does not ask, a seat is empty."""
RETRY_SHARE = 1 / 3
"""Share of the time that it is predicted to wait after which it does."""
LATE_S = 0.25
"""A request that asks later than it was told to by this is passed over until it does."""
GONE_AFTER_S = 5.0
"""By this, and it is forgotten: its client has left."""
MAX_WAITING_OF_TENANT = 1000
"""Requests of a tenant that wait; more are refused."""
MAX_WAITING = 4000
"""Requests of all tenants that do."""
OVERLOAD_RETRY_S = 10.0
"""Time after which a client that was refused so may try again."""
KNOWN_S = 600.0
"""Time for which a tenant that is not in the config is remembered when it has nothing left here."""
MAX_TENANTS = 1000
"""Tenants that are remembered at most, unless more have requests here."""
LOST_AFTER_S = 30.0
"""Time after which a placed request that no worker knows of has ended."""
NUM_RECENT = 32
"""Requests that went, from which the pace of the queue is taken."""
USUAL_PACE = 10.0
"""Requests that go per second, until some have gone while others waited."""
FORGET_PACE_S = 10.0


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Seconds of a worker that a request takes, as predicted."""

    prefill_s: float
    token_s: float = 0.0
    """Of each output token: its part of a full step."""
    num_tokens: float = 0.0
    """Output tokens that are expected."""

    def seconds(self, num_tokens: float | None = None) -> float:
        """All of it, with what is known of the output tokens."""
        return self.prefill_s + self.token_s * (
            self.num_tokens if num_tokens is None else num_tokens
        )


def device_time(request: Request, load: WorkerLoad, num_tokens: float | None = None) -> DeviceTime:
    """What a request takes on a worker; `num_tokens` it is expected to give in all, by default as
    many as it may."""
    forecast = load.forecast
    prefill_s = forecast.prefill_s if forecast else 0.0
    num_new = request.num_prefill_tokens - (forecast.num_cached_tokens if forecast else 0)
    # A token of a prompt is about as much work as one of an output in a full step.
    token_s = prefill_s / max(1, num_new) if load.token_s is None else load.token_s * load.slowness
    given = request.max_tokens if num_tokens is None else num_tokens
    return DeviceTime(
        prefill_s,
        token_s / load.tokens_per_decode,
        max(0.0, given - request.num_prior_tokens),
    )


def num_places(loads: Iterable[WorkerLoad], yields: bool) -> int:
    """How many requests like the one that the loads have forecasts for could go now.

    One that `yields` leaves seats free for others. One that does not may wait for a seat, which is
    the next that is free.
    """
    return sum(_num_places(load, yields) for load in loads if load.takes_requests)


def _num_places(load: WorkerLoad, yields: bool) -> int:
    if load.on_trial or load.silent:
        return 0
    num_seats = min(load.max_num_seqs, 1e6)
    reserve = math.ceil(num_seats * RESERVE_SHARE)
    num_seats = max(1, num_seats - reserve) if yields else num_seats + reserve
    num_left = num_seats - load.num_requests
    if load.num_requests == 0 or load.forecast is None:
        return max(0, int(num_left))
    forecast = load.forecast
    left_s = max(HOLD_S, forecast.prefill_s) - forecast.wait_s
    if not forecast.fits or left_s < 0:
        return 0
    return max(0, int(min(num_left, 1 + left_s / max(forecast.prefill_s, 1e-4))))


_Rank = tuple[int, float, int]
"""Priority, deadline and number of a waiting request: the order within a tenant."""


@dataclass(slots=True)
class _Waiting:
    request_id: str
    tenant: str
    rank: _Rank
    expected_s: float
    """When it is to ask again."""
    in_line: bool = False
    """Whether it is not passed over."""


@dataclass(slots=True)
class _Tenant:
    weight: float
    done_s: float = 0.0
    """Seconds of its ended requests by its weight, or what this was lifted to."""
    running_s: float = 0.0
    """Predicted seconds of those that run, by its weight."""
    num_running: int = 0
    cost_s: float = 0.0
    """Of a request of late, by its weight."""
    line: list[_Rank] = field(default_factory=list)
    """Its requests that wait and ask, in their order."""
    num_waiting: int = 0
    """Those that have stopped asking included."""
    attained_s: float = 0.0
    """Seconds of device time that it has had since the start."""
    asked_s: float = 0.0

    @property
    def had_s(self) -> float:
        """What it has had, by its weight."""
        return self.done_s + self.running_s

    @property
    def is_active(self) -> bool:
        return bool(self.num_running or self.line)


@dataclass(frozen=True, slots=True)
class _Placed:
    tenant: str
    worker_id: str
    time: DeviceTime
    placed_s: float


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant has and waits for."""

    attained_s: float
    """Seconds of device time that its requests took, since the start."""
    running_s: float
    """Seconds that those on workers are predicted to take."""
    num_waiting: int


class FairShares:
    """The shares of all tenants.

    Ask `yields` before the workers are ranked for a request, then `wait_s`; and tell `wait` or
    `place`.
    """

    def __init__(self, weights: Mapping[str, float] = MappingProxyType({})) -> None:
        """`weights` are those of tenants, by name; others have 1."""
        self._weights = weights
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        """Those that asked last are last."""
        self._waiting: dict[str, _Waiting] = {}
        self._expected: list[tuple[float, str]] = []
        """Times at which waiting requests are late, a heap; some are out of date."""
        self._placed: dict[str, _Placed] = {}
        self._placed_on: dict[str, set[str]] = {}
        """Their ids, by worker."""
        self._virtual_s = 0.0
        self._numbers = itertools.count()
        self._went: deque[float] = deque(maxlen=NUM_RECENT)
        """When requests went, while others waited."""

    def yields(self, request: Request, now: float) -> bool:
        """Whether a request yields on its worker to those of tenants that have had less: unless its
        tenant has clearly had less than all others that use workers or wait, or nobody does. Those
        that take turns all yield, and the seats that are kept remain for one that comes."""
        self._forget_gone(now)
        tenant = self._asking(request.tenant, now)
        if not self._is_contested:
            return False
        others = [one for one in self._tenants.values() if one is not tenant and one.is_active]
        if not others:
            return tenant.is_active
        return any(
            tenant.had_s + max(tenant.cost_s, other.cost_s) >= other.had_s for other in others
        )

    def wait_s(self, request: Request, loads: Iterable[WorkerLoad], now: float) -> float | None:
        """For how long a request has to wait, as predicted; None if it may go now.

        `loads` have the forecasts for it, as it yields or does not. One that was taken in before,
        and has lost its worker, goes at once.
        """
        if request.num_attempts or request.num_engine_deaths or not self._is_contested:
            return None
        waiting = self._waiting.get(request.request_id)
        rank = waiting.rank if waiting else self._rank(request, now)
        places = num_places(loads, yields=request.priority >= MAX_PRIORITY)
        ahead = self._num_ahead(self._tenants[request.tenant], rank)
        if ahead < places:
            return None
        return (ahead - places + 1) / self._pace(now)

    def waits(self, request_id: str) -> bool:
        """Whether a request waits already."""
        return request_id in self._waiting

    def wait(self, request: Request, wait_s: float, now: float) -> Refused:
        """Have a request wait that was predicted to have to for so long: ask again, or, if there
        are too many, give up."""
        waiting, tenant = self._waiting.get(request.request_id), self._tenants[request.tenant]
        if waiting is None:
            if tenant.num_waiting >= MAX_WAITING_OF_TENANT or len(self._waiting) >= MAX_WAITING:
                return Refused(
                    RefusalReason.OVERLOAD,
                    OVERLOAD_RETRY_S,
                    f"{tenant.num_waiting} requests of its tenant wait already",
                )
            waiting = _Waiting(request.request_id, request.tenant, self._rank(request, now), now)
            self._waiting[request.request_id] = waiting
            tenant.num_waiting += 1
        self._join(waiting)
        most_s = FIRST_RETRY_S if tenant.line[0] == waiting.rank else MAX_RETRY_S
        retry_s = min(max(wait_s * RETRY_SHARE, MIN_RETRY_S), most_s)
        waiting.expected_s = now + retry_s
        heapq.heappush(self._expected, (waiting.expected_s + LATE_S, request.request_id))
        return Refused(RefusalReason.QUEUED, retry_s)

    def place(self, request: Request, worker_id: str, time: DeviceTime, now: float) -> None:
        """Note that a request was placed, and what it will take."""
        tenant = self._asking(request.tenant, now)
        if waiting := self._waiting.pop(request.request_id, None):
            self._leave(waiting)
            tenant.num_waiting -= 1
        if self._waiting:
            self._went.append(now)
        self.end(request.request_id)
        seconds = time.seconds() / tenant.weight
        tenant.running_s += seconds
        tenant.num_running += 1
        tenant.cost_s += 0.25 * (seconds - tenant.cost_s) if tenant.cost_s else seconds
        self._placed[request.request_id] = _Placed(request.tenant, worker_id, time, now)
        self._placed_on.setdefault(worker_id, set()).add(request.request_id)

    def end(self, request_id: str, num_tokens: float | None = None) -> None:
        """Note that a request has ended on its worker, after so many tokens or as many as
        expected."""
        placed = self._placed.pop(request_id, None)
        if placed is None:
            return
        ids = self._placed_on[placed.worker_id]
        ids.discard(request_id)
        if not ids:
            del self._placed_on[placed.worker_id]
        tenant = self._tenants[placed.tenant]
        tenant.num_running -= 1
        # Without any the sum is 0, whatever was lost by rounding.
        tenant.running_s = (
            max(0.0, tenant.running_s - placed.time.seconds() / tenant.weight)
            if tenant.num_running
            else 0.0
        )
        took_s = placed.time.seconds(num_tokens)
        tenant.done_s += took_s / tenant.weight
        tenant.attained_s += took_s

    def sweep(self, worker_id: str, known: Collection[str], now: float) -> None:
        """Note which requests a worker has: others that were placed there long ago have ended."""
        for request_id in list(self._placed_on.get(worker_id, ())):
            if request_id not in known and now - self._placed[request_id].placed_s > LOST_AFTER_S:
                self.end(request_id)

    def forget(self, worker_id: str) -> None:
        """Forget a worker that is gone, and what ran there."""
        for request_id in list(self._placed_on.get(worker_id, ())):
            self.end(request_id, 0)

    def shares(self) -> dict[str, Share]:
        """What each tenant has and waits for."""
        return {
            name: Share(tenant.attained_s, tenant.running_s * tenant.weight, tenant.num_waiting)
            for name, tenant in self._tenants.items()
        }

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def _is_contested(self) -> bool:
        """Whether there is more than one tenant: otherwise workers order their queues better."""
        if max(len(self._tenants), len(self._weights)) > 1:
            return True
        return bool(self._weights) and any(name not in self._weights for name in self._tenants)

    def _asking(self, name: str, now: float) -> _Tenant:
        """The tenant that asks, with no more credit than those that have waited."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(self._weights.get(name, 1.0))
        self._tenants.move_to_end(name)
        tenant.asked_s = now
        if not tenant.line:
            self._advance()
            tenant.done_s = max(tenant.done_s, self._virtual_s)
        return tenant

    def _advance(self) -> None:
        """Move the virtual time on: to the least that one which waits has had, or, where nobody
        waits and so all have what they want, to the most that any has had."""
        waiting = [one.done_s for one in self._tenants.values() if one.line]
        if waiting:
            self._virtual_s = max(self._virtual_s, min(waiting))
        else:
            everybody = (one.done_s for one in self._tenants.values())
            self._virtual_s = max(self._virtual_s, *everybody)

    def _num_ahead(self, tenant: _Tenant, rank: _Rank) -> int:
        """Waiting requests that go before one of this rank, if those of a tenant are as long as of
        late."""
        own = bisect_left(tenant.line, rank)
        start_s = tenant.had_s + own * tenant.cost_s
        num_ahead = own
        for other in self._tenants.values():
            if other is tenant or not other.line:
                continue
            behind_s = start_s - other.had_s
            if behind_s < 0 or (behind_s == 0 and rank[2] < other.line[0][2]):
                continue
            num = len(other.line)
            if other.cost_s > 0:
                num = min(num, 1 + int(behind_s / other.cost_s))
            num_ahead += num
        return num_ahead

    def _rank(self, request: Request, now: float) -> _Rank:
        priority = request.priority - (YIELDS if request.priority >= MAX_PRIORITY else 0)
        return priority, now + request.slo.ttft_s, next(self._numbers)

    def _join(self, waiting: _Waiting) -> None:
        if not waiting.in_line:
            waiting.in_line = True
            insort(self._tenants[waiting.tenant].line, waiting.rank)

    def _leave(self, waiting: _Waiting) -> None:
        if waiting.in_line:
            waiting.in_line = False
            line = self._tenants[waiting.tenant].line
            del line[bisect_left(line, waiting.rank)]

    def _forget_gone(self, now: float) -> None:
        """Pass over those that are late, and forget them once they are very late."""
        while self._expected and self._expected[0][0] < now:
            _, request_id = heapq.heappop(self._expected)
            waiting = self._waiting.get(request_id)
            if waiting is None or waiting.expected_s + LATE_S >= now:
                continue
            self._leave(waiting)
            if waiting.expected_s + GONE_AFTER_S < now:
                del self._waiting[request_id]
                self._tenants[waiting.tenant].num_waiting -= 1
            else:
                heapq.heappush(self._expected, (waiting.expected_s + GONE_AFTER_S, request_id))
        while self._tenants:
            name, oldest = next(iter(self._tenants.items()))
            is_known = now - oldest.asked_s <= KNOWN_S and len(self._tenants) <= MAX_TENANTS
            if is_known or oldest.num_running or oldest.num_waiting:
                break
            self._advance()
            del self._tenants[name]

    def _pace(self, now: float) -> float:
        """Requests that go per second while others wait."""
        while self._went and now - self._went[0] > FORGET_PACE_S:
            self._went.popleft()
        if not self._went:
            return USUAL_PACE
        return len(self._went) / max(now - self._went[0], MIN_RETRY_S)


def yielding(request: Request, yields: bool) -> Request:
    """The request as workers rank it: its priority counts among those of its own kind."""
    priority = max(-MAX_PRIORITY + 1, min(request.priority, MAX_PRIORITY - 1))
    return replace(request, priority=priority + YIELDS * yields)
