"""What a tenant may use, and the account in which the GlobalScheduler keeps what is left of it.

Ingresses spend from purses (`scheduler/purse.py`), which hold what the account has leased to them,
so that most calls are admitted without asking. Each draw puts back what is left in the purse, or
owed, and takes a new lease.
"""

import math
from dataclasses import dataclass

LEASE_S = 0.25
"""Size of a lease, in seconds of the tenant's rate."""
EXPIRES_S = 5.0
"""Time after which the calls of an ingress that is not heard of no longer count."""
SHARE_HALF_LIFE_S = 30.0
"""Time in which half of what an ingress has admitted is forgotten, where shares are concerned."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may use; infinite where there is no bound."""

    requests_per_s: float = math.inf
    """Calls of the API."""
    tokens_per_s: float = math.inf
    """Prompt and output tokens."""
    max_concurrency: float = math.inf
    """Calls at the same time."""
    burst_s: float = 3.0
    """What a tenant saves up while it is quiet, in seconds of its rates; at least one call."""

    def __post_init__(self) -> None:
        for name in ("requests_per_s", "tokens_per_s", "max_concurrency", "burst_s"):
            if not getattr(self, name) > 0:  # NaN is not either
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")

    @property
    def max_requests(self) -> float:
        """Calls that are saved up at most."""
        return max(self.requests_per_s * self.burst_s, 1.0)

    @property
    def max_tokens(self) -> float:
        """Tokens that are saved up at most."""
        return self.tokens_per_s * self.burst_s

    @property
    def is_bounded(self) -> bool:
        """Whether there is anything to keep account of."""
        return min(self.requests_per_s, self.tokens_per_s, self.max_concurrency) < math.inf


def refilled(level: float, rate: float, passed_s: float, capacity: float) -> float:
    """A level after a time in which it was refilled, up to a capacity."""
    if rate == math.inf:
        return math.inf
    return max(level, min(level + rate * passed_s, capacity))


class Bucket:
    """An amount that refills at a rate up to a capacity; negative while too much was used.

    One with an infinite rate is always full.
    """

    def __init__(self, rate: float, capacity: float, level: float, now: float) -> None:
        self._rate = rate
        self._capacity = capacity
        self._level = level
        self._at_s = now

    def level(self, now: float) -> float:
        """The amount that is there."""
        self._level = refilled(self._level, self._rate, now - self._at_s, self._capacity)
        self._at_s = now
        return self._level

    def put(self, amount: float, now: float) -> None:
        """Add an amount, or take it if it is negative."""
        if self._rate < math.inf:
            self._level = min(self.level(now) + amount, self._capacity)

    def lease(self, least: float, now: float) -> float:
        """Take what refills in LEASE_S, at least `least`, of what is there."""
        level = self.level(now)
        if self._rate == math.inf:
            return math.inf
        taken = min(level, max(least, self._rate * LEASE_S))
        self._level -= taken
        return taken

    def wait_s(self, level: float, now: float) -> float:
        """Time until it has refilled to `level`."""
        return max(level - self.level(now), 0.0) / self._rate


@dataclass(frozen=True, slots=True)
class Draw:
    """What an ingress tells the account of a tenant."""

    has_call: bool
    """Whether a call waits to be admitted."""
    requests: float
    """What it puts back; negative if it owes."""
    tokens: float
    num_live: int
    """Calls that it has admitted and that have not ended."""
    num_admitted: int
    """Calls that it has admitted since its last draw; after some it wants a lease for the next."""
    levels: tuple[float, float]
    """Requests and tokens that were left in the account when the ingress last heard of it, and have
    refilled since: a new account begins with them."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The account's answer."""

    requests: float
    tokens: float
    num_slots: float
    """Calls that the ingress may have at the same time."""
    num_spare: float
    """How many of them are beyond what it asked for."""
    lacking: str
    """The quota that is used up, by its field of `Quota`; empty if none is."""
    wait_s: float
    """Time until there is more of it; 0 where that depends on when calls end."""
    levels: tuple[float, float]
    """Requests and tokens that are left in the account."""
    share: float
    """The ingress's part of what was admitted lately."""


@dataclass(slots=True)
class _Part:
    """What an account knows of one ingress."""

    heard_s: float
    num_slots: float = 0
    num_admitted: float = 0.0
    """Decaying."""

    def recently_admitted(self, now: float) -> float:
        return self.num_admitted * math.exp2((self.heard_s - now) / SHARE_HALF_LIFE_S)


class Account:
    """What is left of a tenant's quota; times are seconds of one monotonic clock."""

    def __init__(self, quota: Quota, levels: tuple[float, float], now: float) -> None:
        """`levels` of requests and tokens are those that the first ingress remembers."""
        self._quota = quota
        self._requests = Bucket(quota.requests_per_s, quota.max_requests, levels[0], now)
        self._tokens = Bucket(quota.tokens_per_s, quota.max_tokens, levels[1], now)
        self._parts: dict[str, _Part] = {}

    def draw(self, ingress_id: str, draw: Draw, now: float) -> Grant:
        """Take back what an ingress has left, and grant it a new lease if it wants one."""
        part = self._hear(ingress_id, draw, now)
        self._requests.put(draw.requests, now)
        self._tokens.put(draw.tokens, now)
        wants = draw.has_call or draw.num_admitted > 0
        num_unused = self._num_free(part) - draw.num_live - draw.has_call
        lacking, wait_s = self._lacking(num_unused, now) if wants else ("", 0.0)
        requests = tokens = 0.0
        if wants and not lacking:
            requests, tokens = self._requests.lease(1.0, now), self._tokens.lease(0.0, now)
        num_spare = self._num_spare(num_unused) if wants or draw.num_live else 0.0
        part.num_slots = draw.num_live + num_spare + (draw.has_call and not lacking)
        levels = self._requests.level(now), self._tokens.level(now)
        share = self._share(part, now)
        return Grant(requests, tokens, part.num_slots, num_spare, lacking, wait_s, levels, share)

    def _hear(self, ingress_id: str, draw: Draw, now: float) -> _Part:
        part = self._parts.setdefault(ingress_id, _Part(now))
        part.num_admitted = part.recently_admitted(now) + draw.num_admitted
        part.heard_s = now
        for gone in [key for key, one in self._parts.items() if now - one.heard_s > EXPIRES_S]:
            del self._parts[gone]
        return part

    def _num_free(self, part: _Part) -> float:
        """Calls that an ingress may have at the same time, beside those of the others."""
        if self._quota.max_concurrency == math.inf:
            return math.inf
        others = (one.num_slots for one in self._parts.values() if one is not part)
        return self._quota.max_concurrency - sum(others)

    def _num_spare(self, num_unused: float) -> float:
        """Half of an ingress's part of what nobody uses; the other half is for those that ask."""
        if num_unused == math.inf:
            return math.inf
        return math.floor(max(num_unused, 0.0) / (2 * len(self._parts)))

    def _lacking(self, num_unused: float, now: float) -> tuple[str, float]:
        if self._requests.level(now) < 1.0:
            return "requests_per_s", self._requests.wait_s(1.0, now)
        if self._tokens.level(now) <= 0.0:
            return "tokens_per_s", self._tokens.wait_s(0.0, now)
        return ("max_concurrency", 0.0) if num_unused < 0 else ("", 0.0)

    def _share(self, part: _Part, now: float) -> float:
        """With one call in advance for each ingress, so that a new one has a share too."""
        parts = self._parts.values()
        num_admitted = sum(one.recently_admitted(now) for one in parts)
        return (part.recently_admitted(now) + 1.0) / (num_admitted + len(parts))
