"""ZeroMQ sockets as all our streams need them: IPv6 if the address is, nothing kept when closed."""

from collections.abc import Mapping
from typing import Any, TypeVar

import zmq

Options = Mapping[int, int | bytes]
"""ZeroMQ's socket options and their values."""

Socket = TypeVar("Socket", bound="zmq.Socket[Any]")


def listen(context: "zmq.Context[Socket]", host: str, options: Options) -> tuple[Socket, str]:
    """A ROUTER socket on a free port of `host`, and the endpoint that others connect to."""
    socket = context.socket(zmq.ROUTER)
    is_ipv6 = ":" in host
    _set(socket, is_ipv6, options)
    base = f"tcp://[{host}]" if is_ipv6 else f"tcp://{host}"
    port = socket.bind_to_random_port(base)
    return socket, f"{base}:{port}"


def connect(context: "zmq.Context[Socket]", endpoint: str, options: Options) -> Socket:
    """A DEALER socket connected to an endpoint of `listen`."""
    socket = context.socket(zmq.DEALER)
    _set(socket, "[" in endpoint, options)
    socket.connect(endpoint)
    return socket


def _set(socket: "zmq.Socket[Any]", is_ipv6: bool, options: Options) -> None:
    """Set the options; they apply to connections made afterwards only."""
    for option, value in {zmq.LINGER: 0, zmq.IPV6: is_ipv6, **options}.items():
        socket.setsockopt(option, value)
