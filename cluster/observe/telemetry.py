"""The telemetry of workers and the GlobalScheduler: metrics, spans and history."""

import time
from typing import TYPE_CHECKING, Any

from cluster.config.app_config import AppConfig
from cluster.observe.exporter import Exporter, PlacementMetrics, WorkerMetrics
from cluster.observe.metrics import PEAK_FLOPS, PEAK_MEMORY_BANDWIDTH
from cluster.observe.tracing import Tracing
from cluster.placement.observer import SchedulerObserver
from scheduler.drafting import CollapseReason
from scheduler.placement import Placement, Refused
from scheduler.request import Request
from scheduler.scaling import ScalingDecision
from scheduler.stage_policy import WorkerPolicy
from scheduler.task import StepReport
from workers.reports import Peaks, WorkerObserver, WorkerReport
from workers.step_history import StepHistory

if TYPE_CHECKING:
    from cluster.observe.vllm_metrics import SchedulerMetrics
    from workers.engine.vllm_engine import VllmEngine


class SchedulerTelemetry(SchedulerObserver):
    """Counts and traces placements, and counts collapses of drafting."""

    def __init__(self, metrics: PlacementMetrics, tracing: Tracing) -> None:
        self._metrics = metrics
        self._tracing = tracing

    def placed(self, request: Request, placement: Placement, took_s: float) -> None:
        """Count a placement, and make a span of it."""
        self._metrics.count_placement(placement)
        ended_s = time.time()
        runner_up, forecast = placement.runner_up, placement.chosen.forecast
        predicted: dict[str, str | float] = {}
        if forecast:
            predicted = {
                "xyserve.predicted_ttft_s": forecast.ttft_s,
                "xyserve.predicted_cached_tokens": forecast.num_cached_tokens,
            }
        self._tracing.add(
            "placement",
            request.traceparent,
            began_s=ended_s - took_s,
            ended_s=ended_s,
            attributes={
                "xyserve.worker": placement.chosen.worker_id,
                "xyserve.reason": placement.reason,
                "xyserve.runner_up": runner_up.worker_id if runner_up else "",
                **predicted,
            },
        )

    def queued(self, request: Request) -> None:
        """Count a request that has to wait for its tenant's turn."""
        self._metrics.count_queued(request.tenant)

    def refused(self, request: Request, refused: Refused) -> None:
        """Count a request that was refused for good."""
        self._metrics.count_refusal(refused.reason)

    def rescaled(self, decision: ScalingDecision) -> None:
        """Count that another number of workers is wanted."""
        self._metrics.count_rescaling(decision)

    def collapsed(self, worker_id: str, reason: CollapseReason) -> None:
        """Count that the drafts for a worker are no longer accepted."""
        self._metrics.count_collapse(reason)

    def policy_changed(self, worker_id: str, policy: WorkerPolicy) -> None:
        """Count a change of a worker's policy."""
        self._metrics.count_policy_change(policy)


class WorkerTelemetry(WorkerObserver):
    """Counts and remembers a worker's steps, and exports what they add up to with each report."""

    def __init__(self, config: AppConfig, history: StepHistory) -> None:
        self._config = config
        self._exporter = Exporter(config.model_name, config.metrics)
        self._metrics = WorkerMetrics(self._exporter)
        self._history = history
        self._scheduler_metrics: SchedulerMetrics | None = None
        self.peaks: Peaks | None = None
        """Peaks of the worker's device; None if they were not measured."""

    def watch(self, engine: "VllmEngine") -> None:
        """Export the statistics of its scheduler, and note its device's peaks."""
        if self._config.metrics:
            # vLLM takes long to import; it is there by now, but not where this file is read.
            from cluster.observe.vllm_metrics import SchedulerMetrics

            self._scheduler_metrics = SchedulerMetrics(
                engine.core.vllm_config, self._config.model_name
            )
        if engine.peaks:
            self.peaks = engine.peaks
            self._exporter.keep(PEAK_FLOPS, engine.peaks.flops_per_s)
            self._exporter.keep(PEAK_MEMORY_BANDWIDTH, engine.peaks.bytes_per_s)

    def took_step(self, step: StepReport) -> None:
        """Count and remember a step."""
        self._metrics.add_step(step)
        self._history.add(step)

    def saw_stats(self, stats: Any) -> None:
        """Add the statistics of a step."""
        if self._scheduler_metrics:
            self._scheduler_metrics.add(stats)

    def reported(self, report: WorkerReport) -> None:
        """Export what the steps since the last report add up to."""
        self._metrics.export(report.drafts)
        if self._scheduler_metrics:
            self._scheduler_metrics.export()
