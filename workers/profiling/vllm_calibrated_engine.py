"""An engine that predicts its steps by a profile of this machine."""

from scheduler.cost_model import CostModel
from workers.config import DraftConfig, WorkerConfig
from workers.engine.vllm_engine import VllmEngine
from workers.engine.vllm_scheduler import PlannedScheduler
from workers.profiling.vllm_profile import calibrated_profile
from workers.profiling.vllm_work import model_work
from workers.reports import WorkerObserver


def make_engine(
    model: str,
    config: WorkerConfig,
    observer: WorkerObserver | None = None,
    draft: DraftConfig | None = None,
) -> VllmEngine:
    """A `VllmEngine` that is ready to predict: its profile is read, or measured first.

    Measuring takes seconds, and happens once for each model, config and machine. Steps that
    vLLM's own scheduler decides are not predicted.
    """
    engine = VllmEngine(model, config, observer, draft)
    engine.grammars.warm_up()
    if isinstance(scheduler := engine.core.scheduler, PlannedScheduler):
        cost_model: CostModel | None = None
        if config.calibrate_at_start and (
            profile := calibrated_profile(engine.core, model, config)
        ):
            cost_model = CostModel.from_dict(profile.cost_model)
            engine.peaks = profile.peaks
        # Counted last: measuring takes the first step, which may pack weights.
        scheduler.planner.calibrate(cost_model, model_work(engine.core))
    return engine
