"""Plans a worker's steps, and learns from each one when it is over."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from scheduler.cost_model import CostModel
from scheduler.pace import Pace
from scheduler.policy import StepPolicy
from scheduler.prefill_queue import PrefillCost, QueuedPrefill, QueueReport
from scheduler.record import Recorder
from scheduler.request import RequestState
from scheduler.speculation import Acceptance
from scheduler.stage_policy import StageReport, late_prefills, weight
from scheduler.task import BatchPlan, Limits, Stage, StageTask, StepReport, StepView
from scheduler.work import ModelWork

TYPICAL_CHUNK = 2048
"""Tokens of a prompt in a step, by which the cost of prompts is told."""
FAR = 8192
"""Tokens of context by which it is told what a longer one costs."""
TYPICAL_SEQ_LEN = 512
"""Tokens of context of the decodes by which workers are compared."""


def generic_cost_model() -> CostModel:
    """Default for an unprofiled machine: 10 ms a step and 1 ms a token, to be corrected by use."""
    return CostModel([0.01, 0.001, 0.0, 0.0, 0.0, 0.0], token_knots=(0,), sample_knots=(0,))


class StepInFlight(NamedTuple):
    """A step from its plan to its output."""

    step: int
    plan: BatchPlan
    began_s: float
    tasks: tuple[StageTask, ...]
    preempted: frozenset[str]
    queued_s: tuple[tuple[str, float], ...]
    decided_s: float
    recorded: dict[str, Any] | None
    """The recorder's note of the decision, which its outcome completes."""


class StepPlanner:
    """The decisions of one worker: its step scheduler, and all that it learns from the outcomes.

    A worker's engine, the simulator and a replay drive the same object: `plan` decides, `begin`
    notes what is computed, `end` learns how long it took. Under async scheduling the next step is
    planned and begun before one ends. Steps end in the order they began.
    """

    def __init__(
        self,
        limits: Limits,
        policy: StepPolicy,
        cost_model: CostModel | None = None,
        *,
        learns: bool = True,
        on_step: Callable[[StepReport], object] | None = None,
    ) -> None:
        """Plan by `policy`; if it `learns`, it corrects `cost_model`, which then must be its own.

        `on_step` is called with the report of each step when it is over.
        """
        self.limits = limits
        self.acceptance = Acceptance()
        self.pace = Pace()
        """How its steps compare with what the profile predicts; unused without a profile."""
        self.is_calibrated = False
        self._policy = policy
        self._learns = learns
        self._on_step = on_step
        self._recorder: Recorder | None = None
        self._num_observed = 0
        """Recorded steps that the cost model has learnt from."""
        self._work: ModelWork | None = None
        self._begun: set[str] = set()
        """Requests that had a task and have not ended."""
        self._is_measured = cost_model is not None
        self._predict_with(cost_model or generic_cost_model())

    @property
    def needs_each_step(self) -> bool:
        """Whether anyone would miss the steps that are not begun and ended one by one."""
        return self._learns or self._on_step is not None or self._recorder is not None

    def calibrate(self, cost_model: CostModel | None, work: ModelWork) -> None:
        """Predict with what was measured of the engine, if it was, and count its `work`."""
        if cost_model is not None:
            self._predict_with(cost_model)
            self.is_calibrated = self._is_measured = True
        self._work = work

    def record(self, file: TextIO) -> None:
        """Write every decision to `file`; called while no step is in flight.

        The cost model starts again from its present weights: a record holds all that its decisions
        depend on.
        """
        self._predict_with(CostModel.from_dict(self.cost_model.to_dict()))
        self._recorder = Recorder(file, self._policy, self.limits, self.cost_model)

    def plan(self, view: StepView, now: float) -> BatchPlan:
        """Decide what the next step computes."""
        return self._scheduler.plan(view, now)

    def begin(
        self,
        view: StepView,
        plan: BatchPlan,
        now: float,
        *,
        tasks: tuple[StageTask, ...] | None = None,
        preempted: frozenset[str] | None = None,
        late: Sequence[RequestState] = (),
        decided_s: float = 0.0,
    ) -> StepInFlight:
        """Note the step that is computed now, `tasks` and `preempted` as planned if not given.

        `late` are the requests with a task that are missing in the view. Called before the states
        in the view change, and only for a step that computes something.
        """
        tasks = plan.tasks if tasks is None else tasks
        recorded = None
        if self._recorder:
            recorded = self._recorder.decision(
                view, plan, now, tasks=tasks, late=late, num_observed=self._num_observed
            )
        return StepInFlight(
            step=view.step,
            plan=plan,
            began_s=now,
            tasks=tasks,
            preempted=frozenset(plan.preempted) if preempted is None else preempted,
            queued_s=self._queued_s((*view.running, *view.waiting, *late), tasks, now),
            decided_s=decided_s,
            recorded=recorded,
        )

    def end(self, step: StepInFlight, measured_s: float, num_new_tokens: Mapping[str, int]) -> None:
        """Record a step that took `measured_s` seconds, learn from it and report it."""
        if self._recorder and step.recorded:
            self._recorder.write_step(step.recorded, measured_s, step.decided_s)
            self._num_observed += self._learns
        prefill = Stage.PREFILL
        decodes = [task for task in step.tasks if task.stage is not prefill]
        self.acceptance.count_decodes(len(decodes))
        if not (self._learns or self._on_step):
            return
        shape = self.cost_model.shape_of(step.tasks)
        if self.is_calibrated and (profiled_s := self.cost_model.profiled(shape)):
            ended_s = step.began_s + measured_s
            self.pace.observe(measured_s / profiled_s, measured_s, ended_s)
        if self._learns:
            self.cost_model.observe(shape, measured_s)
        if self._on_step:
            self._on_step(
                StepReport(
                    step=step.step,
                    began_s=step.began_s,
                    plan=step.plan,
                    tasks=step.tasks,
                    measured_s=measured_s,
                    decided_s=step.decided_s,
                    num_new_tokens=num_new_tokens,
                    preempted=step.preempted,
                    queued_s=step.queued_s,
                    num_flops=self._work.flops(shape) if self._work else 0.0,
                    num_bytes=self._work.memory_bytes(shape) if self._work else 0.0,
                )
            )

    def token_s(self) -> float | None:
        """Seconds of a token in a step full of decodes, by the profile; None without one."""
        if not self.is_calibrated:
            return None
        shape = self.cost_model.shape()
        for _ in range(self.limits.max_num_seqs):
            shape.add(1, TYPICAL_SEQ_LEN, 1)
        return self.cost_model.profiled(shape) / shape.num_tokens

    def queue_report(self, view: StepView, now: float) -> QueueReport:
        """What its requests are to placement.

        Those that were preempted, or come from another worker, prefill again before their next
        token.
        """
        prefills = {
            state.request.request_id: QueuedPrefill(
                state.num_new_tokens,
                state.num_tokens,
                state.due_s - now,
                state.request.priority,
            )
            for states in (view.running, view.waiting)
            for state in states
            if not state.is_decoding
        }
        decodes, tpot_s = self.cost_model.shape(), math.inf
        for state in view.running:
            if state.is_decoding:
                decodes.add(1, state.num_tokens, 1)
                tpot_s = min(tpot_s, state.request.slo.tpot_s)
        speed = self._speed(now)
        decode_s = self.cost_model.profiled(decodes) * speed if decodes.num_spans else 0.0
        if tpot_s < math.inf and view.policy.prefill_share < 1.0:
            # Steps with decodes last no longer, as if that were the target.
            tpot_s = min(tpot_s, decode_s + view.policy.prefill_share * tpot_s)
        return QueueReport(
            prefills=prefills,
            cost=self._prefill_cost(speed),
            num_decodes=decodes.num_spans,
            decode_s=decode_s,
            tpot_s=tpot_s,
            num_tokens=sum(
                state.num_tokens for states in (view.running, view.waiting) for state in states
            ),
            num_free_kv_tokens=view.num_free_kv_blocks * self.limits.kv_block_size,
        )

    def stage_report(
        self, running: Iterable[RequestState], queue: QueueReport, now: float
    ) -> StageReport:
        """What its requests are to the stage policy: those that run, and the queue of all."""
        prefills = queue.prefills.values()
        return StageReport(
            num_decodes=queue.num_decodes,
            work_s=queue.decode_s
            + sum(queue.cost.seconds(one.num_new_tokens, one.num_tokens) for one in prefills),
            late_decodes=sum(
                weight(state.request.priority)
                for state in running
                if state.is_decoding and _is_behind(state, now + queue.decode_s)
            ),
            late_prefills=late_prefills(queue),
        )

    def _speed(self, now: float) -> float:
        """How long steps take compared with the profile; with one, what it was before a pause is
        forgotten: a worker that is believed to be slow gets no request that could disprove it."""
        return self.pace.slowness(now) if self.is_calibrated else self.cost_model.speed

    def _prefill_cost(self, speed: float) -> PrefillCost:
        """Seconds that prompts add to steps which are made anyway."""
        num_tokens = min(TYPICAL_CHUNK, self.limits.max_num_batched_tokens)
        alone, first, later = (self.cost_model.shape() for _ in range(3))
        alone.add(1, 1, 1)
        first.add(num_tokens, num_tokens, 1)
        later.add(num_tokens, FAR + num_tokens, 1)
        first_s = self.cost_model.profiled(first)
        pair_s = (self.cost_model.profiled(later) - first_s) / (num_tokens * FAR)
        chunk_s = first_s - self.cost_model.profiled(alone) - pair_s * num_tokens**2 / 2
        token_s = max(chunk_s, 0.0) / num_tokens
        return PrefillCost(speed * token_s, speed * pair_s, self._is_measured)

    def finish(self, request_id: str, num_output_tokens: int) -> None:
        """Forget a request that has ended with `num_output_tokens` tokens."""
        self._begun.discard(request_id)
        self.acceptance.forget(request_id)
        if self._recorder:
            self._recorder.write_finish(request_id, num_output_tokens)

    def close(self) -> None:
        """End the record, if there is one."""
        if self._recorder:
            self._recorder.close()

    def _predict_with(self, cost_model: CostModel) -> None:
        self.cost_model = cost_model
        self._scheduler = self._policy.make(self.limits, cost_model)

    def _queued_s(
        self, states: Iterable[RequestState], tasks: Iterable[StageTask], now: float
    ) -> tuple[tuple[str, float], ...]:
        """Service class and queueing time of each request whose first task is among `tasks`."""
        begun, prefill = self._begun, Stage.PREFILL
        first = [
            task.request_id
            for task in tasks
            if task.stage is prefill and task.request_id not in begun
        ]
        if not first:
            return ()
        by_id = {state.request.request_id: state for state in states}
        queued = []
        for request_id in first:
            if state := by_id.get(request_id):  # a replay knows no late requests
                begun.add(request_id)
                queued.append((state.request.slo_class, max(now - state.arrival_s, 0.0)))
        return tuple(queued)


def _is_behind(state: RequestState, next_s: float) -> bool:
    """Whether a request, whose first token was on time, is too slow if the next one comes then."""
    slo = state.request.slo
    return (
        state.first_token_s <= state.arrival_s + slo.ttft_s
        and next_s > state.first_token_s + state.num_output_tokens * slo.tpot_s
    )
