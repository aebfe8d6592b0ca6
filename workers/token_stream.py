"""Numbered messages from one sender to one receiver, none lost and none twice.

Tokens travel here and not as Ray calls: a step's output for one receiver is one message. The
sender keeps every message until it is acknowledged and sends again what is overdue (go-back-N),
so that a broken connection misses nothing; a receiver that stays silent is reported as lost.
"""

import asyncio
import itertools
import secrets
import uuid
from collections import deque
from collections.abc import Sequence

import msgspec
import zmq
import zmq.asyncio

RESEND_AFTER_S = 1.0
LOST_AFTER_S = 30.0
"""A receiver whose acknowledgement is overdue this long is taken to be gone."""
FORGET_AFTER_S = 300.0
"""A stream unused this long is closed; the next message opens a new one."""
RESEND_AT_MOST = 64
"""Messages sent again at once."""
HEARTBEAT_MS = 2000
"""A connection that is silent for three of these is made anew."""
ACK_EVERY = 16
"""Messages per acknowledgement while more are waiting to be read."""


class StreamAddress(msgspec.Struct, frozen=True):
    """Where a receiver listens. The token keeps strangers on the network out."""

    endpoint: str
    token: bytes


class _Header(msgspec.Struct, array_like=True):
    token: bytes
    seq: int


_encode = msgspec.msgpack.Encoder().encode
_decode_header = msgspec.msgpack.Decoder(_Header).decode
_decode_ack = msgspec.msgpack.Decoder(int).decode


class StreamSender:
    """The sending end; used from one thread only. Times are seconds of one monotonic clock."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: StreamAddress) -> None:
        self._token = address.token
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by LOST_AFTER_S, not by dropping
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        self._socket.setsockopt(zmq.IPV6, "[" in address.endpoint)
        self._socket.connect(address.endpoint)
        self._next_seq = 0
        self._unacked: deque[tuple[int, list[bytes]]] = deque()
        self._progress_at = 0.0  # the last acknowledgement, or when waiting for one began
        self._resend_at = 0.0

    def send(self, frames: Sequence[bytes], now: float) -> None:
        """Queue one message; it leaves at once if the receiver is reachable."""
        message = [_encode(_Header(self._token, self._next_seq)), *frames]
        if not self._unacked:
            self._progress_at, self._resend_at = now, now + RESEND_AFTER_S
        self._unacked.append((self._next_seq, message))
        self._next_seq += 1
        self._socket.send_multipart(message, copy=False)

    def poll(self, now: float) -> None:
        """Read acknowledgements and send again what is overdue; call it now and then."""
        while self._socket.poll(0):
            try:
                acked = _decode_ack(self._socket.recv())
            except msgspec.MsgspecError:
                continue  # a stranger that took over the port of a receiver that is gone
            while self._unacked and self._unacked[0][0] <= acked:
                self._unacked.popleft()
                self._progress_at, self._resend_at = now, now + RESEND_AFTER_S
        if self._unacked and now >= self._resend_at:
            # A slow receiver still has them all: a few are enough to find out.
            for _, message in itertools.islice(self._unacked, RESEND_AT_MOST):
                self._socket.send_multipart(message, copy=False)
            # Wait longer each time: the receiver may only be slow.
            self._resend_at = now + max(RESEND_AFTER_S, now - self._progress_at)

    def is_idle(self) -> bool:
        """Whether everything sent was acknowledged."""
        return not self._unacked

    def is_lost(self, now: float) -> bool:
        """Whether the receiver has owed an acknowledgement for `LOST_AFTER_S`."""
        return bool(self._unacked) and now - self._progress_at > LOST_AFTER_S

    def close(self) -> None:
        """Close the socket; what was not acknowledged is dropped."""
        self._socket.close()


class StreamReceiver:
    """The receiving end: one socket for any number of senders, read by one asyncio task."""

    def __init__(self, host: str) -> None:
        """Listen on a free port of `host`, an address that the senders can reach."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a sender that reconnects keeps its name
        self._socket.setsockopt(zmq.IPV6, ":" in host)
        base = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
        port = self._socket.bind_to_random_port(base)
        self.address = StreamAddress(f"{base}:{port}", secrets.token_bytes(16))
        self._expected: dict[bytes, int] = {}

    async def receive(self) -> list[bytes]:
        """The frames of the next message; messages of one sender come in order."""
        while True:
            await asyncio.sleep(0)  # a backlog must not keep the event loop from other work
            sender, raw_header, *frames = await self._socket.recv_multipart()
            try:
                header = _decode_header(raw_header)
            except msgspec.MsgspecError:
                continue  # a stranger
            if header.token != self.address.token:
                continue
            expected = self._expected.get(sender, 0)
            if header.seq == expected:
                self._expected[sender] = expected + 1
                if header.seq % ACK_EVERY == 0 or not await self._socket.poll(0):
                    await self._acknowledge(sender, header.seq)
                return frames
            # A duplicate, or a gap that the sender fills when it sends again.
            await self._acknowledge(sender, expected - 1)

    async def _acknowledge(self, sender: bytes, seq: int) -> None:
        await self._socket.send_multipart([sender, _encode(seq)])

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._context.term()


class StreamSenders:
    """One sender for each address in use; used from one thread only."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._senders: dict[StreamAddress, StreamSender] = {}
        self._used_at: dict[StreamAddress, float] = {}

    def send(self, address: StreamAddress, frames: Sequence[bytes], now: float) -> None:
        """Queue one message for the receiver at `address`."""
        if address not in self._senders:
            self._senders[address] = StreamSender(self._context, address)
        self._used_at[address] = now
        self._senders[address].send(frames, now)

    def tend(self, now: float) -> list[StreamAddress]:
        """Do what is due on all streams; returns the receivers that are lost, now forgotten."""
        lost = []
        for address, sender in list(self._senders.items()):
            sender.poll(now)
            if sender.is_lost(now):
                lost.append(address)
            if sender.is_lost(now) or (
                sender.is_idle() and now - self._used_at[address] > FORGET_AFTER_S
            ):
                self._senders.pop(address).close()
                self._used_at.pop(address)
        return lost

    def is_idle(self) -> bool:
        """Whether everything sent was acknowledged."""
        return all(sender.is_idle() for sender in self._senders.values())

    def close(self) -> None:
        """Close all streams; what was not acknowledged is dropped."""
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()
        self._context.term()
