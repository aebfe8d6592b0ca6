import asyncio
import time
from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RequestCancelledError

from cluster.ingress.engine_client import MAX_ATTEMPTS, EngineClient
from scheduler.request import Request
from workers.engine_request import EngineRequest
from workers.errors import ClientLost, EngineDead, WorkerDraining
from workers.token_stream import StreamAddress, StreamReceiver, StreamSenders

GARBAGE = [b"garbage"]


@dataclass
class FakeOutput:
    """Some tokens of one request."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None


@dataclass
class FakeOutputs:
    """What one step produced."""

    outputs: list[FakeOutput] = field(default_factory=list)


def decode(frames: list[bytes]) -> FakeOutputs:
    return FakeOutputs(msgspec.msgpack.decode(frames[0], type=list[FakeOutput]))


def failed(request_id: str, error: Exception) -> FakeOutputs:
    return FakeOutputs([FakeOutput(request_id, [], f"error: {error}")])


class FakeResponse:
    """A call of a worker, awaited and cancelled as Serve's response is."""

    def __init__(self) -> None:
        self.result: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.was_cancelled = False

    def cancel(self) -> None:
        self.was_cancelled = True
        self.result.cancel()

    def __await__(self) -> Generator[Any, None, str]:
        try:
            return (yield from self.result.__await__())
        except asyncio.CancelledError:
            if self.was_cancelled:
                raise RequestCancelledError("call") from None
            raise


@dataclass
class Call:
    """One call of `generate`."""

    request: EngineRequest
    response: FakeResponse


class FakeWorkers:
    """The handle of the workers, and the stream on which the tokens come from them."""

    def __init__(self) -> None:
        self.generate = self
        self.calls: list[Call] = []
        self.refusal: Exception | None = None
        self._senders = StreamSenders()
        self._reply_to: StreamAddress | None = None

    def remote(self, request: EngineRequest, reply_to: StreamAddress) -> FakeResponse:
        if self.refusal is not None:
            raise self.refusal
        self._reply_to = reply_to
        self.calls.append(Call(request, FakeResponse()))
        return self.calls[-1].response

    async def called(self, count: int) -> Call:
        """The last of `count` calls, once it is made."""
        async with asyncio.timeout(30):
            while len(self.calls) < count:
                await asyncio.sleep(0)
        assert len(self.calls) == count
        return self.calls[-1]

    def send(self, *outputs: FakeOutput) -> None:
        """Send what one step produced."""
        self.send_frames([msgspec.msgpack.encode(outputs)])

    def send_frames(self, frames: list[bytes]) -> None:
        assert self._reply_to is not None
        self._senders.send(self._reply_to, frames, now=0.0)

    def close(self) -> None:
        self._senders.close()


Client = EngineClient[FakeOutputs]


@pytest.fixture
async def workers() -> AsyncIterator[FakeWorkers]:
    workers = FakeWorkers()
    yield workers
    workers.close()


@pytest.fixture
async def client(workers: FakeWorkers) -> AsyncIterator[Client]:
    client: Client = EngineClient(workers, StreamReceiver("127.0.0.1"), decode, failed)
    yield client
    await client.close()


def submit(client: Client, request_id: str) -> None:
    client.submit(as_sent(request_id), time.time())


def as_sent(request_id: str) -> EngineRequest:
    return EngineRequest(Request(request_id, num_prompt_tokens=10, max_tokens=5), [b"encoded"])


async def next_outputs(client: Client) -> list[FakeOutput]:
    return (await asyncio.wait_for(client.next_outputs(), 30)).outputs


def as_serve_raises(error: Exception) -> Exception:
    """An error of a replica's method, as it arrives where the method was called."""
    raised: Exception = RayTaskError("generate", "traceback", error).as_instanceof_cause()
    return raised


async def test_a_request_is_submitted_to_the_workers_under_the_id_of_its_attempt(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    call = await workers.called(1)

    assert call.request == as_sent("r.0")


async def test_outputs_come_under_the_id_of_their_request(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    submit(client, "s")
    call = await workers.called(2)
    workers.send(FakeOutput("r.0", [1]), FakeOutput("s.0", [2]))
    workers.send(FakeOutput("r.0", [3], "stop"))
    call.response.result.set_result("stop")

    assert [await next_outputs(client), await next_outputs(client)] == [
        [FakeOutput("r", [1]), FakeOutput("s", [2])],
        [FakeOutput("r", [3], "stop")],
    ]
    assert client.num_live == 1


async def test_the_call_may_end_before_the_last_outputs_come(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    call = await workers.called(1)
    call.response.result.set_result("length")
    await asyncio.sleep(0)
    workers.send(FakeOutput("r.0", [1], "length"))

    assert await next_outputs(client) == [FakeOutput("r", [1], "length")]
    assert client.num_live == 0


async def test_a_request_whose_last_outputs_never_come_fails(
    client: Client, workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.ingress.engine_client.LOST_AFTER_S", 0.01)
    submit(client, "r")
    call = await workers.called(1)
    call.response.result.set_result("length")

    assert await next_outputs(client) == [
        FakeOutput("r", [], "error: the last outputs of the request did not arrive")
    ]
    assert client.num_live == 0


@pytest.mark.parametrize(
    "death",
    [
        RayActorError(),
        as_serve_raises(EngineDead("a step hangs")),
        as_serve_raises(WorkerDraining("draining")),
    ],
    ids=["the worker died", "its engine failed", "it takes no new requests"],
)
async def test_a_request_that_loses_its_worker_before_its_first_token_is_placed_again(
    client: Client, workers: FakeWorkers, death: Exception
) -> None:
    submit(client, "r")
    first = await workers.called(1)
    first.response.result.set_exception(death)
    second = await workers.called(2)
    workers.send(FakeOutput("r.0", [666]))  # late, from the worker that was given up
    workers.send(FakeOutput("r.1", [1], "stop"), FakeOutput("r.0", [666], "stop"))

    assert second.request == as_sent("r.1")
    assert await next_outputs(client) == [FakeOutput("r", [1], "stop")]
    assert client.num_live == 0


async def test_a_request_that_loses_its_worker_after_its_first_token_ends_with_an_error(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    call = await workers.called(1)
    workers.send(FakeOutput("r.0", [1]))
    outputs = [await next_outputs(client)]
    death = RayActorError()
    call.response.result.set_exception(death)
    outputs += [await next_outputs(client)]

    assert outputs == [[FakeOutput("r", [1])], [FakeOutput("r", [], f"error: {death}")]]
    assert (len(workers.calls), client.num_live) == (1, 0)


async def test_a_request_under_which_worker_after_worker_dies_ends_with_an_error(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    death = RayActorError()
    for attempt in range(MAX_ATTEMPTS):
        (await workers.called(attempt + 1)).response.result.set_exception(death)

    assert await next_outputs(client) == [FakeOutput("r", [], f"error: {death}")]
    assert (len(workers.calls), client.num_live) == (MAX_ATTEMPTS, 0)


@pytest.mark.parametrize(
    "error",
    [as_serve_raises(ValueError("malformed")), as_serve_raises(ClientLost("unreachable"))],
)
async def test_a_request_that_its_worker_refuses_or_gives_up_ends_with_an_error(
    client: Client, workers: FakeWorkers, error: Exception
) -> None:
    submit(client, "r")
    (await workers.called(1)).response.result.set_exception(error)

    assert await next_outputs(client) == [FakeOutput("r", [], f"error: {error}")]
    assert (len(workers.calls), client.num_live) == (1, 0)


async def test_a_request_that_cannot_be_sent_ends_with_an_error(
    client: Client, workers: FakeWorkers
) -> None:
    workers.refusal = RuntimeError("Serve is shutting down")
    submit(client, "r")

    assert await next_outputs(client) == [FakeOutput("r", [], "error: Serve is shutting down")]
    assert client.num_live == 0


async def test_abort_cancels_the_call_and_nothing_more_comes(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    submit(client, "other")
    await workers.called(2)
    client.abort(["r", "unknown"])
    workers.send(FakeOutput("r.0", [1]))
    workers.send(FakeOutput("r.0", [2], "abort"), FakeOutput("other.0", [3]))

    assert await next_outputs(client) == [FakeOutput("other", [3])]
    assert [call.response.was_cancelled for call in workers.calls] == [True, False]
    assert client.num_live == 1


async def test_a_request_aborted_at_once_is_never_sent(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    client.abort(["r"])
    submit(client, "other")

    assert (await workers.called(1)).request == as_sent("other.0")
    assert client.num_live == 1


async def test_an_aborted_request_is_not_placed_again(client: Client, workers: FakeWorkers) -> None:
    submit(client, "r")
    call = await workers.called(1)
    call.response.result.set_exception(RayActorError())
    client.abort(["r"])
    submit(client, "other")
    await asyncio.sleep(0.01)

    assert [call.request.request.request_id for call in workers.calls] == ["r.0", "other.0"]


async def test_outputs_that_cannot_be_read_do_not_stop_those_that_can(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    await workers.called(1)
    workers.send_frames(GARBAGE)
    workers.send(FakeOutput("r.0", [1]))

    assert await next_outputs(client) == [FakeOutput("r", [1])]


async def test_closing_cancels_what_runs_and_leaves_no_task(workers: FakeWorkers) -> None:
    before = asyncio.all_tasks()
    client: Client = EngineClient(workers, StreamReceiver("127.0.0.1"), decode, failed)
    submit(client, "r")
    call = await workers.called(1)
    await client.close()
    async with asyncio.timeout(30):
        while asyncio.all_tasks() != before:
            await asyncio.sleep(0)

    assert (call.response.was_cancelled, client.num_live) == (True, 0)
