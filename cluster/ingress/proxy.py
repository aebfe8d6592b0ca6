"""What Serve's HTTP proxy lets through, and what its clients take of their answers."""

import asyncio
from http import HTTPStatus
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.config.auth import is_loopback
from cluster.errors import RequestFailed
from cluster.ingress.calls import check_id
from cluster.ingress.connections import bound_connections
from cluster.ingress.error_answers import error_answer
from cluster.ingress.protocol import HEADERS
from cluster.ingress.unread import EXTENSION, TAKEN, TELL_EVERY

DECODED = (HEADERS.call_id, "x-session-id", "serve-multiplexed-model-id")
"""Headers that Serve's proxy decodes; one that is no UTF-8 would be a plain 500."""

ROUTES = "/-/routes"
"""Serve's list of apps, which it would show to everybody."""

NOT_OURS = ("x-request-timeout-seconds", "x-request-disconnect-disabled")
"""Headers by which Serve's own load balancer has its proxies cut requests short, or go on when the
client has left. A client's are dropped."""

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.middlewares"}
"""The environment variable by which Serve's proxies find `middlewares`."""

STUCK_S = 120.0
"""Time after which a connection is cut whose client takes nothing while something waits for it."""


def middlewares() -> list[Middleware]:
    """Serve's hook for its HTTP proxies, called before they listen."""
    bound_connections()
    return [Middleware(ReadableHeaders), Middleware(TakenAnswers)]


class ReadableHeaders:
    """Refuses calls with ids that the app would refuse too, before the proxy reads them.

    Also drops what is for the proxy itself, and does not let it tell strangers what runs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer why its headers cannot be read."""
        try:
            headers = [
                (key.decode("latin-1").lower().replace("_", "-"), key, value)
                for key, value in scope.get("headers", ())
            ]
            for name, _, value in headers:
                if name in DECODED:
                    check_id(name, value.decode("latin-1"))
            scope["headers"] = [
                (key, value) for name, key, value in headers if name not in NOT_OURS
            ]
            if scope.get("path") == ROUTES and not is_loopback((scope.get("client") or "?")[0]):
                raise RequestFailed("`serve status` shows what runs", HTTPStatus.FORBIDDEN)
        except RequestFailed as failure:
            if scope["type"] != "http":
                raise
            answer = error_answer(scope["path"], HTTPStatus(failure.status), str(failure))
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class TakenAnswers:
    """Tells the app what its client has taken of the answer, among the messages from the client.

    Serve takes from the app whatever it sends, and keeps it for a client that does not read. The
    connection of one that takes nothing for `stuck_s` is cut, so that this does not last.
    """

    def __init__(self, app: ASGIApp, stuck_s: float = STUCK_S) -> None:
        self._app = app
        self._stuck_s = stuck_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and say that its app will be told."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["extensions"] = {**scope.get("extensions", {}), EXTENSION: {}}
        # `send` is uvicorn's own, and the only way to its connection.
        transport = getattr(getattr(send, "__self__", None), "transport", None)
        answer = _Answer(receive)

        async def told(message: Message) -> None:
            with _Watch(transport, self._stuck_s):
                await send(message)
            answer.take(len(message.get("body", b"")))

        try:
            await self._app(scope, answer.receive, told)
        finally:
            answer.close()
            _cut_if_stuck(transport, self._stuck_s)


class _Answer:
    """How much of an answer was taken, and what its client sends meanwhile."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._receiving: asyncio.Future[Message] | None = None
        self._num_taken = self._num_told = 0
        self._due: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, num_bytes: int) -> None:
        """Note that the connection has room for more after these bytes of the body."""
        self._num_taken += num_bytes
        if self._num_taken - self._num_told >= TELL_EVERY and not self._due.done():
            self._due.set_result(None)

    async def receive(self) -> Message:
        """What the client sends next, or how much it has taken."""
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._receive())
        awaited: set[asyncio.Future[Any]] = {self._receiving, self._due}
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if self._receiving.done():
            received, self._receiving = self._receiving, None
            return received.result()
        self._due = asyncio.get_running_loop().create_future()
        self._num_told = self._num_taken
        return {"type": TAKEN, "num_bytes": self._num_taken}

    def close(self) -> None:
        """Wait for the client no longer."""
        if self._receiving is not None:
            self._receiving.cancel()


class _Watch:
    """Cuts a connection if the block takes longer than `stuck_s`."""

    def __init__(self, transport: Any, stuck_s: float) -> None:
        self._transport = transport
        self._stuck_s = stuck_s

    def __enter__(self) -> None:
        cut = self._transport.abort if self._transport else lambda: None
        self._timer = asyncio.get_running_loop().call_later(self._stuck_s, cut)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _cut_if_stuck(transport: Any, stuck_s: float) -> None:
    """Cut a connection that keeps the rest of an answer, once it no longer shrinks."""
    if transport is None or not (num_left := transport.get_write_buffer_size()):
        return

    def look() -> None:
        if transport.get_write_buffer_size() >= num_left:
            transport.abort()
        else:
            _cut_if_stuck(transport, stuck_s)

    asyncio.get_running_loop().call_later(stuck_s, look)
