"""The workers that Serve believes to be alive, as this process sees them."""

from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

_ROUTERS: dict[str, RequestRouter] = {}
"""The router of this process for the workers of each app."""


def keep_router(router: RequestRouter) -> None:
    """Let `WorkerDirectory` find a router, which Serve makes and gives no access to.

    `_ROUTERS` cannot be in the router's own module: Serve sends a copy of that with the class.
    """
    _ROUTERS[router.app_name] = router


class WorkerDirectory:
    """The workers of a handle."""

    def __init__(self, workers: "DeploymentHandle[Any]") -> None:
        self._app_name = workers.app_name

    def worker_ids(self) -> list[str]:
        """Ids of the workers; none until Serve makes the router, at the first use of the handle."""
        router = _ROUTERS.get(self._app_name)
        return [replica_id.unique_id for replica_id in list(router.curr_replicas)] if router else []
