"""The workers that Serve believes to be alive, as this process sees them."""

from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

_ROUTERS: dict[str, RequestRouter] = {}
"""The router of this process for the workers of each app."""


def keep_router(router: RequestRouter) -> None:
    """Let `WorkerDirectory` find a router: Serve makes it, and gives nobody a way to it.

    Serve sends the router's whole module along with its class, so this cannot be there.
    """
    _ROUTERS[router.app_name] = router


class WorkerDirectory:
    """The workers of a handle."""

    def __init__(self, workers: "DeploymentHandle[Any]") -> None:
        self._app_name = workers.app_name

    def worker_ids(self) -> list[str]:
        """Their ids; none before Serve has made the router, at the first use of the handle."""
        router = _ROUTERS.get(self._app_name)
        return [replica_id.unique_id for replica_id in list(router.curr_replicas)] if router else []
