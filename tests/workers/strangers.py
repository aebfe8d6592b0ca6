"""Who connects to a stream and means it no good, or is one of ours and broken."""

import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import zmq
from hypothesis import strategies as st

from workers import sockets
from workers.token_stream import StreamAddress

Socket = zmq.Socket[bytes]
WAIT_MS = 30_000
MAX_OPEN = 40
"""Connections of each kind that stay open, so that the next ones come while they are there."""

HELLO = b"\x05HELLO" + b"\x01\x00" + bytes(72) + bytes(8) + bytes(80) + bytes(64)
HANDSHAKES = (
    b"",
    b"\xff",
    sockets.CURVE_GREETING[:11],
    sockets.CURVE_GREETING,
    sockets.CURVE_GREETING.replace(b"CURVE", b"NULL\0"),
    sockets.CURVE_GREETING.replace(b"CURVE", b"PLAIN"),
    sockets.CURVE_GREETING + b"\x04" + bytes([len(HELLO[:200])]) + HELLO[:200],
    sockets.CURVE_GREETING + b"\x06" + struct.pack(">Q", 1 << 62) + b"x" * 100_000,
    sockets.CURVE_GREETING + b"\x06" + struct.pack(">Q", sockets.MAX_PART_BYTES) + b"x" * 60_000,
    sockets.CURVE_GREETING + b"\x00\x00" * 1000,
    sockets.CURVE_GREETING + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER",
    b"GET / HTTP/1.1\r\n\r\n",
    bytes(1000),
)
"""Beginnings of connections by who does not know the key."""
NESTED = b"\x91" * 100_000
HUGE = (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\x7f\xff")
"""The beginnings of arrays, bytes, maps and texts that say they are large."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One connection, and what it sends."""

    way: Literal["tcp", "without encryption", "another key", "with the key"]
    parts: tuple[bytes, ...]
    """Bytes on the wire, or, but for `tcp`, the parts of one message."""
    stays: bool = True


def garbage() -> st.SearchStrategy[bytes]:
    """What msgpack may or may not know."""
    values: st.SearchStrategy[object] = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats()
        | st.text(max_size=5)
        | st.binary(max_size=20),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=10,
    )
    return st.binary(max_size=300) | values.map(msgspec.msgpack.encode)


def mutations(valid: bytes) -> st.SearchStrategy[bytes]:
    """A message with a piece of it replaced, or cut off."""
    piece = st.tuples(st.integers(0, len(valid)), st.integers(0, 40), st.binary(max_size=10))
    replaced = piece.map(lambda p: valid[: p[0]] + p[2] + valid[p[0] + p[1] :])
    return replaced | st.integers(0, len(valid)).map(lambda end: valid[:end])


def in_parts(message: bytes) -> tuple[bytes, ...]:
    """A message as it is sent."""
    size = sockets.MAX_PART_BYTES
    return tuple(message[at : at + size] for at in range(0, len(message), size)) or (b"",)


def attacks(messages: Sequence[bytes]) -> st.SearchStrategy[Attack]:
    """Attacks by everybody, with what is made of these messages, good ones or bad."""
    body = garbage() | st.sampled_from(messages) | st.sampled_from(messages).flatmap(mutations)
    parts = body.map(in_parts) | st.lists(body, min_size=1, max_size=4).map(tuple)
    bytes_ = st.sampled_from(HANDSHAKES) | st.binary(max_size=300)
    bytes_ |= st.sampled_from(HANDSHAKES).flatmap(mutations)
    ways: st.SearchStrategy[Literal["without encryption", "another key", "with the key"]]
    ways = st.sampled_from(["without encryption", "another key", "with the key", "with the key"])
    return st.builds(Attack, st.just("tcp"), bytes_.map(lambda b: (b,)), st.booleans()) | st.builds(
        Attack, ways, parts, st.booleans()
    )


class Strangers:
    """Everybody who attacks one address."""

    def __init__(self, address: StreamAddress, probe: bytes) -> None:
        """`probe` is a message that is answered on every connection with the key."""
        self._address, self._probe = address, probe
        self._context: zmq.Context[Socket] = zmq.Context()
        self._open: deque[socket.socket] = deque()
        self._peers: deque[Socket] = deque()

    def attack(self, attack: Attack) -> None:
        """Do it; with the key, until it has been read."""
        if attack.way == "tcp":
            self._attack_by_tcp(attack)
        else:
            self._attack_by_zmq(attack)

    def _attack_by_tcp(self, attack: Attack) -> None:
        stranger = socket.create_connection(sockets.host_and_port(self._address.endpoint))
        try:
            stranger.sendall(attack.parts[0])
        except OSError:  # it was thrown out before it had said all
            stranger.close()
            return
        self._open.append(stranger)
        if not attack.stays:
            self._open.pop().close()
        elif len(self._open) > MAX_OPEN:
            self._open.popleft().close()

    def _attack_by_zmq(self, attack: Attack) -> None:
        endpoint = self._address.endpoint
        match attack.way:
            case "without encryption":
                peer = self._context.socket(zmq.DEALER)
                peer.connect(endpoint)
            case "another key":
                peer = sockets.connect(self._context, endpoint, zmq.curve_keypair()[0], {})
            case _:
                peer = sockets.connect(self._context, endpoint, self._address.public_key, {})
        peer.linger = 0
        peer.send_multipart(attack.parts)
        is_cut = max(map(len, attack.parts)) > sockets.MAX_PART_BYTES
        if attack.way == "with the key" and not is_cut:
            assert sockets.send(peer, self._probe)
            assert peer.poll(WAIT_MS)
        self._peers.append(peer)
        if not attack.stays:
            self._peers.pop().close()
        elif len(self._peers) > MAX_OPEN:
            self._peers.popleft().close()

    def close(self) -> None:
        """Leave."""
        for stranger in self._open:
            stranger.close()
        self._context.destroy(linger=0)
