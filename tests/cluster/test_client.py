"""The client handle over an ingress in this process: calls without Ray, streams by real sockets."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

import msgspec
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.client import XYServe
from cluster.errors import RequestFailed
from cluster.ingress.protocol import Api, Chunk
from workers.token_stream import StreamAddress, StreamSenders

HELLO = [{"role": "user", "content": "Hello"}]
WAIT_S = 30.0


class Response:
    """A call of a deployment as Serve gives it: it can be awaited, and cancelled meanwhile."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work
        self._task: asyncio.Task[Any] | None = None

    def __await__(self) -> Generator[Any, None, Any]:
        self._task = asyncio.create_task(self._work)
        return self._task.__await__()

    def cancel(self) -> None:
        assert self._task is not None
        self._task.cancel()


class Method:
    """A method of a deployment's handle."""

    def __init__(self, method: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._method = method

    def remote(self, *args: Any) -> Response:
        return Response(self._method(*args))


class FakeIngress:
    """Answers each call with its arguments, or as its attributes say, and streams likewise."""

    def __init__(self) -> None:
        self.call, self.stream = Method(self._call), Method(self._stream)
        self.failure: RequestFailed | None = None
        self.pieces = 2
        """Chunks of each stream."""
        self.hangs = False
        """Whether calls do not end by themselves."""
        self.late_s = 0.0
        """Time from the end of a streamed call to its chunks, which travel by themselves."""
        self.began, self.cancelled = threading.Event(), threading.Event()
        self.senders = StreamSenders()

    async def _call(self, api: Api, payload: dict[str, Any]) -> str | RequestFailed:
        await self._begin()
        return self.failure or json.dumps({"id": api, "choices": [], "payload": payload})

    async def _stream(
        self, api: Api, payload: dict[str, Any], call_id: str, reply_to: StreamAddress
    ) -> RequestFailed | None:
        chunks = [
            json.dumps({"id": f"{api} {n}", "choices": [], "payload": payload})
            for n in range(self.pieces)
        ]
        end = [] if self.failure or self.hangs else [""]
        frame = msgspec.msgpack.encode([Chunk(call_id, data) for data in chunks + end])
        asyncio.get_running_loop().call_later(
            self.late_s, lambda: self.senders.send(reply_to, [frame], time.monotonic())
        )
        await self._begin()
        return self.failure

    async def _begin(self) -> None:
        self.began.set()
        try:
            await asyncio.sleep(WAIT_S if self.hangs else 0)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@pytest.fixture
def ingress() -> Iterator[FakeIngress]:
    ingress = FakeIngress()
    yield ingress
    ingress.senders.close()


@pytest.fixture
def handle(ingress: FakeIngress) -> Iterator[XYServe]:
    deployment: Any = ingress
    with XYServe(deployment) as handle:
        yield handle


def test_a_chat_sends_its_messages_and_parameters(handle: XYServe) -> None:
    answer = handle.chat(HELLO, max_tokens=3, stop="x")

    assert isinstance(answer, ChatCompletion)
    assert answer.id == "chat"
    assert answer.to_dict()["payload"] == {"messages": HELLO, "max_tokens": 3, "stop": "x"}


@pytest.mark.parametrize("prompt", ["Hello", [1, 2, 3], []])
def test_text_and_token_ids_are_sent_as_a_prompt(handle: XYServe, prompt: str | list[int]) -> None:
    answer = handle.generate(prompt, n=2)
    [first, _] = handle.stream(prompt, n=2)

    assert isinstance(answer, Completion)
    assert isinstance(first, Completion)
    assert answer.to_dict()["payload"] == first.to_dict()["payload"] == {"prompt": prompt, "n": 2}


async def test_the_asynchronous_twins_do_the_same(handle: XYServe) -> None:
    chat = await handle.chat_async(HELLO)
    completion = await handle.generate_async("Hello")
    chunks = [chunk async for chunk in handle.stream_async(HELLO)]

    assert (chat.id, completion.id) == ("chat", "completion")
    assert [chunk.id for chunk in chunks] == ["chat 0", "chat 1"]


@pytest.mark.parametrize("late_s", [0.0, 0.1])
def test_a_stream_has_all_chunks_whether_they_or_the_calls_end_come_first(
    handle: XYServe, ingress: FakeIngress, late_s: float
) -> None:
    ingress.pieces, ingress.late_s = 5, late_s

    chunks = list(handle.stream(HELLO))

    assert [chunk.id for chunk in chunks] == [f"chat {n}" for n in range(5)]
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)


def test_an_empty_stream_ends(handle: XYServe, ingress: FakeIngress) -> None:
    ingress.pieces = 0

    assert list(handle.stream(HELLO)) == []


async def test_streams_at_once_get_each_its_own_chunks(handle: XYServe) -> None:
    async def read(prompt: str) -> list[dict[str, Any]]:
        stream = handle.stream_async(prompt)
        return [chunk.to_dict()["payload"] async for chunk in stream]  # type: ignore[misc]

    prompts = [f"prompt {n}" for n in range(20)]

    assert await asyncio.gather(*map(read, prompts)) == [[{"prompt": p}] * 2 for p in prompts]


def test_a_failure_is_raised_with_its_status(handle: XYServe, ingress: FakeIngress) -> None:
    ingress.failure, ingress.pieces = RequestFailed("no such model", 404), 0

    for call in (
        lambda: handle.chat(HELLO),
        lambda: handle.generate("Hello"),
        lambda: list(handle.stream(HELLO)),
    ):
        with pytest.raises(RequestFailed, match="no such model") as raised:
            call()
        assert raised.value.status == 404


def test_a_stream_whose_handle_is_closed_ends_with_an_error(
    handle: XYServe, ingress: FakeIngress
) -> None:
    ingress.hangs = True
    stream = handle.stream(HELLO)
    assert [next(stream).id, next(stream).id] == ["chat 0", "chat 1"]

    handle.close()

    with pytest.raises(RuntimeError, match="this handle is closed"):
        next(stream)


@pytest.mark.parametrize("api", ["generate", "stream"])
def test_a_call_that_takes_too_long_is_cancelled(
    handle: XYServe, ingress: FakeIngress, api: str
) -> None:
    ingress.hangs, ingress.pieces = True, 0

    with pytest.raises(TimeoutError, match=r"no complete answer within 0\.01 s"):
        list(getattr(handle, api)("Hello", timeout_s=0.01))

    assert ingress.cancelled.wait(WAIT_S)


def test_leaving_a_stream_cancels_its_call(handle: XYServe, ingress: FakeIngress) -> None:
    ingress.hangs = True
    stream = handle.stream(HELLO)
    assert next(stream).id == "chat 0"

    stream.close()

    assert ingress.cancelled.wait(WAIT_S)


async def test_cancelling_an_asynchronous_call_cancels_it_at_the_ingress(
    handle: XYServe, ingress: FakeIngress
) -> None:
    ingress.hangs = True
    call = asyncio.create_task(handle.chat_async(HELLO))
    assert await asyncio.to_thread(ingress.began.wait, WAIT_S)

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(ingress.cancelled.wait, WAIT_S)


def test_closing_a_handle_cancels_its_calls_and_refuses_new_ones(
    handle: XYServe, ingress: FakeIngress
) -> None:
    ingress.hangs = True
    outcome: list[BaseException] = []

    def chat() -> None:
        try:
            handle.chat(HELLO)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=chat)
    thread.start()
    assert ingress.began.wait(WAIT_S)
    handle.close()
    thread.join(WAIT_S)

    assert [type(error).__name__ for error in outcome] == ["CancelledError"]
    assert ingress.cancelled.is_set()
    with pytest.raises(RuntimeError, match="this handle is closed"):
        handle.chat(HELLO)
