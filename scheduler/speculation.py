"""How many drafts each request may have verified in a step, and what drafts are worth."""

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
"""Drafts in a row that may lower the tokens per second before one raises them: the kernels' tiles
make a step longer by jumps, and what follows a jump is nearly free."""

PROBE_STEPS = 32
"""While no drafts are verified, one is in so many steps, to see whether they are worth it again."""
REST_STEPS = 64
"""After so many steps without one, no drafts are asked for but shortly before such a probe."""
PROBE_LEAD_STEPS = 3
"""So long before a probe drafts are asked for again."""
MAX_CHANCE = 0.98
"""No draft is taken to be surer than this."""
REQUEST_MEMORY = 0.9
"""Weight of a request's past beside its next draft."""
WORKER_MEMORY = 0.98
"""The same of all requests together, and of a drafter's calibration."""
PRIOR_DRAFTS = 2.0
"""Expected drafts that the prior of a request's factor counts for."""
NUM_BINS = 8
"""Intervals of a drafter's estimates, each with a calibration of its own."""
BIN_PRIOR = 4.0
"""Drafts that the drafter's own word counts for in each."""
WINDOW = 64
"""Expected right drafts over which the recent acceptance rate is taken, about."""


def add_drafts(
    step: Step, states: Iterable[RequestState], cost_model: CostModel, limit_s: float
) -> None:
    """Extend decodes of `step` by drafts while that raises the tokens expected per second.

    Draft k of a request comes out as a token if it and all before it are accepted, so with the
    product of their chances. The likeliest draft of all goes first, and what is taken is what
    makes (decodes + expected accepted drafts) / (predicted seconds) greatest, the measure of
    X. Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using
    Goodput" (2024). The step never gets longer than `limit_s` seconds by them.
    """
    decodes = [state for state in states if state in step and state.draft_chances]
    candidates = [
        (-state.draft_chances[0], index, 1) for index, state in enumerate(decodes)
    ]  # least first
    heapq.heapify(candidates)
    shape = step.shape
    expected = float(shape.num_samples)
    best_rate = expected / cost_model.predict(shape) if expected else 0.0
    num_left = step.num_tokens_left
    taken: list[int] = []
    """Whose draft each is, in the order they are taken."""
    num_best = 0
    while candidates and num_left > len(taken) and len(taken) < num_best + LOOK_AHEAD:
        loss, index, position = heapq.heappop(candidates)
        state = decodes[index]
        shape = shape.longer(state.num_tokens + position)
        expected -= loss
        seconds = cost_model.predict(shape)
        if seconds > limit_s:
            break
        taken.append(index)
        if expected > best_rate * seconds:
            best_rate, num_best = expected / seconds, len(taken)
        if position < len(state.draft_chances):
            chance = state.draft_chances[position]
            heapq.heappush(candidates, (loss * chance, index, position + 1))
    for index, count in Counter(taken[:num_best]).items():
        step.extend(decodes[index], count)


def num_expected(chances: Iterable[float]) -> float:
    """How many of a request's drafts are accepted in the mean: each needs all before it."""
    return math.fsum(itertools.accumulate(chances, operator.mul))


@dataclass(slots=True)
class _Ratio:
    """Right drafts over those expected, the past forgotten bit by bit."""

    expected: float = 0.0
    right: float = 0.0

    def observe(self, chance: float, right: bool, memory: float) -> None:
        self.expected = self.expected * memory + chance
        self.right = self.right * memory + right

    def value(self, prior: float, weight: float) -> float:
        return (self.right + weight * prior) / (self.expected + weight)


class Calibration:
    """What one drafter's estimates are worth: of drafts given a chance, how many were right."""

    def __init__(self) -> None:
        self._bins = [_Ratio() for _ in range(NUM_BINS)]

    def chance(self, prob: float) -> float:
        """The chance of a draft of which the drafter says `prob`."""
        ratio = self._bin(prob).value(1.0, BIN_PRIOR * (prob or 1.0))
        return min(prob * ratio, MAX_CHANCE)

    def observe(self, prob: float, right: bool) -> None:
        """Learn from a draft that was verified after all before it were right."""
        self._bin(prob).observe(prob, right, WORKER_MEMORY)

    def _bin(self, prob: float) -> _Ratio:
        return self._bins[min(int(prob * NUM_BINS), NUM_BINS - 1)]


@dataclass(slots=True)
class _OfRequest:
    factor: _Ratio = field(default_factory=_Ratio)
    """Its drafts' luck beside the calibrated chances."""
    offered: tuple[str, tuple[float, ...], tuple[float, ...]] = ("", (), ())
    """Drafter, its estimates and their calibrated chances, of the drafts at hand."""


class Acceptance:
    """How likely each draft is to be accepted, learnt from those that were verified.

    The drafter says how sure it is; how far that is true is learnt for each drafter, and how much
    luckier or unluckier a request is than that, for each request, which begins as all are on its
    worker. When nothing was verified for a while, one draft is, so that a verdict is not for ever.
    """

    def __init__(self) -> None:
        self._drafters: dict[str, Calibration] = {}
        self._requests: dict[str, _OfRequest] = {}
        self._all = _Ratio()
        self._recent = _Ratio()
        self._extra = _Ratio()
        """Accepted drafts over decodes."""
        self._num_idle_steps = 0

    def chances(self, request_id: str, drafter: str, probs: Sequence[float]) -> tuple[float, ...]:
        """Chances of drafts of which the drafter says `probs`, each if all before are right."""
        calibration = self._drafters.setdefault(drafter, Calibration())
        of_request = self._requests.setdefault(request_id, _OfRequest())
        factor = of_request.factor.value(self._all.value(1.0, PRIOR_DRAFTS), PRIOR_DRAFTS)
        return tuple(min(calibration.chance(prob) * factor, MAX_CHANCE) for prob in probs)

    def offer(self, request_id: str, drafter: str, probs: Sequence[float]) -> None:
        """Note that these are the drafts at hand, which `verified` will speak of."""
        calibration = self._drafters[drafter]
        base = tuple(calibration.chance(prob) for prob in probs)
        self._requests[request_id].offered = drafter, tuple(probs), base

    def next_probe(self, offers: dict[str, tuple[float, ...]]) -> str | None:
        """Whose first draft to verify whatever it promises; None while drafts are verified anyhow.

        Called in each step that decodes, with the chances of the drafts by request.
        """
        self._num_idle_steps += 1
        if not offers or self._num_idle_steps % PROBE_STEPS:
            return None
        return max(offers, key=lambda request_id: offers[request_id][0])

    @property
    def is_resting(self) -> bool:
        """Whether drafts are of no use now: they cost more than they bring, or none is right."""
        to_probe = -self._num_idle_steps % PROBE_STEPS
        return self._num_idle_steps > REST_STEPS and to_probe > PROBE_LEAD_STEPS

    def verified(self, request_id: str, num_drafts: int, num_accepted: int) -> str | None:
        """Learn that of the request's drafts at hand the first `num_drafts` were verified.

        Returns whose they were; None if there were none.
        """
        of_request = self._requests.get(request_id)
        if of_request is None or not num_drafts:
            return None
        self._num_idle_steps = 0
        self._extra.right += num_accepted
        drafter, probs, base = of_request.offered
        # None after the first wrong one was looked at.
        for index in range(min(num_accepted + 1, num_drafts, len(probs))):
            right = index < num_accepted
            self._drafters[drafter].observe(probs[index], right)
            of_request.factor.observe(base[index], right, REQUEST_MEMORY)
            self._all.observe(base[index], right, WORKER_MEMORY)
            self._recent.observe(1.0, right, 1 - 1 / WINDOW)
        return drafter

    def count_decodes(self, num_decodes: int) -> None:
        """Note that a step had so many decodes, with drafts or without."""
        self._extra.expected = self._extra.expected * WORKER_MEMORY + num_decodes
        self._extra.right *= WORKER_MEMORY

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._requests.pop(request_id, None)

    @property
    def tokens_per_span(self) -> float:
        """Output tokens that a decode gave lately, drafts included."""
        return 1.0 + self._extra.value(0.0, 1.0)

    @property
    def rate(self) -> float:
        """Share of the drafts verified lately that were right; 1 before there were any."""
        return self._recent.value(1.0, 1.0)
