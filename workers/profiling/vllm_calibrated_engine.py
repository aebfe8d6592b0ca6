"""An engine that predicts its steps by a profile of this machine."""

import functools
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import KVCacheConfig

from scheduler.cost_model import CostModel
from workers.config import DraftConfig, WorkerConfig
from workers.engine.vllm_engine import VllmEngine
from workers.engine.vllm_scheduler import PlannedScheduler
from workers.plugin.vllm_seams import VLLM
from workers.profiling.vllm_profile import calibrated_profile
from workers.profiling.vllm_work import model_work
from workers.reports import WorkerObserver
from workers.start import Start, StartPhase


def make_engine(
    model: str,
    config: WorkerConfig,
    observer: WorkerObserver | None = None,
    draft: DraftConfig | None = None,
    start: Start | None = None,
) -> VllmEngine:
    """A `VllmEngine` that is ready to predict: its profile is read, or measured first.

    Measuring takes seconds, and happens once for each model, config and machine. Steps that
    vLLM's own scheduler decides are not predicted. `start` is told of its phases.
    """
    start = start or Start()
    with VLLM.replaced(EngineCore, "_initialize_kv_caches", _timed(start)):
        engine = VllmEngine(model, config, observer, draft)
    _forget_rendezvous(engine.core.model_executor)
    engine.grammars.warm_up()
    start.ended(StartPhase.SCHEDULER)
    if isinstance(scheduler := engine.core.scheduler, PlannedScheduler):
        cost_model: CostModel | None = None
        if config.calibrate_at_start and (
            profile := calibrated_profile(engine.core, model, config)
        ):
            cost_model = CostModel.from_dict(profile.cost_model)
            engine.peaks = profile.peaks
        # Counted last: measuring takes the first step, which may pack weights.
        scheduler.planner.calibrate(cost_model, model_work(engine.core))
    start.ended(StartPhase.CALIBRATION)
    return engine


def _timed(start: Start) -> Callable[[EngineCore, VllmConfig], KVCacheConfig]:
    """What makes the KV cache, between the phases before and after it."""
    initialize = EngineCore._initialize_kv_caches

    @functools.wraps(initialize)
    def initialize_kv_caches(core: EngineCore, vllm_config: VllmConfig) -> KVCacheConfig:
        start.ended(StartPhase.MODEL)
        kv_cache_config: KVCacheConfig = initialize(core, vllm_config)
        start.ended(StartPhase.KV_CACHE)
        return kv_cache_config

    return initialize_kv_caches


def _forget_rendezvous(executor: Executor) -> None:
    """Remove the file by which the processes of an engine find each other, if this is its only one.

    vLLM does so at an orderly end only: each worker that is killed would leave a file in TMPDIR.
    """
    if isinstance(executor, UniProcExecutor):
        rendezvous = urlsplit(executor.driver_worker.worker.distributed_init_method)
        if rendezvous.scheme == "file":
            Path(rendezvous.path).unlink(missing_ok=True)
