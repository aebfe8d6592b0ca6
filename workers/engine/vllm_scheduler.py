"""vLLM's scheduler, made to follow our plans."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from scheduler.policy import StepPolicy
from scheduler.prefill_queue import QueueReport
from scheduler.request import RequestState
from scheduler.stage_policy import FollowedPolicy, StageReport
from scheduler.step_planner import StepInFlight, StepPlanner
from scheduler.task import BatchPlan, Stage, StageTask, StepView
from workers.engine.vllm_drafts import DraftOffers
from workers.engine.vllm_queue import PlannedQueue
from workers.engine.vllm_queue_report import limits_of, queue_report
from workers.engine.vllm_requests import LiveRequests, initial_state
from workers.engine_request import EngineRequest, Progress

PROMPT_LOGPROBS_BYTES = 256 << 20
"""Memory for the log probabilities, of the whole vocabulary, of a request's tokens in one step."""
LOGPROB_BYTES = 12
"""A logit, a log probability and what selects the largest, for each entry of the vocabulary."""


class PlannedScheduler(Scheduler):
    """vLLM's scheduler, each of whose steps `planner` decides.

    vLLM determines one after another how many tokens each request gets; here it gets the plan's
    answer. vLLM keeps the last word where it knows better: on KV blocks, LoRA slots, grammars and
    transfers. If a plan is empty while there is work, vLLM decides the step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting_queue = PlannedQueue(self.policy)
        self._kv_holding_queue = PlannedQueue(self.policy)
        self.waiting = self._waiting_queue
        self.kv_holding_waiting = self._kv_holding_queue
        if self.num_spec_tokens and self.dynamic_sd_lookup is None:
            # Without a look-up table, vLLM pads a prompt of which one token is left by drafts that
            # nobody proposed, and admits no request to a step without room for them.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self.limits = limits_of(self)
        self.planner = StepPlanner(self.limits, StepPolicy())
        """Replaced by the planner of the worker, between two steps."""
        self.followed = FollowedPolicy()
        """The bounds of the steps."""
        self._live = LiveRequests()
        self.drafts = DraftOffers(
            self.requests, self._live, self.num_spec_tokens, super().update_draft_token_ids
        )
        self._shares: dict[str, int] | None = None
        """Tokens of each request in the step that vLLM is making; None: vLLM decides."""
        self._in_flight: deque[tuple[SchedulerOutput, StepInFlight | None]] = deque()
        """Steps whose outputs are awaited; None for one that computes nothing."""
        row_bytes = LOGPROB_BYTES * self.vllm_config.model_config.get_vocab_size()
        self._max_rows = max(1, PROMPT_LOGPROBS_BYTES // row_bytes)
        """Prompt tokens of one step whose log probabilities a request may want."""
        self.on_trial: deque[str] = deque()
        """Requests under which a step has failed. The first one runs, and no other does, until it
        has got a token."""
        self._takes_in = False
        """Whether it is taking in the output of a step."""
        self.predicted_step_s = inf
        """Of the latest step; infinite without a profile."""
        self._num_steps = 0
        self._last_step_s = 0.0
        self._last_ended_s = -inf

    def add_request(self, request: VllmRequest) -> None:
        """Queue a request."""
        if request.request_id not in self.requests:
            ours: EngineRequest | None = getattr(request, "came_as", None)
            known, progress = (ours.request, ours.progress) if ours else (None, None)
            self._live.add(initial_state(request, known, progress))
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan a step and have vLLM make it."""
        if self._pause_state == PauseState.PAUSED_ALL:
            return super().schedule(throttle_prefills)
        began_s = time.monotonic()
        self._num_steps += 1
        if self.num_spec_tokens:
            self.drafts.max_drafts = self.followed.at(began_s).max_drafts
            self.drafts.offer(self.running, self.planner.acceptance, self._last_step_s)
        view = self._view(began_s)
        plan = self.planner.plan(view, began_s)
        self.predicted_step_s = plan.predicted_s or inf
        self._preempt(plan)
        decided_s = time.monotonic() - began_s
        with self._shaped(plan):
            output = super().schedule(throttle_prefills)
        step: StepInFlight | None = None
        if tasks := self._executed(plan, output):
            step = self.planner.begin(
                view,
                plan,
                began_s,
                tasks=tasks,
                preempted=frozenset(plan.preempted) | (output.preempted_req_ids or frozenset()),
                late=self._late(view, plan, tasks),
                decided_s=decided_s,
            )
        self._in_flight.append((output, step))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take in what a step gave, and how long it took."""
        self._takes_in = True
        scheduled = scheduler_output.num_scheduled_tokens
        starts = self.drafts.starts(scheduled)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        # Before all else, so that the draft worker drafts meanwhile.
        self.drafts.send(model_runner_output.req_ids, scheduled, starts, self.planner.acceptance)
        now = time.monotonic()
        requests = (self.requests[name] for name in scheduled if name in self.requests)
        num_new_tokens = self._live.deliver(requests, now)
        while self._in_flight:
            output, step = self._in_flight.popleft()
            if output is scheduler_output:
                if step:
                    # Under async scheduling a step begins before the one before it ends.
                    self._last_step_s = now - max(step.began_s, self._last_ended_s)
                    self.planner.end(step, self._last_step_s, num_new_tokens)
                break
        self._last_ended_s = now
        if self.on_trial and num_new_tokens.get(self.on_trial[0]):
            self.on_trial.popleft()
        self._takes_in = False
        return outputs

    def abandon_step(self) -> tuple[list[str], list[tuple[EngineRequest, int]]] | None:
        """Forget the step whose computation has failed, and all requests.

        Gives the ids of those in it, and all requests as they are to be added again, each with the
        index of its client; None if some of what it gave may have been taken in already.
        """
        if self._takes_in or len(self._in_flight) != 1:
            return None
        output, _ = self._in_flight.pop()
        requests = [
            (self._as_it_is(request), request.client_index) for request in self.requests.values()
        ]
        self.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        return list(output.num_scheduled_tokens), requests

    def _as_it_is(self, request: VllmRequest) -> EngineRequest:
        """A request with its tokens so far."""
        came_as: EngineRequest | None = getattr(request, "came_as", None)
        assert came_as, "only engines whose requests all come from us recover"
        if not request.num_output_tokens:
            return came_as
        state = self._live[request.request_id].state
        to_wall_clock_s = time.time() - time.monotonic()
        progress = Progress(
            tuple(request.output_token_ids),
            state.first_token_s + to_wall_clock_s,
            state.last_token_s + to_wall_clock_s,
        )
        return came_as.for_attempt(request.request_id, progress, came_as.request.num_engine_deaths)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Count drafts and accepted ones; vLLM calls it for each request that had drafts."""
        num_drafts = num_draft_tokens - (num_invalid_spec_tokens or {}).get(request_id, 0)
        self.drafts.verified(request_id, num_drafts, num_accepted_tokens, self.planner.acceptance)
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take drafts of vLLM's own, unless they come from a draft worker."""
        if self.drafts.client is None:
            super().update_draft_token_ids(draft_token_ids)

    def queue_report(self, now: float) -> QueueReport:
        """What placement is to know of its requests.

        It changes nothing. What is cached of a waiting prompt is what the last look-up found, and
        of one that came since the last plan nothing.
        """
        return queue_report(self, self.planner, self._live.peek, now, self.followed.at(now))

    def stage_report(self, queue: QueueReport, now: float) -> StageReport:
        """What the stage policy is to know of its requests, of which this is the queue."""
        return self.planner.stage_report(map(self._live.peek, self.running), queue, now)

    def _view(self, now: float) -> StepView:
        running, waiting = self.running, self._ready()
        if self.on_trial:
            running = [r for r in running if r.request_id == self.on_trial[0]]
            waiting = [r for r in waiting if r.request_id == self.on_trial[0]]
        return StepView(
            step=self._num_steps,
            running=[self._live.run(request, now) for request in running],
            waiting=[self._live.wait(request, now) for request in waiting],
            num_free_kv_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks(),
            policy=self.followed.at(now),
        )

    def _ready(self) -> list[VllmRequest]:
        """Waiting requests that could run now, their prefixes looked up."""
        ready = list(filter(self._is_ready, self._kv_holding_queue))
        if self._pause_state == PauseState.UNPAUSED:
            ready += filter(self._is_ready, self._waiting_queue)
        if self.lora_config:
            ready = self._with_lora_slots(ready, self.lora_config.max_loras)
        self._live.look_up(ready, self._num_steps, self._prefix_hit)
        return ready

    def _is_ready(self, request: VllmRequest) -> bool:
        if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return self._handle_blocked_waiting_request(request)
        return request.drop_stale_output or not request.num_stale_output_tokens

    def _with_lora_slots(self, ready: list[VllmRequest], max_loras: int) -> list[VllmRequest]:
        """Requests whose adapters fit next to those of all running requests.

        Running requests that are not in the next step count, too: vLLM does not look at them, and
        fails when too many adapters are in one step later.
        """
        loras = {r.lora_request.lora_int_id for r in self.running if r.lora_request}
        admissible = []
        for request in ready:
            if request.lora_request:
                wanted = loras | {request.lora_request.lora_int_id}
                if len(wanted) > max_loras:
                    continue
                loras = wanted
            admissible.append(request)
        return admissible

    def _prefix_hit(self, request: VllmRequest) -> int:
        if not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return 0
        # Not the manager's own look-up, which may report the blocks as used to listeners of KV
        # events.
        _, num_tokens, _ = self.kv_cache_manager.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        return num_tokens

    def _preempt(self, plan: BatchPlan) -> None:
        victims = set(plan.preempted)
        # Last one first, so that they wait in the order they ran in.
        for request in [r for r in reversed(self.running) if r.request_id in victims]:
            if self._request_blocks_can_be_freed(request):
                self.running.remove(request)
                self._preempt_request(
                    request, time.monotonic(), drop_stale_output=self.requires_kv_delivery
                )

    @contextmanager
    def _shaped(self, plan: BatchPlan) -> Iterator[None]:
        """Within it, vLLM gives each request its share in the plan, and admits in its order."""
        if not (plan.tasks or plan.preempted or self.on_trial):
            yield
            return
        self._shares = {task.request_id: task.num_tokens for task in plan.tasks}
        waiting, rest = self._split(self._waiting_queue)
        if self.connector is not None or self.ec_connector is not None:
            # vLLM starts the transfers of a waiting request when it looks at it.
            waiting += rest
        kv_holding, _ = self._split(self._kv_holding_queue)
        try:
            with self._waiting_queue.showing(waiting), self._kv_holding_queue.showing(kv_holding):
                yield
        finally:
            self._shares = None

    def _split(self, queue: PlannedQueue) -> tuple[list[VllmRequest], list[VllmRequest]]:
        """The requests of a queue that are in the plan, in the plan's order, and the others."""
        shares = self._shares or {}
        by_id = {request.request_id: request for request in queue}
        planned = [by_id[request_id] for request_id in shares if request_id in by_id]
        return planned, [r for request_id, r in by_id.items() if request_id not in shares]

    def _reserve_prefill_lookahead(
        self, request: VllmRequest, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # vLLM calls this for every request, just before it allocates KV blocks, and leaves those
        # that get no tokens out of the step.
        share = num_new_tokens
        if self._shares is not None:
            share = min(share, self._shares.get(request.request_id, 0))
        if (sampling := request.sampling_params) and sampling.prompt_logprobs is not None:
            share = min(share, self._max_rows)
        if 0 < share < num_new_tokens:
            share = self._aligned(request, num_computed_tokens, num_new_tokens, share)
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, share)

    def _aligned(
        self, request: VllmRequest, num_computed_tokens: int, num_new_tokens: int, share: int
    ) -> int:
        """The share of a request, or more where the model allows no smaller one."""
        is_admitted = request.status != RequestStatus.RUNNING
        if is_admitted and not self.scheduler_config.enable_chunked_prefill:
            return num_new_tokens
        if self.need_mamba_block_aligned_split:
            num_hit_tokens = num_computed_tokens - request.num_computed_tokens
            return self._mamba_block_aligned_split(request, share, num_hit_tokens) or num_new_tokens
        return share

    def _executed(self, plan: BatchPlan, output: SchedulerOutput) -> tuple[StageTask, ...]:
        planned = {task.request_id: task for task in plan.tasks}
        return tuple(
            self._task(request_id, num_tokens, planned.get(request_id))
            for request_id, num_tokens in output.num_scheduled_tokens.items()
        )

    def _late(
        self, view: StepView, plan: BatchPlan, tasks: tuple[StageTask, ...]
    ) -> list[RequestState]:
        """Requests that became ready after the view was made; only an empty plan lets them in."""
        if plan.tasks:
            return []
        seen = {state.request.request_id for state in (*view.running, *view.waiting)}
        return [self._live[t.request_id].state for t in tasks if t.request_id not in seen]

    def _task(self, request_id: str, num_tokens: int, planned: StageTask | None) -> StageTask:
        request = self.requests[request_id]
        seq_len = request.num_computed_tokens
        if planned and planned.num_tokens == num_tokens and planned.seq_len == seq_len:
            return planned
        state = self._live[request_id].state
        if state.num_output_tokens > 0 and seq_len - num_tokens == state.num_tokens - 1:
            stage = Stage.DECODE if num_tokens == 1 else Stage.VERIFY
        else:
            stage = Stage.PREFILL
        return StageTask(
            request_id=request_id,
            stage=stage,
            num_tokens=num_tokens,
            seq_len=seq_len,
            samples=not request.is_prefill_chunk,
        )

    def _free_request(
        self, request: VllmRequest, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        if request.request_id in self.on_trial:
            self.on_trial.remove(request.request_id)
        self._live.finish(request)
        self.drafts.finish(request.request_id)
        self.planner.finish(request.request_id, request.num_output_tokens)
        return super()._free_request(request, delay_free_blocks)


class PlannedAsyncScheduler(PlannedScheduler, AsyncScheduler):
    """A `PlannedScheduler` that schedules a step while another runs."""
