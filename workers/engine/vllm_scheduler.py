"""vLLM's scheduler, made to follow our plans."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, NamedTuple, TextIO

from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from scheduler.cost_model import CostModel
from scheduler.hybrid import HybridScheduler
from scheduler.policy import StepPolicy
from scheduler.record import Recorder
from scheduler.speculation import Acceptance, num_expected
from scheduler.task import BatchPlan, Limits, Stage, StageTask, StepReport, StepScheduler, StepView
from scheduler.work import ModelWork
from workers.drafts.draft_client import DraftClient, DraftPath
from workers.engine.vllm_queue import PlannedQueue
from workers.engine.vllm_requests import MAX_HIDDEN_STATES, _initial_state, _Live
from workers.step_history import TakenStep

OWN_DRAFTER, OWN_PROB = "vllm", 0.7
"""Where drafts come from that vLLM made itself, and the chance of each before any was verified."""
LOOKUP_STEPS = 16
"""A prefix hit of a request that waits is looked up again after so many steps."""
MAX_LOOKUPS = 8
"""First lookups of one step, and repeated ones."""


def generic_cost_model() -> CostModel:
    """Of a machine that nothing is known of: 10 ms a step and 1 ms a token, to be corrected."""
    return CostModel([0.01, 0.001, 0.0, 0.0, 0.0, 0.0], token_knots=(0,), sample_knots=(0,))


class _Step(NamedTuple):
    """A step between its decision and its output."""

    view: StepView
    plan: BatchPlan
    output: SchedulerOutput
    executed: tuple[StageTask, ...]
    """What vLLM made of the plan."""
    preempted: frozenset[str]
    queued_s: tuple[tuple[str, float], ...]
    began_s: float
    decided_s: float
    num_recorded: int
    """Steps whose times the cost model had learnt when the plan was made."""


class PlannedScheduler(Scheduler):
    """vLLM's scheduler, each of whose steps a `StepScheduler` decides.

    vLLM asks itself how many tokens each request gets, one after another; the answer given here
    is the plan's. vLLM keeps the last word where it knows better: on KV blocks, LoRA slots,
    grammars and transfers. If a plan is empty while there is work, vLLM decides the step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting_queue = PlannedQueue(self.policy)
        self._kv_holding_queue = PlannedQueue(self.policy)
        self.waiting = self._waiting_queue
        self.kv_holding_waiting = self._kv_holding_queue
        if self.num_spec_tokens and self.dynamic_sd_lookup is None:
            # Without a lookup, vLLM pads a prompt of which one token is left by K drafts that
            # nobody proposed, and admits nobody to a step without room for them.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self.limits = Limits(
            max_num_seqs=self.max_num_active_reqs,
            max_num_batched_tokens=self.max_num_scheduled_tokens,
            kv_block_size=self.block_size,
            # vLLM keeps one block for padding. Where several kinds of layers share the pool, fewer
            # tokens fit than this says: then vLLM admits less than planned.
            num_kv_blocks=self.kv_cache_manager.block_pool.num_gpu_blocks - 1,
        )
        self.cost_model = generic_cost_model()
        self.step_scheduler: StepScheduler = HybridScheduler(self.limits, self.cost_model)
        self.on_step: Callable[[TakenStep], None] | None = None
        """Called after each step that computed something."""
        self.recorder: Recorder | None = None
        self.drafts: DraftClient | None = None
        """Where drafts come from; None: from vLLM itself, if at all."""
        self.hidden_states: Callable[[int, int], list[bytes]] | None = None
        """Gives those of a range of the last step's tokens, if a drafter wants them."""
        self.acceptance = Acceptance()
        self.work: ModelWork | None = None
        """What a step asks of the device, by the model's shape; None if it is not known."""
        self._live: dict[str, _Live] = {}
        self._shares: dict[str, int] | None = None
        """Tokens of each request in the step that vLLM is making; None: vLLM decides."""
        self._steps: deque[_Step] = deque()
        """Those whose outputs are awaited."""
        self._ended_tokens: dict[str, int] = {}
        """Output tokens that the step of now gave requests that it ended, by id."""
        self._num_steps = 0
        self._step_s = 0.0
        """Of the last step."""
        self._step_ended_s = -inf

    def record(self, file: TextIO, policy: StepPolicy) -> None:
        """Decide by `policy` and write every decision to `file`; called while nothing runs.

        The cost model begins anew from its present weights: a record holds all that its decisions
        depend on.
        """
        self.cost_model = CostModel.from_dict(self.cost_model.to_dict())
        self.step_scheduler = policy.make(self.limits, self.cost_model)
        self.recorder = Recorder(file, policy, self.limits, self.cost_model)

    def add_request(self, request: VllmRequest) -> None:
        """Queue a request."""
        if request.request_id not in self.requests:
            ours = getattr(request, "scheduled_as", None)
            state = _initial_state(request, ours, time.monotonic())
            self._live[request.request_id] = _Live(state)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan a step and have vLLM make it."""
        if self._pause_state == PauseState.PAUSED_ALL:
            return super().schedule(throttle_prefills)
        began_s = time.monotonic()
        self._num_steps += 1
        num_recorded = self.recorder.num_steps if self.recorder else 0
        if self.num_spec_tokens:
            self._offer_drafts()
        view = self._view(began_s)
        plan = self.step_scheduler.plan(view, began_s)
        self._preempt(plan)
        decided_s = time.monotonic() - began_s
        with self._shaped(plan):
            output = super().schedule(throttle_prefills)
        executed = self._executed(plan, output)
        preempted = frozenset(plan.preempted) | (output.preempted_req_ids or frozenset())
        self._steps.append(
            _Step(
                view, plan, output, executed, preempted, self._queued_s(began_s, executed),
                began_s, decided_s, num_recorded,
            )
        )  # fmt: skip
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take in what a step gave, and how long it took."""
        if self.drafts:
            outputs = self._update_and_tell(scheduler_output, model_runner_output)
        else:
            outputs = super().update_from_output(scheduler_output, model_runner_output)
        now = time.monotonic()
        num_new_tokens = self._ended_tokens
        self._ended_tokens = {}
        for request_id in scheduler_output.num_scheduled_tokens:
            if live := self._live.get(request_id):
                num_new_tokens[request_id] = live.deliver(
                    self.requests[request_id].num_output_tokens, now
                )
        while self._steps:
            step = self._steps.popleft()
            if step.output is scheduler_output:
                if step.executed:
                    self._learn(step, num_new_tokens, now)
                break
        self._step_ended_s = now
        return outputs

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Count drafts and those accepted; vLLM calls it for each request that had some."""
        num_drafts = num_draft_tokens - (num_invalid_spec_tokens or {}).get(request_id, 0)
        drafter = self.acceptance.verified(request_id, num_drafts, num_accepted_tokens)
        if self.drafts and drafter is not None:
            self.drafts.counts_of[drafter].count(num_drafts, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take drafts of vLLM's own, unless a draft worker gives them."""
        if self.drafts is None:
            super().update_draft_token_ids(draft_token_ids)

    def _offer_drafts(self) -> None:
        """Give each request that decodes the drafts that promise most, and say what they do."""
        if self.drafts:
            now = time.monotonic()
            if self.acceptance.is_resting:
                self.drafts.poll(now)
            else:
                self.drafts.await_answer(self._step_s, now)
        offers = {}
        decodes = False
        for request in self.running:
            live = self._live[request.request_id]
            live.draft_chances = ()
            if request.is_prefill_chunk or not request.num_output_tokens:
                continue
            decodes = True
            if chances := self._offer(request):
                offers[request.request_id] = live.draft_chances = chances
        if decodes and (probe := self.acceptance.next_probe(offers)):
            self._live[probe].draft_chances = (1.0,)
            self.requests[probe].spec_token_ids = self.requests[probe].spec_token_ids[:1]

    def _offer(self, request: VllmRequest) -> tuple[float, ...]:
        """Choose the request's drafts: the path with most tokens expected to be accepted."""
        request_id, acceptance = request.request_id, self.acceptance
        if self.drafts is None:
            probs = [OWN_PROB] * len(request.spec_token_ids)
            chances = acceptance.chances(request_id, OWN_DRAFTER, probs)
            acceptance.offer(request_id, OWN_DRAFTER, probs)
            return chances
        request.spec_token_ids = []
        # The last token is never a draft: it would be the one that verification adds.
        most = min(self.num_spec_tokens, request.max_tokens - request.num_output_tokens - 1)
        best: DraftPath | None = None
        best_chances: tuple[float, ...] = ()
        for path in self.drafts.paths(request_id, request.all_token_ids):
            chances = acceptance.chances(request_id, path.drafter, path.probs[: max(most, 0)])
            if num_expected(chances) > num_expected(best_chances):
                best, best_chances = path, chances
        if best is None:
            return ()
        drafts = best.token_ids[: len(best_chances)]
        # Grammars have their say.
        super().update_draft_token_ids(DraftTokenIds([request_id], [drafts]))
        best_chances = best_chances[: len(request.spec_token_ids)]
        acceptance.offer(request_id, best.drafter, best.probs[: len(best_chances)])
        return best_chances

    def _update_and_tell(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take in what a step gave, and tell the draft worker before anything else is done."""
        assert self.drafts
        scheduled = scheduler_output.num_scheduled_tokens
        first_computed = {
            request_id: self.requests[request_id].num_computed_tokens - num_tokens
            for request_id, num_tokens in scheduled.items()
            if request_id in self.requests
        }
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        num_wanted = 0 if self.acceptance.is_resting else self.num_spec_tokens
        now = time.monotonic()
        row = 0
        for request_id in model_runner_output.req_ids:
            request, live = self.requests.get(request_id), self._live.get(request_id)
            if request and live:
                if self.hidden_states and _may_speculate(request):
                    # Of drafts that were refused, the states are of no use.
                    num_rows = max(request.num_computed_tokens - first_computed[request_id], 0)
                    live.hidden_states += self.hidden_states(row, row + num_rows)
                    del live.hidden_states[:-MAX_HIDDEN_STATES]
                if _may_speculate(request):
                    # A prompt is sent as its prefill begins, its states when that is over.
                    states = live.hidden_states if request.num_output_tokens else []
                    if self.drafts.update(
                        request_id, request.all_token_ids, num_wanted, b"".join(states), now
                    ):
                        states.clear()
            row += scheduled[request_id]
        self.drafts.flush(now)
        return outputs

    def _view(self, now: float) -> StepView:
        return StepView(
            step=self._num_steps,
            running=[self._live[r.request_id].run(r, now) for r in self.running],
            waiting=[self._live[r.request_id].wait(r, now) for r in self._ready()],
            num_free_kv_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks(),
        )

    def _ready(self) -> list[VllmRequest]:
        """Those that wait and could run now, their prefixes looked up."""
        ready = list(filter(self._is_ready, self._kv_holding_queue))
        if self._pause_state == PauseState.UNPAUSED:
            ready += filter(self._is_ready, self._waiting_queue)
        if self.lora_config:
            ready = self._with_lora_slots(ready, self.lora_config.max_loras)
        self._look_up_prefixes(ready)
        return ready

    def _is_ready(self, request: VllmRequest) -> bool:
        if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return self._handle_blocked_waiting_request(request)
        return request.drop_stale_output or not request.num_stale_output_tokens

    def _with_lora_slots(self, ready: list[VllmRequest], max_loras: int) -> list[VllmRequest]:
        """Those whose adapters have room beside those of all that run.

        Also of those that run and are not in the next step: vLLM does not look at them, and
        fails when they are in one together later.
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

    def _look_up_prefixes(self, requests: Iterable[VllmRequest]) -> None:
        num_left = {True: MAX_LOOKUPS, False: MAX_LOOKUPS}  # first ones and repeated ones
        for request in requests:
            live = self._live[request.request_id]
            is_first = live.looked_up is None
            is_due = live.looked_up is None or self._num_steps - live.looked_up >= LOOKUP_STEPS
            if request.num_computed_tokens == 0 and is_due and num_left[is_first]:
                num_left[is_first] -= 1
                live.looked_up = self._num_steps
                live.num_cached = self._prefix_hit(request)

    def _prefix_hit(self, request: VllmRequest) -> int:
        if not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return 0
        # Not the manager's own look-up: that can tell the listeners of KV events that the blocks
        # are used.
        _, num_tokens, _ = self.kv_cache_manager.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        return num_tokens

    def _preempt(self, plan: BatchPlan) -> None:
        victims = set(plan.preempted)
        # The last one first, so that they wait in the order they ran in.
        for request in [r for r in reversed(self.running) if r.request_id in victims]:
            if self._request_blocks_can_be_freed(request):
                self.running.remove(request)
                self._preempt_request(
                    request, time.monotonic(), drop_stale_output=self.requires_kv_delivery
                )

    @contextmanager
    def _shaped(self, plan: BatchPlan) -> Iterator[None]:
        """Have vLLM give each request its share in the plan, and admit in the plan's order."""
        if not plan.tasks and not plan.preempted:
            yield
            return
        self._shares = {task.request_id: task.num_tokens for task in plan.tasks}
        waiting, rest = self._split(self._waiting_queue)
        if self.connector is not None or self.ec_connector is not None:
            # A look at those that wait is what starts their transfers.
            waiting += rest
        kv_holding, _ = self._split(self._kv_holding_queue)
        try:
            with self._waiting_queue.showing(waiting), self._kv_holding_queue.showing(kv_holding):
                yield
        finally:
            self._shares = None

    def _split(self, queue: PlannedQueue) -> tuple[list[VllmRequest], list[VllmRequest]]:
        """The requests of a queue that are in the plan, in its order, and the others."""
        shares = self._shares or {}
        by_id = {request.request_id: request for request in queue}
        planned = [by_id[request_id] for request_id in shares if request_id in by_id]
        return planned, [r for request_id, r in by_id.items() if request_id not in shares]

    def _reserve_prefill_lookahead(
        self, request: VllmRequest, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # vLLM calls this for every request, just before it allocates KV blocks, and takes a request
        # to which it gives nothing out of the step.
        if self._shares is not None:
            share = min(num_new_tokens, self._shares.get(request.request_id, 0))
            if 0 < share < num_new_tokens:
                share = self._aligned(request, num_computed_tokens, num_new_tokens, share)
            num_new_tokens = share
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)

    def _aligned(
        self, request: VllmRequest, num_computed_tokens: int, num_new_tokens: int, share: int
    ) -> int:
        """The share of a request, or as much more as the model cannot do without."""
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
        return StageTask(request_id, stage, num_tokens, seq_len, not request.is_prefill_chunk)

    def _learn(self, step: _Step, num_new_tokens: dict[str, int], now: float) -> None:
        # Under async scheduling a step begins before the one before it ends.
        measured_s = now - max(step.began_s, self._step_ended_s)
        self._step_s = measured_s
        report = StepReport(step.view.step, step.began_s, step.plan, measured_s, step.decided_s)
        if self.recorder:
            self.recorder.write_step(step.view, report, step.executed, step.num_recorded)
        shape = self.cost_model.shape_of(step.executed)
        self.cost_model.observe(shape, measured_s)
        if self.num_spec_tokens:
            stages = [task.stage for task in step.executed]
            self.acceptance.count_decodes(len(stages) - stages.count(Stage.PREFILL))
        if self.on_step:
            self.on_step(
                TakenStep(
                    report,
                    step.executed,
                    num_new_tokens,
                    step.preempted,
                    step.queued_s,
                    self.work.flops(shape) if self.work else 0.0,
                    self.work.memory_bytes(shape) if self.work else 0.0,
                )
            )

    def _queued_s(
        self, began_s: float, tasks: Iterable[StageTask]
    ) -> tuple[tuple[str, float], ...]:
        """Of each request that these are the first tasks of: its class and how long it waited."""
        queued = []
        for task in tasks:
            live = self._live[task.request_id]
            if not live.has_begun:
                live.has_begun = True
                state = live.state
                queued.append((state.request.slo_class, max(began_s - state.arrival_s, 0.0)))
        return tuple(queued)

    def _free_request(
        self, request: VllmRequest, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        live = self._live.pop(request.request_id, None)
        if live and request.num_output_tokens > live.num_delivered:
            self._ended_tokens[request.request_id] = request.num_output_tokens - live.num_delivered
        self.acceptance.forget(request.request_id)
        if self.drafts:
            self.drafts.finish(request.request_id)
        if self.recorder:
            self.recorder.write_finish(request.request_id, request.num_output_tokens)
        return super()._free_request(request, delay_free_blocks)


def _may_speculate(request: VllmRequest) -> bool:
    """Whether vLLM's verification of drafts honours all that the request asks for.

    Drafts use up random numbers, so that an equal seed would no longer give an equal answer.
    """
    params = request.sampling_params
    if params is None or params.min_p or params.logit_bias or params.extra_args:
        return False
    return params.seed is None or params.sampling_type is SamplingType.GREEDY


class PlannedAsyncScheduler(PlannedScheduler, AsyncScheduler):
    """The same where steps are scheduled while others run."""
