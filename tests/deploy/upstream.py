"""A small app behind a front, on a real server: it remembers its calls and streams on demand."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

TIMEOUT_S = 60
STREAM = "/v1/stream"
"""The path whose answer is what `emit` sends, event by event."""
HANG = "/v1/hang"
"""The path that has no answer."""


@dataclass
class Call:
    """One call that has arrived."""

    path: str
    headers: list[tuple[str, str]]
    num_bytes: int = 0
    """Size of the body, as far as it has come."""
    has_come: threading.Event = field(default_factory=threading.Event)
    """Set when all of it has come."""
    has_left: threading.Event = field(default_factory=threading.Event)
    """Set when its client has gone before it was answered."""

    def header(self, name: str) -> list[str]:
        """All values of a header."""
        return [value for each, value in self.headers if each == name]


class Upstream:
    """The app, by ASGI."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._events: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a call with the size of its body, or as its path says."""
        if scope["type"] != "http":
            return
        headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
        call = Call(scope["path"], headers)
        self.calls.append(call)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                call.has_left.set()
                return
            call.num_bytes += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        call.has_come.set()
        if call.path in (STREAM, HANG):
            leaving = asyncio.create_task(self._wait_until_left(call, receive))
            if call.path == STREAM:
                await self._stream(send, leaving)
            await leaving
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(call.num_bytes).encode()})

    async def _stream(self, send: Send, leaving: "asyncio.Task[None]") -> None:
        header = (b"content-type", b"text/event-stream; charset=utf-8")
        await send({"type": "http.response.start", "status": 200, "headers": [header]})
        while not leaving.done():
            event = asyncio.create_task(self._events.get())
            await asyncio.wait([event, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                return
            body = f"data: {event.result()}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _wait_until_left(self, call: Call, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        call.has_left.set()

    def emit(self, event: str) -> None:
        """Send one event on the stream that is open, or on the next one."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        """Serve until the server is told to exit."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(server.serve([listener]))

    def latest(self, path: str) -> Call:
        """The latest call of a path, as soon as there is one and all of it has come."""
        for _ in range(TIMEOUT_S * 100):
            for call in reversed(self.calls):
                if call.path == path:
                    assert call.has_come.wait(TIMEOUT_S)
                    return call
            threading.Event().wait(0.01)
        raise AssertionError(f"no call of {path}: {self.calls}")


@contextmanager
def upstream() -> Iterator[Upstream]:
    """An app that is served until the end of the block."""
    app = Upstream()
    listener = socket.create_server(("127.0.0.1", 0))
    app.port = listener.getsockname()[1]
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=app.run, args=(server, listener))
    thread.start()
    try:
        yield app
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        listener.close()
