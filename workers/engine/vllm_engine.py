"""vLLM's engine core in the caller's own process, stepped by the caller."""

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import vllm.v1.engine.core
from vllm.config import KVEventsConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from scheduler.prefill_queue import QueueReport
from scheduler.prefix_index import PrefixDelta
from scheduler.stage_policy import StageReport, WorkerPolicy
from scheduler.step_planner import StepPlanner
from workers.config import DraftConfig, WorkerConfig
from workers.drafts.draft_client import DraftClient
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.engine.engine import EngineStats, StepOutput
from workers.engine.vllm_drafts import DraftOffers
from workers.engine.vllm_grammars import BoundedGrammars
from workers.engine.vllm_prefix import PrefixLog, refusal
from workers.engine.vllm_queue_report import StockQueue
from workers.engine.vllm_recovery import StepRecovery
from workers.engine.vllm_resume import Resumption
from workers.engine.vllm_sampling import (
    all_logits_processors,
    fix_sampling,
    on_each_rank,
    runner_of,
)
from workers.engine.vllm_scheduler import PlannedAsyncScheduler, PlannedScheduler
from workers.engine.vllm_speculation import LastHiddenStates, speculative_config
from workers.engine.vllm_verification import verify_as_without_drafts
from workers.engine_request import EngineRequest, Grammar
from workers.errors import GrammarRefused
from workers.plugin.names import QUANTIZATION
from workers.plugin.vllm_seams import VLLM, check_seams
from workers.reports import DraftStats, Peaks, WorkerObserver
from workers.token_stream import StreamAddress

logger = logging.getLogger(__name__)

GIB = 1 << 30


def engine_args(model: str, config: WorkerConfig, *, kernels: bool = True) -> AsyncEngineArgs:
    """vLLM's arguments for `config`; the ingress and the workers must use the same, but an ingress,
    which may be on a node without the device, does without our kernels.

    They leave out drafts, which only workers know of: an ingress that did would refuse parameters
    that vLLM cannot verify drafts under.
    """
    # vLLM reads this variable as it makes a config for a CPU, or an `LLMEngine`: with 1, the
    # default, the executor would move to a child process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # A thread that vLLM leaves behind; `vllm_grammars` has a bound that ends what it bounds.
    os.environ["VLLM_REGEX_COMPILATION_TIMEOUT_S"] = "0"
    args: dict[str, Any] = {
        field.name: value
        for field in dataclasses.fields(config.engine)
        if field.name not in ("kv_cache_gib", "extra_args")
        and (value := getattr(config.engine, field.name)) is not None
    }
    args["kv_cache_memory_bytes"] = int(config.engine.kv_cache_gib * GIB)
    # Compiling for the CPU takes minutes and gains nothing there.
    args.setdefault("enforce_eager", config.runs_on_cpu)
    if config.uses_cpu_kernels:
        args["dtype"] = "float32"
    if kernels and config.kernels == "xyserve":
        args["quantization"] = QUANTIZATION
        if config.device == "cuda":  # on NPUs the platform chooses
            args["attention_backend"] = "CUSTOM"
        args["additional_config"] = {
            QUANTIZATION: {
                "weight_format": config.weight_format,
                "lm_head_format": config.lm_head_format,
                "activation_format": config.activation_format,
                "kv_cache_format": config.kv_cache_format,
                "num_threads": config.cpus_per_rank,
                "keep_packed_weights": config.keep_packed_weights,
            }
        }
    args["tensor_parallel_size"] = config.tensor_parallel_size
    args["distributed_executor_backend"] = "mp" if config.tensor_parallel_size > 1 else "uni"
    args |= config.engine.extra_args
    # Left to vLLM, the first request would decide.
    structured = args.get("structured_outputs_config") or {}
    args["structured_outputs_config"] = structured | {"backend": "xgrammar"}
    return AsyncEngineArgs(model=model, **args)


def encoder() -> Callable[[object], list[bytes]]:
    """vLLM's encoding of its requests and outputs, as messages that outlive their source."""
    encode = MsgpackEncoder().encode
    return lambda value: [bytes(part) for part in encode(value)]  # type: ignore[arg-type]


class VllmEngine:
    """An `Engine` on vLLM's `EngineCore`."""

    def __init__(
        self,
        model: str,
        config: WorkerConfig,
        observer: WorkerObserver | None = None,
        draft: DraftConfig | None = None,
    ) -> None:
        """Load `model`; takes seconds, and no second engine fits the process until its end.

        With `draft` the engine verifies the drafts of the draft worker that it is assigned later.
        """
        began_s = time.monotonic()
        check_seams(config.device)
        if config.tensor_parallel_size > 1 and config.runs_on_cpu:
            _share_cores(config)
        vllm_config = _vllm_config(model, config, draft)
        grammars = functools.partial(BoundedGrammars, config=config)
        with (
            VLLM.replaced(vllm.v1.engine.core, "StructuredOutputManager", grammars),
            all_logits_processors() if draft else contextlib.nullcontext(),
            _ours_first_in_path(),
        ):
            self.core = EngineCore(vllm_config, Executor.get_class(vllm_config), log_stats=True)
            """vLLM's engine core; touched between two steps only."""
        if config.uses_cpu_kernels:
            _keep_packed_weights(vllm_config)
        manager = self.core.structured_output_manager
        assert isinstance(manager, BoundedGrammars)
        self.grammars = manager
        if config.runs_on_cpu:
            on_each_rank(self.core, fix_sampling)
        elif config.device == "npu" and draft:  # vLLM's verification is made of Triton for GPUs
            on_each_rank(self.core, verify_as_without_drafts)
        self._resumption = Resumption(self.core)
        not_told = refusal(self.core) if config.prefix_index else "prefix_index is off"
        self._prefix_log = None if not_told else PrefixLog(self.core)
        # As vLLM's own engine process does: a collection would look through all of vLLM and torch.
        freeze_gc_heap()
        self.peaks: Peaks | None = None
        """Peaks of its device; None if they were not measured."""
        self._planned: PlannedScheduler | None = None
        self._recovery: StepRecovery | None = None
        if isinstance(scheduler := self.core.scheduler, PlannedScheduler):
            scheduler.planner = StepPlanner(
                scheduler.limits,
                config.step_policy,
                on_step=observer.took_step if observer else None,
            )
            scheduler.drafts.verifies_all = config.runs_on_cpu
            self._planned = scheduler
            # Other devices may compute nothing more, and other ranks wait for the one that failed.
            if config.runs_on_cpu and config.tensor_parallel_size == 1:
                self._recovery = StepRecovery(self.core, scheduler)
            if draft:
                self._connect(scheduler.drafts, draft)
        self._stock_queue = None if self._planned else StockQueue(self.core.scheduler)
        self._observer = observer
        self._decoder = MsgpackDecoder(EngineCoreRequest)
        self._encode = encoder()
        self._clients: list[StreamAddress] = []
        logger.info(
            "engine ready",
            extra={
                "model": model,
                "num_kv_tokens": vllm_config.cache_config.kv_cache_size_tokens,
                "no_prefix_index": not_told,
                "took_s": round(time.monotonic() - began_s, 1),
            },
        )

    async def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar apart from the engine, before the requests with it are added."""
        await self.grammars.prepare(grammar)

    def add_request(self, request: EngineRequest, client: StreamAddress) -> None:
        """Decode and queue a request, which goes on behind what came of it elsewhere."""
        core_request: EngineCoreRequest = self._decoder.decode(request.core)
        core_request.request_id = request.request.request_id
        core_request.priority = request.request.priority  # what placement makes of the client's
        if request.progress:
            self._resumption.strip(core_request)
        if client not in self._clients:
            self._clients.append(client)
        # vLLM groups the outputs of a step by this index.
        core_request.client_index = self._clients.index(client)
        preprocessed, wave = self.core.preprocess_add_request(core_request)
        # Our view rides on vLLM's request, so that nothing has to be joined again by id.
        preprocessed.came_as = request  # type: ignore[attr-defined]
        if request.progress:
            self._resumption.resume(preprocessed, request.progress.output_token_ids)
        self.core.add_request(preprocessed, wave)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Forget these requests."""
        self.core.abort_requests(request_ids)

    def has_requests(self) -> bool:
        """Whether a step would find work, finished requests not yet cleaned up included."""
        return self.core.scheduler.has_requests()

    def running(self) -> list[str]:
        """Ids of the requests that vLLM's scheduler has admitted."""
        scheduler: Any = self.core.scheduler
        return [request.request_id for request in scheduler.running]

    def step(self) -> tuple[dict[StreamAddress, StepOutput], bool]:
        """One step of vLLM."""
        began_s = time.monotonic()
        outputs, model_ran = self.core.step_fn()
        self.core.post_step(model_executed=model_ran)
        if self._recovery:
            self._recovery.step_succeeded()
        if self._stock_queue and model_ran:
            given = [one for of_client in (outputs or {}).values() for one in of_client.outputs]
            self._stock_queue.took_step(given, began_s, time.monotonic())
        for of_client in (outputs or {}).values():
            # A client would take this engine's statistics for those of all workers.
            stats, of_client.scheduler_stats = of_client.scheduler_stats, None
            if stats is not None and self._observer:
                self._observer.saw_stats(stats)
        return {
            self._clients[index]: self._step_output(of_client)
            for index, of_client in (outputs or {}).items()
            if of_client.outputs
        }, model_ran

    def recover(self, error: Exception) -> list[str]:
        """Go on after a step that failed; gives the requests that are the cause and are gone.

        Raises `error` if the engine cannot go on.
        """
        if self._recovery is None:
            raise error
        causes, requests = self._recovery.undo_step(error)
        for request, client_index in requests:
            self.add_request(request, self._clients[client_index])
        return causes

    def _step_output(self, of_client: EngineCoreOutputs) -> StepOutput:
        ends: dict[str, str | GrammarRefused] = {
            out.request_id: self.grammars.dead_end(out.request_id) or str(out.finish_reason)
            for out in of_client.outputs
            if out.finish_reason is not None
        }
        # vLLM has only "error" for a dead end; the client learns more from the end of its call.
        of_client.outputs = [
            out
            for out in of_client.outputs
            if not isinstance(ends.get(out.request_id), GrammarRefused)
        ]
        num_new_tokens = {out.request_id: len(out.new_token_ids) for out in of_client.outputs}
        return StepOutput(num_new_tokens, ends, self._encode(of_client))

    def predicted_step_s(self) -> float:
        """How long the current step was predicted to take; infinite if vLLM decides steps."""
        return self._planned.predicted_step_s if self._planned else math.inf

    def assign_draft_worker(self, draft_worker: DraftWorkerAddress | None) -> None:
        """Take drafts from this draft worker from now on."""
        if client := self._draft_client:
            client.assign(draft_worker)

    def follow_policy(self, policy: WorkerPolicy | None) -> None:
        """Keep to these bounds from the next step on; vLLM's own scheduler knows none."""
        if self._planned:
            self._planned.followed.follow(policy, time.monotonic())

    def stats(self) -> EngineStats:
        """Count running and waiting requests."""
        running, waiting = self.core.scheduler.get_request_counts()
        usage = self.core.scheduler.get_kv_cache_usage()
        stats = EngineStats(running, waiting, usage, self._draft_stats())
        if self._planned is None:
            return stats
        planner, now = self._planned.planner, time.monotonic()
        return dataclasses.replace(
            stats,
            token_s=planner.token_s(),
            slowness=planner.pace.slowness(now),
            policy=self._planned.followed.at(now),
        )

    def queue(self) -> QueueReport:
        """What placement is to know of its requests."""
        now = time.monotonic()
        if self._stock_queue:
            return self._stock_queue.report(now)
        assert self._planned
        return self._planned.queue_report(now)

    def stages(self, queue: QueueReport) -> StageReport:
        """What the stage policy is to know of its requests, of which this is the queue."""
        if self._planned is None:
            return StageReport()
        return self._planned.stage_report(queue, time.monotonic())

    def take_prefix(self) -> PrefixDelta | None:
        """What has changed in the prefix cache since the last call; None if that is not told."""
        return self._prefix_log.take() if self._prefix_log else None

    def prefix_is_due(self) -> bool:
        """Whether so much has changed there that a report should not wait."""
        return self._prefix_log is not None and self._prefix_log.is_due

    def resync_prefix(self) -> None:
        """Have the next `take_prefix` tell all that the prefix cache has."""
        if self._prefix_log:
            self._prefix_log.resync()

    def _draft_stats(self) -> DraftStats | None:
        if self._planned is None or (client := self._draft_client) is None:
            return None
        now = time.monotonic()
        client.poll(now)
        acceptance = self._planned.planner.acceptance
        return DraftStats(
            copy.deepcopy(dict(client.counts_of)),
            acceptance.rate,
            acceptance.tokens_per_decode,
            client.draft_worker.incarnation if client.draft_worker else None,
            client.silent_s(now),
        )

    def record(self, path: Path) -> None:
        """Write every decision to `path`; ValueError if vLLM's own scheduler decides."""
        if self._planned is None:
            raise ValueError(f"{type(self.core.scheduler).__name__} keeps no record: {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._planned.planner.record(path.open("w", buffering=1))

    def shutdown(self) -> None:
        """Release vLLM's resources, and end the record."""
        if self._planned:
            self._planned.planner.close()
        if client := self._draft_client:
            client.close()
        self.core.shutdown()

    @property
    def _draft_client(self) -> DraftClient | None:
        return self._planned.drafts.client if self._planned else None

    def _connect(self, drafts: DraftOffers, draft: DraftConfig) -> None:
        wants_states = "head" in draft.drafters
        drafts.connect(
            DraftClient(secrets.token_hex(8), self.core.vllm_config.model_config.get_vocab_size()),
            LastHiddenStates(runner_of(self.core).model).rows if wants_states else None,
        )


def _keep_packed_weights(vllm_config: VllmConfig) -> None:
    from workers.plugin.vllm_linear import KernelConfig  # other devices do without our kernels

    kernels = vllm_config.quant_config
    assert isinstance(kernels, KernelConfig)
    if kernels.packed_weights:
        kernels.packed_weights.finish()


@contextlib.contextmanager
def _ours_first_in_path() -> Iterator[None]:
    """Have ranks, which get this process' path, find our packages in it first.

    Ray begins the path with the folder in which its program was started, and there may be a
    workers.py.
    """
    root = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)


def _share_cores(config: WorkerConfig) -> None:
    """Have vLLM bind each rank to its share of this process' cores."""
    cores, share = sorted(os.sched_getaffinity(0)), config.cpus_per_rank
    shares = [cores[rank * share :][:share] for rank in range(config.tensor_parallel_size)]
    if all(shares):  # else there are fewer cores than ranks, which share them all
        bound = "|".join(",".join(map(str, of_rank)) for of_rank in shares)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bound
    else:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def _vllm_config(model: str, config: WorkerConfig, draft: DraftConfig | None) -> VllmConfig:
    args = engine_args(model, config)
    if draft:
        args.speculative_config = speculative_config(draft)
    if config.prefix_index and config.engine.enable_prefix_caching and not args.kv_events_config:
        args.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    vllm_config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    scheduler_config = vllm_config.scheduler_config
    if config.step_policy.name != "vllm" and scheduler_config.scheduler_cls is None:
        scheduler_config.scheduler_cls = (
            PlannedAsyncScheduler if scheduler_config.async_scheduling else PlannedScheduler
        )
    return vllm_config
