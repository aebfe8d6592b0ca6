"""The middlewares of the HTTP side, around small apps of Starlette's, without an engine."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from ray.exceptions import TaskCancelledError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.ingress.vllm_http import BodyLimit, DisconnectByMessage

POST: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}


async def post(app: ASGIApp, body: bytes | AsyncIterator[bytes] = b"") -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return await client.post("/", content=body)


async def answer_length(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
def limited() -> ASGIApp:
    return BodyLimit(Starlette(routes=[Route("/", answer_length, methods=["POST"])]), 10, 60.0)


async def in_pieces(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield b"x" * size


@pytest.mark.parametrize("sizes", [(), (10,), (5, 5), (1,) * 10])
async def test_a_body_within_the_limit_arrives_whole(
    limited: ASGIApp, sizes: tuple[int, ...]
) -> None:
    whole = await post(limited, b"x" * sum(sizes))
    in_parts = await post(limited, in_pieces(*sizes))

    assert (whole.status_code, whole.text) == (in_parts.status_code, in_parts.text)
    assert (whole.status_code, whole.text) == (200, str(sum(sizes)))


@pytest.mark.parametrize("sizes", [(11,), (10, 1), (1,) * 11, (1000, 1000)])
async def test_a_body_over_the_limit_is_refused(limited: ASGIApp, sizes: tuple[int, ...]) -> None:
    for body in (b"x" * sum(sizes), in_pieces(*sizes)):
        answer = await post(limited, body)
        assert answer.status_code == 413
        assert answer.text == (
            "The request body is over the limit of 10 bytes (ingress.max_request_bytes)."
        )


async def test_a_text_to_tokenize_is_smaller() -> None:
    routes = [Route("/v/tokenize", answer_length, methods=["POST"])]
    transport = httpx.ASGITransport(BodyLimit(Starlette(routes=routes), 80, 60.0))
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        whole, large = [await client.post("/v/tokenize", content=b"x" * n) for n in (10, 11)]

    assert (whole.status_code, whole.text) == (200, "10")
    assert (large.status_code, large.text) == (
        413,
        "The request body is over the limit of 10 bytes "
        "(ingress.max_request_bytes / 8, for /tokenize).",
    )


async def test_a_body_that_does_not_come_is_refused() -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    routes = [Route("/", answer_length, methods=["POST"])]

    answer = await post(BodyLimit(Starlette(routes=routes), 10, 0.05), endless())

    assert answer.status_code == 408
    assert answer.text == "The request body did not come within 0.05 s (ingress.body_timeout_s)."


async def test_what_comes_after_the_body_may_take_its_time() -> None:
    async def waits(request: Request) -> Response:
        await request.body()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(request.receive(), 0.03)
        return PlainTextResponse("done")

    received: asyncio.Queue[Message] = asyncio.Queue()
    received.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    routes = [Route("/", waits, methods=["POST"])]
    await BodyLimit(Starlette(routes=routes), 10, 0.05)({**POST}, received.get, send)

    assert sent[0]["status"] == 200


async def test_what_is_no_request_is_not_counted() -> None:
    message: Message = {"type": "lifespan.startup", "body": b"x" * 100}
    seen: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await receive())

    async def receive() -> Message:
        return message

    async def send(message: Message) -> None:
        raise AssertionError(message)

    await BodyLimit(app, 10, 60.0)({"type": "lifespan"}, receive, send)

    assert seen == [message]


async def nothing_received() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


class Waiting:
    """An app that begins something, waits until its client is gone, and then cleans up."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.messages: list[Message] = []
        self.cleaned_up = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.began.set()
        while not self.messages or self.messages[-1]["type"] != "http.disconnect":
            self.messages.append(await receive())
        await asyncio.sleep(0)
        self.cleaned_up = True


async def no_answer(message: Message) -> None:
    raise AssertionError(message)


async def test_a_cancelled_call_gets_a_disconnect_and_may_clean_up() -> None:
    app = Waiting()
    call = asyncio.create_task(DisconnectByMessage(app)(POST, nothing_received, no_answer))
    await app.began.wait()

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    assert app.messages == [{"type": "http.disconnect"}]
    assert app.cleaned_up


async def test_an_app_that_is_busy_when_cancelled_sees_the_disconnect_at_its_next_receive() -> None:
    began, go_on = asyncio.Event(), asyncio.Event()
    messages: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        began.set()
        await go_on.wait()
        messages.append(await receive())

    call = asyncio.create_task(DisconnectByMessage(app)(POST, nothing_received, no_answer))
    await began.wait()
    call.cancel()
    await asyncio.sleep(0)
    assert not call.done()
    go_on.set()

    with pytest.raises(asyncio.CancelledError):
        await call
    assert messages == [{"type": "http.disconnect"}]


async def test_serves_own_cancelling_of_the_wait_for_a_message_is_a_disconnect() -> None:
    async def receive() -> Message:
        raise TaskCancelledError

    app = Waiting()
    await DisconnectByMessage(app)(POST, receive, no_answer)

    assert app.messages == [{"type": "http.disconnect"}]


async def test_messages_of_the_client_arrive_in_order() -> None:
    messages: list[Message] = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b", "more_body": False},
        {"type": "http.disconnect"},
    ]
    coming = iter(messages)

    async def receive() -> Message:
        return next(coming)

    app = Waiting()
    await DisconnectByMessage(app)(POST, receive, no_answer)

    assert app.messages == messages


async def test_an_error_of_the_app_is_raised() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise OSError("no more files")

    with pytest.raises(OSError, match="no more files"):
        await DisconnectByMessage(app)(POST, nothing_received, no_answer)
