"""Connections to a real uvicorn: how many, how long their headers take, and how long those are."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.importer import import_from_string

from cluster.ingress import connections
from cluster.ingress.connections import Connections, client_of

LENGTH = [(b"content-length", b"4")]
PROTOCOLS = ["h11", "httptools"]
REQUEST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body, which it waits for."""
    body = b""
    while len(body) < 4:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
    await send({"type": "http.response.start", "status": 200, "headers": LENGTH})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(name: str, bounds: Connections) -> AsyncIterator[int]:
    protocol = bounds.guarded(import_from_string(HTTP_PROTOCOLS[name]))
    config = uvicorn.Config(
        app, port=0, http=protocol, lifespan="off", log_config=None, timeout_keep_alive=60
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    server.force_exit = True
    await running


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """What the server says before it hangs up; without what it had not read, it may be nothing."""
    async with asyncio.timeout(10):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("begun", [b"", b"P", b"POST / HTTP/1.1\r\nhost: a\r\nx: "])
async def test_headers_that_do_not_come_are_given_up(name: str, begun: bytes) -> None:
    async with serving(name, Connections(headers_timeout_s=0.3)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begun)

        assert (await until_closed(reader)).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        writer.close()


@pytest.mark.parametrize("name", PROTOCOLS)
async def test_a_drop_now_and_then_does_not_help(name: str) -> None:
    async with serving(name, Connections(headers_timeout_s=0.5)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST + b"body")
        assert (await reader.readuntil(b"body")).startswith(b"HTTP/1.1 200 OK")

        async def drip() -> None:
            for byte in b"POST / HTTP/1.1\r\n" + b"x: y\r\n" * 100:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 408")
        dripping.cancel()
        writer.close()


@pytest.mark.parametrize("name", PROTOCOLS)
async def test_headers_beyond_all_measure_are_refused(name: str) -> None:
    async with serving(name, Connections(max_headers_bytes=10_000)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n")
        for _ in range(50):
            writer.write(b"x: " + b"y" * 1000 + b"\r\n")
            await asyncio.sleep(0)

        found = await until_closed(reader)
        # h11 has a bound of its own.
        assert found.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")) or not found
        writer.close()


@pytest.mark.parametrize("name", PROTOCOLS)
async def test_a_request_may_take_longer_than_its_headers(name: str) -> None:
    async with serving(name, Connections(headers_timeout_s=0.3, max_headers_bytes=100)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):  # on one connection, with a pause between them
            writer.write(REQUEST[:20])
            await asyncio.sleep(0.1)
            writer.write(REQUEST[20:])
            for byte in b"body":
                await asyncio.sleep(0.15)
                writer.write(bytes([byte]))
            assert (await reader.readuntil(b"body")).startswith(b"HTTP/1.1 200 OK")
            await asyncio.sleep(0.5)
        writer.close()


@pytest.mark.parametrize("name", PROTOCOLS)
async def test_one_connection_too_many_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "is_loopback", lambda host: False)
    bounds = Connections(max_connections=3)
    async with serving(name, bounds) as port:
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        assert (await until_closed(opened[3][0])).startswith(b"HTTP/1.1 429 Too Many Requests")
        for reader, writer in opened[:3]:
            writer.write(REQUEST + b"body")
            assert (await reader.readuntil(b"body")).startswith(b"HTTP/1.1 200 OK")
        opened[0][1].close()
        await asyncio.sleep(0.2)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST + b"body")
        assert (await reader.readuntil(b"body")).startswith(b"HTTP/1.1 200 OK")
        for _, opener in opened:
            opener.close()
        writer.close()


async def test_a_front_on_this_machine_has_as_many_as_it_likes() -> None:
    async with serving("httptools", Connections(max_connections=1)) as port:
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for reader, writer in opened:
            writer.write(REQUEST + b"body")
            assert (await reader.readuntil(b"body")).startswith(b"HTTP/1.1 200 OK")
            writer.close()


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        (("10.0.0.1", 5), "10.0.0.1"),
        (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1"),
        (("2001:db8::7", 5, 0, 0), "2001:db8::/64"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        (("::1", 5, 0, 0), "::1"),
        ("", ""),
        (None, ""),
    ],
)
def test_a_client_is_its_address_or_its_network(peer: Any, client: str) -> None:
    class Transport:
        def get_extra_info(self, name: str) -> Any:
            return peer

    transport: Any = Transport()
    assert client_of(transport) == client
