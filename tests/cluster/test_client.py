"""The client handle over an ingress in this process: calls without Ray, streams by real sockets."""

import asyncio
import gc
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

import msgspec
import openai
import pydantic
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.client import XYServe
from cluster.errors import HandleClosed, RequestFailed, XYServeError
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
        self.choices: list[dict[str, Any]] = []
        self.pieces = 2
        """Chunks of each stream."""
        self.hangs = False
        """Whether calls do not end by themselves."""
        self.garbage: list[bytes] = []
        """Frames before those of each stream."""
        self.late_s = 0.0
        """Time from the end of a streamed call to its chunks, which travel by themselves."""
        self.began, self.cancelled = threading.Event(), threading.Event()
        self.senders = StreamSenders()

    async def _call(self, api: Api, payload: str) -> str | RequestFailed:
        await self._begin()
        answer = {"id": api, "choices": self.choices, "payload": json.loads(payload)}
        return self.failure or json.dumps(answer)

    async def _stream(
        self, api: Api, payload: str, call_id: str, reply_to: StreamAddress
    ) -> RequestFailed | None:
        chunks = [
            json.dumps({"id": f"{api} {n}", "choices": [], "payload": json.loads(payload)})
            for n in range(self.pieces)
        ]
        end = [] if self.failure or self.hangs else [""]
        frame = msgspec.msgpack.encode([Chunk(call_id, data) for data in chunks + end])
        frames = [*self.garbage, frame]
        asyncio.get_running_loop().call_later(
            self.late_s, lambda: self.senders.send(reply_to, frames, time.monotonic())
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


def test_chunks_that_cannot_be_read_cost_no_other_chunk(
    handle: XYServe, ingress: FakeIngress
) -> None:
    ingress.garbage = [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        msgspec.msgpack.encode([("call", 1)]),
        msgspec.msgpack.encode([Chunk("a call of nobody", "data")]),
    ]

    assert [chunk.id for chunk in handle.stream(HELLO)] == ["chat 0", "chat 1"]


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

    with pytest.raises(HandleClosed, match="this handle is closed"):
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

    assert [type(error).__name__ for error in outcome] == ["HandleClosed"]
    assert ingress.cancelled.is_set()


async def test_closing_a_handle_ends_asynchronous_calls_but_not_their_tasks(
    handle: XYServe, ingress: FakeIngress
) -> None:
    ingress.hangs = True
    call = asyncio.create_task(handle.chat_async(HELLO))
    assert await asyncio.to_thread(ingress.began.wait, WAIT_S)

    handle.close()

    with pytest.raises(HandleClosed):
        await call
    assert not call.cancelled()


METHODS: dict[str, Callable[[XYServe], Any]] = {
    "chat": lambda handle: handle.chat(HELLO),
    "chat_async": lambda handle: asyncio.run(handle.chat_async(HELLO)),
    "generate": lambda handle: handle.generate("Hello"),
    "generate_async": lambda handle: asyncio.run(handle.generate_async("Hello")),
    "stream": lambda handle: next(handle.stream(HELLO)),
    "stream_async": lambda handle: asyncio.run(anext(handle.stream_async(HELLO))),
    "status": lambda handle: handle.status(),
    "spans": lambda handle: handle.spans(0.0),
    "steps": lambda handle: handle.steps(),
    "explain": lambda handle: handle.explain("an id"),
    "pickling": lambda handle: handle.__reduce__(),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_closed_handle_says_so(handle: XYServe, method: str) -> None:
    handle.close()
    handle.close()

    with pytest.raises(HandleClosed, match="this handle is closed") as raised:
        METHODS[method](handle)
    assert isinstance(raised.value, XYServeError)


def test_a_fork_cannot_use_the_handle_and_leaves_it_alone(handle: XYServe) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
        child = os.fork()
    if child == 0:
        try:
            handle.chat(HELLO)
        except HandleClosed as error:
            handle.close()
            os._exit(0 if f"belongs to the process {os.getppid()}" in str(error) else 1)
        os._exit(2)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert handle.chat(HELLO).id == "chat"


def test_a_handle_that_nobody_has_ends_its_thread(ingress: FakeIngress) -> None:
    before = set(threading.enumerate())
    deployment: Any = ingress
    handle = XYServe(deployment)
    assert len(list(handle.stream(HELLO))) == 2
    [thread] = set(threading.enumerate()) - before

    del handle
    gc.collect()

    thread.join(WAIT_S)
    assert not thread.is_alive()


class Answer(pydantic.BaseModel):
    capital: str


def choice(content: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"index": 0, "finish_reason": finish_reason, "message": message}


async def test_an_answer_of_a_type_is_parsed(handle: XYServe, ingress: FakeIngress) -> None:
    ingress.choices = [choice('{"capital": "Paris"}'), choice(None, "tool_calls")]

    answer = handle.chat(HELLO, response_format=Answer)
    twin = await handle.chat_async(HELLO, response_format=Answer)

    for each in (answer, twin):
        parsed = [choice.message.parsed for choice in each.choices]
        assert parsed == [Answer(capital="Paris"), None]
        assert isinstance(each, ChatCompletion)


def test_an_answer_of_a_type_that_is_cut_off_raises_what_openai_raises(
    handle: XYServe, ingress: FakeIngress
) -> None:
    ingress.choices = [choice('{"capital": "Par', "length")]

    with pytest.raises(openai.LengthFinishReasonError) as raised:
        handle.chat(HELLO, response_format=Answer)

    assert raised.value.completion.choices[0].message.content == '{"capital": "Par'


def test_messages_may_be_an_iterator_or_objects(handle: XYServe, ingress: FakeIngress) -> None:
    ingress.choices = [choice("Paris")]
    message = handle.chat(HELLO).choices[0].message
    messages: list[dict[str, Any] | pydantic.BaseModel] = [HELLO[0], message]
    sent = [HELLO[0], {"role": "assistant", "content": "Paris"}]

    assert handle.chat(messages).to_dict()["payload"] == {"messages": sent}
    iterator: Any = iter(messages)
    assert handle.chat(iterator).to_dict()["payload"] == {"messages": sent}
    iterator = iter(messages)
    for stream in (handle.stream(tuple(messages)), handle.stream(iterator)):
        assert [chunk.to_dict()["payload"] for chunk in stream] == [{"messages": sent}] * 2


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda handle: handle.chat([object()]), "messages: it cannot be sent as JSON"),
        (lambda handle: handle.chat(HELLO, stop=print), "stop: it cannot be sent as JSON"),
        (lambda handle: handle.generate(b"\xff"), "prompt: it cannot be sent as JSON"),
        (
            lambda handle: handle.chat(HELLO, timeout_s="5"),
            "timeout_s: '5' is not of the type float",
        ),
        (lambda handle: handle.chat(HELLO, timeout_s=0), "timeout_s: 0 is not a positive number"),
        (lambda handle: next(handle.stream(HELLO, timeout_s=-1)), "timeout_s: -1 is not a pos"),
        (lambda handle: handle.spans("now"), "since_s: 'now' is not of the type float"),
        (lambda handle: handle.steps(most=2.5), "most: 2.5 is not of the type int"),
        (lambda handle: handle.explain(None), "request_id: None is not of the type str"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(
    handle: XYServe, call: Callable[[XYServe], Any], fault: str
) -> None:
    with pytest.raises(RequestFailed) as raised:
        call(handle)

    assert str(raised.value).startswith(fault)
    assert raised.value.status == 400
