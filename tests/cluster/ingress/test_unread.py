"""Clients that do not read their streams, before the real front end over scripted workers."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from starlette.types import Message, Receive, Scope, Send
from vllm.v1.engine import FinishReason

from cluster.config.app_config import MIN_UNREAD_BYTES, AppConfig, parse_args
from cluster.ingress.calls import Call, current_call
from cluster.ingress.unread import EXTENSION, TAKEN, UnreadLimit
from cluster.observe.request_history import RequestRecord
from scheduler.request import Request
from tests.cluster.ingress.answering_workers import Server, Step, serving
from tests.cluster.ingress.test_vllm_handlers import BODIES

LIMIT = MIN_UNREAD_BYTES
MANY = 6000
"""Tokens of which the events take more than the limit, and what then waits as tokens too."""
TIMEOUT_S = 120.0

COMPLETIONS, MESSAGES = "/v1/completions", "/v1/messages"


def few(path: str) -> int:
    """Tokens of which the events take more than the limit, and the others not half of it."""
    return 1500 if path == MESSAGES else 1000  # its events are shorter


def several(path: str) -> int:
    """Tokens of which the events take more than the limit, and the others not all of it."""
    return few(path) + 550


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Server]:
    async with serving(config(1e6)) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def impatient() -> AsyncIterator[Server]:
    """One that waits for no client."""
    async with serving(config(1e-6)) as server:
        yield server


def config(unread_timeout_s: float) -> AppConfig:
    ingress = {"max_unread_bytes": LIMIT, "unread_timeout_s": unread_timeout_s}
    return parse_args({"worker": {"kernels": "vllm"}, "ingress": ingress})


@pytest.fixture
def server(running: Server) -> Server:
    running.records.take()
    return running


def play(server: Server, num_tokens: int, reason: FinishReason | None = None) -> None:
    """Have the next requests answered with so many tokens, one in a step; the last may end them."""
    [token_id] = server.tokens("a")
    steps: list[Step] = [([token_id], None)] * (num_tokens - 1)
    server.workers.play([*steps, ([token_id], reason)])


class SlowClient:
    """A call whose client takes nothing until it is told to."""

    def __init__(self, server: Server, path: str, *, tells: bool = True, **params: Any) -> None:
        """Its proxy `tells` what is taken, as those of `xyserve up` do."""
        self.sent: list[Message] = []
        self._come = asyncio.Event()
        self._received: asyncio.Queue[Message] = asyncio.Queue()
        body = json.dumps(BODIES[path] | {"stream": True} | params).encode()
        self._received.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "client": ("127.0.0.1", 50000),
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "extensions": {EXTENSION: {}} if tells else {},
        }
        self.running = asyncio.create_task(server.asgi_app(scope, self._received.get, self._send))

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        self._come.set()

    @property
    def num_bytes(self) -> int:
        return sum(len(message.get("body", b"")) for message in self.sent)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    def take(self) -> None:
        """Take all that was sent."""
        self._received.put_nowait({"type": TAKEN, "num_bytes": self.num_bytes})

    def leave(self) -> None:
        self._received.put_nowait({"type": "http.disconnect"})

    async def sent_at_least(self, num_bytes: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while self.num_bytes < num_bytes:
                self._come.clear()
                await self._come.wait()

    async def ended(self) -> None:
        await asyncio.wait_for(self.running, TIMEOUT_S)


def said(client: SlowClient) -> str:
    """The text of a stream, whatever its API."""
    found = []
    for line in client.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if event.get("type") in (None, "content_block_delta", "response.output_text.delta"):
                [choice] = event.get("choices") or [event]
                delta = choice.get("delta", choice)
                text = delta if isinstance(delta, str) else delta.get("content", delta.get("text"))
                found.append(text or "")
    return "".join(found)


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_that_is_not_read_is_held_back_and_goes_on_where_it_was(
    server: Server, path: str
) -> None:
    play(server, few(path), FinishReason.LENGTH)
    client = SlowClient(server, path)
    await client.sent_at_least(LIMIT)
    async with asyncio.timeout(TIMEOUT_S):
        while not server.records.ended_ones:  # the ingress has all of it
            await asyncio.sleep(0)
    held_at = client.num_bytes

    while not client.running.done():
        client.take()
        await asyncio.sleep(0)

    assert held_at < LIMIT + 10_000
    assert server.records.take() == [("length", few(path))]
    assert said(client) == "a" * few(path)
    assert client.text.count("data: ") < few(path)  # what gathered came in fewer events


@pytest.mark.parametrize("path", BODIES)
async def test_a_request_that_is_not_read_leaves_its_worker_until_it_is(
    server: Server, path: str
) -> None:
    """The engine computes no more for nobody."""
    play(server, several(path))
    [endless] = server.workers.scripts
    server.workers.play(endless, [(server.tokens("b"), FinishReason.LENGTH)])
    client = SlowClient(server, path)
    async with asyncio.timeout(TIMEOUT_S):
        while not server.workers.calls or not server.workers.calls[0].response.was_cancelled:
            await asyncio.sleep(0)
    [held] = server.client._live.values()
    num_tokens = held.record.num_output_tokens

    while not client.running.done():
        client.take()
        await asyncio.sleep(0)

    _, again = server.workers.calls
    assert again.request.progress is not None
    assert len(again.request.progress.output_token_ids) == num_tokens
    assert server.records.take() == [("length", num_tokens + 1)]
    assert said(client) == "a" * num_tokens + "b"
    assert held.record.attempts[0].lost == "its client did not read the stream"


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_that_is_not_read_for_too_long_ends_with_an_error_that_says_so(
    impatient: Server, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = impatient
    server.records.take()
    play(server, MANY)
    client = SlowClient(server, path)

    await client.ended()

    [record] = [one for one in server.records.ended_ones]
    assert record.outcome == "unread"
    assert record.error.startswith("the client does not read its stream: ")
    assert "ingress.unread_timeout_s" in record.error
    events = [part for part in client.text.split("\n\n") if part and part != "data: [DONE]"]
    name, _, data = events[-1].rpartition("data: ")
    error = json.loads(data)
    assert error.get("error", error)["message"] == record.error
    assert name == NAMES.get(path, "")
    assert client.num_bytes < 2 * LIMIT
    assert [one.getMessage() for one in caplog.records if one.name.startswith("cluster")] == [
        "a stream that is not read was ended"
    ]
    assert server.client.num_live == 0


NAMES = {"/v1/responses": "event: error\n", "/v1/messages": "event: error\n"}
"""Names of the last event, where the API has names."""


async def test_tokens_that_come_though_they_are_held_end_a_stream_too() -> None:
    record = RequestRecord(Request("r", 1, 10**6), 0.0)
    call = Call("call", records=[record])
    noted: list[str] = []

    class Requests:
        def hold(self, call: Call) -> None:
            noted.append("held")

        def go_on(self, call: Call) -> None:
            noted.append("on")

        def give_up(self, call: Call, reason: str) -> None:
            noted.append(reason)
            record.outcome = "unread"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            await send(
                {"type": "http.response.body", "body": b"x" * (LIMIT + 1), "more_body": True}
            )

    async def send(message: Message) -> None:
        # Once the app waits for room.
        asyncio.get_running_loop().call_soon(
            record.deliver, range(LIMIT // call.token_bytes + 1), 1
        )

    received: asyncio.Queue[Message] = asyncio.Queue()
    token = current_call.set(call)
    try:
        scope = {"type": "http", "extensions": {EXTENSION: {}}}
        await UnreadLimit(app, LIMIT, 1e6, Requests())(scope, received.get, send)
    finally:
        current_call.reset(token)

    assert len(noted) == 2, noted
    reason, left = noted
    assert reason.startswith("the client does not read its stream: ")
    assert left == ""


async def test_a_client_that_leaves_while_it_is_held_back_is_an_abort(server: Server) -> None:
    play(server, few(COMPLETIONS))
    client = SlowClient(server, COMPLETIONS)
    await client.sent_at_least(LIMIT)

    client.leave()
    await client.ended()
    async with asyncio.timeout(TIMEOUT_S):
        while server.client.num_live:
            await asyncio.sleep(0)

    assert [outcome for outcome, _ in server.records.take()] == ["abort"]


async def test_without_word_of_a_proxy_nothing_is_held_back(server: Server) -> None:
    play(server, MANY // 2, FinishReason.LENGTH)
    client = SlowClient(server, "/v1/completions", tells=False)

    await client.ended()

    assert client.num_bytes > 2 * LIMIT
    assert server.records.take() == [("length", MANY // 2)]
