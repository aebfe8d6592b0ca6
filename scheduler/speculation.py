"""How many drafts of each request to verify in a step, and how likely each is accepted."""

import heapq
import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.cost_model import CostModel
from scheduler.request import RequestState
from scheduler.step import Step

LOOK_AHEAD = 4
"""Max drafts in a row that lower the tokens per second before one raises them: the kernels' tiles
lengthen a step by jumps, and tokens that follow a jump are nearly free."""

PROBE_STEPS = 32
"""Steps between probes: while none is worth verifying, one draft is verified in this many steps."""
REST_STEPS = 64
"""Steps without a verified draft after which drafts are only requested shortly before a probe."""
PROBE_LEAD_STEPS = 3
"""Steps before a probe from which on drafts are requested."""
MAX_CHANCE = 0.98
"""Cap on the chance of any draft."""
REQUEST_MEMORY = 0.9
"""Decay of a request's past with each of its drafts."""
WORKER_MEMORY = 0.98
"""Decay of the past of all requests together, and of a drafter's calibration, with each draft."""
PRIOR_DRAFTS = 2.0
"""Weight of the prior on a request's acceptance factor, in drafts."""
NUM_BINS = 8
"""Number of intervals of a drafter's estimates, each calibrated by itself."""
BIN_PRIOR = 4.0
"""Weight of the drafter's own estimate in each bin, in drafts."""
WINDOW = 64
"""Number of verified drafts that the recent acceptance rate reaches back over, about."""


def add_drafts(
    step: Step,
    states: Iterable[RequestState],
    cost_model: CostModel,
    limit_s: float,
    max_drafts: int | None = None,
) -> None:
    """Extend decodes of `step` by drafts while that raises the tokens expected per second.

    Draft k of a request becomes a token if it and all before it are accepted, so with the product
    of their chances. The likeliest draft of all requests is added first, up to the maximum of
    (decodes + expected accepted drafts) / (predicted seconds), the measure of X. Liu et
    al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput" (2024).
    Drafts never make the step longer than `limit_s` seconds, and no request gets more than
    `max_drafts`.
    """
    decodes = [state for state in states if state in step]
    chances = [state.draft_chances[:max_drafts] for state in decodes]
    # A heap has its smallest entry first, hence the sign.
    candidates = [(-each[0], index, 1) for index, each in enumerate(chances) if each]
    heapq.heapify(candidates)
    shape = step.shape
    expected = float(shape.num_samples)
    best_rate = expected / cost_model.predict(shape) if expected else 0.0
    num_left = step.num_tokens_left
    taken: list[int] = []
    """The decode, by index, that each taken draft extends."""
    num_best = 0
    while candidates and num_left > len(taken) and len(taken) < num_best + LOOK_AHEAD:
        negative_chance, index, position = heapq.heappop(candidates)
        state = decodes[index]
        shape = shape.longer(state.num_tokens + position)
        expected -= negative_chance
        seconds = cost_model.predict(shape)
        if seconds > limit_s:
            break
        taken.append(index)
        if expected > best_rate * seconds:
            best_rate, num_best = expected / seconds, len(taken)
        if position < len(chances[index]):
            chance = chances[index][position]
            heapq.heappush(candidates, (negative_chance * chance, index, position + 1))
    for index, count in Counter(taken[:num_best]).items():
        step.extend(decodes[index], count)


def num_expected(chances: Iterable[float]) -> float:
    """Expected number of accepted drafts; each needs all before it to be accepted."""
    return math.fsum(itertools.accumulate(chances, operator.mul))


@dataclass(slots=True)
class _Ratio:
    """Accepted over expected drafts, with a past that decays."""

    expected: float = 0.0
    accepted: float = 0.0

    def observe(self, chance: float, accepted: bool, memory: float) -> None:
        self.expected = self.expected * memory + chance
        self.accepted = self.accepted * memory + accepted

    def value(self, prior: float, weight: float) -> float:
        return (self.accepted + weight * prior) / (self.expected + weight)


class DrafterCalibration:
    """Turns one drafter's estimates into chances, by how many of its drafts were accepted."""

    def __init__(self) -> None:
        self._bins = [_Ratio() for _ in range(NUM_BINS)]

    def chance(self, prob: float) -> float:
        """Chance of a draft that the drafter estimates at `prob`, if all before it are accepted."""
        ratio = self._bin(prob).value(1.0, BIN_PRIOR * (prob or 1.0))
        return min(prob * ratio, MAX_CHANCE)

    def observe(self, prob: float, accepted: bool) -> None:
        """Learn from a verified draft; all before it were accepted."""
        self._bin(prob).observe(prob, accepted, WORKER_MEMORY)

    def _bin(self, prob: float) -> _Ratio:
        return self._bins[min(int(prob * NUM_BINS), NUM_BINS - 1)]


@dataclass(slots=True)
class _RequestDrafts:
    factor: _Ratio = field(default_factory=_Ratio)
    """Accepted drafts relative to their calibrated chances."""
    offered: tuple[str, tuple[float, ...], tuple[float, ...]] = ("", (), ())
    """The drafts at hand: drafter, its estimates, and their calibrated chances."""


class Acceptance:
    """How likely each draft is to be accepted, learnt from verified drafts.

    A drafter estimates the chance of each of its drafts. The estimates are calibrated per drafter
    and scaled by a factor per request, which starts at the factor of all requests of the worker.
    When nothing was verified for a while, one draft is verified as a probe, so that drafts can
    recover.
    """

    def __init__(self) -> None:
        self._drafters: dict[str, DrafterCalibration] = {}
        self._requests: dict[str, _RequestDrafts] = {}
        self._all = _Ratio()
        """The factor of all requests together."""
        self._recent = _Ratio()
        """Accepted over verified drafts."""
        self._extra = _Ratio()
        """Accepted drafts over decodes."""
        self._num_idle_steps = 0

    def chances(self, request_id: str, drafter: str, probs: Sequence[float]) -> tuple[float, ...]:
        """Chances of drafts estimated at `probs`, each if all before it are accepted."""
        calibration = self._drafters.setdefault(drafter, DrafterCalibration())
        drafts = self._requests.setdefault(request_id, _RequestDrafts())
        factor = drafts.factor.value(self._all.value(1.0, PRIOR_DRAFTS), PRIOR_DRAFTS)
        return tuple(min(calibration.chance(prob) * factor, MAX_CHANCE) for prob in probs)

    def offer(self, request_id: str, drafter: str, probs: Sequence[float]) -> None:
        """Note that these are the drafts at hand, which the next call of `verified` is about."""
        calibration = self._drafters[drafter]
        base = tuple(calibration.chance(prob) for prob in probs)
        self._requests[request_id].offered = drafter, tuple(probs), base

    def next_probe(self, offers: dict[str, tuple[float, ...]]) -> str | None:
        """The request whose first draft to verify as a probe; None if no probe is due.

        Called in each step that decodes, with the chances of the drafts by request.
        """
        self._num_idle_steps += 1
        if not offers or self._num_idle_steps % PROBE_STEPS:
            return None
        return max(offers, key=lambda request_id: offers[request_id][0])

    @property
    def is_resting(self) -> bool:
        """Whether to request no drafts: none was worth verifying lately, and no probe is near."""
        to_probe = -self._num_idle_steps % PROBE_STEPS
        return self._num_idle_steps > REST_STEPS and to_probe > PROBE_LEAD_STEPS

    def verified(self, request_id: str, num_drafts: int, num_accepted: int) -> str | None:
        """Learn that the first `num_drafts` of the request's drafts at hand were verified.

        Returns their drafter; None if there were none.
        """
        drafts = self._requests.get(request_id)
        if drafts is None or not num_drafts:
            return None
        self._num_idle_steps = 0
        self._extra.accepted += num_accepted
        drafter, probs, base = drafts.offered
        # Nothing is learnt about drafts that follow the first refused one.
        for index in range(min(num_accepted + 1, num_drafts, len(probs))):
            accepted = index < num_accepted
            self._drafters[drafter].observe(probs[index], accepted)
            drafts.factor.observe(base[index], accepted, REQUEST_MEMORY)
            self._all.observe(base[index], accepted, WORKER_MEMORY)
            self._recent.observe(1.0, accepted, 1 - 1 / WINDOW)
        return drafter

    def count_decodes(self, num_decodes: int) -> None:
        """Count the decodes of a step, with drafts or without."""
        self._extra.expected = self._extra.expected * WORKER_MEMORY + num_decodes
        self._extra.accepted *= WORKER_MEMORY

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request that has ended."""
        self._requests.pop(request_id, None)

    @property
    def tokens_per_decode(self) -> float:
        """Mean output tokens of recent decodes, accepted drafts included."""
        return 1.0 + self._extra.value(0.0, 1.0)

    @property
    def rate(self) -> float:
        """Share of recently verified drafts that were accepted; 1 before the first."""
        return self._recent.value(1.0, 1.0)
