"""A step in the making, which takes spans while tokens, seats and KV blocks last."""

from collections.abc import Callable, Iterable
from typing import Any

from scheduler.cost_model import CostModel
from scheduler.request import RequestState
from scheduler.task import BatchPlan, Deferral, Limits, Reason, Stage, StageTask, StepView

VictimOrder = Callable[[RequestState], Any]
"""Sort key of running requests; the one with the greatest is preempted first."""


def latest_of_lowest_priority(state: RequestState) -> tuple[int, float]:
    """vLLM's order of preemption."""
    return state.request.priority, state.arrival_s


class Step:
    """Builds a plan. Every scheduler uses it, so that none can exceed a limit."""

    def __init__(
        self,
        view: StepView,
        limits: Limits,
        cost_model: CostModel,
        *,
        victim_order: VictimOrder = latest_of_lowest_priority,
    ) -> None:
        self.shape = cost_model.shape()
        self.num_tokens_left = limits.max_num_batched_tokens
        self._limits = limits
        self._cost_model = cost_model
        self._victim_order = victim_order
        self._running = {state.request.request_id: state for state in view.running}
        self._admitted: list[RequestState] = []
        self._num_free_blocks = view.num_free_kv_blocks
        self._num_shared_blocks = view.num_shared_kv_blocks
        self._tasks: dict[str, StageTask] = {}
        self._deferred: dict[str, Reason] = {}
        self._preempted: list[str] = []

    def __contains__(self, state: RequestState) -> bool:
        return state.request.request_id in self._tasks

    @property
    def is_empty(self) -> bool:
        """Whether the step has no task yet."""
        return not self._tasks

    def take_running(self, state: RequestState, num_tokens: int) -> bool:
        """Take up to `num_tokens` tokens of a running request; False if none fits.

        While the KV cache has no room, admissions are undone and requests preempted, if need be
        this one.
        """
        request_id = state.request.request_id
        if request_id not in self._running:  # preempted
            return False
        num_tokens = min(num_tokens, self.num_tokens_left)
        if num_tokens <= 0:
            self.defer(state, Reason.TOKENS)
            return False
        while self._new_blocks(state, num_tokens) > self._num_free_blocks:
            if self._admitted:
                self._undo_admission(self._admitted.pop())
                continue
            victim = max(self._running.values(), key=self._victim_order)
            self._preempt(victim)
            if victim is state:
                return False
        self._add(state, num_tokens)
        return True

    def admit(self, state: RequestState, num_tokens: int) -> Reason | None:
        """Take up to `num_tokens` tokens of a waiting request; returns the reason if none is taken.

        As in vLLM, a request is admitted only if all its tokens fit into the KV cache, and none is
        in a step that preempts.
        """
        reason = None
        if self.num_tokens_left <= 0 or num_tokens <= 0:
            reason = Reason.TOKENS
        elif len(self._running) >= self._limits.max_num_seqs:
            reason = Reason.SEATS
        elif self._preempted or self._limits.num_blocks(state.num_tokens) > self._num_free_blocks:
            reason = Reason.KV
        if reason is not None:
            self.defer(state, reason)
            return reason
        self._running[state.request.request_id] = state
        self._admitted.append(state)
        # Until now the blocks of a prefix hit may have been counted as free.
        self._num_free_blocks -= self._limits.num_blocks(state.num_computed_tokens)
        self._add(state, min(num_tokens, self.num_tokens_left))
        return None

    def extend(self, state: RequestState, num_drafts: int) -> None:
        """Add the next `num_drafts` drafts of a request that decodes in this step, if they fit."""
        num_tokens = 1 + min(num_drafts, self.num_tokens_left)
        if num_tokens > 1 and self._new_blocks(state, num_tokens) <= self._num_free_blocks + (
            self._new_blocks(state, 1)
        ):
            self._remove(state)
            self._add(state, num_tokens)

    def defer(self, state: RequestState, reason: Reason) -> None:
        """Note why a request gets no task; the first reason is kept."""
        self._deferred.setdefault(state.request.request_id, reason)

    def defer_rest(self, states: Iterable[RequestState], reason: Reason) -> None:
        """Note one reason for all of `states` that have no task."""
        for state in states:
            if state not in self:
                self.defer(state, reason)

    def plan(self, limit_s: float) -> BatchPlan:
        """The finished plan; `limit_s` is the longest duration that the targets allow."""
        return BatchPlan(
            tasks=tuple(self._tasks.values()),
            deferred=tuple(
                Deferral(request_id, reason)
                for request_id, reason in self._deferred.items()
                if request_id not in self._tasks
            ),
            preempted=tuple(self._preempted),
            predicted_s=self._cost_model.predict(self.shape),
            limit_s=limit_s,
        )

    def _new_blocks(self, state: RequestState, num_tokens: int) -> int:
        computed = state.num_computed_tokens
        return self._limits.num_blocks(computed + num_tokens) - self._limits.num_blocks(computed)

    def _add(self, state: RequestState, num_tokens: int) -> None:
        request_id = state.request.request_id
        decode = Stage.DECODE if num_tokens == 1 else Stage.VERIFY
        stage = decode if state.is_decoding else Stage.PREFILL
        seq_len = state.num_computed_tokens + num_tokens
        samples = seq_len >= state.num_tokens
        task = StageTask(request_id, stage, num_tokens, seq_len, samples)
        self._tasks[request_id] = task
        self.shape.add_task(task)
        self.num_tokens_left -= num_tokens
        self._num_free_blocks -= self._new_blocks(state, num_tokens)

    def _remove(self, state: RequestState) -> None:
        task = self._tasks.pop(state.request.request_id)
        self.num_tokens_left += task.num_tokens
        self._num_free_blocks += self._new_blocks(state, task.num_tokens)
        self.shape = self._cost_model.shape_of(self._tasks.values())

    def _undo_admission(self, state: RequestState) -> None:
        del self._running[state.request.request_id]
        self._remove(state)
        self._num_free_blocks += self._limits.num_blocks(state.num_computed_tokens)
        self.defer(state, Reason.KV)

    def _preempt(self, victim: RequestState) -> None:
        request_id = victim.request.request_id
        del self._running[request_id]
        if request_id in self._tasks:
            self._remove(victim)
        num_blocks = self._limits.num_blocks(victim.num_computed_tokens)
        self._num_free_blocks += num_blocks - self._num_shared_blocks.get(request_id, 0)
        self._preempted.append(request_id)
        self._deferred[request_id] = Reason.PREEMPTED
