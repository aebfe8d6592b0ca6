"""The purse from which one ingress spends what the account of a tenant has leased to it."""

import math
from dataclasses import dataclass

from scheduler.quota import Draw, Grant, Quota, refilled

MIN_REFUSED_S, MAX_REFUSED_S = 0.05, 0.5
"""Time for which calls are refused without asking the account again: a flood must not become one of
questions. It is the shorter where it depends on when calls end."""
FIRST_TOKENS, FIRST_S = 200.0, 1.0
"""Tokens, prompt and output, and seconds of a call before there is experience."""
EXPERIENCE = 0.1
"""Weight of the latest call in what is expected of the next."""
LITTLE = 1e-6
"""An amount too small to matter, but larger than errors of rounding."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a call is not admitted."""

    lacking: str
    """The quota that is used up, by its field of `Quota`."""
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What a purse held when it drew."""

    requests: float = 0.0
    tokens: float = 0.0
    num_admitted: int = 0
    lent_s: float = 0.0


class Purse:
    """What one ingress may spend of a tenant's quota without asking.

    A call costs one request and, at first, as many tokens as are expected of it; when it ends, that
    is set right. Times are seconds of one monotonic clock.
    """

    def __init__(self, quota: Quota, num_ingresses: int, now: float) -> None:
        self._quota = quota
        self._requests = self._tokens = 0.0
        self._num_slots = self._num_spare = 0.0
        self._num_live = self._num_admitted = 0
        self._levels = quota.max_requests, quota.max_tokens
        self._share = 1.0 / num_ingresses
        self._granted_s = self._refilled_s = now
        self._lent_s = 0.0
        """What this purse has refilled by itself, in seconds of the tenant's rates."""
        self._drawn = _Drawn()
        self._expected_tokens, self._expected_s = FIRST_TOKENS, FIRST_S
        self._lacking, self._more_at_s, self._ask_at_s = "", now, now

    @property
    def is_empty(self) -> bool:
        """Whether nothing needs to be put back."""
        return self._num_live == self._num_slots == self._requests == self._tokens == 0

    @property
    def hoards(self) -> bool:
        """Whether it has room for more calls than it should keep from others."""
        return self._num_slots - self._num_live > 2 * self._num_spare

    @property
    def pays(self) -> bool:
        """Whether there is enough in it for a call."""
        has_slot = self._num_live < self._num_slots
        return has_slot and self._requests >= 1.0 - LITTLE and self._tokens > 0.0

    def admit(self) -> float | None:
        """Admit a call and return the tokens it is charged; None if the purse cannot pay for it."""
        if not self.pays:
            return None
        charged = self._expected_tokens
        self._requests -= 1.0
        self._tokens -= charged
        self._num_live += 1
        self._num_admitted += 1
        return charged

    def settle(self, charged: float, num_tokens: int, took_s: float) -> None:
        """End a call that was charged in advance, and has used `num_tokens`."""
        self._num_live -= 1
        self._tokens += charged - num_tokens
        self._expected_tokens += EXPERIENCE * (num_tokens - self._expected_tokens)
        self._expected_s += EXPERIENCE * (took_s - self._expected_s)
        if self._lacking == "max_concurrency":
            self._ask_at_s = -math.inf

    def shortage(self, now: float) -> Shortage | None:
        """Why a call is refused without asking the account."""
        if now >= self._ask_at_s:
            return None
        return Shortage(self._lacking, max(self._more_at_s - now, 0.0))

    def draw(self, has_call: bool, now: float) -> Draw:
        """What to tell the account; calls go on being paid from the purse until its grant comes."""
        quota, passed_s = self._quota, now - self._granted_s
        requests, tokens = self._levels
        # The account has refilled too while this purse did so by itself, up to its capacity.
        owed_s = min(self._lent_s, self._share * quota.burst_s)
        self._drawn = _Drawn(self._requests, self._tokens, self._num_admitted, self._lent_s)
        return Draw(
            has_call,
            self._requests - _times(quota.requests_per_s, owed_s),
            self._tokens - _times(quota.tokens_per_s, owed_s),
            self._num_live,
            self._num_admitted,
            (
                refilled(requests, quota.requests_per_s, passed_s, quota.max_requests),
                refilled(tokens, quota.tokens_per_s, passed_s, quota.max_tokens),
            ),
        )

    def take(self, grant: Grant, now: float) -> None:
        """Take what the account has granted for what was drawn last."""
        drawn = self._drawn
        self._requests = _replaced(self._requests, drawn.requests, grant.requests)
        self._tokens = _replaced(self._tokens, drawn.tokens, grant.tokens)
        self._num_admitted -= drawn.num_admitted
        self._lent_s -= drawn.lent_s
        self._num_slots, self._num_spare = grant.num_slots, grant.num_spare
        self._levels, self._share = grant.levels, grant.share
        self._granted_s = self._refilled_s = now
        if grant.lacking:
            self._lack(grant.lacking, grant.wait_s, now)

    def refill(self, now: float) -> None:
        """Lend it this ingress's share of the quota, because the account cannot be reached."""
        quota, share, passed_s = self._quota, self._share, now - self._refilled_s
        rates = share * quota.requests_per_s, share * quota.tokens_per_s
        most = max(share * quota.max_requests, 1.0), share * quota.max_tokens
        self._requests = refilled(self._requests, rates[0], passed_s, most[0])
        self._tokens = refilled(self._tokens, rates[1], passed_s, most[1])
        self._num_slots = max(self._num_slots, _ceil(share * quota.max_concurrency))
        self._refilled_s = now
        self._lent_s += share * passed_s
        if self._requests < 1.0 - LITTLE:
            self._lack("requests_per_s", (1.0 - self._requests) / rates[0], now)
        elif self._tokens <= 0.0:
            self._lack("tokens_per_s", (LITTLE - self._tokens) / rates[1], now)
        elif self._num_live >= self._num_slots:
            self._lack("max_concurrency", 0.0, now)

    def _lack(self, lacking: str, wait_s: float, now: float) -> None:
        most_s = MAX_REFUSED_S
        if lacking == "max_concurrency":
            wait_s, most_s = self._expected_s / self._quota.max_concurrency, MIN_REFUSED_S
        wait_s = max(wait_s, MIN_REFUSED_S)
        self._lacking, self._more_at_s = lacking, now + wait_s
        self._ask_at_s = now + min(wait_s, most_s)


def _replaced(held: float, put_back: float, granted: float) -> float:
    """What is held once what was there has been put back; the difference was spent meanwhile."""
    return granted if put_back == math.inf else held - put_back + granted


def _times(rate: float, seconds: float) -> float:
    """What is owed after some seconds; nothing of what is not bounded."""
    return 0.0 if rate == math.inf else rate * seconds


def _ceil(number: float) -> float:
    return number if number == math.inf else math.ceil(number)
