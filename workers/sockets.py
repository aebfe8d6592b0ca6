"""ZeroMQ sockets as all our streams need them: IPv6 if the address is, nothing kept when closed."""

import asyncio
import contextlib
import errno
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import zmq

Options = Mapping[int, int | bytes]
"""ZeroMQ's socket options and their values."""

Socket = TypeVar("Socket", bound="zmq.Socket[Any]")


Ports = tuple[int, int]
"""The first and the last of a range of TCP ports."""

HEARTBEAT_MS = 2000
"""Interval of heartbeats; a connection that misses three is opened again."""
GREETING, GREETING_END = b"\xff", b"\x7f"
"""First and last of the ten bytes with which a ZeroMQ socket greets whoever connects."""
CONNECT_TIMEOUT_MS = 3000
"""Time that a peer has to take a connection. The kernel alone asks at longer and longer intervals,
so that a link which was cut for 20 s would be found healed only after 31."""


def listen(
    context: "zmq.Context[Socket]", host: str, options: Options, ports: Ports | None = None
) -> tuple[Socket, str]:
    """A ROUTER socket on `host`, and the endpoint that others connect to.

    Its port is the first of `ports` that is free, by default any; OSError if none is.
    """
    socket = context.socket(zmq.ROUTER)
    is_ipv6 = ":" in host
    _set(socket, is_ipv6, options)
    base = f"tcp://[{host}]" if is_ipv6 else f"tcp://{host}"
    if ports is None:
        return socket, f"{base}:{socket.bind_to_random_port(base)}"
    for port in range(ports[0], ports[1] + 1):
        try:
            socket.bind(f"{base}:{port}")
        except zmq.ZMQError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return socket, f"{base}:{port}"
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
            greeting = await reader.readexactly(10)
    except TimeoutError:
        return f"nothing answers within {CONNECT_TIMEOUT_MS / 1e3:g} s"
    except asyncio.IncompleteReadError:
        return "it closes the connection"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    is_ours = greeting.startswith(GREETING) and greeting.endswith(GREETING_END)
    return "" if is_ours else "another program answers there"


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


def connect(context: "zmq.Context[Socket]", endpoint: str, options: Options) -> Socket:
    """A DEALER socket connected to an endpoint of `listen`, again whenever the link comes back."""
    socket = context.socket(zmq.DEALER)
    alive: Options = {
        zmq.HEARTBEAT_IVL: HEARTBEAT_MS,
        zmq.HEARTBEAT_TIMEOUT: 3 * HEARTBEAT_MS,
        zmq.CONNECT_TIMEOUT: CONNECT_TIMEOUT_MS,
    }
    _set(socket, "[" in endpoint, {**alive, **options})
    socket.connect(endpoint)
    return socket


def _set(socket: "zmq.Socket[Any]", is_ipv6: bool, options: Options) -> None:
    """Set the options; they apply to connections made afterwards only."""
    for option, value in {zmq.LINGER: 0, zmq.IPV6: is_ipv6, **options}.items():
        socket.setsockopt(option, value)
