"""The look-up of the worker that a call names, in Serve's own routing, and how it is called."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve._private.replica_result import ActorReplicaResult
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RunningReplica

from cluster.placement.directory import WorkerDirectory
from cluster.placement.router import PlacementRouter, UnaryReplica

WORKERS = DeploymentID("Worker", "app")
MAX_ONGOING = 10


@dataclass
class FakeReplica:
    """A replica as Serve's routing sees it."""

    worker_id: str
    queue_len: int | None = 0
    """None: it does not answer."""
    max_ongoing_requests: int = MAX_ONGOING

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.worker_id, WORKERS)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        if self.queue_len is None:
            await asyncio.sleep(3600)
        assert self.queue_len is not None
        return self.queue_len


@pytest.fixture
async def router() -> AsyncIterator[PlacementRouter]:
    router = PlacementRouter(
        WORKERS,
        DeploymentHandleSource.REPLICA,
        self_actor_id="ingress",
        use_replica_queue_len_cache=True,
    )
    router.queue_len_response_deadline_s = 0.01
    router.initialize_state()
    yield router
    router.update_replicas([])


def route(router: PlacementRouter, worker_id: str) -> "asyncio.Task[str]":
    """The id of the worker that a call for `worker_id` is sent to."""
    metadata = RequestMetadata(worker_id, f"internal {worker_id}")
    pending = PendingRequest([worker_id, "request", "address"], {}, metadata)

    async def chosen() -> str:
        replica = await router._choose_replica_for_request(pending)
        return str(replica.replica_id.unique_id)

    return asyncio.create_task(chosen())


def update(router: PlacementRouter, *replicas: FakeReplica) -> None:
    router.update_replicas(list(replicas))


def is_known(*worker_ids: str) -> bool:
    handle: Any = WORKERS  # which has the name of the app, as a handle has
    return set(WorkerDirectory(handle).worker_ids()) == set(worker_ids)


async def test_a_call_goes_to_the_worker_that_it_names(router: PlacementRouter) -> None:
    update(router, FakeReplica("a"), FakeReplica("b", 5), FakeReplica("c"))

    async with asyncio.timeout(10):
        assert [await route(router, name) for name in "bac"] == ["b", "a", "c"]


@pytest.mark.parametrize(
    "named", [FakeReplica("b", None), FakeReplica("b", MAX_ONGOING), None], ids=repr
)
async def test_a_worker_that_cannot_be_reached_is_answered_for_by_another(
    router: PlacementRouter, named: FakeReplica | None
) -> None:
    update(router, FakeReplica("a"), *([named] if named else []))

    async with asyncio.timeout(10):
        assert await route(router, "b") == "a"


async def test_a_call_waits_for_a_worker_where_there_is_none(router: PlacementRouter) -> None:
    routed = route(router, "gone")
    await asyncio.sleep(0.01)
    assert not routed.done()
    update(router, FakeReplica("new"))

    async with asyncio.timeout(10):
        assert await routed == "new"


async def test_the_directory_knows_the_workers_that_serve_knows(router: PlacementRouter) -> None:
    known = [is_known()]
    update(router, FakeReplica("a"), FakeReplica("b"))
    known += [is_known("a", "b")]
    router.on_replica_actor_died(ReplicaID("a", WORKERS))
    known += [is_known("b")]
    update(router, FakeReplica("b"), FakeReplica("c"))
    known += [is_known("b", "c")]

    assert known == [True] * 4


IN_THE_INGRESS = """
import sys
from ray import cloudpickle
from ray.serve._private.common import DeploymentID, ReplicaID
from cluster.placement.directory import WorkerDirectory

PlacementRouter = cloudpickle.loads(sys.stdin.buffer.read())
workers = DeploymentID("Worker", "app")
router = PlacementRouter.__new__(PlacementRouter)
router._deployment_id, router._replicas = workers, {ReplicaID("a", workers): None}
router.initialize_state()
print(WorkerDirectory(workers).worker_ids())
"""


def test_the_directory_finds_the_router_as_serve_sends_it() -> None:
    """Its whole module goes with it, so that the receiver has a copy of all that is in there."""
    sent = RequestRouterConfig(request_router_class=PlacementRouter)
    found = subprocess.run(
        [sys.executable, "-c", IN_THE_INGRESS],
        input=sent.get_serialized_request_router_cls(),
        stdout=subprocess.PIPE,
        check=True,
    )

    assert found.stdout.decode().strip() == "['a']"


def test_before_the_handle_is_used_no_worker_is_known() -> None:
    handle: Any = DeploymentID("Worker", "another app")

    assert WorkerDirectory(handle).worker_ids() == []


@pytest.mark.parametrize("is_streaming", [False, True])
async def test_only_a_stream_is_answered_twice(
    is_streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray stops a replica that ends a stream of answers while its caller is out of reach."""
    sent: list[bool] = []

    def send(
        replica: RunningReplica, pr: PendingRequest, with_rejection: bool
    ) -> ActorReplicaResult:
        sent.append(with_rejection)
        return ActorReplicaResult.__new__(ActorReplicaResult)

    monkeypatch.setattr(RunningReplica, "try_send_request", send)
    metadata = RequestMetadata("r", "i", is_streaming=is_streaming)

    result = UnaryReplica.__new__(UnaryReplica).try_send_request(
        PendingRequest([], {}, metadata), with_rejection=True
    )

    assert sent == [is_streaming]
    if not is_streaming:
        assert (await result.get_rejection_response()).accepted
