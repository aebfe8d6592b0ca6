"""The Serve application: its deployments and how they are bound to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.config.app_config import AppConfig, parse_args
from cluster.config.nodes import NodesConfig
from cluster.config.scaling import autoscaling_of_serve
from cluster.errors import DeviceMissing, NodeMissing
from cluster.ingress.ingress import Ingress
from cluster.placement.router import PlacementRouter, UnaryRouter
from cluster.replicas import DraftReplica, GlobalSchedulerReplica, WorkerReplica
from scheduler.scaling import ScalingSettings
from workers.config import DraftConfig

MAX_ONGOING_REQUESTS = 4096
"""Requests that wait in a worker's own queue, where its scheduler sees them, not in Serve's."""
SCALING_POLICY = "cluster.placement.scaling_policy:num_replicas_wanted"


def build_app(args: dict[str, Any]) -> Application:
    """The app for `args` of a Serve config; raises ConfigError before anything starts."""
    config = parse_args(args)
    if not config.wait_for_device:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        check_labels(config.nodes, nodes)
        check_device(config, nodes)
    scheduler = _deployment(
        GlobalSchedulerReplica,
        name="GlobalScheduler",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, **_on(config.nodes.global_scheduler)},
        request_router_config=RequestRouterConfig(request_router_class=UnaryRouter),
        # Ingresses do its work, not so well, while it is gone or hangs. Nothing that it does
        # takes long.
        health_check_period_s=1,
        health_check_timeout_s=5,
    ).bind(config)
    workers = _deployment(
        WorkerReplica,
        name="Worker",
        **_replicas(config.num_workers, config.autoscaling, config.worker_scaling),
        ray_actor_options=_worker_resources(config),
        request_router_config=RequestRouterConfig(request_router_class=PlacementRouter),
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        health_check_period_s=1,  # how soon Serve sees that a worker's process has ended
    ).bind(config, scheduler)
    # Bound as an argument, the draft workers are part of the app.
    draft_workers = (
        _draft_workers(config.draft, config).bind(config, scheduler) if config.draft else None
    )
    return _deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=config.num_ingresses,
        ray_actor_options={
            "num_cpus": 0,
            **_on(config.nodes.ingress),
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
    env = _VLLM_ENV | worker.env
    options: dict[str, Any] = {
        "num_cpus": worker.cpus,
        **_on(config.nodes.worker),
        "runtime_env": {"env_vars": env},
    }
    resource, number = worker.resource
    if resource == "GPU":
        options["num_gpus"] = number
    elif resource == "NPU":
        options["resources"] = {resource: number}
    return options


def _on(labels: dict[str, str]) -> dict[str, Any]:
    """Options of an actor that runs only on nodes with these labels."""
    return {"label_selector": labels} if labels else {}


def _replicas(
    number: int, autoscaling: dict[str, Any] | None, scaling: ScalingSettings | None
) -> dict[str, Any]:
    """Options of a deployment for the number of its replicas, which our policy decides on if there
    is a `scaling`."""
    if autoscaling is None:
        return {"num_replicas": number}
    if scaling is not None:
        autoscaling = autoscaling_of_serve(autoscaling, SCALING_POLICY)
    return {"autoscaling_config": autoscaling}


def _draft_workers(draft: DraftConfig, config: AppConfig) -> Any:
    env = _VLLM_ENV | {"OMP_NUM_THREADS": str(max(draft.cpus, 1)), "OMP_WAIT_POLICY": "PASSIVE"}
    return _deployment(
        DraftReplica,
        name="DraftWorker",
        **_replicas(draft.num_workers, draft.autoscaling, config.draft_scaling),
        ray_actor_options={
            "num_cpus": draft.cpus,
            **_on(config.nodes.draft_worker),
            "runtime_env": {"env_vars": env},
        },
    )


def check_labels(wanted: NodesConfig, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuse labels that none of Ray's nodes has: actors would wait for ever for such a node."""
    for role in fields(wanted):
        labels = getattr(wanted, role.name)
        if not any(_has(node, labels) for node in nodes):
            options = ",".join(f"{label}={value}" for label, value in labels.items())
            raise NodeMissing(
                f"nodes.{role.name} is {labels}, and no node of this Ray cluster has these labels: "
                f"start one by `ray start --address=HEAD:6379 --labels={options}`, change "
                f"nodes.{role.name}, or set wait_for_device if the cluster grows on demand"
            )


def check_device(config: AppConfig, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuse workers that would wait for ever for a device that none of these nodes has."""
    resource, need = config.worker.resource
    labels = config.nodes.worker
    found = (node["Resources"].get(resource, 0) for node in nodes if _has(node, labels))
    if (largest := max(found, default=0)) < need:
        among = f" with the labels {labels} of nodes.worker" if labels else ""
        raise DeviceMissing(
            f"worker.device is {config.worker.device} and needs {need} {resource} on one node, but "
            f"the largest node of this Ray cluster{among} has {largest:g}: add such a node, change "
            "worker.device or worker.cpus, or set wait_for_device if the cluster grows on demand"
        )


def _has(node: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return all(node["Labels"].get(label) == value for label, value in labels.items())
