"""Serve's routers for calls of the GlobalScheduler and of workers."""

from typing import Any

from ray.serve._private.common import ReplicaQueueLengthInfo
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.placement.directory import keep_router
from cluster.placement.ray_seams import RAY


class UnaryReplica(RunningReplica):
    """A replica whose calls have one answer.

    Serve has a replica answer each call twice, first whether it accepts it, as a stream; and when
    Ray ends a stream, the whole replica stands still until its caller has acknowledged all of it.
    So a caller whose link is cut would stop the GlobalScheduler, or a worker, for everybody.
    """

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> Any:
        """Send a call; our replicas accept all."""
        if pr.metadata.is_streaming or not with_rejection:
            return super().try_send_request(pr, with_rejection)
        result = super().try_send_request(pr, with_rejection=False)
        RAY.replace(result, "get_rejection_response", _accepted)
        return result


async def _accepted() -> ReplicaQueueLengthInfo:
    return ReplicaQueueLengthInfo(accepted=True, num_ongoing_requests=0)


class UnaryRouter(RequestRouter):
    """Routes calls to any replica: there is one."""

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """Serve's hook: what its calls go through."""
        return UnaryReplica(replica_info)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All."""
        return [candidate_replicas]


class PlacementRouter(UnaryRouter):
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
