"""What every actor of the app has as a replica of Serve: an id, logs, traces and an orderly end."""

import contextlib

from ray import serve

from cluster.config.app_config import AppConfig
from cluster.observe.logs import set_up_logs
from cluster.observe.tracing import Tracing


class Replica:
    """An actor in a replica of Serve; Serve calls its public methods and its hooks."""

    def __init__(self, config: AppConfig, role: str) -> None:
        """`role` names its service in traces."""
        self._at_end = contextlib.ExitStack()
        """What ends with the replica, the latest first; traces are sent last."""
        context = replica_context()
        set_up_logs(config.logs, **context)
        self._replica_id = context["replica"]
        self._tracing = Tracing(config.tracing, role, self._replica_id)
        self._at_end.callback(self._tracing.shut_down)

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
