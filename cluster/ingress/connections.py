"""What one client may keep of Serve's HTTP proxy: connections, and the time and size of headers.

uvicorn, which the proxy runs, waits for headers for ever, however long they become.
"""

import asyncio
import functools
import ipaddress
import os
from collections import Counter
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http import auto

from cluster.config.auth import is_loopback

HEADERS_TIMEOUT_S = 30.0
"""Time in which the headers of a request must have come, from its first byte or the connection's
beginning."""
MAX_HEADERS_BYTES = 64 << 10
"""Size of the headers of a request."""
MAX_CONNECTIONS = 256
"""Connections of one address at a time; those of the machine itself, where a front may be, have no
bound. The environment variable XYSERVE_MAX_CONNECTIONS, before Ray starts, sets another."""


def bound_connections() -> None:
    """Have uvicorn, in this process, bound what a client may keep of it."""
    if not hasattr(auto.AutoHTTPProtocol, "is_bounded"):
        most = int(os.environ.get("XYSERVE_MAX_CONNECTIONS", MAX_CONNECTIONS))
        auto.AutoHTTPProtocol = Connections(most).guarded(auto.AutoHTTPProtocol)


class Connections:
    """The connections of one proxy."""

    def __init__(
        self,
        max_connections: int = MAX_CONNECTIONS,
        max_headers_bytes: int = MAX_HEADERS_BYTES,
        headers_timeout_s: float = HEADERS_TIMEOUT_S,
    ) -> None:
        self._max_connections = max_connections
        self._max_headers_bytes = max_headers_bytes
        self._headers_timeout_s = headers_timeout_s
        self._num_of: Counter[str] = Counter()
        """Connections by client."""

    def guarded(self, protocol: type[Any]) -> type[Any]:
        """uvicorn's protocol with these bounds."""
        connections = self

        class Guarded(protocol):
            """One connection."""

            is_bounded = True

            def connection_made(self, transport: asyncio.Transport) -> None:
                """Count it, and refuse one too many."""
                super().connection_made(transport)
                self._num_bytes = 0
                self._giving_up: asyncio.TimerHandle | None = None
                self._client = client_of(transport)
                connections._num_of[self._client] += 1
                if connections._is_too_much(self._client):
                    _refuse(transport, HTTPStatus.TOO_MANY_REQUESTS)
                else:
                    self._wait_for_headers()

            def connection_lost(self, exc: Exception | None) -> None:
                """Forget it."""
                connections._num_of[self._client] -= 1
                connections._num_of += Counter()  # without those of none
                self._have_headers()
                super().connection_lost(exc)

            def data_received(self, data: bytes) -> None:
                """Count what comes before a request's headers are whole."""
                if self.transport.is_closing():
                    return
                super().data_received(data)
                if self.cycle is not None and not self.cycle.response_complete:
                    self._have_headers()
                    return
                self._num_bytes += len(data)
                self._wait_for_headers()
                if self._num_bytes > connections._max_headers_bytes:
                    _refuse(self.transport, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

            def _wait_for_headers(self) -> None:
                if self._giving_up is None:
                    give_up = functools.partial(_refuse, self.transport, HTTPStatus.REQUEST_TIMEOUT)
                    self._giving_up = self.loop.call_later(connections._headers_timeout_s, give_up)

            def _have_headers(self) -> None:
                self._num_bytes = 0
                if self._giving_up is not None:
                    self._giving_up.cancel()
                    self._giving_up = None

        return Guarded

    def _is_too_much(self, client: str) -> bool:
        return self._num_of[client] > self._max_connections and not is_loopback(client)


def client_of(transport: asyncio.Transport) -> str:
    """The address of a client; of one with IPv6 its network, of which it may have all addresses."""
    peer = transport.get_extra_info("peername")
    if not peer:
        return ""
    address = ipaddress.ip_address(peer[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        if not address.is_loopback:
            return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _refuse(transport: asyncio.Transport, status: HTTPStatus) -> None:
    """Answer a client for whom there is no request yet, and hang up."""
    if not transport.is_closing():
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nretry-after: 1\r\n"
        transport.write(f"{head}content-length: 0\r\nconnection: close\r\n\r\n".encode())
        transport.close()
