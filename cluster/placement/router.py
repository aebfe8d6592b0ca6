"""Serve's router for workers: carries out what the GlobalScheduler decides."""

import asyncio
from typing import Any

from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from scheduler.request import Request


class PlacementRouter(RequestRouter):
    """Routes a call that carries a `Request` to the worker on which it is placed."""

    def initialize_state(self, *, scheduler_name: str) -> None:
        """Remember where the GlobalScheduler is; called by Serve with the router's kwargs."""
        self._scheduler = serve.get_deployment_handle(scheduler_name, self.app_name)
        self._sending = asyncio.Lock()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The one replica chosen by the GlobalScheduler; none while all are draining."""
        request: Any = pending_request.args[0] if pending_request and pending_request.args else None
        if pending_request is None or not isinstance(request, Request):
            return [candidate_replicas]
        # Without this Serve asks again without pause as long as every worker drains.
        pending_request.routing_context.should_backoff = True
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        async with self._sending:
            # The first use of a handle waits for this event loop, so it must not block it.
            placing = await asyncio.to_thread(
                lambda: self._scheduler.place.remote(request, list(replicas))
            )
        chosen = await placing
        return [[replicas[chosen]]] if chosen is not None else []
