"""How many drafts each request may have verified in a step."""

import heapq
from collections.abc import Iterable

from scheduler.cost_model import CostModel
from scheduler.request import RequestState
from scheduler.step import Step


def add_drafts(
    step: Step, states: Iterable[RequestState], cost_model: CostModel, limit_s: float
) -> None:
    """Extend decodes of `step` by drafts while that raises the tokens expected per second.

    Draft k of a request comes out as a token if it and all before it are accepted, so with the
    acceptance rate to the power of k. The likeliest draft of all goes first, and the last one taken
    is the last that raises (decodes + expected accepted drafts) / (predicted seconds), the measure
    of X. Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using
    Goodput" (2024). The step never gets longer than `limit_s` seconds by them.
    """
    decodes = [state for state in states if state in step and state.num_drafts > 0]
    candidates = [
        (-state.acceptance_rate, index, 1) for index, state in enumerate(decodes)
    ]  # least first
    heapq.heapify(candidates)
    num_drafts = [0] * len(decodes)
    shape = step.shape
    expected = float(shape.num_samples)
    seconds = cost_model.predict(shape)
    num_left = step.num_tokens_left
    while candidates and num_left > 0:
        loss, index, position = heapq.heappop(candidates)
        state = decodes[index]
        longer = shape.longer(state.num_tokens + position)
        longer_s = cost_model.predict(longer)
        if longer_s > limit_s or (expected - loss) * seconds <= expected * longer_s:
            break
        shape, seconds, expected, num_left = longer, longer_s, expected - loss, num_left - 1
        num_drafts[index] = position
        if position < state.num_drafts:
            heapq.heappush(candidates, (loss * state.acceptance_rate, index, position + 1))
    for state, count in zip(decodes, num_drafts, strict=True):
        if count:
            step.extend(state, count)
