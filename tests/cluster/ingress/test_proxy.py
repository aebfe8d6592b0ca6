import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from ray.serve._private.http_util import validate_http_proxy_callback_return
from ray.serve._private.utils import call_function_from_import_path
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.ingress.proxy import CALLBACK, ReadableHeaders, TakenAnswers
from cluster.ingress.unread import EXTENSION, TAKEN, TELL_EVERY


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def get(headers: dict[str, bytes]) -> httpx.Response:
    [path] = CALLBACK.values()
    app: ASGIApp = Starlette(routes=[Route("/v1/models", hello)])
    for found in validate_http_proxy_callback_return(call_function_from_import_path(path)):
        app = found.cls(app, *found.args, **found.kwargs)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return await client.get(
            "/v1/models", headers=[(key.encode(), value) for key, value in headers.items()]
        )


@pytest.mark.parametrize("value", [b"\xff\xfe", b"\xe2\x82\xac", b"i" * 513, b"i" * 1_000_000])
@pytest.mark.parametrize("name", ["x-request-id", "X-Session-Id", "serve_multiplexed_model_id"])
async def test_a_header_that_serve_could_not_read_is_refused(name: str, value: bytes) -> None:
    answer = await get({name: value})

    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert message.startswith(f"{name.lower().replace('_', '-')}: an id has at most 512 printable")


@pytest.mark.parametrize("headers", [{}, {"x-request-id": b"mine"}, {"x-other": b"\xff"}])
async def test_other_headers_pass(headers: dict[str, bytes]) -> None:
    assert (await get(headers)).text == "hello"


@pytest.mark.parametrize(
    ("client", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.9", 403), (None, 403)]
)
async def test_what_runs_is_told_on_this_machine_only(client: str | None, status: int) -> None:
    app = ReadableHeaders(Starlette(routes=[Route("/-/routes", hello)]))

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "client": client and (client, 1)}, receive, send)

    transport = httpx.ASGITransport(called)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
        assert (await http.get("/-/routes")).status_code == status


async def test_what_is_for_the_proxy_itself_is_dropped() -> None:
    async def named(request: Request) -> Response:
        return PlainTextResponse(" ".join(sorted(request.headers)))

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(ReadableHeaders(Starlette(routes=[Route("/", named)]))),
        base_url="http://here",
        headers={"x-mine": "1", "X-Request-Timeout-Seconds": "1"},
    ) as client:
        answer = await client.get("/", headers=[(b"x_request_disconnect_disabled", b"\xff")])

    assert "x-mine" in answer.text
    assert "timeout" not in answer.text
    assert "disabled" not in answer.text


PIECE = b"x" * 10_000
TIMEOUT_S = 30.0


class Streaming:
    """An app that streams pieces without end, or a number of them, and notes what it receives."""

    def __init__(self, num_pieces: int | None = None) -> None:
        self.num_pieces = num_pieces
        self.num_sent = 0
        self.received: list[Message] = []
        self.extensions: object = None
        self.gone = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.extensions = scope["extensions"]
        reading = asyncio.create_task(self._read(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while self.num_sent != self.num_pieces and not self.gone.is_set():
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            self.num_sent += 1
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        await asyncio.sleep(0)
        reading.cancel()

    async def _read(self, receive: Receive) -> None:
        while not self.gone.is_set():
            self.received.append(await receive())
            if self.received[-1]["type"] == "http.disconnect":
                self.gone.set()

    def taken(self) -> list[int]:
        return [message["num_bytes"] for message in self.received if message["type"] == TAKEN]


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[tuple[socket.socket, uvicorn.Server]]:
    """A client's connection with a request for the app, and a server as Serve's proxy has it."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve([listening]))
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        try:
            await loop.sock_connect(client, listening.getsockname())
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            yield client, server
        finally:
            client.close()
            server.should_exit = True
            await running


async def closed(server: uvicorn.Server) -> None:
    """Wait until the server has no connection."""
    while server.server_state.connections:
        await asyncio.sleep(0)


async def read(client: socket.socket, num_bytes: int) -> None:
    left = num_bytes
    while left > 0 and (data := await asyncio.get_running_loop().sock_recv(client, 1 << 16)):
        left -= len(data)


async def test_the_app_is_told_what_its_client_takes() -> None:
    app = Streaming(num_pieces=100)
    async with serving(TakenAnswers(app)) as (client, _), asyncio.timeout(TIMEOUT_S):
        await read(client, 100 * len(PIECE))

    assert app.extensions == {EXTENSION: {}}
    assert app.taken() == sorted(set(app.taken()))
    assert len(app.taken()) > 1
    for before, after in zip([0, *app.taken()], app.taken(), strict=False):
        assert after - before >= TELL_EVERY


async def test_a_client_that_takes_nothing_is_cut_off() -> None:
    app = Streaming()
    async with (
        serving(TakenAnswers(app, stuck_s=0.2)) as (_, server),
        asyncio.timeout(TIMEOUT_S),
    ):
        await app.gone.wait()
        await closed(server)


async def test_a_client_that_does_not_take_the_rest_of_an_answer_is_cut_off() -> None:
    whole = b"x" * (8 << 20)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": whole, "more_body": False})

    async with (
        serving(TakenAnswers(app, stuck_s=0.2)) as (client, server),
        asyncio.timeout(TIMEOUT_S),
    ):
        await read(client, 1)
        await closed(server)


async def test_a_slow_client_that_goes_on_is_not_cut_off() -> None:
    app = Streaming(num_pieces=200)
    async with serving(TakenAnswers(app, stuck_s=3.0)) as (client, _), asyncio.timeout(TIMEOUT_S):
        for _ in range(40):
            await read(client, 5 * len(PIECE))
            await asyncio.sleep(0.1)
        await read(client, 1)

    assert app.num_sent == 200
    assert not app.gone.is_set()
