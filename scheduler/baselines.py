"""Baselines: how others fill a step, behind the same interface as `HybridScheduler`.

None of them reads a target or a clock. The token budget of a baseline is the
`max_num_batched_tokens` of its limits.
"""

import math
import sys
from collections.abc import Iterable, Sequence

from scheduler.cost_model import CostModel
from scheduler.request import RequestState
from scheduler.step import Step
from scheduler.task import BatchPlan, Limits, Reason, StepView

NO_CHUNK = sys.maxsize
"""A chunk size that cuts no prompt."""


class StaticBudget:
    """vLLM's default: running requests in the order they came, then waiting ones, up to the budget.

    If `long_prefill_token_threshold` is not 0, no request takes more tokens than that in a step
    that it shares with others.
    """

    def __init__(
        self,
        limits: Limits,
        cost_model: CostModel,
        *,
        long_prefill_token_threshold: int = 0,
    ) -> None:
        self._limits = limits
        self._cost_model = cost_model
        self._threshold = long_prefill_token_threshold

    def plan(self, view: StepView, now: float) -> BatchPlan:
        """Make the next step."""
        step = Step(view, self._limits, self._cost_model)
        alone = len(view.running) + len(view.waiting) == 1
        chunk = NO_CHUNK if alone else self._threshold or NO_CHUNK
        take_running(step, view.running, chunk)
        admit_in_order(step, view.waiting, chunk)
        return step.plan(math.inf)


class DecodeFirst:
    """Sarathi-Serve: all decodes, then running prefills, then new ones, up to the budget.

    A. Agrawal et al., OSDI '24, algorithm 3.
    """

    def __init__(self, limits: Limits, cost_model: CostModel) -> None:
        self._limits = limits
        self._cost_model = cost_model

    def plan(self, view: StepView, now: float) -> BatchPlan:
        """Make the next step."""
        step = Step(view, self._limits, self._cost_model)
        take_running(step, sorted(view.running, key=lambda state: not state.is_decoding))
        admit_in_order(step, view.waiting)
        return step.plan(math.inf)


class PrefillFirst:
    """XY-Serve's paper: prefills take the budget, except for slots reserved for decodes.

    The decodes that have waited longest for a token take the slots (section 4.1, which gives no
    number of slots).
    """

    def __init__(self, limits: Limits, cost_model: CostModel, *, reserved_slots: int) -> None:
        self._limits = limits
        self._cost_model = cost_model
        self._reserved_slots = reserved_slots

    def plan(self, view: StepView, now: float) -> BatchPlan:
        """Make the next step."""
        step = Step(view, self._limits, self._cost_model)
        decodes = [state for state in view.running if state.is_decoding]
        prefills = [state for state in view.running if not state.is_decoding]
        num_reserved = min(len(decodes), self._reserved_slots, step.num_tokens_left)
        step.num_tokens_left -= num_reserved
        take_running(step, prefills)
        admit_in_order(step, view.waiting)
        step.num_tokens_left += num_reserved
        take_running(step, sorted(decodes, key=lambda state: state.last_token_s))
        return step.plan(math.inf)


def take_running(step: Step, states: Iterable[RequestState], chunk: int = NO_CHUNK) -> None:
    """Take as many tokens of each request as the step has room for, drafts included."""
    for state in states:
        num_drafts = state.num_drafts if state.is_decoding else 0
        step.take_running(state, min(state.num_new_tokens + num_drafts, chunk))


def admit_in_order(step: Step, states: Sequence[RequestState], chunk: int = NO_CHUNK) -> None:
    """Admit requests in order until one does not fit; none may pass it."""
    for index, state in enumerate(states):
        if step.admit(state, min(state.num_new_tokens, chunk)) is not None:
            step.defer_rest(states[index:], Reason.BEHIND)
            return
