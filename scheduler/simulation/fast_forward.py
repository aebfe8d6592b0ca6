"""Steady steps taken at once: while no request comes or ends, each decodes one token of all."""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import accumulate

from scheduler.cost_model import CostModel
from scheduler.request import RequestState
from scheduler.simulation.noise import Noise
from scheduler.step_planner import StepPlanner
from scheduler.task import BatchPlan, Stage, StepView

MAX_JUMP = 64
"""Maximum number of steps in a jump if requests have targets: only its last step is planned, and
the scheduler might decide otherwise in between."""
MAX_JUMP_WITHOUT_TARGETS = 4096
"""Maximum number of steps in a jump if no request has a target; only memory bounds it."""


@dataclass(slots=True, kw_only=True)
class Jump:
    """Steady steps under way."""

    began_s: float
    seconds: list[float]
    ends: list[float]
    num_steps: int
    """Number of steps taken; fewer than `seconds` has once a request has arrived."""
    predicted_s: float
    """Predicted seconds of the first step."""
    longer_s: float
    """Predicted seconds by which each step is longer than the one before, as each request has one
    more token of context."""
    num_grown: int = 0
    """Steps whose KV blocks are held."""

    @property
    def end_s(self) -> float:
        """End of its last step."""
        return self.ends[self.num_steps - 1]

    @property
    def busy_s(self) -> float:
        """Seconds of its steps."""
        return math.fsum(self.seconds[: self.num_steps])

    def num_done(self, now: float) -> int:
        """Steps that are over before `now`."""
        return min(bisect_left(self.ends, now), self.num_steps)

    def cut(self, now: float) -> bool:
        """End with the step in flight at `now`; returns whether that is earlier than before."""
        num_steps = bisect_left(self.ends, now) + 1
        if num_steps >= self.num_steps:
            return False
        self.num_steps = num_steps
        return True


class FastForward:
    """Finds the jumps of one worker."""

    def __init__(self, planner: StepPlanner, truth: CostModel, noise: Noise | None) -> None:
        """`planner` makes the plans; `truth` is how long steps really take, times `noise`."""
        self._planner = planner
        self._limits = planner.limits
        self._truth = truth
        self._noise = noise

    def jump(self, view: StepView, plan: BatchPlan, now: float, max_steps: int) -> Jump | None:
        """Up to `max_steps` steps that follow the steady `plan`, each one token further.

        If requests have targets, the last step is planned too, to check that it is still steady.
        None if there are fewer than two such steps.
        """
        # A single request has no other plan.
        may_change = len(view.running) > 1 and any(map(_has_targets, view.running))
        num_steps = min(max_steps, MAX_JUMP if may_change else MAX_JUMP_WITHOUT_TARGETS)
        while num_steps > 1 and self._new_blocks(view, num_steps) > view.num_free_kv_blocks:
            num_steps //= 2
        if num_steps < 2:
            return None
        seconds, longer_s = self._seconds(view, plan, num_steps)
        ends = list(accumulate(seconds, initial=now))[1:]
        while may_change and not self._is_steady_at(num_steps - 1, view, ends):
            num_steps //= 2
            if num_steps < 2:
                return None
        return Jump(
            began_s=now,
            seconds=seconds,
            ends=ends,
            num_steps=num_steps,
            predicted_s=plan.predicted_s,
            longer_s=longer_s,
        )

    def _new_blocks(self, view: StepView, num_steps: int) -> int:
        num_blocks = self._limits.num_blocks
        return sum(
            num_blocks(state.num_computed_tokens + num_steps)
            - num_blocks(state.num_computed_tokens)
            for state in view.running
        )

    def _seconds(
        self, view: StepView, plan: BatchPlan, num_steps: int
    ) -> tuple[list[float], float]:
        """Seconds of consecutive steps, and how much longer each is than the one before."""
        shape = self._truth.shape_of(plan.tasks)
        first_s = self._truth.predict(shape)
        shape.num_kv_reads += len(plan.tasks)
        shape.num_pairs += len(plan.tasks)
        longer_s = self._truth.predict(shape) - first_s
        seconds = [first_s + longer_s * step for step in range(num_steps)]
        if self._noise is not None:
            factors = self._noise.factors(view.step, num_steps)
            seconds = [s * factor for s, factor in zip(seconds, factors, strict=True)]
        return seconds, longer_s

    def _is_steady_at(self, num_steps: int, view: StepView, ends: list[float]) -> bool:
        """Whether the plan `num_steps` steps later is the same as now, one token further."""
        now = ends[num_steps - 1]
        later = StepView(
            step=view.step + num_steps,
            running=[advanced(state, num_steps, now) for state in view.running],
            waiting=view.waiting,
            num_free_kv_blocks=view.num_free_kv_blocks - self._new_blocks(view, num_steps),
            policy=view.policy,
        )
        plan = self._planner.plan(later, now)
        return is_steady(plan, later)


def is_steady(plan: BatchPlan, view: StepView) -> bool:
    """Whether a step decodes all requests and does nothing else."""
    decode = Stage.DECODE
    return (
        not view.waiting
        and 0 < len(plan.tasks) == len(view.running)
        and all(task.stage is decode for task in plan.tasks)
    )


def _has_targets(state: RequestState) -> bool:
    slo = state.request.slo
    return slo.ttft_s < math.inf or slo.tpot_s < math.inf


def advanced(state: RequestState, num_steps: int, now: float) -> RequestState:
    """The request after `num_steps` decodes, the last of which ended `now`."""
    return replace(
        state,
        num_output_tokens=state.num_output_tokens + num_steps,
        num_computed_tokens=state.num_computed_tokens + num_steps,
        last_token_s=now,
    )
