"""A worker in simulation: its scheduler's plans carried out on a KV cache, in predicted time."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import NamedTuple

import numpy as np

from scheduler.cost_model import CostModel, StepShape
from scheduler.request import RequestState, Slo
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.device import DeviceProfile
from scheduler.simulation.kv_cache import Holding, KvCache, KvCacheFull
from scheduler.task import BatchPlan, Stage, StageTask, StepScheduler, StepView

MAX_JUMP = 64
"""Steps that are taken at once, at most, where a scheduler may change its mind about targets."""
MAX_JUMP_WITHOUT_TARGETS = 4096
"""The same where none has any."""
NO_TARGETS = Slo()


class SimulationError(Exception):
    """A plan broke a limit, or nothing moves any more: a bug of a scheduler, not of its user."""


class StepRecord(NamedTuple):
    """One step of a worker."""

    began_s: float
    seconds: float
    predicted_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_verify_tokens: int
    num_requests: int


@dataclass(slots=True)
class LiveRequest:
    """A request on its worker."""

    arrival: Arrival
    index: int
    """Place in the list of arrivals."""
    state: RequestState
    holding: Holding
    random: Random | None
    """Decides which of its drafts are accepted."""
    draft_chances: tuple[float, ...] = ()
    """Of the drafts that are at hand for each next token."""
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    is_admitted: bool = False

    @property
    def num_left(self) -> int:
        """Output tokens still to come."""
        return self.arrival.num_output_tokens - self.state.num_output_tokens


class Noise:
    """Factors of step times, the same for a step whether it is taken alone or in a jump."""

    def __init__(self, sigma: float, seed: Sequence[int]) -> None:
        self._sigma = sigma
        self._generator = np.random.default_rng(seed)
        self._factors: list[float] = []
        self._first = 0

    def factors(self, step: int, count: int) -> list[float]:
        """Those of `count` steps from `step` on; earlier ones are not asked for again."""
        while self._first + len(self._factors) < step + count:
            passed = min(step - self._first, len(self._factors))
            del self._factors[:passed]
            self._first += passed
            drawn = self._generator.normal(-(self._sigma**2) / 2, self._sigma, 1024)
            self._factors += np.exp(drawn).tolist()
        return self._factors[step - self._first : step - self._first + count]


@dataclass(slots=True)
class _Jump:
    """Steady steps that are under way: each decodes one token of all that run."""

    began_s: float
    seconds: list[float]
    ends: list[float]
    num_steps: int
    """How many of them are taken; fewer than were planned once a request came."""
    predicted: tuple[float, float]
    """Of the first step, and how much longer each next one is."""

    def num_done(self, now: float) -> int:
        """Steps that are over before `now`."""
        return min(bisect_left(self.ends, now), self.num_steps)


class SimulatedWorker:
    """One worker: its scheduler, its requests and its KV cache."""

    def __init__(
        self,
        worker_id: str,
        device: DeviceProfile,
        scheduler: StepScheduler,
        learning: CostModel | None,
        noise: Noise | None,
        fast_forward: bool,
        log: list[StepRecord] | None,
    ) -> None:
        self.worker_id = worker_id
        self.kv = KvCache(device.limits.num_kv_blocks, device.limits.kv_block_size)
        self.live: dict[str, LiveRequest] = {}
        self.num_outstanding_tokens = 0
        self.begins_soon = False
        self.version = 0
        """Of the event that ends its step; others are out of date."""
        self.num_steps = 0
        self.num_query_tokens = 0
        self.num_spans = 0
        self.busy_s = 0.0
        self.num_preemptions = 0
        self.jump: _Jump | None = None
        self.plan: BatchPlan | None = None
        """The step under way, if it is not a jump."""
        self.neighbours: list[SimulatedWorker] = []
        """The others on its machine."""
        self._truth = device.cost_model
        self._crowded = device.crowded_cost_model
        self._limits = device.limits
        self._scheduler = scheduler
        self._learning = learning
        self._noise = noise
        self._fast_forward = fast_forward and learning is None and self._crowded is None
        self._num_kv_tokens = device.num_kv_tokens
        self.log = log
        self._running: list[RequestState] = []
        self._waiting: list[RequestState] = []
        self._waiting_ranks: list[tuple[bool, int, float, int]] = []
        self._num_with_targets = 0

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way."""
        return self.plan is not None or self.jump is not None

    def outstanding_at(self, now: float) -> int:
        """Tokens its requests may still need, by the steps that are over before `now`."""
        if self.jump is None:
            return self.num_outstanding_tokens
        return self.num_outstanding_tokens - self.jump.num_done(now) * len(self._running)

    def add(self, live: LiveRequest) -> None:
        """Take a new request."""
        self.live[live.arrival.request.request_id] = live
        self.num_outstanding_tokens += live.state.request.num_outstanding_tokens()
        self._num_with_targets += live.state.request.slo != NO_TARGETS
        self._wait(live)

    def cut_jump(self, now: float) -> float | None:
        """End the jump with the step that is under way; returns when, if it is earlier than before.

        A request that came `now` is part of the next plan.
        """
        if self.jump is None:
            return None
        num_steps = bisect_left(self.jump.ends, now) + 1
        if num_steps >= self.jump.num_steps:
            return None
        self.jump.num_steps = num_steps
        return self.jump.ends[num_steps - 1]

    def begin(self, now: float) -> float | None:
        """Plan the next step, or the next steps if they are steady; returns when they end.

        None if there is nothing to do, or nothing fits.
        """
        for _ in range(2):
            if not self.live:
                return None
            for state in self._waiting:
                live = self.live[state.request.request_id]
                state.num_computed_tokens = self.kv.num_hit_tokens(live.holding, state.num_tokens)
            view = StepView(
                self.num_steps,
                self._running,
                self._waiting,
                self.kv.num_free,
                self._num_shared_blocks(),
            )
            plan = self._scheduler.plan(view, now)
            if (end_s := self._begin_jump(plan, now)) is not None:
                return end_s
            self._apply(plan)
            if plan.tasks:
                return self._begin_step(plan, now)
            if not plan.preempted:
                return None
        raise SimulationError(f"{self.worker_id} preempts and computes nothing, twice: {plan}")

    def finish(self, now: float) -> list[LiveRequest]:
        """End the step or the jump; returns the requests that got their last token."""
        if self.jump is not None:
            return self._finish_jump()
        assert self.plan is not None
        plan, self.plan = self.plan, None
        ended = []
        for task in plan.tasks:
            live = self.live[task.request_id]
            num_tokens = self._advance(live, task)
            if num_tokens and self._emit(live, num_tokens, now):
                ended.append(live)
        self._remove(ended)
        return ended

    def _num_shared_blocks(self) -> dict[str, int]:
        """What of the running requests' blocks others hold too, if anyone may be preempted."""
        most = self._limits.num_blocks(self._limits.max_num_batched_tokens) + len(self._running)
        if self.kv.num_free >= most:
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
        """Do to seats and KV blocks what the plan says."""
        self._check(plan)
        for request_id in plan.preempted:
            self._preempt(request_id)
        admitted = [
            live for task in plan.tasks if not (live := self.live[task.request_id]).is_admitted
        ]
        for live in admitted:
            self._admit(live)
        # Hits are held before room is made, or it might be made of them.
        for task in plan.tasks:
            self._grow(self.live[task.request_id], task.seq_len)
        if len(self._running) > self._limits.max_num_seqs:
            raise SimulationError(
                f"{self.worker_id}: {len(self._running)} requests run; at most "
                f"{self._limits.max_num_seqs} may"
            )

    def _check(self, plan: BatchPlan) -> None:
        """SimulationError for a plan that no worker could carry out."""
        num_tokens = 0
        for task in plan.tasks:
            live = self.live.get(task.request_id)
            if live is None:
                raise SimulationError(f"{self.worker_id}: {task} is of an unknown request")
            state = live.state
            most = state.num_new_tokens + (state.num_drafts if state.is_decoding else 0)
            if not 0 < task.num_tokens <= most:
                raise SimulationError(f"{self.worker_id}: {task}, but {most} tokens are left")
            if task.seq_len != state.num_computed_tokens + task.num_tokens or (
                task.samples != (task.seq_len >= state.num_tokens)
            ):
                raise SimulationError(f"{self.worker_id}: {task} does not fit to {state}")
            num_tokens += task.num_tokens
        if num_tokens > self._limits.max_num_batched_tokens:
            raise SimulationError(
                f"{self.worker_id}: {num_tokens} tokens in a step; at most "
                f"{self._limits.max_num_batched_tokens} may be"
            )
        named = {task.request_id for task in plan.tasks}
        named.update(deferral.request_id for deferral in plan.deferred)
        if len(named) != len(plan.tasks) + len(plan.deferred) or len(named) != len(self.live):
            raise SimulationError(
                f"{self.worker_id}: a plan names each request once, as a task or as deferred; "
                f"{sorted(self.live.keys() ^ named)} are not or unknown, in {plan}"
            )

    def _preempt(self, request_id: str) -> None:
        live = self.live.get(request_id)
        if live is None or not live.is_admitted:
            raise SimulationError(f"{self.worker_id}: {request_id} is preempted but does not run")
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

    def _grow(self, live: LiveRequest, num_tokens: int) -> None:
        """Hold as many blocks as `num_tokens` tokens need."""
        num_blocks = self._limits.num_blocks
        more = num_blocks(num_tokens) - num_blocks(live.state.num_computed_tokens)
        try:
            if more:
                self.kv.grow(live.holding, more)
        except KvCacheFull as error:
            raise SimulationError(f"{self.worker_id}: the KV cache is full: {error}") from error

    def _begin_step(self, plan: BatchPlan, now: float) -> float:
        shape = self._truth.shape_of(plan.tasks)
        seconds = self._seconds(shape)
        if self._noise is not None:
            seconds *= self._noise.factors(self.num_steps, 1)[0]
        if self._learning is not None:
            self._learning.observe(shape, seconds)
        if self.log is not None:
            tokens = dict.fromkeys(Stage, 0)
            for task in plan.tasks:
                tokens[task.stage] += task.num_tokens
            counts = (tokens[Stage.PREFILL], tokens[Stage.DECODE], tokens[Stage.VERIFY])
            self.log.append(
                StepRecord(now, seconds, plan.predicted_s, *counts, num_requests=len(plan.tasks))
            )
        self.plan = plan
        self.num_steps += 1
        self.num_query_tokens += shape.num_tokens
        self.num_spans += shape.num_spans
        self.busy_s += seconds
        return now + seconds

    def _seconds(self, shape: StepShape) -> float:
        """How long a step takes beside what its neighbours are computing."""
        seconds = self._truth.predict(shape)
        if self._crowded is None or not self.neighbours:
            return seconds
        share = sum(worker.is_busy for worker in self.neighbours) / len(self.neighbours)
        return seconds + share * (self._crowded.predict(shape) - seconds)

    def _advance(self, live: LiveRequest, task: StageTask) -> int:
        """Move a request on by its task; returns how many output tokens that gave."""
        state = live.state
        if task.stage is Stage.VERIFY:
            num_tokens = 1
            while (
                num_tokens < min(task.num_tokens, live.num_left)
                and live.random is not None
                and live.random.random() < state.draft_chances[num_tokens - 1]
            ):
                num_tokens += 1
            # Blocks of drafts that were refused are given back.
            held = self._limits.num_blocks(task.seq_len)
            state.num_computed_tokens += num_tokens
            self.kv.grow(live.holding, self._limits.num_blocks(state.num_computed_tokens) - held)
            return num_tokens
        state.num_computed_tokens = task.seq_len
        self.kv.publish(live.holding, task.seq_len)
        return int(task.samples)

    def _emit(self, live: LiveRequest, num_tokens: int, now: float) -> bool:
        """Give a request new tokens; returns whether it ended with them."""
        state = live.state
        before = state.request.num_outstanding_tokens(state.num_output_tokens)
        if state.num_output_tokens == 0:
            state.first_token_s = now
        state.num_output_tokens += num_tokens
        state.last_token_s = now
        if live.draft_chances:
            num_left = state.request.max_tokens - state.num_output_tokens
            room = self._num_kv_tokens - state.num_tokens
            state.draft_chances = live.draft_chances[: max(0, min(num_left - 1, room))]
        left = state.request.num_outstanding_tokens(state.num_output_tokens)
        self.num_outstanding_tokens -= before - left
        return live.num_left == 0

    def _remove(self, ended: list[LiveRequest]) -> None:
        if not ended:
            return
        for live in ended:
            request = live.state.request
            self.kv.release(live.holding)
            del self.live[request.request_id]
            self._num_with_targets -= request.slo != NO_TARGETS
            self.num_outstanding_tokens -= request.num_outstanding_tokens(
                live.state.num_output_tokens
            )
        gone = {id(live.state) for live in ended}
        self._running = [state for state in self._running if id(state) not in gone]

    def _begin_jump(self, plan: BatchPlan, now: float) -> float | None:
        """Take many steps at once, if each would be the same plan, one token further.

        Those of a scheduler that reads targets and time are made sure of by having it plan the last
        one as well.
        """
        if not self._fast_forward or self._waiting or plan.deferred or not plan.tasks:
            return None
        if len(plan.tasks) != len(self._running) or not self._only_decodes(plan):
            return None
        # For a single request there is no other plan.
        may_change = self._num_with_targets > 0 and len(self._running) > 1
        most = MAX_JUMP if may_change else MAX_JUMP_WITHOUT_TARGETS
        num_steps = min(most, *(live.num_left for live in self.live.values()))
        while num_steps > 1 and self._new_blocks(num_steps) > self.kv.num_free:
            num_steps //= 2
        if num_steps < 2:
            return None
        self._check(plan)
        seconds, ends = self._steady_steps(plan, now, num_steps)
        while may_change and not self._is_steady_at(num_steps - 1, ends):
            num_steps //= 2
            if num_steps < 2:
                return None
        longer_s = 0.0
        if self.log is not None:
            longer_s = self._longer_s(plan)
        self.jump = _Jump(now, seconds, ends, num_steps, (plan.predicted_s, longer_s))
        return ends[num_steps - 1]

    @staticmethod
    def _only_decodes(plan: BatchPlan) -> bool:
        decode = Stage.DECODE
        return all(task.stage is decode for task in plan.tasks)

    def _new_blocks(self, num_steps: int) -> int:
        num_blocks = self._limits.num_blocks
        return sum(
            num_blocks(state.num_computed_tokens + num_steps)
            - num_blocks(state.num_computed_tokens)
            for state in self._running
        )

    def _longer_s(self, plan: BatchPlan) -> float:
        """How much longer a steady step lasts than the one before: each request has one more
        token of context."""
        shape = self._truth.shape_of(plan.tasks)
        seconds = self._truth.predict(shape)
        shape.num_kv_reads += len(plan.tasks)
        shape.num_pairs += len(plan.tasks)
        return self._truth.predict(shape) - seconds

    def _steady_steps(
        self, plan: BatchPlan, now: float, num_steps: int
    ) -> tuple[list[float], list[float]]:
        """Seconds and ends of steps that follow each other."""
        shape = self._truth.shape_of(plan.tasks)
        first_s = self._truth.predict(shape)
        shape.num_kv_reads += len(plan.tasks)
        shape.num_pairs += len(plan.tasks)
        longer_s = self._truth.predict(shape) - first_s
        seconds = [first_s + longer_s * step for step in range(num_steps)]
        if self._noise is not None:
            factors = self._noise.factors(self.num_steps, num_steps)
            seconds = [s * factor for s, factor in zip(seconds, factors, strict=True)]
        return seconds, list(accumulate(seconds, initial=now))[1:]

    def _is_steady_at(self, num_steps: int, ends: list[float]) -> bool:
        """Whether the plan after so many steps is the same as now, one token further."""
        running = self._running
        num_free = self.kv.num_free - self._new_blocks(num_steps)
        before = [state.last_token_s for state in running]
        now = ends[num_steps - 1]
        for state in running:
            state.num_output_tokens += num_steps
            state.num_computed_tokens += num_steps
            state.last_token_s = now
        view = StepView(self.num_steps + num_steps, running, self._waiting, num_free)
        plan = self._scheduler.plan(view, now)
        for state, last_token_s in zip(running, before, strict=True):
            state.num_output_tokens -= num_steps
            state.num_computed_tokens -= num_steps
            state.last_token_s = last_token_s
        return not plan.deferred and self._only_decodes(plan)

    def _finish_jump(self) -> list[LiveRequest]:
        assert self.jump is not None
        jump, self.jump = self.jump, None
        num_steps, end_s = jump.num_steps, jump.ends[jump.num_steps - 1]
        num_running = len(self._running)
        if self.log is not None:
            predicted_s, longer_s = jump.predicted
            begin_s = jump.began_s
            for step in range(num_steps):
                self.log.append(
                    StepRecord(begin_s, jump.seconds[step], predicted_s + step * longer_s,
                               0, num_running, 0, num_running)
                )  # fmt: skip
                begin_s = jump.ends[step]
        self.num_steps += num_steps
        self.num_query_tokens += num_steps * num_running
        self.num_spans += num_steps * num_running
        self.busy_s += math.fsum(jump.seconds[:num_steps])
        self.num_outstanding_tokens -= num_steps * num_running
        ended = []
        for state in self._running:  # one that came meanwhile waits
            live = self.live[state.request.request_id]
            self._grow(live, state.num_computed_tokens + num_steps)
            state.num_computed_tokens += num_steps
            state.num_output_tokens += num_steps
            state.last_token_s = end_s
            if live.num_left == 0:
                ended.append(live)
        self._remove(ended)
        return ended
