"""The Serve application: its deployments and how they are bound to each other."""

import asyncio
import logging
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.util import get_node_ip_address

from cluster.config import AppConfig, parse_args
from cluster.errors import DeviceMissing
from cluster.global_scheduler import GlobalScheduler
from cluster.ingress import Ingress
from cluster.metrics import CollapseMetrics, DraftMetrics, StepMetrics
from cluster.model import resolve_model
from cluster.router import PlacementRouter
from scheduler.task import StepReport
from workers.draft_stream import DrafterAddress
from workers.draft_worker import DraftConfig, DraftWorker, DraftWorkerReport, make_drafters
from workers.engine import Engine
from workers.worker import Worker, WorkerReport

logger = logging.getLogger(__name__)

MAX_ONGOING_REQUESTS = 4096
"""Requests that wait in a worker's own queue, where its scheduler sees them, not in Serve's."""


class GlobalSchedulerReplica(GlobalScheduler):
    """The GlobalScheduler as a replica of Serve."""

    def __init__(self) -> None:
        super().__init__(on_collapse=CollapseMetrics().count)


class WorkerReplica(Worker):
    """A worker as a replica of Serve."""

    def __init__(self, config: AppConfig, scheduler: "DeploymentHandle[Any]") -> None:
        metrics = StepMetrics()
        draft_metrics = DraftMetrics() if config.draft else None

        def make_engine() -> Engine:
            # vLLM takes long to import; only this process of the cluster package needs it.
            from workers.vllm_engine import VllmEngine

            return VllmEngine(resolve_model(config.model), config.worker, on_step, config.draft)

        def on_step(report: StepReport) -> None:
            metrics.observe(report)
            self.timeline.add(
                "step",
                report.began_s,
                report.began_s + report.measured_s,
                {task.request_id: task.num_tokens for task in report.plan.tasks},
            )

        def send(report: WorkerReport) -> None:
            answer = scheduler.report.remote(report)
            if draft_metrics and report.drafts:
                draft_metrics.observe(report.drafts)
                asyncio.run_coroutine_threadsafe(self._follow(answer), loop)

        loop = asyncio.get_running_loop()
        self._drafter: DrafterAddress | None = None
        super().__init__(
            serve.get_replica_context().replica_id.unique_id, config.worker, make_engine, send
        )

    async def _follow(self, answer: "DeploymentResponse[DrafterAddress | None]") -> None:
        """Have the draft worker that the GlobalScheduler names make the drafts."""
        drafter = await _answered(answer, self._drafter)
        if drafter != self._drafter:
            self._drafter = drafter
            self.assign_drafter(drafter)

    def __del__(self) -> None:
        """Serve's hook for the end of a replica, also of one whose constructor failed."""
        if hasattr(self, "_loop"):
            self.shutdown()


class DraftReplica(DraftWorker):
    """A draft worker as a replica of Serve."""

    def __init__(self, config: AppConfig, scheduler: "DeploymentHandle[Any]") -> None:
        assert config.draft
        draft = config.draft

        def send(report: DraftWorkerReport) -> None:
            answer = scheduler.report_drafter.remote(report)
            asyncio.run_coroutine_threadsafe(self._follow(answer), loop)

        loop = asyncio.get_running_loop()
        super().__init__(
            serve.get_replica_context().replica_id.unique_id,
            draft,
            lambda: make_drafters(draft, resolve_model(config.model), resolve_model),
            send,
            get_node_ip_address(),
        )

    async def _follow(self, answer: "DeploymentResponse[list[DrafterAddress]]") -> None:
        self.meet(await _answered(answer, []))

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
        logger.warning("the GlobalScheduler did not answer: %r", error)
        return otherwise


def build_app(args: dict[str, Any]) -> Application:
    """The app for `args` of a Serve config; raises ConfigError before anything starts."""
    config = parse_args(args)
    if not config.wait_for_device:
        _check_device(config)
    scheduler = _deployment(GlobalSchedulerReplica, name="GlobalScheduler", num_replicas=1).bind()
    workers = _deployment(
        WorkerReplica,
        name="Worker",
        **(
            {"autoscaling_config": config.autoscaling}
            if config.autoscaling
            else {"num_replicas": config.num_workers}
        ),
        ray_actor_options=_worker_resources(config),
        request_router_config=RequestRouterConfig(
            request_router_class=PlacementRouter,
            request_router_kwargs={"scheduler_name": "GlobalScheduler"},
        ),
        graceful_shutdown_timeout_s=config.drain_timeout_s,
    ).bind(config, scheduler)
    # Nobody calls the draft workers; an argument is what makes them a part of the app.
    draft_workers = _draft_workers(config.draft).bind(config, scheduler) if config.draft else None
    return _deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=config.num_ingresses,
        ray_actor_options={
            "num_cpus": 0,
            "runtime_env": {
                "env_vars": _VLLM_ENV
                | {"OMP_NUM_THREADS": "1", "VLLM_MAX_N_SEQUENCES": str(config.ingress.max_n)}
            },
        },
        graceful_shutdown_timeout_s=config.drain_timeout_s,
    ).bind(config, workers, scheduler, draft_workers)


_VLLM_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


def _deployment(cls: type, **options: Any) -> Any:
    defaults = {
        "name": cls.__name__,
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "ray_actor_options": {"num_cpus": 0},
        "logging_config": {"enable_access_log": False},
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
    }
    return serve.deployment(cls).options(**(defaults | options))


def _worker_resources(config: AppConfig) -> dict[str, Any]:
    worker = config.worker
    env = _VLLM_ENV | worker.thread_env
    options: dict[str, Any] = {"num_cpus": worker.cpus, "runtime_env": {"env_vars": env}}
    if worker.device == "cuda":
        options["num_gpus"] = 1
    elif worker.device == "npu":
        options["resources"] = {"NPU": 1}
    return options


def _draft_workers(config: DraftConfig) -> Any:
    env = _VLLM_ENV | {"OMP_NUM_THREADS": str(max(config.cpus, 1)), "OMP_WAIT_POLICY": "PASSIVE"}
    return _deployment(
        DraftReplica,
        name="DraftWorker",
        num_replicas=config.num_workers,
        ray_actor_options={"num_cpus": config.cpus, "runtime_env": {"env_vars": env}},
    )


def _check_device(config: AppConfig) -> None:
    """Refuse a config whose workers would wait for ever for a device that no node has."""
    resource, need = {"cpu": ("CPU", config.worker.cpus), "cuda": ("GPU", 1), "npu": ("NPU", 1)}[
        config.worker.device
    ]
    most = max(
        (node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"]), default=0
    )
    if most < need:
        raise DeviceMissing(
            f"worker.device is {config.worker.device} and needs {need} {resource} on one node, but "
            f"the largest node of this Ray cluster has {most:g}: add such a node, change "
            "worker.device or worker.cpus, or set wait_for_device if the cluster grows on demand"
        )
