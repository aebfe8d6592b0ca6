"""The actors of the app, except the ingress, as replicas of Serve: wired, measured and traced."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ray.exceptions import RayError
from ray.serve._private.replica import Replica as ReplicaOfServe
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.util import get_node_ip_address

from cluster.config.app_config import AppConfig
from cluster.models.model import resolve_model
from cluster.observe.exporter import DraftWorkerMetrics, Exporter, PlacementMetrics
from cluster.observe.phases import phases
from cluster.observe.replica import Replica
from cluster.observe.telemetry import SchedulerTelemetry, WorkerTelemetry
from cluster.placement import ray_seams
from cluster.placement.global_scheduler import GlobalScheduler
from cluster.placement.prefix_watch import PrefixStats
from cluster.placement.record import PlacementRecorder
from cluster.placement.scaling_policy import ANSWERED, WANTED
from scheduler.placement import Placed, Placement, Refused, WorkerLoad
from scheduler.quota import Draw, Grant
from scheduler.request import Request
from scheduler.scaling import ScalingDecision
from workers.drafters.draft_worker import DraftWorker
from workers.drafters.make import make_drafters
from workers.engine.engine import Engine
from workers.engine_request import EngineRequest
from workers.errors import WorkerError
from workers.plugin.vllm_seams import check_seams
from workers.reports import (
    DraftReportAnswer,
    DraftWorkerReport,
    DraftWorkerStatus,
    ReportAnswer,
    Stall,
    WorkerReport,
    WorkerStatus,
    WorkerSteps,
)
from workers.start import Start, StartPhase, nothing_collected
from workers.step_history import RequestStep, StepHistory
from workers.timeline import Span
from workers.token_stream import StreamAddress
from workers.worker import Worker

logger = logging.getLogger(__name__)

Report = TypeVar("Report")
ReportAnswered = TypeVar("ReportAnswered")

BEAT_S = 0.5
"""Period at which a worker says that it lives, whatever its engine does."""
ANSWERED_S = 2.0
"""Max wait of a process that ends for its callers to be told."""
SENT_S = 1.0
"""Time in which Ray sends an answer that a method has returned, on a busy machine too."""
ANSWER_TIMEOUT_S = 5.0
"""Time that the GlobalScheduler has to answer a report or a beat; then the next one is sent. Ray
may lose a call when a link between nodes is cut."""
EXPORT_LOADS_S = 2.0
"""Period at which the GlobalScheduler's view of the workers is exported."""


class GlobalSchedulerReplica(Replica):
    """Has the GlobalScheduler, and exports its view of the workers."""

    def __init__(self, config: AppConfig) -> None:
        super().__init__(config, "scheduler")
        metrics = PlacementMetrics(Exporter(config.model_name, config.metrics))
        self._scheduler = GlobalScheduler(
            observer=SchedulerTelemetry(metrics, self._tracing),
            max_num_seqs=config.worker.engine.max_num_seqs,
            slow_timeout_s=config.worker.slow_timeout_s,
            predicts=config.placement.policy == "predicted",
            sets_stages=config.placement.stage_policy,
            admission=config.placement.admission,
            recorder=self._recorder(config),
            quotas={name: tenant.quota for name, tenant in config.all_tenants.items()},
            weights={name: tenant.weight for name, tenant in config.tenants.items()},
            learn_output_lengths=config.placement.learn_output_lengths,
            scaling=config.worker_scaling,
            draft_scaling=config.draft_scaling,
        )
        worker = config.worker
        is_told = worker.prefix_index and worker.engine.enable_prefix_caching
        exporting = self._export(metrics, is_told)
        self._exporting = asyncio.get_running_loop().create_task(exporting)
        logger.info("GlobalScheduler ready")

    def _recorder(self, config: AppConfig) -> PlacementRecorder | None:
        if config.placement.record is None:
            return None
        recorder = PlacementRecorder(Path(config.placement.record))
        self._at_end.callback(recorder.close)
        return recorder

    async def place(self, request: Request, worker_ids: Sequence[str]) -> Placed | Refused:
        """Choose one of the workers."""
        return await self._scheduler.place(request, worker_ids)

    async def draw(self, ingress_id: str, draws: Mapping[str, Draw]) -> dict[str, Grant]:
        """Lease parts of tenants' quotas to an ingress."""
        return await self._scheduler.draw(ingress_id, draws)

    async def refuse(self, fingerprint: str, found: str) -> None:
        """Refuse requests with this fingerprint for a while, because of what was found of one."""
        await self._scheduler.refuse(fingerprint, found)

    async def placements(self, request_ids: Sequence[str]) -> dict[str, Placement]:
        """Where requests were placed and why."""
        return await self._scheduler.placements(request_ids)

    async def report(self, report: WorkerReport) -> ReportAnswer:
        """Take a worker's report."""
        return await self._scheduler.report(report)

    async def beat(self, worker_id: str, stall: Stall | None) -> None:
        """Hear of a worker between its reports."""
        await self._scheduler.beat(worker_id, stall)

    async def bury(self, worker_id: str, reason: str) -> None:
        """Note that the process of a worker has ended."""
        await self._scheduler.bury(worker_id, reason)

    async def losses(self, attempts: Mapping[str, str]) -> dict[str, WorkerError]:
        """Which attempts at requests, each with its worker, are to be made elsewhere, and why."""
        return await self._scheduler.losses(attempts)

    async def report_draft_worker(self, report: DraftWorkerReport) -> DraftReportAnswer:
        """Take a draft worker's report."""
        return await self._scheduler.report_draft_worker(report)

    async def draft_workers(self) -> list[DraftWorkerStatus]:
        """The current view of all draft workers."""
        return await self._scheduler.draft_workers()

    async def loads(self) -> list[WorkerLoad]:
        """The current view of all workers."""
        return await self._scheduler.loads()

    async def prefix_stats(self) -> PrefixStats:
        """What is known of the workers' prefix caches."""
        return self._scheduler.prefix_stats()

    async def scaling(self) -> ScalingDecision | None:
        """The latest decision on the number of workers, if it is decided here."""
        return self._scheduler.scaling

    async def _export(self, metrics: PlacementMetrics, is_told: bool) -> None:
        while True:
            for load, report_age_s in self._scheduler.loads_and_ages():
                metrics.set_load(load, report_age_s)
            metrics.set_prefixes(self._scheduler.prefix_stats(), is_told)
            metrics.set_policies(self._scheduler.policies())
            for tenant, accuracy in self._scheduler.output_lengths.accuracies.items():
                metrics.set_length_accuracy(tenant, accuracy)
            for tenant, share in self._scheduler.shares().items():
                metrics.set_share(tenant, share)
            if decision := self._scheduler.scaling:
                metrics.set_scaling(decision)
            await asyncio.sleep(EXPORT_LOADS_S)


class WorkerReplica(Replica):
    """Has a worker, and remembers its steps."""

    def __init__(self, config: AppConfig, scheduler: "DeploymentHandle[Any]") -> None:
        self._start = Start()
        super().__init__(config, "worker")
        self._start.ended(StartPhase.PROCESS)
        self._history = StepHistory()
        self._telemetry = _ReportingTelemetry(config, self._history, self, scheduler)
        self._worker = Worker(
            self._replica_id,
            config.worker,
            lambda: self._make_engine(config),
            self._telemetry,
            start=self._start,
        )
        self._at_end.callback(self._worker.shutdown)
        self._at_end.enter_context(_called_at_stop(self._worker.drain))
        self._num_calls = 0
        self._wanted = _Wanted()
        event_loop = asyncio.get_running_loop()
        self._tasks = [
            event_loop.create_task(self._end_with_engine()),
            event_loop.create_task(self._beat(scheduler)),
        ]

    async def generate(
        self, worker_id: str, request: EngineRequest, reply_to: StreamAddress
    ) -> str | Exception:
        """Run a request, with spans of its phases, on the worker of id `worker_id`.

        Its error is returned: Serve would log it as a crash of this replica if it were raised.
        """
        began_s, outcome = time.time(), "error"
        self._num_calls += 1
        try:
            outcome = await self._worker.generate(worker_id, request, reply_to)
            return outcome
        except (WorkerError, ValueError) as error:
            return error
        finally:
            self._num_calls -= 1
            if self._tracing.is_on and request.request.traceparent:
                self._trace(request.request, began_s, outcome)

    async def status(self) -> WorkerStatus:
        """The worker's load and place on its node."""
        return await self._worker.status()

    async def spans(self, since_s: float) -> tuple[str, list[Span]]:
        """The worker's id, and its steps that ended after a time, by the wall clock."""
        return self._replica_id, self._history.spans(since_s)

    async def steps(self, since_s: float, most: int) -> WorkerSteps:
        """The latest `most` of its steps that ended after a time, by the wall clock."""
        steps = self._history.summaries(since_s, most)
        return WorkerSteps(self._replica_id, steps, self._telemetry.peaks)

    async def steps_of(self, request_ids: list[str]) -> tuple[str, dict[str, list[RequestStep]]]:
        """The worker's id, and the steps that each request took part in or was deferred in."""
        found = {request_id: self._history.of_request(request_id) for request_id in request_ids}
        return self._replica_id, {request_id: steps for request_id, steps in found.items() if steps}

    def check_health(self) -> None:
        """Serve's hook: it replaces this replica when this raises."""
        self._worker.check_health()

    def follow(self, answer: ReportAnswer) -> None:
        """Do what the GlobalScheduler answers to a report."""
        self._wanted.note(answer.num_workers_wanted)
        self._worker.follow(answer)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what our autoscaling policy decides by."""
        return self._wanted.stats()

    async def _beat(self, scheduler: "DeploymentHandle[Any]") -> None:
        while True:
            with _while_the_scheduler_restarts():
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await scheduler.beat.remote(self._replica_id, self._worker.stall())
            await asyncio.sleep(BEAT_S)

    async def _end_with_engine(self) -> None:
        """End this process when its engine is dead and its callers know.

        Serve replaces a process that is gone at its next look, and one that only says that it is
        unhealthy after three, and when it has shut down.
        """
        await self._worker.until_dead()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWERED_S):
                while self._num_calls:
                    await asyncio.sleep(0.05)
        await asyncio.sleep(SENT_S)
        logger.warning("this worker's process ends with its engine")
        os._exit(1)  # an orderly end could hang with the engine

    def _make_engine(self, config: AppConfig) -> Engine:
        with nothing_collected():
            check_seams(config.worker.device)
            # vLLM takes long to import, and is checked first.
            from workers.profiling.vllm_calibrated_engine import make_engine
        self._start.ended(StartPhase.IMPORTS)
        observer = self._telemetry if config.metrics or config.tracing else None
        with nothing_collected():
            engine = make_engine(
                resolve_model(config.model), config.worker, observer, config.draft, self._start
            )
        self._telemetry.watch(engine)
        return engine

    def _trace(self, request: Request, began_s: float, outcome: str) -> None:
        steps = self._history.of_request(request.request_id, began_s)
        for phase in phases(steps, began_s):
            self._tracing.add(
                phase.name,
                request.traceparent,
                began_s=phase.began_s,
                ended_s=phase.ended_s,
                attributes={
                    "xyserve.request_id": request.request_id,
                    "xyserve.outcome": outcome,
                    **phase.attributes(),
                },
            )


class _Wanted:
    """How many replicas of a deployment the GlobalScheduler wants, for Serve."""

    def __init__(self) -> None:
        self._stats: dict[str, float] = {}

    def note(self, num_wanted: int | None) -> None:
        """Take an answer; without a number the one before stays."""
        if num_wanted is not None:
            self._stats = {WANTED: num_wanted, ANSWERED: time.time()}

    def stats(self) -> dict[str, float]:
        """The latest number and its time, as metrics for our autoscaling policy; empty if there is
        none."""
        return self._stats


class _Reports(Generic[Report, ReportAnswered]):
    """Sends reports to the GlobalScheduler one at a time, the latest only, and follows its answers.

    So none is overtaken by an older one, and none pile up while it is out of reach.
    """

    def __init__(
        self,
        send: "Callable[[Report], DeploymentResponse[ReportAnswered]]",
        follow: Callable[[ReportAnswered], None],
        join: Callable[[Report, Report], Report],
    ) -> None:
        """`join` makes one of a report that was not sent and the next."""
        self._send, self._follow, self._join = send, follow, join
        self._event_loop = asyncio.get_running_loop()
        self._next: Report | None = None
        self._sending: asyncio.Task[None] | None = None

    def send(self, report: Report) -> None:
        """Send a report, now or after the one under way; called from any thread."""
        self._event_loop.call_soon_threadsafe(self._put, report)

    def _put(self, report: Report) -> None:
        self._next = report if self._next is None else self._join(self._next, report)
        if self._sending is None or self._sending.done():
            self._sending = self._event_loop.create_task(self._send_all())

    async def _send_all(self) -> None:
        while self._next is not None:
            report, self._next = self._next, None
            with _while_the_scheduler_restarts():
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    self._follow(await self._send(report))


def _join_reports(unsent: WorkerReport, report: WorkerReport) -> WorkerReport:
    """The later report, with what only the earlier one says."""
    prefix = report.prefix
    if unsent.prefix:
        prefix = unsent.prefix.then(prefix) if prefix else unsent.prefix
    finished = {**unsent.finished, **report.finished}
    return dataclasses.replace(report, finished=finished, prefix=prefix)


class _ReportingTelemetry(WorkerTelemetry):
    """Sends a worker's reports to the GlobalScheduler too, and has its answers followed."""

    def __init__(
        self,
        config: AppConfig,
        history: StepHistory,
        replica: WorkerReplica,
        scheduler: "DeploymentHandle[Any]",
    ) -> None:
        super().__init__(config, history)
        self._send = scheduler.report
        self._reports: _Reports[WorkerReport, ReportAnswer] = _Reports(
            self._send.remote, replica.follow, _join_reports
        )

    def reported(self, report: WorkerReport) -> None:
        """Export and send a report."""
        super().reported(report)
        if report.death:
            self._send.remote(report)  # at once: the calls fail after it, and are placed again
        else:
            self._reports.send(report)


class DraftReplica(Replica):
    """Has a draft worker."""

    def __init__(self, config: AppConfig, scheduler: "DeploymentHandle[Any]") -> None:
        assert config.draft
        super().__init__(config, "draft_worker")
        draft = config.draft
        metrics = DraftWorkerMetrics(Exporter(config.model_name, config.metrics))
        method = scheduler.report_draft_worker
        reports: _Reports[DraftWorkerReport, DraftReportAnswer] = _Reports(
            method.remote, self._follow, lambda _, report: report
        )
        self._wanted = _Wanted()

        def send(report: DraftWorkerReport) -> None:
            metrics.export(report.status)
            reports.send(report)

        self._draft_worker = DraftWorker(
            self._replica_id,
            draft,
            lambda: make_drafters(draft, resolve_model(config.model), resolve_model),
            send,
            get_node_ip_address(),
            config.stream_ports,
        )
        self._at_end.callback(self._draft_worker.shutdown)

    @property
    def stream_endpoint(self) -> str:
        """Where workers and other draft workers send what drafts are to be made of."""
        return self._draft_worker.address.stream.endpoint

    async def spans(self, since_s: float) -> tuple[str, list[Span]]:
        """The draft worker's id, and the drafts it made after a time, by the wall clock."""
        return await self._draft_worker.spans(since_s)

    def check_health(self) -> None:
        """Serve's hook: it replaces this replica when this raises."""
        self._draft_worker.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what our autoscaling policy decides by."""
        return self._wanted.stats()

    def _follow(self, answer: DraftReportAnswer) -> None:
        self._wanted.note(answer.num_wanted)
        self._draft_worker.set_peers(answer.peers)


@contextlib.contextmanager
def _called_at_stop(hook: Callable[[], None]) -> Iterator[None]:
    """Have `hook` called, in any thread, when Serve begins to stop the replica of this process."""
    drain = ReplicaOfServe._drain_ongoing_requests

    async def drain_after_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        hook()
        await drain(self, *args, **kwargs)

    with ray_seams.RAY.replaced(ReplicaOfServe, "_drain_ongoing_requests", drain_after_hook):
        yield


@contextlib.contextmanager
def _while_the_scheduler_restarts() -> Iterator[None]:
    """Keep the GlobalScheduler's last answer if this call of it fails."""
    try:
        yield
    except (RayError, RuntimeError, TimeoutError) as error:
        logger.warning("the GlobalScheduler did not answer", extra={"error": repr(error)})
