"""Serve's router for workers: sends a call to the worker that was chosen for it."""

from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

_ROUTERS: dict[str, "PlacementRouter"] = {}
"""The router of this process for each app; Serve makes it, and gives no way to it."""


class PlacementRouter(RequestRouter):
    """Routes a call to the worker whose id is its first argument."""

    def initialize_state(self) -> None:
        """Let `WorkerDirectory` find this router; called by Serve."""
        _ROUTERS[self.app_name] = self

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The worker that was chosen, then all.

        If it is gone, full, or does not answer Serve, any other one answers `WrongWorker` at once,
        and the client asks for another placement.
        """
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        # Otherwise Serve tries again without a pause while no worker has room.
        pending_request.routing_context.should_backoff = True
        return [named(pending_request.args[0], candidate_replicas), candidate_replicas]


def named(worker_id: str, replicas: list[RunningReplica]) -> list[RunningReplica]:
    """The replica of that id, if it is there."""
    return [replica for replica in replicas if replica.replica_id.unique_id == worker_id]


class WorkerDirectory:
    """The workers that Serve believes to be alive, as it tells this process's router."""

    def __init__(self, workers: "DeploymentHandle[Any]") -> None:
        self._app_name = workers.app_name

    def worker_ids(self) -> list[str]:
        """Their ids; none before Serve has made the router, at the first use of the handle."""
        router = _ROUTERS.get(self._app_name)
        return [replica_id.unique_id for replica_id in list(router.curr_replicas)] if router else []
