"""Serve's router for workers: sends a call to the worker that was chosen for it."""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.placement.directory import keep_router


class PlacementRouter(RequestRouter):
    """Routes a call to the worker whose id is its first argument."""

    def initialize_state(self) -> None:
        """Serve's hook: let the client of the workers know which ones are alive."""
        keep_router(self)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The chosen worker first, then all.

        If the chosen one is gone, full, or does not answer Serve, another one answers `WrongWorker`
        at once, and the client asks for another placement.
        """
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        # Otherwise Serve tries again without a pause while no worker has room.
        pending_request.routing_context.should_backoff = True
        chosen = pending_request.args[0]
        return [
            [r for r in candidate_replicas if r.replica_id.unique_id == chosen],
            candidate_replicas,
        ]
