"""What placement is to know of the requests on an engine."""

from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request as VllmRequest

from scheduler.policy import StepPolicy
from scheduler.prefill_queue import QueueReport
from scheduler.request import RequestState
from scheduler.stage_policy import ALONE, WorkerPolicy
from scheduler.step_planner import StepPlanner
from scheduler.task import Limits, StepView
from workers.engine.vllm_requests import initial_state
from workers.engine_request import EngineRequest


def limits_of(scheduler: Any) -> Limits:
    """The bounds of a step of one of vLLM's schedulers."""
    return Limits(
        max_num_seqs=scheduler.max_num_active_reqs,
        max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
        kv_block_size=scheduler.block_size,
        # vLLM keeps one block for padding. If several kinds of layers share the pool, fewer
        # tokens fit than this says: then vLLM admits less than planned.
        num_kv_blocks=scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
    )


def queue_report(
    scheduler: Any,
    planner: StepPlanner,
    state_of: Callable[[VllmRequest], RequestState],
    now: float,
    policy: WorkerPolicy = ALONE,
) -> QueueReport:
    """All requests of one of vLLM's schedulers, those included that cannot run yet."""
    running = {request.request_id for request in scheduler.running}
    states = [
        (request_id in running, state_of(request))
        for request_id, request in scheduler.requests.items()
    ]
    view = StepView(
        step=0,
        running=[state for is_running, state in states if is_running],
        waiting=[state for is_running, state in states if not is_running],
        num_free_kv_blocks=scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        policy=policy,
    )
    return planner.queue_report(view, now)


class StockQueue:
    """The requests of vLLM's own scheduler.

    Nobody plans its steps, nor looks up what is cached of its waiting prompts, which count whole.
    How long prompts take is learnt from the steps.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._planner = StepPlanner(limits_of(scheduler), StepPolicy())
        self._done: dict[str, tuple[int, int]] = {}
        """Computed and output tokens of running requests after the last step."""
        self._ended_s = 0.0

    def took_step(self, outputs: Iterable[EngineCoreOutput], began_s: float, now: float) -> None:
        """Learn from a step that is over; under async scheduling it began before the last ended."""
        first = {one.request_id: one.prefill_stats for one in outputs if one.prefill_stats}
        cost_model = self._planner.cost_model
        shape, done = cost_model.shape(), {}
        for request in self._scheduler.running:
            num_computed, num_output = request.num_computed_tokens, request.num_output_tokens
            done[request.request_id] = num_computed, num_output
            if request.request_id in self._done:
                before, output_before = self._done[request.request_id]
            else:  # vLLM tells with the first token what was cached, and until then keeps it here
                stats = first.get(request.request_id) or request.prefill_stats
                before, output_before = stats.num_cached_tokens if stats else num_computed, 0
            if num_computed > before:
                num_samples = min(num_output - output_before, num_computed - before)
                shape.add(num_computed - before, num_computed, max(num_samples, 0))
        if shape.num_tokens:
            cost_model.observe(shape, now - max(began_s, self._ended_s))
        self._done, self._ended_s = done, now

    def report(self, now: float) -> QueueReport:
        """What placement is to know of it."""
        return queue_report(self._scheduler, self._planner, _state, now)


def _state(request: VllmRequest) -> RequestState:
    came_as: EngineRequest | None = getattr(request, "came_as", None)
    known, progress = (came_as.request, came_as.progress) if came_as else (None, None)
    state = initial_state(request, known, progress)
    state.num_output_tokens = request.num_output_tokens + request.num_output_placeholders
    state.num_computed_tokens = request.num_computed_tokens
    return state
