"""Output lengths, learned from the requests that ended: how many tokens a request will give.

What is learned of a kind of request is, for each length, the share of those that came so far which
ended there. A request that was stopped by its `max_tokens` counts as one that came so far and not
as one that ended, so that limits do not pass for lengths. Where a kind was seen seldom, at any
length, it is completed by its parent: everybody's of this tenant, in the end everybody's. Before
anything was seen the prediction is `max_tokens`.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.request import Request

Floats = NDArray[np.float64]

HIGH = 0.95
"""Share of the requests that end within their `OutputLength.high`."""
MAX_KINDS = 2000
"""Kinds of requests that are remembered; beyond, those not seen for longest go."""
MAX_BYTES = 4 << 20
"""Memory of so many kinds and of the accuracies of their tenants."""
KIND_HALF_LIFE = 500.0
"""Requests of a kind after which one of them counts half."""
PARENT_WEIGHT = 4.0
"""Requests of its own for which a kind is believed as much as its parent."""
TAIL_HAZARD = 0.25
"""Share of the requests that end within a bucket of lengths that none was seen to reach."""
MAX_TENANTS = 1000
"""Tenants whose accuracy is remembered."""
ACCURACY_HALF_LIFE = 200.0
"""Requests of a tenant after which one of them counts half for the accuracy."""
LEVEL_STEP = 0.005
"""How far one request moves the level at which `high` is read."""
MIN_LEVEL, MAX_LEVEL = 0.5, 0.999

# Buckets of lengths: one for each up to 8 tokens, then four to the octave.
_EDGES = np.array(sorted({round(2 ** (i / 4)) for i in range(4 * 18 + 1)}), float)
_LOWS, _HIGHS = _EDGES[:-1], _EDGES[1:]
_WIDTHS = _HIGHS - _LOWS
NUM_BUCKETS = len(_LOWS)


@dataclass(frozen=True, slots=True)
class OutputLength:
    """How many tokens a request will give in all, as predicted."""

    mean: float
    median: float
    high: float
    """Length that `HIGH` of such requests do not exceed."""


@dataclass(slots=True)
class Accuracy:
    """How well the lengths of one tenant's requests were predicted, of late.

    Each was predicted anew when it had ended, before it was learned from.
    """

    log_error: float = 0.0
    """Mean of |ln(predicted median / length)|: 0.7 is a factor of two."""
    coverage: float = 0.0
    """Share of the requests that were not longer than their `high`."""
    num_requests: float = 0.0
    """Requests that this is of, decaying."""
    level: float = HIGH
    """Quantile of what was learned that is `high`, moved until the coverage is right."""
    _predicted: float = 0.0
    _measured: float = 0.0

    @property
    def bias(self) -> float:
        """Sum of the predicted means relative to the sum of the lengths, minus 1."""
        return self._predicted / self._measured - 1 if self._measured else 0.0

    def add(self, predicted: OutputLength, num_output_tokens: int) -> None:
        """Take the length of one more request."""
        kept = 0.5 ** (1 / ACCURACY_HALF_LIFE)
        covered = float(num_output_tokens <= math.ceil(predicted.high))
        self.num_requests = kept * self.num_requests + 1
        part = 1 / self.num_requests
        error = abs(math.log(predicted.median / num_output_tokens))
        self.log_error += part * (error - self.log_error)
        self.coverage += part * (covered - self.coverage)
        self._predicted = kept * self._predicted + predicted.mean
        self._measured = kept * self._measured + num_output_tokens
        self.level = min(max(self.level + LEVEL_STEP * (HIGH - covered), MIN_LEVEL), MAX_LEVEL)


class OutputLengths:
    """The lengths of the outputs of each kind of request."""

    def __init__(self, max_kinds: int = MAX_KINDS) -> None:
        self._max_kinds = max_kinds
        self._kinds: OrderedDict[_Kind, _Lengths] = OrderedDict()
        """Those seen last are last, parents after their children."""
        self._accuracies: OrderedDict[str, Accuracy] = OrderedDict()

    def __len__(self) -> int:
        """Number of kinds."""
        return len(self._kinds)

    @property
    def accuracies(self) -> Mapping[str, Accuracy]:
        """How well the lengths of each tenant's requests are predicted."""
        return self._accuracies

    def predict(self, request: Request) -> OutputLength:
        """How many tokens `request` will give, those of its earlier attempts included."""
        return self._predict(request, request.num_prior_tokens)

    def remaining(self, request: Request, num_output_tokens: int) -> float:
        """Mean number of tokens still to come of a request that gave so many and has not ended.

        `num_output_tokens` counts those of its earlier attempts too.
        """
        return self._predict(request, num_output_tokens).mean - num_output_tokens

    def observe(self, request: Request, num_output_tokens: int) -> None:
        """Learn from a request that ended, by itself or by its `max_tokens`, after so many tokens,
        those of its earlier attempts included."""
        if num_output_tokens < 1:
            return  # it ended before it began: nothing of a length
        self._accuracy(request.tenant).add(self._predict(request, 0), num_output_tokens)
        for kind in reversed([*_kinds(request)]):
            lengths = self._kinds.setdefault(kind, _Lengths())
            lengths.add(num_output_tokens, num_output_tokens < request.max_tokens)
            self._kinds.move_to_end(kind)
        while len(self._kinds) > self._max_kinds:
            self._kinds.popitem(last=False)

    def _predict(self, request: Request, num_output_tokens: int) -> OutputLength:
        if num_output_tokens >= request.max_tokens:
            return OutputLength(*[float(num_output_tokens)] * 3)
        accuracy = self._accuracies.get(request.tenant)
        level = accuracy.level if accuracy else HIGH
        return _from(self._hazards(request), num_output_tokens, request.max_tokens, level)

    def _hazards(self, request: Request) -> Floats:
        """Share of the requests that reach each bucket which end in it."""
        everybody = self._kinds.get(())
        num_ended = float(everybody.ended.sum()) if everybody else 0.0
        hazards: Floats = np.full(NUM_BUCKETS, TAIL_HAZARD * num_ended / (num_ended + 1))
        weight = 1.0
        for kind in _kinds(request):
            if (lengths := self._kinds.get(kind)) is not None:
                hazards = (lengths.ended + weight * hazards) / (lengths.reached + weight)
            weight = PARENT_WEIGHT
        return hazards

    def _accuracy(self, tenant: str) -> Accuracy:
        accuracy = self._accuracies.setdefault(tenant, Accuracy())
        self._accuracies.move_to_end(tenant)
        if len(self._accuracies) > MAX_TENANTS:
            self._accuracies.popitem(last=False)
        return accuracy


class _Lengths:
    """What was seen of one kind, decaying."""

    __slots__ = ("ended", "reached")

    def __init__(self) -> None:
        self.reached: Floats = np.zeros(NUM_BUCKETS)
        """Requests that came to each bucket."""
        self.ended: Floats = np.zeros(NUM_BUCKETS)
        """Those of them that ended in it by themselves."""

    def add(self, num_tokens: int, by_itself: bool) -> None:
        kept = 0.5 ** (1 / KIND_HALF_LIFE)
        self.reached *= kept
        self.ended *= kept
        bucket = _bucket(num_tokens)
        # One that its limit stopped says nothing of the rest of its last bucket.
        self.reached[: bucket + by_itself] += 1
        self.ended[bucket] += by_itself


_Kind = tuple[str | int, ...]
"""What is known of a request: its tenant, class and limit, and the length of its prompt."""


def _kinds(request: Request) -> Iterator[_Kind]:
    """The kinds that a request is of, each the parent of the next."""
    yield ()
    yield (request.tenant,)
    limit = request.max_tokens.bit_length()
    yield (request.tenant, request.slo_class, limit)
    yield (request.tenant, request.slo_class, limit, request.num_prompt_tokens.bit_length())


def _bucket(num_tokens: int) -> int:
    found = int(np.searchsorted(_EDGES, num_tokens, "right")) - 1
    return min(found, NUM_BUCKETS - 1)


def _from(hazards: Floats, num_output_tokens: int, max_tokens: int, level: float) -> OutputLength:
    """The length of a request that gave `num_output_tokens` and goes on, to `max_tokens` at most.

    Within a bucket all lengths are as likely.
    """
    reached = np.concatenate(([1.0], np.cumprod(1 - hazards)))
    lows = np.maximum(_LOWS, num_output_tokens + 1)
    highs = np.minimum(_HIGHS, max_tokens)
    open_to = np.maximum(highs - lows, 0)
    shares = hazards * reached[:-1] * (open_to / _WIDTHS)
    beyond = np.clip((_HIGHS - np.maximum(lows, max_tokens)) / _WIDTHS, 0, 1)
    at_limit = float(reached[-1] + hazards * reached[:-1] @ beyond)
    total = float(shares.sum()) + at_limit
    if total <= 0:
        return OutputLength(*[float(max_tokens)] * 3)
    mean = (shares @ ((lows + highs - 1) / 2) + at_limit * max_tokens) / total
    summed = np.cumsum(shares) / total

    def quantile(level: float) -> float:
        bucket = int(np.searchsorted(summed, level))
        if bucket == NUM_BUCKETS:
            return float(max_tokens)
        before = summed[bucket - 1] if bucket else 0.0
        part = (level - before) / (summed[bucket] - before)
        return float(lows[bucket] + part * max(open_to[bucket] - 1, 0))

    mean = min(max(float(mean), num_output_tokens + 1.0), float(max_tokens))
    return OutputLength(mean, quantile(0.5), quantile(level))
