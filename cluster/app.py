"""The Serve application: its deployments and how they are bound to each other."""

from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.config.app_config import AppConfig, parse_args
from cluster.errors import DeviceMissing
from cluster.ingress.ingress import Ingress
from cluster.placement.router import PlacementRouter
from cluster.replicas import DraftReplica, GlobalSchedulerReplica, WorkerReplica
from workers.config import DraftConfig

MAX_ONGOING_REQUESTS = 4096
"""Requests that wait in a worker's own queue, where its scheduler sees them, not in Serve's."""


def build_app(args: dict[str, Any]) -> Application:
    """The app for `args` of a Serve config; raises ConfigError before anything starts."""
    config = parse_args(args)
    if not config.wait_for_device:
        _check_device(config)
    scheduler = _deployment(
        GlobalSchedulerReplica,
        name="GlobalScheduler",
        num_replicas=1,
        # New requests wait while it is gone or hangs. Nothing that it does takes long.
        health_check_period_s=1,
        health_check_timeout_s=5,
    ).bind(config)
    workers = _deployment(
        WorkerReplica,
        name="Worker",
        **(
            {"autoscaling_config": config.autoscaling}
            if config.autoscaling
            else {"num_replicas": config.num_workers}
        ),
        ray_actor_options=_worker_resources(config),
        request_router_config=RequestRouterConfig(request_router_class=PlacementRouter),
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        health_check_period_s=1,  # how soon Serve sees that a worker's process has ended
    ).bind(config, scheduler)
    # Bound as an argument, the draft workers are part of the app.
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
    largest = max(
        (node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"]), default=0
    )
    if largest < need:
        raise DeviceMissing(
            f"worker.device is {config.worker.device} and needs {need} {resource} on one node, but "
            f"the largest node of this Ray cluster has {largest:g}: add such a node, change "
            "worker.device or worker.cpus, or set wait_for_device if the cluster grows on demand"
        )
