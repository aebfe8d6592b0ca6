"""ZeroMQ sockets as all our streams need them: encrypted, and safe from who connects to them.

Each receiver makes a key pair of CURVE, and whoever is to send to it is told the public key, which
no handshake shows. Without it a peer gets no further than that handshake, in which it can neither
send more than one part of a message nor take longer than HANDSHAKE_S.
"""

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import zmq

logger = logging.getLogger(__name__)

Options = Mapping[int, int | bytes]
"""ZeroMQ's socket options and their values."""

Socket = TypeVar("Socket", bound="zmq.Socket[Any]")


Ports = tuple[int, int]
"""The first and the last of a range of TCP ports."""

HEARTBEAT_MS = 2000
"""Interval of heartbeats; a connection that misses three is opened again."""
GREETING, GREETING_END = b"\xff", b"\x7f"
"""First and last of the ten bytes with which a ZeroMQ socket greets whoever connects."""
CURVE_GREETING = b"\xff%s\x7f\x03\x00%s%s" % (bytes(8), b"CURVE".ljust(20, b"\0"), bytes(32))
"""All that a connecting socket says before it hears the other side's, of the same length."""
VERSION_END = 11
MECHANISM = slice(12, 32)
"""The parts of a greeting: up to the version, and the name of the mechanism."""
HANDSHAKE_S = 10.0
"""Time that a peer has to show that it knows the key; it takes milliseconds."""
MAX_PART_BYTES = 1 << 16
"""Size of the parts in which messages are sent: what one connection may fill memory with before it
has shown that it knows the key."""
PART_OVERHEAD = 1 << 10
"""What the encryption may add to a part."""
LIMITS: Options = {
    zmq.MAXMSGSIZE: MAX_PART_BYTES + PART_OVERHEAD,
    zmq.HANDSHAKE_IVL: int(1000 * HANDSHAKE_S),
}
"""Bounds of what a peer may send before it has shown that it knows the key, and of its time."""
UNREADABLE = (ValueError, RecursionError, MemoryError)
"""What decoders raise for bytes that are not what they expect: of another type or cut off, nested
deeply, or said to be huge."""
LOG_INTERVAL_S = 60.0
"""Period in which at most one line of the log says that messages were dropped."""
MAX_REASON_LEN = 200
"""Characters of the reason in that line, which a peer may have chosen."""
CONNECT_TIMEOUT_MS = 3000
"""Time that a peer has to take a connection. The kernel alone asks at longer and longer intervals,
so that a link which was cut for 20 s would be found healed only after 31."""


def check_curve() -> None:
    """Raise RuntimeError unless ZeroMQ can encrypt."""
    if not zmq.has("curve"):
        raise RuntimeError(
            f"this ZeroMQ ({zmq.zmq_version()}) was built without CURVE, which encrypts what the "
            "processes of the app send each other: install pyzmq as PyPI has it, by "
            "`pip install --force-reinstall --only-binary :all: pyzmq`"
        )


def listen(
    context: "zmq.Context[Socket]", host: str, options: Options, ports: Ports | None = None
) -> tuple[Socket, str, bytes]:
    """A ROUTER socket on `host`, and the endpoint and the public key that others connect with.

    Its port is the first of `ports` that is free, by default any; OSError if none is.
    """
    check_curve()
    public_key, secret_key = zmq.curve_keypair()
    socket = context.socket(zmq.ROUTER)
    is_ipv6 = ":" in host
    _set(socket, is_ipv6, {**_server_lock(secret_key), **options})
    base = f"tcp://[{host}]" if is_ipv6 else f"tcp://{host}"
    if ports is None:
        return socket, f"{base}:{socket.bind_to_random_port(base)}", public_key
    for port in range(ports[0], ports[1] + 1):
        try:
            socket.bind(f"{base}:{port}")
        except zmq.ZMQError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return socket, f"{base}:{port}", public_key
    socket.close()
    raise OSError(
        errno.EADDRINUSE,
        f"no port of stream_ports ({ports[0]} to {ports[1]}) is free on {host}: widen the range",
    )


async def fault(endpoint: str) -> str:
    """Why no ZeroMQ socket can be reached at an endpoint of `listen`; empty if one can."""
    host, port = host_and_port(endpoint)
    writer = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_MS / 1e3):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(CURVE_GREETING[:VERSION_END])  # then it tells its mechanism
            greeting = await reader.readexactly(10)
            if not (greeting.startswith(GREETING) and greeting.endswith(GREETING_END)):
                return "another program answers there"
            greeting += await reader.readexactly(len(CURVE_GREETING) - len(greeting))
    except TimeoutError:
        return f"nothing answers within {CONNECT_TIMEOUT_MS / 1e3:g} s"
    except asyncio.IncompleteReadError as end:
        return "another program answers there" if end.partial else "it closes the connection"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    is_encrypted = greeting[MECHANISM] == CURVE_GREETING[MECHANISM]
    return "" if is_encrypted else "it does not encrypt (CURVE): another version of the app"


def host_and_port(endpoint: str) -> tuple[str, int]:
    """The address and the port of an endpoint of `listen`."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def check_ports(ports: Ports | None) -> None:
    """Raise ValueError unless these are the first and the last of a range of ports."""
    if ports and not 0 < ports[0] <= ports[1] < 1 << 16:
        raise ValueError(
            f"stream_ports ({list(ports)}) must be the first and the last of a range of ports, "
            "such as [20000, 20099]"
        )


def connect(
    context: "zmq.Context[Socket]", endpoint: str, public_key: bytes, options: Options
) -> Socket:
    """A DEALER socket connected to what `listen` gave, again whenever the link comes back.

    It gives up once a peer breaks the protocol, and then `send` says so: connect another one.
    """
    check_curve()
    socket = context.socket(zmq.DEALER)
    alive: Options = {
        zmq.HEARTBEAT_IVL: HEARTBEAT_MS,
        zmq.HEARTBEAT_TIMEOUT: 3 * HEARTBEAT_MS,
        zmq.CONNECT_TIMEOUT: CONNECT_TIMEOUT_MS,
    }
    _set(socket, "[" in endpoint, {**_client_lock(public_key), **alive, **options})
    socket.connect(endpoint)
    return socket


def send(socket: "zmq.Socket[bytes]", message: bytes, to: bytes | None = None) -> bool:
    """Send a message, of a ROUTER `to` one of its peers, without waiting.

    False if it is not sent: the queue is full, or the socket has given up its connection.
    """
    parts: list[bytes | memoryview] = [] if to is None else [to]
    if len(message) <= MAX_PART_BYTES:
        parts.append(message)
    else:
        whole = memoryview(message)
        starts = range(0, len(message), MAX_PART_BYTES)
        parts += [whole[start : start + MAX_PART_BYTES] for start in starts]
    try:
        socket.send_multipart(parts, zmq.DONTWAIT)
    except zmq.Again:
        return False
    return True


def joined(parts: Sequence[bytes]) -> bytes:
    """The message that was sent in these parts."""
    return parts[0] if len(parts) == 1 else b"".join(parts)


class Dropped:
    """Counts the messages of one stream that are dropped, and logs that once in LOG_INTERVAL_S."""

    def __init__(self, stream: str) -> None:
        self.count = 0
        self._stream = stream
        self._logged_count = 0
        self._logged_s = -LOG_INTERVAL_S

    def add(self, reason: object) -> None:
        """Count one."""
        self.count += 1
        now = time.monotonic()
        if now - self._logged_s < LOG_INTERVAL_S:
            return
        logger.warning(
            "messages were dropped; the last one is described",
            extra={
                "stream": self._stream,
                "num_messages": self.count - self._logged_count,
                "reason": repr(reason)[:MAX_REASON_LEN],
            },
        )
        self._logged_count, self._logged_s = self.count, now


def _server_lock(secret_key: bytes) -> Options:
    """Options of a socket that only peers with its public key can open."""
    return {zmq.CURVE_SERVER: 1, zmq.CURVE_SECRETKEY: secret_key, **LIMITS}


def _client_lock(server_key: bytes) -> Options:
    """Options of a socket that opens the one with this public key, and believes no other."""
    public_key, secret_key = zmq.curve_keypair()
    return {
        zmq.CURVE_SERVERKEY: server_key,
        zmq.CURVE_PUBLICKEY: public_key,
        zmq.CURVE_SECRETKEY: secret_key,
        **LIMITS,
    }


def _set(socket: "zmq.Socket[Any]", is_ipv6: bool, options: Options) -> None:
    """Set the options; they apply to connections made afterwards only."""
    for option, value in {zmq.LINGER: 0, zmq.IPV6: is_ipv6, **options}.items():
        socket.setsockopt(option, value)
