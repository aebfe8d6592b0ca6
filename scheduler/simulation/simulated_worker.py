"""A simulated worker: executes its planner's steps on a KV cache, in predicted time."""

from bisect import bisect_right
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from scheduler.cost_model import StepShape
from scheduler.prefill_queue import QueueReport
from scheduler.request import RequestState
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.device import DeviceProfile
from scheduler.simulation.fast_forward import FastForward, Jump, advanced, is_steady
from scheduler.simulation.kv_cache import Holding, KvCache, KvCacheFull
from scheduler.simulation.noise import Noise
from scheduler.simulation.plan_check import BrokenPlan, check
from scheduler.stage_policy import FollowedPolicy, StageReport
from scheduler.step_planner import StepInFlight, StepPlanner
from scheduler.task import BatchPlan, Stage, StageTask, StepView


class SimulationError(Exception):
    """A plan broke a limit, or no request makes progress: a bug in a scheduler."""


class StepRecord(NamedTuple):
    """One step of a worker."""

    began_s: float
    seconds: float
    predicted_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_verify_tokens: int
    num_requests: int


@dataclass(slots=True, kw_only=True)
class LiveRequest:
    """A request on its worker."""

    arrival: Arrival
    index: int
    """Position in the list of arrivals."""
    state: RequestState
    holding: Holding
    random: Random | None
    """Draws which of its drafts are accepted."""
    draft_chances: tuple[float, ...] = ()
    """Chances of the drafts at hand in each decode."""
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    is_admitted: bool = False

    @property
    def num_left(self) -> int:
        """Output tokens still to come."""
        return self.arrival.num_output_tokens - self.state.num_output_tokens


class SimulatedWorker:
    """One worker: its planner, its requests and its KV cache."""

    def __init__(
        self,
        worker_id: str,
        device: DeviceProfile,
        planner: StepPlanner,
        *,
        noise: Noise | None = None,
        fast_forward: bool = True,
        log: list[StepRecord] | None = None,
    ) -> None:
        """Steps take as long as `device` predicts, times `noise`; each is appended to `log`.

        With `fast_forward`, steady steps are taken at once, unless `planner` needs each of them.
        """
        self.worker_id = worker_id
        self.policy = FollowedPolicy()
        self.kv = KvCache(device.limits.num_kv_blocks, device.limits.kv_block_size)
        self.live: dict[str, LiveRequest] = {}
        self.num_outstanding_tokens = 0
        self.begins_soon = False
        self.version = 0
        """Version of the event that ends its step; events of other versions are out of date."""
        self.num_steps = 0
        self.num_query_tokens = 0
        self.num_spans = 0
        self.busy_s = 0.0
        self.num_preemptions = 0
        self.jump: Jump | None = None
        self.step: tuple[StepInFlight, float] | None = None
        """The step in flight and its seconds; None in a jump and between steps."""
        self.neighbours: list[SimulatedWorker] = []
        """Other workers on its machine."""
        self.log = log
        self._truth = device.cost_model
        self._crowded = device.crowded_cost_model
        self._limits = device.limits
        self._planner = planner
        self._noise = noise
        self._fast_forward: FastForward | None = None
        if fast_forward and not planner.needs_each_step and self._crowded is None:
            self._fast_forward = FastForward(planner, device.cost_model, noise)
        self._num_kv_tokens = device.num_kv_tokens
        self._running: list[RequestState] = []
        self._waiting: list[RequestState] = []
        self._waiting_ranks: list[tuple[bool, int, float, int]] = []

    @property
    def is_busy(self) -> bool:
        """Whether a step is in flight."""
        return self.step is not None or self.jump is not None

    def outstanding_at(self, now: float) -> int:
        """Tokens its requests may still need, counting the steps that are over before `now`."""
        if self.jump is None:
            return self.num_outstanding_tokens
        return self.num_outstanding_tokens - self.jump.num_done(now) * len(self._running)

    def reports(self, now: float) -> tuple[QueueReport, StageReport]:
        """What it reports of its queue, and of its stages."""
        for state in self._waiting:
            live = self.live[state.request.request_id]
            state.num_computed_tokens = self.kv.num_hit_tokens(live.holding, state.num_tokens)
        running = self._running
        if self.jump:
            num_done = self.jump.num_done(now)
            self._grow_in(self.jump, min(num_done + 1, self.jump.num_steps))
            running = [advanced(state, num_done, now) for state in running]
        view = StepView(
            step=self.num_steps,
            running=running,
            waiting=self._waiting,
            num_free_kv_blocks=self.kv.num_free,
            policy=self.policy.at(now),
        )
        queue = self._planner.queue_report(view, now)
        return queue, self._planner.stage_report(running, queue, now)

    def add(self, live: LiveRequest) -> None:
        """Take a new request."""
        self.live[live.arrival.request.request_id] = live
        self.num_outstanding_tokens += live.state.request.num_outstanding_tokens()
        self._wait(live)

    def cut_jump(self, now: float) -> float | None:
        """End the jump with the step in flight; returns its end if that is earlier than before.

        A request that arrives `now` is part of the next plan.
        """
        if self.jump is None or not self.jump.cut(now):
            return None
        return self.jump.end_s

    def begin(self, now: float) -> float | None:
        """Plan the next step, or the next steps if they are steady; returns their end.

        None if there is nothing to do, or nothing fits.
        """
        for _ in range(2):  # a plan that only preempts is followed by another one at once
            if not self.live:
                return None
            for state in self._waiting:
                live = self.live[state.request.request_id]
                state.num_computed_tokens = self.kv.num_hit_tokens(live.holding, state.num_tokens)
            view = StepView(
                step=self.num_steps,
                running=self._running,
                waiting=self._waiting,
                num_free_kv_blocks=self.kv.num_free,
                num_shared_kv_blocks=self._num_shared_blocks(),
                policy=self.policy.at(now),
            )
            plan = self._planner.plan(view, now)
            try:
                check(plan, view, self._limits)
            except BrokenPlan as error:
                raise SimulationError(f"{self.worker_id}: {error}") from error
            if self._fast_forward and is_steady(plan, view):
                num_left = min(live.num_left for live in self.live.values())
                if jump := self._fast_forward.jump(view, plan, now, num_left):
                    self.jump = jump
                    return jump.end_s
            step = self._planner.begin(view, plan, now) if plan.tasks else None
            self._apply(plan)
            if step:
                return self._begin_step(step)
            if not plan.preempted:
                return None
        raise SimulationError(f"{self.worker_id} preempts twice and computes nothing: {plan}")

    def finish(self, now: float) -> list[LiveRequest]:
        """End the step or the jump; returns the requests that got their last token."""
        if self.jump is not None:
            return self._finish_jump()
        assert self.step is not None
        (step, seconds), self.step = self.step, None
        ended = []
        num_new_tokens = {}
        for task in step.tasks:
            live = self.live[task.request_id]
            num_tokens = self._advance(live, task)
            if num_tokens:
                num_new_tokens[task.request_id] = num_tokens
                if self._emit(live, num_tokens, now):
                    ended.append(live)
        self._planner.end(step, seconds, num_new_tokens)
        self._remove(ended)
        return ended

    def _num_shared_blocks(self) -> dict[str, int]:
        """Blocks of running requests that others hold too, unless there is room for any step."""
        num_tokens = self._limits.max_num_batched_tokens
        if self.kv.num_free >= self._limits.num_blocks(num_tokens) + len(self._running):
            return {}
        return {
            request_id: num_shared
            for request_id, live in self.live.items()
            if live.is_admitted and (num_shared := self.kv.num_shared_blocks(live.holding))
        }

    def _wait(self, live: LiveRequest) -> None:
        state = live.state
        rank = (not live.num_preemptions, state.request.priority, state.arrival_s, live.index)
        place = bisect_right(self._waiting_ranks, rank)
        self._waiting_ranks.insert(place, rank)
        self._waiting.insert(place, state)

    def _apply(self, plan: BatchPlan) -> None:
        """Take and free seats and KV blocks as the plan says."""
        for request_id in plan.preempted:
            self._preempt(request_id)
        admitted = [
            live for task in plan.tasks if not (live := self.live[task.request_id]).is_admitted
        ]
        for live in admitted:
            self._admit(live)
        # All hits are held before any block is evicted, or they might be evicted.
        for task in plan.tasks:
            self._grow(self.live[task.request_id], task.seq_len)

    def _preempt(self, request_id: str) -> None:
        live = self.live[request_id]
        self.kv.release(live.holding)
        live.is_admitted = False
        live.num_preemptions += 1
        self.num_preemptions += 1
        live.state.num_computed_tokens = 0
        live.state.draft_chances = ()
        self._running = [state for state in self._running if state is not live.state]
        self._wait(live)

    def _admit(self, live: LiveRequest) -> None:
        state = live.state
        live.is_admitted = True
        self.kv.take_hits(live.holding, state.num_computed_tokens)
        if not live.num_preemptions:
            live.num_cached_tokens = state.num_computed_tokens
        index = next(i for i, waiting in enumerate(self._waiting) if waiting is state)
        del self._waiting[index], self._waiting_ranks[index]
        self._running.append(state)

    def _grow_in(self, jump: Jump, num_steps: int) -> None:
        """Hold the blocks that the first `num_steps` steps of a jump need: those of a step are
        taken when it begins."""
        for state in self._running:
            live = self.live[state.request.request_id]
            num_held = state.num_computed_tokens + jump.num_grown
            self._grow(live, state.num_computed_tokens + num_steps, num_held)
        jump.num_grown = num_steps

    def _grow(self, live: LiveRequest, num_tokens: int, num_held: int | None = None) -> None:
        """Hold as many blocks as `num_tokens` tokens need, if those of `num_held` tokens, by
        default the computed ones, are held."""
        num_blocks = self._limits.num_blocks
        if num_held is None:
            num_held = live.state.num_computed_tokens
        num_new = num_blocks(num_tokens) - num_blocks(num_held)
        try:
            if num_new:
                self.kv.grow(live.holding, num_new)
        except KvCacheFull as error:
            raise SimulationError(f"{self.worker_id}: the KV cache is full: {error}") from error

    def _begin_step(self, step: StepInFlight) -> float:
        shape = self._truth.shape_of(step.tasks)
        seconds = self._seconds(shape)
        if self._noise is not None:
            seconds *= self._noise.factors(self.num_steps, 1)[0]
        if self.log is not None:
            self.log.append(_record(step, seconds))
        self.step = step, seconds
        self.num_steps += 1
        self.num_query_tokens += shape.num_tokens
        self.num_spans += shape.num_spans
        self.busy_s += seconds
        return step.began_s + seconds

    def _seconds(self, shape: StepShape) -> float:
        """Seconds of a step, given how many neighbours compute."""
        seconds = self._truth.predict(shape)
        if self._crowded is None or not self.neighbours:
            return seconds
        share = sum(worker.is_busy for worker in self.neighbours) / len(self.neighbours)
        return seconds + share * (self._crowded.predict(shape) - seconds)

    def _advance(self, live: LiveRequest, task: StageTask) -> int:
        """Apply a request's task to its state; returns the number of new output tokens."""
        state = live.state
        if task.stage is Stage.VERIFY:
            num_tokens = 1
            while (
                num_tokens < min(task.num_tokens, live.num_left)
                and live.random is not None
                and live.random.random() < state.draft_chances[num_tokens - 1]
            ):
                num_tokens += 1
            # The blocks of rejected drafts are freed.
            held = self._limits.num_blocks(task.seq_len)
            state.num_computed_tokens += num_tokens
            self.kv.grow(live.holding, self._limits.num_blocks(state.num_computed_tokens) - held)
            return num_tokens
        state.num_computed_tokens = task.seq_len
        self.kv.publish(live.holding, task.seq_len)
        return int(task.samples)

    def _emit(self, live: LiveRequest, num_tokens: int, now: float) -> bool:
        """Give a request new tokens; returns whether it has ended."""
        state = live.state
        if state.num_output_tokens == 0:
            state.first_token_s = now
            self.num_outstanding_tokens -= state.request.num_prompt_tokens
        state.num_output_tokens += num_tokens
        state.last_token_s = now
        if live.draft_chances:
            num_left = state.request.max_tokens - state.num_output_tokens
            room = self._num_kv_tokens - state.num_tokens
            state.draft_chances = live.draft_chances[: max(0, min(num_left - 1, room))]
        self.num_outstanding_tokens -= num_tokens
        return live.num_left == 0

    def _remove(self, ended: list[LiveRequest]) -> None:
        if not ended:
            return
        gone = {id(live.state) for live in ended}
        # In the order of admission, in a jump and in a step: it is that of eviction.
        for state in self._running:
            if id(state) not in gone:
                continue
            request = state.request
            live = self.live[request.request_id]
            self.kv.release(live.holding)
            del self.live[request.request_id]
            self._planner.finish(request.request_id, live.state.num_output_tokens)
            self.num_outstanding_tokens -= request.num_outstanding_tokens(
                live.state.num_output_tokens
            )
        self._running = [state for state in self._running if id(state) not in gone]

    def _finish_jump(self) -> list[LiveRequest]:
        assert self.jump is not None
        jump, self.jump = self.jump, None
        num_steps, num_running = jump.num_steps, len(self._running)
        if self.log is not None:
            self.log += _records(jump, num_running)
        self.num_steps += num_steps
        self.num_query_tokens += num_steps * num_running
        self.num_spans += num_steps * num_running
        self.busy_s += jump.busy_s
        self.num_outstanding_tokens -= num_steps * num_running
        self._grow_in(jump, num_steps)
        ended = []
        for state in self._running:  # a request that arrived meanwhile waits
            live = self.live[state.request.request_id]
            state.num_computed_tokens += num_steps
            state.num_output_tokens += num_steps
            state.last_token_s = jump.end_s
            if live.num_left == 0:
                ended.append(live)
        self._remove(ended)
        return ended


def _record(step: StepInFlight, seconds: float) -> StepRecord:
    tokens = dict.fromkeys(Stage, 0)
    for task in step.tasks:
        tokens[task.stage] += task.num_tokens
    return StepRecord(
        began_s=step.began_s,
        seconds=seconds,
        predicted_s=step.plan.predicted_s,
        num_prefill_tokens=tokens[Stage.PREFILL],
        num_decode_tokens=tokens[Stage.DECODE],
        num_verify_tokens=tokens[Stage.VERIFY],
        num_requests=len(step.tasks),
    )


def _records(jump: Jump, num_running: int) -> list[StepRecord]:
    """The steps of a jump, one by one."""
    begins = [jump.began_s, *jump.ends]
    return [
        StepRecord(
            began_s=begins[step],
            seconds=jump.seconds[step],
            predicted_s=jump.predicted_s + step * jump.longer_s,
            num_prefill_tokens=0,
            num_decode_tokens=num_running,
            num_verify_tokens=0,
            num_requests=num_running,
        )
        for step in range(jump.num_steps)
    ]
