"""Measures the steps of an idle engine, and fits a cost model to them."""

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import RequestStatus

from scheduler.cost_fit import fit
from scheduler.cost_model import StepShape
from scheduler.policy import StepPolicy
from scheduler.step_planner import StepPlanner
from scheduler.task import (
    BatchPlan,
    Deferral,
    Limits,
    Reason,
    Stage,
    StageTask,
    StepReport,
    StepView,
)
from workers.config import WorkerConfig
from workers.engine.vllm_sampling import runner_of
from workers.engine.vllm_scheduler import PlannedScheduler
from workers.kernels.tiles import QUERY_ROWS
from workers.plugin.vllm_quantization import OwnKernelConfig
from workers.profiling.engine_profile import (
    Checked,
    Depth,
    EngineProfile,
    Progress,
    load_or_measure,
    profile_key,
)
from workers.profiling.profile_script import ScriptStep, Seats, num_tokens, script
from workers.profiling.vllm_peaks import measure_peaks

logger = logging.getLogger(__name__)

ORDER_SEED, CHECK_SEED, TOKEN_SEED = 1, 2, 3

SETTLE_TOKENS = 64
"""A step of fewer tokens is taken twice, and the second one counts: in the first, vLLM sets up the
batch again, which a batch that goes on decoding never does."""

NUM_CHECKED = 40
"""Steps that a full profile predicts to check itself: enough for a median within a few percent."""

MIN_MODEL_LEN = 16
"""A shorter context leaves too little room for the seats of the script."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a profile may take."""

    budget_s: float
    """Time shared evenly by the steps; one that has had its share is not measured again."""
    max_step_s: float
    """A series of steps ends with the first one that takes longer."""
    min_rounds: int
    max_rounds: int


EFFORTS: dict[Depth, Effort] = {
    "brief": Effort(budget_s=8, max_step_s=0.3, min_rounds=1, max_rounds=7),
    "full": Effort(budget_s=90, max_step_s=1.5, min_rounds=2, max_rounds=15),
}


def calibrated_profile(core: EngineCore, model: str, config: WorkerConfig) -> EngineProfile | None:
    """The profile of an engine of `model`: read, or else measured now, which takes seconds.

    None for an engine that cannot be measured.
    """
    if (reason := _refusal(core)) is not None:
        logger.warning("the steps of this engine are not measured", extra={"reason": reason})
        return None
    return load_or_measure(profile_key(model, config), lambda: measure(core, "brief"))


def _refusal(core: EngineCore) -> str | None:
    model_config = core.vllm_config.model_config
    if model_config.runner_type != "generate":
        return f"it does not generate, its runner is {model_config.runner_type}"
    if model_config.is_encoder_decoder:
        return "its model has an encoder"
    if model_config.max_model_len < MIN_MODEL_LEN:
        return f"its max_model_len is {model_config.max_model_len}"
    if core.vllm_config.parallel_config.world_size > 1:
        return "its model is split over several processes"
    if core.vllm_config.kv_transfer_config is not None:
        return "it transfers its KV cache"
    return None


def measure(
    core: EngineCore, depth: Depth, progress: Progress = lambda share: None
) -> EngineProfile:
    """Measure an idle engine with a scheduler of ours, and fit its cost model.

    Takes seconds or minutes; the engine is left as it was found.
    """
    began_s = time.perf_counter()
    runner = runner_of(core)
    quant_config = core.vllm_config.quant_config
    inputs = quant_config.inputs if isinstance(quant_config, OwnKernelConfig) else None
    peaks = measure_peaks(runner.device, runner.dtype, inputs)
    with _seated(core) as engine:
        times = _in_rounds(engine, script(engine.seats, depth), EFFORTS[depth], progress)
        steps = [(engine.shape(step), _typical_s(of_step)) for step, of_step in times.items()]
        model = fit(steps)
        checked = []
        if depth == "full":
            random = Random(CHECK_SEED)
            for _ in range(NUM_CHECKED):
                step = engine.seats.mixed(random, 256)
                measured_s = engine.take(step)
                checked.append(_checked(step, model.predict(engine.shape(step)), measured_s))
    return EngineProfile(
        cost_model=model.to_dict(),
        peaks=peaks,
        depth=depth,
        num_kv_blocks=engine.limits.num_kv_blocks,
        kv_block_size=engine.limits.kv_block_size,
        num_steps=sum(map(len, times.values())),
        took_s=time.perf_counter() - began_s,
        error=statistics.median(abs(model.predict(shape) / took_s - 1) for shape, took_s in steps),
        checked=tuple(checked),
    )


def _in_rounds(
    engine: "SeatedEngine", series: list[list[ScriptStep]], effort: Effort, progress: Progress
) -> dict[ScriptStep, list[float]]:
    """Seconds of each step, once a round: first from short to long, then in random order.

    A drift of the machine then does not look like a slope.
    """
    began_s = time.perf_counter()
    times: dict[ScriptStep, list[float]] = {}
    num_steps = sum(map(len, series))
    for steps in series:
        for step in steps:
            times[step] = [engine.take(step)]
            progress(0.5 * len(times) / num_steps)
            if times[step][0] > effort.max_step_s:
                break
    random = Random(ORDER_SEED)
    share_s = effort.budget_s / len(times)
    first_s = time.perf_counter() - began_s
    for num_rounds in range(1, effort.max_rounds):
        for step in random.sample(list(times), len(times)):
            spent_s = time.perf_counter() - began_s
            of_step = times[step]
            if num_rounds >= effort.min_rounds and (
                sum(of_step) + of_step[-1] > share_s or spent_s > effort.budget_s
            ):
                continue
            of_step.append(engine.take(step))
            progress(0.5 + 0.5 * min((spent_s - first_s) / max(effort.budget_s - first_s, 1), 1))
    progress(1.0)
    return times


def _typical_s(times_s: list[float]) -> float:
    """The lower quartile: on a busy machine more than half of the times may be too long."""
    if len(times_s) == 1:
        return times_s[0]
    return statistics.quantiles(times_s, method="inclusive")[0]


def _checked(step: ScriptStep, predicted_s: float, measured_s: float) -> Checked:
    decodes = [span for span in step if span.num_tokens == 1]
    return Checked(
        num_decodes=len(decodes),
        num_prefill_tokens=num_tokens(step) - len(decodes),
        num_context_tokens=sum(span.num_computed_tokens for span in step),
        predicted_s=predicted_s,
        measured_s=measured_s,
    )


class ScriptedPlanner(StepPlanner):
    """Plans the tasks in `tasks`, and keeps the time they took."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits, StepPolicy(), learns=False, on_step=self._note)
        self.tasks: tuple[StageTask, ...] = ()
        self.measured_s = 0.0

    def plan(self, view: StepView, now: float) -> BatchPlan:
        """The plan that consists of `tasks`."""
        taken = {task.request_id for task in self.tasks}
        ids = [state.request.request_id for state in (*view.running, *view.waiting)]
        return BatchPlan(
            tasks=self.tasks,
            deferred=tuple(Deferral(name, Reason.TIME) for name in ids if name not in taken),
            preempted=(),
            predicted_s=0.0,
            limit_s=float("inf"),
        )

    def _note(self, report: StepReport) -> None:
        self.measured_s = report.measured_s


class SeatedEngine:
    """An idle engine filled with dummy requests whose position in their prompt can be set freely.

    The prompts are longer than any step reaches, so nothing is sampled for good. Timing needs no
    meaningful keys and values: a position is set by its number, without computing anything up to
    it.
    """

    def __init__(self, core: EngineCore, planner: ScriptedPlanner) -> None:
        """The engine's scheduler follows `planner`."""
        self._core = core
        self._planner = planner
        self._scheduler = planned_scheduler(core)
        self.limits = planner.limits
        model_config = core.vllm_config.model_config
        parallel_config = core.vllm_config.parallel_config
        self.seats = Seats.within(
            self.limits,
            self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            model_config.max_model_len,
        )
        group = model_config.get_num_attention_heads(
            parallel_config
        ) // model_config.get_num_kv_heads(parallel_config)
        self._query_tile = max(1, QUERY_ROWS // max(1, group))
        self._ids = [f"xyserve-profile-{seat}" for seat in range(len(self.seats.lens))]

    def fill(self) -> None:
        """Add the requests and compute the first token of each."""
        random = Random(TOKEN_SEED)
        vocabulary = range(self._core.vllm_config.model_config.get_vocab_size())
        for request_id, seat_len in zip(self._ids, self.seats.lens, strict=True):
            request = EngineCoreRequest(
                request_id=request_id,
                prompt_token_ids=random.choices(vocabulary, k=seat_len + 1),
                mm_features=None,
                sampling_params=SamplingParams(
                    temperature=0, max_tokens=1, ignore_eos=True, skip_reading_prefix_cache=True
                ),
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
            self._core.add_request(*self._core.preprocess_add_request(request))
        width = self.limits.max_num_batched_tokens
        for first in range(0, len(self._ids), width):
            self._play(self.seats.decodes(len(self._ids), 0.0)[first : first + width])

    def shape(self, step: ScriptStep) -> StepShape:
        """The shape of a step, in this engine's query tiles."""
        shape = StepShape(self._query_tile)
        for task in self._tasks(step):
            shape.add_task(task)
        return shape

    def take(self, step: ScriptStep) -> float:
        """Take a step; returns how many seconds it took."""
        if num_tokens(step) < SETTLE_TOKENS:
            self._play(step)
        self._play(step)
        return self._planner.measured_s

    def clear(self) -> None:
        """End the requests, and drop what they left in the prefix cache."""
        self._scheduler.finish_requests(self._ids, RequestStatus.FINISHED_ABORTED)
        self._planner.tasks = ()
        while self._scheduler.has_requests():
            self._core.step()
        self._core.reset_prefix_cache()
        self._scheduler.kv_cache_manager.make_prefix_cache_stats()

    def _tasks(self, step: ScriptStep) -> tuple[StageTask, ...]:
        return tuple(
            StageTask(
                request_id=self._ids[span.seat],
                stage=Stage.PREFILL,
                num_tokens=span.num_tokens,
                seq_len=span.num_computed_tokens + span.num_tokens,
                samples=False,
            )
            for span in step
        )

    def _play(self, step: ScriptStep) -> None:
        for span in step:
            request = self._scheduler.requests[self._ids[span.seat]]
            request.num_computed_tokens = span.num_computed_tokens
        self._planner.tasks = self._tasks(step)
        self._planner.measured_s = 0.0
        # Not vLLM's `step_fn`, which may begin a step before the previous one ends.
        self._core.step()
        assert self._planner.measured_s > 0, "the step did not run"


@contextmanager
def _seated(core: EngineCore) -> Iterator[SeatedEngine]:
    scheduler = planned_scheduler(core)
    planner = scheduler.planner
    core.collective_rpc(_touch_kv_cache)
    try:
        scheduler.planner = scripted = ScriptedPlanner(scheduler.limits)
        engine = SeatedEngine(core, scripted)
        engine.fill()
        yield engine
        engine.clear()
    finally:
        scheduler.planner = planner


def planned_scheduler(core: EngineCore) -> PlannedScheduler:
    """The scheduler of an engine whose steps we plan."""
    assert isinstance(core.scheduler, PlannedScheduler)
    return core.scheduler


def _touch_kv_cache(worker: Any) -> None:
    """Give the KV cache its own memory: zeros that were never written are read from one page."""
    for cache in worker.model_runner.kv_caches:
        if isinstance(cache, torch.Tensor) and cache.device.type == "cpu":
            cache.zero_()
