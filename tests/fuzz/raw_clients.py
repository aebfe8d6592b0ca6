"""Clients that break off, dawdle, vanish or speak nonsense: many connections at once."""

import asyncio
import json
import re
import socket
import struct
import urllib.parse
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeAlias

TIMEOUT_S = 300.0
LONG = {"max_tokens": 400, "ignore_eos": True}
SHORT = {"max_tokens": 2}
LINGER = struct.pack("ii", 1, 0)
"""Closes a connection by a reset, as the network does when a client vanishes."""

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter


class RawClients:
    """As many clients at once as are wanted, each of a kind of its own."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._model = model
        self.random = Random(seed)
        self.faults: list[str] = []

    async def run(self, number: int) -> None:
        """Connect all of them, then let each go its way."""
        kinds = [*KINDS]
        connected = await asyncio.gather(*(self._connect() for _ in range(number)))
        await asyncio.gather(
            *(
                self._go(kinds[place % len(kinds)], reader, writer)
                for place, (reader, writer) in enumerate(connected)
            )
        )

    async def _connect(self) -> tuple[Reader, Writer]:
        return await asyncio.open_connection(self._host, self._port)

    async def _go(self, kind: str, reader: Reader, writer: Writer) -> None:
        way = KINDS[kind]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await way(self, reader, writer)
        except TimeoutError:
            self.faults.append(f"a client ({kind}) got no answer within {TIMEOUT_S:.0f} s")
            return
        except OSError:
            return  # the server may close a connection that makes no sense
        finally:
            writer.close()
        for status in re.findall(rb"^HTTP/1\.1 (\d+)", answer, re.MULTILINE):
            if int(status) >= 500 and int(status) != 503:
                self.faults.append(f"a client ({kind}) was answered {answer[:500]!r}")

    def request(self, stream: bool, params: dict[str, Any], body: bytes | None = None) -> bytes:
        """A whole request."""
        if body is None:
            given = {"model": self._model, "prompt": "Once upon a time", "stream": stream} | params
            body = json.dumps(given).encode()
        return self.head(f"Content-Length: {len(body)}") + body

    def head(self, *lines: str) -> bytes:
        """The head of a request with these further lines."""
        first = ("POST /v1/completions HTTP/1.1", "Host: here", "Content-Type: application/json")
        return "\r\n".join((*first, *lines, "", "")).encode()

    def place(self, data: bytes) -> int:
        """Where to break off."""
        return self.random.randrange(1, len(data))

    async def pause(self) -> None:
        """Let some time go by, from nothing to a second."""
        await asyncio.sleep(self.random.random())


async def _leaves_at_once(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    return b""


async def _breaks_off(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    data = clients.request(False, SHORT)
    writer.write(data[: clients.place(data)])
    await writer.drain()
    await clients.pause()
    return b""


async def _ends_early(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    """It sends a part, says that this is all, and waits for the answer."""
    data = clients.request(False, SHORT)
    writer.write(data[: clients.place(data)])
    writer.write_eof()
    return await reader.read()


async def _dawdles(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    """It sends a whole request in pieces, and reads the whole answer."""
    data = clients.request(False, SHORT | {"user": "x" * 1000})
    for start in range(0, len(data), 300):
        writer.write(data[start : start + 300])
        await writer.drain()
        await clients.pause()
    return await _whole(reader)


async def _reads_slowly(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    writer.write(clients.request(True, {"max_tokens": 30, "ignore_eos": True}))
    answer = b""
    while not answer.endswith(b"0\r\n\r\n") and (data := await reader.read(200)):
        answer += data
        await asyncio.sleep(0.05)
    if b"[DONE]" not in answer and b" 200 OK" in answer:
        clients.faults.append(f"a slow reader's stream has no end: {answer[-300:]!r}")
    return answer


async def _vanishes(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    """It reads the beginning of a long stream."""
    writer.write(clients.request(True, LONG))
    answer = await reader.read(100)
    await clients.pause()
    _reset(writer)
    return answer


async def _vanishes_unanswered(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    writer.write(clients.request(False, LONG))
    await writer.drain()
    await clients.pause()
    _reset(writer)
    return b""


async def _does_not_read(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(clients.request(True, LONG))
    for _ in range(3):
        await clients.pause()
    return b""


async def _speaks_another_language(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    writer.write(
        clients.random.choice(
            [
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
                b"GET /v1/models HTTP/9.9\r\n\r\n",
                b"HELO\r\n" * 50,
                b"GET / HTTP/1.1\r\n" + b"x" * 100_000 + b"\r\n\r\n",
                b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
                b"GET //%2e%2e/%00?%zz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
                b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            ]
        )
    )
    writer.write_eof()
    return await reader.read()


async def _sends_bad_chunks(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    writer.write(clients.head("Transfer-Encoding: chunked"))
    writer.write(
        clients.random.choice([b"zz\r\n{}\r\n", b"5\r\n{}", b"fffffffff\r\n{", b"2\r\n{}\r\n"])
    )
    await writer.drain()
    await clients.pause()
    writer.write_eof()
    return await reader.read()


async def _declares_too_much(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    writer.write(clients.head(f"Content-Length: {10**15}") + b"{" * 1000)
    await writer.drain()
    await clients.pause()
    return b""


async def _sends_too_much(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    size = 12 << 20
    writer.write(clients.head(f"Content-Length: {size}", "Connection: close"))
    for _ in range(size >> 16):
        writer.write(b" " * (1 << 16))
        await writer.drain()
    return await reader.read()


async def _asks_twice(clients: RawClients, reader: Reader, writer: Writer) -> bytes:
    """Both requests at once, in one connection."""
    writer.write(clients.request(False, SHORT) * 2)
    return await _whole(reader) + await _whole(reader)


KINDS: dict[str, Callable[[RawClients, Reader, Writer], Awaitable[bytes]]] = {
    "leaves at once": _leaves_at_once,
    "breaks off": _breaks_off,
    "ends early": _ends_early,
    "dawdles": _dawdles,
    "reads slowly": _reads_slowly,
    "vanishes": _vanishes,
    "vanishes unanswered": _vanishes_unanswered,
    "does not read": _does_not_read,
    "speaks another language": _speaks_another_language,
    "sends bad chunks": _sends_bad_chunks,
    "declares too much": _declares_too_much,
    "sends too much": _sends_too_much,
    "asks twice": _asks_twice,
}


async def _whole(reader: Reader) -> bytes:
    """One answer that has a length."""
    head = await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"(?i)content-length: (\d+)", head)
    return head + await reader.readexactly(int(found.group(1)) if found else 0)


def _reset(writer: Writer) -> None:
    connection = writer.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
    writer.transport.abort()
