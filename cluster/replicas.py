"""The actors of the app as replicas of Serve: wired to each other, measured, traced and logged."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.util import get_node_ip_address

from cluster.config.app_config import AppConfig
from cluster.models.model import resolve_model
from cluster.observe.exporter import DraftWorkerMetrics, Exporter, PlacementMetrics, WorkerMetrics
from cluster.observe.logs import replica_context, set_up_logs
from cluster.observe.metrics import PEAK_FLOPS, PEAK_MEMORY_BANDWIDTH
from cluster.observe.phases import phases
from cluster.observe.tracing import Tracing
from cluster.placement.global_scheduler import GlobalScheduler
from scheduler.request import Request
from scheduler.task import StepReport
from workers.drafters.draft_worker import DraftWorker
from workers.drafters.make import make_drafters
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.engine.engine import Engine
from workers.plugin.vllm_seams import check_seams
from workers.reports import DraftWorkerReport, WorkerReport
from workers.token_stream import StreamAddress
from workers.worker import Worker

if TYPE_CHECKING:
    from cluster.observe.vllm_metrics import SchedulerMetrics

logger = logging.getLogger(__name__)

EXPORT_LOADS_S = 2.0
"""How often the GlobalScheduler's view of the workers is exported."""


class GlobalSchedulerReplica(GlobalScheduler):
    """The GlobalScheduler as a replica of Serve."""

    def __init__(self, config: AppConfig) -> None:
        context = replica_context()
        set_up_logs(config.logs, **context)
        metrics = PlacementMetrics(Exporter(config.model_name, config.metrics))
        self._tracing = Tracing(config.tracing, "scheduler", context["replica"])
        super().__init__(
            on_placement=lambda request, placement: metrics.count_placement(placement),
            on_collapse=metrics.count_collapse,
        )
        self._exporting = asyncio.get_running_loop().create_task(self._export(metrics))
        logger.info("GlobalScheduler ready")

    async def place(self, request: Request, worker_ids: Sequence[str]) -> str | None:
        """Choose a worker, and trace that."""
        began_s = time.time()
        chosen = await super().place(request, worker_ids)
        if self._tracing.is_on and chosen is not None:
            placement = (await self.placements([request.request_id]))[request.request_id]
            self._tracing.add(
                "placement",
                request.traceparent,
                began_s,
                time.time(),
                {
                    "xyserve.worker": chosen,
                    "xyserve.reason": placement.reason,
                    "xyserve.runner_up": placement.runner_up.worker_id
                    if placement.runner_up
                    else "",
                },
            )
        return chosen

    def __del__(self) -> None:
        """Serve's hook for the end of a replica, also of one whose constructor failed."""
        if hasattr(self, "_tracing"):
            self._tracing.shut_down()

    async def _export(self, metrics: PlacementMetrics) -> None:
        while True:
            for load, report_age_s in self.loads_by_age():
                metrics.set_load(load, report_age_s)
            await asyncio.sleep(EXPORT_LOADS_S)


class WorkerReplica(Worker):
    """A worker as a replica of Serve."""

    def __init__(self, config: AppConfig, scheduler: "DeploymentHandle[Any]") -> None:
        context = replica_context()
        set_up_logs(config.logs, **context)
        exporter = Exporter(config.model_name, config.metrics)
        metrics = WorkerMetrics(exporter)
        self._tracing = Tracing(config.tracing, "worker", context["replica"])
        self._scheduler_metrics: SchedulerMetrics | None = None

        def make_engine() -> Engine:
            check_seams(config.worker.device)
            # vLLM takes long to import; only this process of the cluster package needs it.
            from cluster.observe.vllm_metrics import SchedulerMetrics
            from workers.profiling import vllm_calibrated_engine

            told = on_step if config.metrics or config.tracing else None
            engine = vllm_calibrated_engine.make_engine(
                resolve_model(config.model), config.worker, told, config.draft
            )
            if config.metrics:
                self._scheduler_metrics = SchedulerMetrics(engine.vllm_config, config.model_name)
                engine.on_stats = self._scheduler_metrics.add
            if engine.peaks:
                self.peaks = engine.peaks
                exporter.keep(PEAK_FLOPS, engine.peaks.flops_per_s)
                exporter.keep(PEAK_MEMORY_BANDWIDTH, engine.peaks.bytes_per_s)
            return engine

        def on_step(step: StepReport) -> None:
            metrics.add_step(step)
            self.history.add(step)

        def send(report: WorkerReport) -> None:
            metrics.export(report.drafts)
            if self._scheduler_metrics:
                self._scheduler_metrics.export()
            answer = scheduler.report.remote(report)
            if report.drafts:
                asyncio.run_coroutine_threadsafe(self._follow(answer), loop)

        loop = asyncio.get_running_loop()
        self._draft_worker: DraftWorkerAddress | None = None
        super().__init__(context["replica"], config.worker, make_engine, send)

    async def generate(
        self, request: Request, engine_request: list[bytes], reply_to: StreamAddress
    ) -> str:
        """Run a request, and trace that."""
        began_s, outcome = time.time(), "error"
        try:
            outcome = await super().generate(request, engine_request, reply_to)
            return outcome
        finally:
            if self._tracing.is_on and request.traceparent:
                self._trace(request, began_s, outcome)

    def _trace(self, request: Request, began_s: float, outcome: str) -> None:
        steps = self.history.of_request(request.request_id, began_s)
        for phase in phases(steps, began_s):
            self._tracing.add(
                phase.name,
                request.traceparent,
                phase.began_s,
                phase.ended_s,
                {
                    "xyserve.request_id": request.request_id,
                    "xyserve.outcome": outcome,
                    **phase.attributes(),
                },
            )

    async def _follow(self, answer: "DeploymentResponse[DraftWorkerAddress | None]") -> None:
        """Have the draft worker that the GlobalScheduler names make the drafts."""
        draft_worker = await _answered(answer, self._draft_worker)
        if draft_worker != self._draft_worker:
            self._draft_worker = draft_worker
            self.assign_draft_worker(draft_worker)

    def __del__(self) -> None:
        """Serve's hook for the end of a replica, also of one whose constructor failed."""
        if hasattr(self, "_loop"):
            self.shutdown()
            self._tracing.shut_down()


class DraftReplica(DraftWorker):
    """A draft worker as a replica of Serve."""

    def __init__(self, config: AppConfig, scheduler: "DeploymentHandle[Any]") -> None:
        assert config.draft
        context = replica_context()
        set_up_logs(config.logs, **context)
        draft = config.draft
        metrics = DraftWorkerMetrics(Exporter(config.model_name, config.metrics))

        def send(report: DraftWorkerReport) -> None:
            metrics.export(report.status)
            answer = scheduler.report_draft_worker.remote(report)
            asyncio.run_coroutine_threadsafe(self._follow(answer), loop)

        loop = asyncio.get_running_loop()
        super().__init__(
            context["replica"],
            draft,
            lambda: make_drafters(draft, resolve_model(config.model), resolve_model),
            send,
            get_node_ip_address(),
        )

    async def _follow(self, answer: "DeploymentResponse[list[DraftWorkerAddress]]") -> None:
        self.set_peers(await _answered(answer, []))

    def __del__(self) -> None:
        """Serve's hook for the end of a replica, also of one whose constructor failed."""
        if hasattr(self, "_thread"):
            self.shutdown()


T = TypeVar("T")


async def _answered(answer: "DeploymentResponse[T]", otherwise: T) -> T:
    """The GlobalScheduler's answer, or `otherwise` while it restarts."""
    try:
        result: T = await answer
        return result
    except (RayError, RuntimeError) as error:
        logger.warning("the GlobalScheduler did not answer", extra={"error": repr(error)})
        return otherwise
