"""What every actor of the app has as a replica of Serve: an id, logs, traces and an orderly end."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from ray import serve
from ray.util import get_node_ip_address

from cluster.config.app_config import AppConfig
from cluster.observe.logs import keep_serves_logs, set_up_logs
from cluster.observe.tracing import Tracing
from workers import sockets


@dataclass(frozen=True, slots=True)
class ReplicaLinks:
    """What a replica finds of the streams of others."""

    name: str
    """Deployment and id."""
    address: str
    """Address of its node."""
    endpoint: str
    """Where it listens itself; empty if it does not."""
    faults: dict[str, str]
    """Why it cannot reach an endpoint, by endpoint; empty for one that it reaches."""


class Replica:
    """An actor in a replica of Serve; Serve calls its public methods and its hooks."""

    def __init__(self, config: AppConfig, role: str) -> None:
        """`role` names its service in traces."""
        self._at_end = contextlib.ExitStack()
        """What ends with the replica, the latest first; traces are sent last."""
        context = replica_context()
        set_up_logs(config.logs, **context)
        keep_serves_logs()
        self._replica_id = context["replica"]
        self._tracing = Tracing(config.tracing, role, self._replica_id)
        self._at_end.callback(self._tracing.shut_down)

    @property
    def stream_endpoint(self) -> str:
        """Where it takes a stream; empty if it takes none."""
        return ""

    async def links(self, endpoints: Sequence[str]) -> ReplicaLinks:
        """Try each of these endpoints from here, except its own."""
        others = [endpoint for endpoint in endpoints if endpoint != self.stream_endpoint]
        faults = await asyncio.gather(*map(sockets.fault, others))
        context = replica_context()
        return ReplicaLinks(
            f"{context['deployment']} {context['replica']}",
            get_node_ip_address(),
            self.stream_endpoint,
            dict(zip(others, faults, strict=True)),
        )

    def __del__(self) -> None:
        """Serve's hook for the end of a replica, also of one whose constructor failed."""
        if hasattr(self, "_at_end"):
            self._at_end.close()


def replica_context() -> dict[str, str]:
    """Fields that identify this process's replica of Serve in its logs."""
    replica = serve.get_replica_context()
    return {
        "app": replica.app_name,
        "deployment": replica.deployment,
        "replica": replica.replica_id.unique_id,
    }
