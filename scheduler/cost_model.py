"""Predicts the seconds of a step from its spans."""

import itertools
import math
import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.task import Stage, StageTask

TOKEN_KNOTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Numbers of tokens at which the slope of the linear part may change: few tokens are bound by
reading the weights, many by arithmetic, and the heights of the kernels' tiles lie in between."""
SAMPLE_KNOTS = (0, 1, 4, 16, 64)
"""Numbers of logits at which the slope of the LM head may change."""

SPEED_RATE = 0.15
"""Weight of a new observation in `speed`."""
SPEED_WINDOW = 5
"""Steps whose median is one observation of `speed`, so that a single outlier moves nothing."""
SPEED_RANGE = 1e-3, 1e3
"""Bounds of `speed` relative to the profile; anything outside is a clock fault."""
SETTLED = 0.15
"""Weights are learnt only while recent steps are this close to `speed`, relative to it; beyond
that the whole machine has changed."""
WEIGHT_RATE = 0.02
"""Share of a step's error by which the weights are corrected."""
MAX_ERROR = 0.2
"""Cap on the relative error that one step teaches the weights."""
FORGET_RATE = 0.0005
"""Fraction by which the weights decay towards the profile in each step, so that stale and one-sided
(too long) observations fade."""
MIN_WEIGHT, MAX_WEIGHT = 1 / 3, 3.0
"""Bounds of a learnt weight relative to its profiled value."""
ERROR_WINDOW = 256
"""Number of recent steps that `error` and `lateness` are taken over."""
LATENESS_QUANTILE = 0.9
"""Quantile of recent steps that `lateness` is; a higher one would leave less time for prefills."""

SPAN_FEATURE = -3
"""Place of the spans among the features and weights; KV reads and pairs follow."""


@dataclass(slots=True)
class StepShape:
    """The amounts of work that a step's time depends on, added span by span."""

    query_tile: int
    """Number of query tokens that read the KV cache together."""
    num_tokens: int = 0
    num_samples: int = 0
    """Number of tokens after which one is sampled."""
    num_logits: int = 0
    """Rows of the LM head: vLLM also computes one for a span that samples nothing."""
    num_spans: int = 0
    num_kv_reads: int = 0
    """Tokens of KV cache read, each counted once per query tile."""
    num_pairs: int = 0
    """Query-key pairs of causal attention."""

    def add(self, num_tokens: int, seq_len: int, samples: int) -> None:
        """Add the last `num_tokens` of `seq_len` tokens; after `samples` of them one is sampled."""
        self.num_tokens += num_tokens
        self.num_samples += samples
        self.num_logits += samples or 1
        self.num_spans += 1
        self.num_kv_reads += -(-num_tokens // self.query_tile) * seq_len
        self.num_pairs += num_tokens * seq_len - num_tokens * (num_tokens - 1) // 2

    def add_task(self, task: StageTask) -> None:
        """Add a task: a decode or a verify samples after each token, a prefill after its last."""
        samples = task.num_tokens if task.stage is not Stage.PREFILL else int(task.samples)
        self.add(task.num_tokens, task.seq_len, samples)

    def plus(self, num_tokens: int, seq_len: int, samples: int) -> "StepShape":
        """The shape with one more span."""
        shape = StepShape(
            self.query_tile,
            self.num_tokens,
            self.num_samples,
            self.num_logits,
            self.num_spans,
            self.num_kv_reads,
            self.num_pairs,
        )
        shape.add(num_tokens, seq_len, samples)
        return shape

    def longer(self, seq_len: int) -> "StepShape":
        """The shape with one more draft of a decode, at the end of `seq_len` tokens."""
        return StepShape(
            self.query_tile,
            self.num_tokens + 1,
            self.num_samples + 1,
            self.num_logits + 1,
            self.num_spans,
            self.num_kv_reads,
            self.num_pairs + seq_len,
        )


class CostModel:
    """Predicts a step's time as a sum of parts, each of which grows with the work.

        seconds = speed * (fixed + linear(tokens) + head(logits)
                           + a * spans + b * kv_reads + c * pairs)

    `linear` and `head` are piecewise linear and never fall; no part is negative. So a prediction is
    positive, and monotone in the tokens and their context. `speed` follows the machine within a few
    steps: it doubles soon after another process takes half of the machine. The weights follow
    slowly and within bounds.
    """

    def __init__(
        self,
        weights: Sequence[float],
        *,
        token_knots: Sequence[int] = TOKEN_KNOTS,
        sample_knots: Sequence[int] = SAMPLE_KNOTS,
        token_tile: int = 1,
        query_tile: int = 32,
        speed: float = 1.0,
    ) -> None:
        """`weights`, in seconds: fixed, the slope from each token knot on, the slope from each
        sample knot on, per span, per KV read, per pair. Tokens are computed in tiles of
        `token_tile` rows. ValueError if a weight is missing, negative or not finite, or if knots do
        not ascend from 0.
        """
        for knots in (token_knots, sample_knots):
            if not knots or knots[0] != 0 or any(a >= b for a, b in itertools.pairwise(knots)):
                raise ValueError(f"knots ({knots}) must ascend from 0")
        num_weights = 1 + len(token_knots) + len(sample_knots) + 3
        if len(weights) != num_weights:
            raise ValueError(
                f"a cost model with these knots has {num_weights} weights, not {len(weights)}"
            )
        if not all(0 <= weight < math.inf for weight in weights) or not 0 < speed < math.inf:
            raise ValueError(
                f"weights ({weights}) must be finite and not negative, and speed ({speed}) finite "
                "and positive"
            )
        if token_tile < 1 or query_tile < 1:
            raise ValueError(f"tiles ({token_tile}, {query_tile}) must be at least 1")
        self.token_knots = tuple(token_knots)
        self.sample_knots = tuple(sample_knots)
        self.token_tile = token_tile
        self.query_tile = query_tile
        self.speed = speed
        self._weights = [float(weight) for weight in weights]
        self._profiled = tuple(self._weights)
        self._recent_ratios: deque[float] = deque(maxlen=SPEED_WINDOW)
        self._errors: deque[float] = deque(maxlen=ERROR_WINDOW)
        self._lateness: deque[float] = deque(maxlen=ERROR_WINDOW)
        self._tabulate()

    def shape(self) -> StepShape:
        """The shape of an empty step."""
        return StepShape(self.query_tile)

    def shape_of(self, tasks: Iterable[StageTask]) -> StepShape:
        """The shape of a step of these tasks."""
        shape = self.shape()
        for task in tasks:
            shape.add_task(task)
        return shape

    def predict(self, shape: StepShape) -> float:
        """Seconds of a step of this shape; 0 for an empty one."""
        if shape.num_tokens == 0:
            return 0.0
        return self.speed * (
            self._fixed
            + _interpolate(self._linear, -(-shape.num_tokens // self.token_tile) * self.token_tile)
            + _interpolate(self._head, shape.num_logits)
            + self._span_s * shape.num_spans
            + self._kv_read_s * shape.num_kv_reads
            + self._pair_s * shape.num_pairs
        )

    def profiled(self, shape: StepShape) -> float:
        """Seconds of a step of this shape at the speed that the machine had when profiled."""
        return self.predict(shape) / self.speed

    def longest_chunk(
        self, shape: StepShape, num_computed_tokens: int, num_tokens: int, limit_s: float
    ) -> int:
        """How many of a request's next `num_tokens` tokens can be added to `shape` so that the
        step takes at most `limit_s`. After the last of all `num_tokens` a token is sampled.
        """
        fits, too_many = 0, num_tokens + 1
        while too_many - fits > 1:
            # Usually all tokens fit or none, so all are tried first; then by bisection.
            middle = num_tokens if too_many > num_tokens else (fits + too_many) // 2
            seq_len = num_computed_tokens + middle
            if self.predict(shape.plus(middle, seq_len, middle == num_tokens)) <= limit_s:
                fits = middle
            else:
                too_many = middle
        return fits

    @property
    def error(self) -> float:
        """Median of the relative errors of recent predictions; 0 before the first."""
        return statistics.median(self._errors) if self._errors else 0.0

    @property
    def lateness(self) -> float:
        """Share by which recent steps took longer than predicted; one in ten took even more."""
        if not self._lateness:
            return 0.0
        return max(0.0, sorted(self._lateness)[int(LATENESS_QUANTILE * len(self._lateness))])

    def observe(self, shape: StepShape, measured_s: float) -> None:
        """Learn from a step that took `measured_s` seconds; broken measurements are ignored."""
        predicted_s = self.predict(shape)
        if not 0 < measured_s < math.inf or not 0 < predicted_s < math.inf:
            return
        self._errors.append(abs(predicted_s / measured_s - 1))
        self._lateness.append(measured_s / predicted_s - 1)
        ratio = measured_s / (predicted_s / self.speed)
        self._recent_ratios.append(min(max(ratio, SPEED_RANGE[0]), SPEED_RANGE[1]))
        recent = statistics.median(self._recent_ratios)
        self.speed *= (recent / self.speed) ** SPEED_RATE
        if abs(recent / self.speed - 1) < SETTLED:
            self._learn(shape, ratio / self.speed - 1)

    def _learn(self, shape: StepShape, error: float) -> None:
        """Correct each weight in proportion to its share of the predicted time (proportionate LMS).

        No weight changes its sign, as each is scaled.
        """
        features = self.features(shape)
        parts = [weight * value for weight, value in zip(self._weights, features, strict=True)]
        base_s = sum(parts)
        shares = [part / base_s for part in parts]
        error = min(max(error, -MAX_ERROR), MAX_ERROR)
        rate = WEIGHT_RATE * error / sum(share * share for share in shares)
        self._weights = [
            min(
                max(weight * (1 + rate * share) + FORGET_RATE * (own - weight), MIN_WEIGHT * own),
                MAX_WEIGHT * own,
            )
            for weight, share, own in zip(self._weights, shares, self._profiled, strict=True)
        ]
        self._tabulate()

    def to_dict(self) -> dict[str, Any]:
        """The model as JSON can hold it; `CostModel.from_dict` restores it."""
        return {
            "weights": list(self._weights),
            "token_knots": list(self.token_knots),
            "sample_knots": list(self.sample_knots),
            "token_tile": self.token_tile,
            "query_tile": self.query_tile,
            "speed": self.speed,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "CostModel":
        """The model that `to_dict` described; ValueError or TypeError if malformed."""
        return cls(**state)

    def features(self, shape: StepShape) -> list[float]:
        """Amounts that the weights are multiplied with, in the order of the weights."""
        num_rows = -(-shape.num_tokens // self.token_tile) * self.token_tile
        return [
            1,
            *_segments(num_rows, self.token_knots),
            *_segments(shape.num_logits, self.sample_knots),
            shape.num_spans,
            shape.num_kv_reads,
            shape.num_pairs,
        ]

    def _tabulate(self) -> None:
        num_token_knots = len(self.token_knots)
        self._fixed = self._weights[0]
        self._linear = _table(self.token_knots, self._weights[1 : 1 + num_token_knots])
        self._head = _table(self.sample_knots, self._weights[1 + num_token_knots : SPAN_FEATURE])
        self._span_s, self._kv_read_s, self._pair_s = self._weights[SPAN_FEATURE:]


Table = tuple[tuple[int, ...], list[float], list[float]]
"""Knots of a piecewise linear function, its value at each, and its slope from each on."""


def _table(knots: tuple[int, ...], slopes: list[float]) -> Table:
    values = [0.0]
    for slope, begin, end in zip(slopes, knots, knots[1:], strict=False):
        values.append(values[-1] + slope * (end - begin))
    return knots, values, slopes


def _interpolate(table: Table, x: int) -> float:
    knots, values, slopes = table
    segment = bisect_right(knots, x) - 1
    return values[segment] + slopes[segment] * (x - knots[segment])


def _segments(x: int, knots: tuple[int, ...]) -> list[int]:
    """How much of `x` lies between each knot and the next."""
    last = bisect_right(knots, x) - 1
    whole = [end - begin for begin, end in itertools.pairwise(knots[: last + 1])]
    return [*whole, x - knots[last], *(0 for _ in knots[last + 1 :])]
