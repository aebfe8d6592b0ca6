"""Numbered messages from one sender to one receiver, each delivered once and in order.

Tokens are sent this way instead of by Ray calls: a step's output for one receiver is one message.
The sender keeps every message until it is acknowledged and resends what is overdue (go-back-N), so
that a broken connection loses nothing; a receiver that stays silent is reported as lost.
"""

import asyncio
import itertools
import secrets
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Annotated

import msgspec
import zmq
import zmq.asyncio

from workers import sockets

RESEND_AFTER_S = 1.0
"""Time without an owed acknowledgement before the first resend: longer than a busy event loop
delays one, much shorter than LOST_AFTER_S."""
LOST_AFTER_S = 30.0
"""Time without an owed acknowledgement after which a receiver counts as lost."""
MAX_UNACKED_BYTES = 256 << 20
"""Memory of what one receiver has not acknowledged; one that owes more counts as lost too."""
CLOSE_AFTER_S = 300.0
"""A stream unused this long is closed; the next message opens a new one."""
MAX_RESENT = 64
"""Max messages resent at once: a slow receiver has them already, and need not read all again."""
MESSAGE_BYTES = 200
"""Memory of a message beside its bytes."""
MAX_SENDERS = 10_000
"""Streams that a receiver knows, about 200 bytes each; a sender opens a new one after each pause of
CLOSE_AFTER_S."""
ACK_EVERY = 16
"""Messages per acknowledgement while more are waiting to be read."""


class StreamAddress(msgspec.Struct, frozen=True):
    """Where a receiver listens, and what its senders have to know; given to them by Ray calls."""

    endpoint: str
    token: bytes
    """Secret that every message has to show."""
    public_key: bytes
    """Secret too, towards all but the senders: who knows it gets through the handshake."""

    def __repr__(self) -> str:
        """Without the secrets, as it may get into a log."""
        return f"StreamAddress({self.endpoint!r})"


class _Message(msgspec.Struct, array_like=True):
    token: bytes
    seq: Annotated[int, msgspec.Meta(ge=0)]
    frames: list[bytes]


_encode = msgspec.msgpack.Encoder().encode
_decode_message = msgspec.msgpack.Decoder(_Message).decode
_decode_ack = msgspec.msgpack.Decoder(int).decode


class StreamSender:
    """The sending end; used from one thread only. Times are seconds of one monotonic clock."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: StreamAddress) -> None:
        self._context, self._address = context, address
        self._identity = uuid.uuid4().bytes
        self._socket = self._connect()
        self._next_seq = 0
        self._unacked: deque[tuple[int, bytes]] = deque()
        self._num_bytes = 0  # of all unacknowledged messages
        self._progress_at = 0.0  # last acknowledgement, or when waiting for one began
        self._resend_at = 0.0

    def _connect(self) -> zmq.Socket[bytes]:
        options: sockets.Options = {
            zmq.IDENTITY: self._identity,
            zmq.SNDHWM: 0,  # bounded by MAX_UNACKED_BYTES, not by dropping
        }
        address = self._address
        return sockets.connect(self._context, address.endpoint, address.public_key, options)

    def send(self, frames: Sequence[bytes], now: float) -> None:
        """Queue one message; it is sent at once if the receiver is reachable."""
        message = _encode(_Message(self._address.token, self._next_seq, list(frames)))
        if not self._unacked:
            self._progress_at, self._resend_at = now, now + RESEND_AFTER_S
        self._unacked.append((self._next_seq, message))
        self._num_bytes += MESSAGE_BYTES + len(message)
        self._next_seq += 1
        sockets.send(self._socket, message)  # if it cannot, `poll` will

    def poll(self, now: float) -> None:
        """Read acknowledgements and resend what is overdue; to be called regularly."""
        while self._socket.poll(0):
            try:
                acked = _decode_ack(self._socket.recv())
            except sockets.UNREADABLE:
                continue
            if acked >= self._next_seq:
                continue  # nobody can have received it
            while self._unacked and self._unacked[0][0] <= acked:
                _, message = self._unacked.popleft()
                self._num_bytes -= MESSAGE_BYTES + len(message)
                self._progress_at, self._resend_at = now, now + RESEND_AFTER_S
        if self._unacked and now >= self._resend_at:
            if not self._socket.poll(0, zmq.POLLOUT):  # somebody has spoken something else there
                self._socket.close()
                self._socket = self._connect()
            for _, message in itertools.islice(self._unacked, MAX_RESENT):
                sockets.send(self._socket, message)
            # Back off: the receiver may only be slow.
            self._resend_at = now + max(RESEND_AFTER_S, now - self._progress_at)

    def is_idle(self) -> bool:
        """Whether everything sent was acknowledged."""
        return not self._unacked

    def is_lost(self, now: float) -> bool:
        """Whether the receiver has owed an acknowledgement for too long, or for too much."""
        is_late = bool(self._unacked) and now - self._progress_at > LOST_AFTER_S
        return is_late or self._num_bytes > MAX_UNACKED_BYTES

    def close(self) -> None:
        """Close the socket; what was not acknowledged is dropped."""
        self._socket.close()


class StreamReceiver:
    """The receiving end: one socket for any number of senders, read by one asyncio task."""

    def __init__(self, host: str, ports: sockets.Ports | None = None) -> None:
        """Listen on `host`, an address that the senders can reach, at one of `ports`."""
        self._context = zmq.asyncio.Context()
        # With the handover a sender that reconnects keeps its identity.
        options: sockets.Options = {zmq.RCVHWM: 0, zmq.ROUTER_HANDOVER: 1}
        self._socket, endpoint, public_key = sockets.listen(self._context, host, options, ports)
        self.address = StreamAddress(endpoint, secrets.token_bytes(16), public_key)
        self.dropped = sockets.Dropped(endpoint)
        """Messages that cannot be read or show another token."""
        self._expected: dict[bytes, int] = {}  # the one heard last is at the end

    async def receive(self) -> list[bytes]:
        """Frames of the next message; messages of one sender arrive in order."""
        while True:
            await asyncio.sleep(0)  # a backlog must not block the event loop
            sender, *parts = await self._socket.recv_multipart()
            try:
                message = _decode_message(sockets.joined(parts))
            except sockets.UNREADABLE as error:
                self.dropped.add(error)
                continue
            if not secrets.compare_digest(message.token, self.address.token):
                self.dropped.add("another token")
                continue
            expected = self._expected.pop(sender, 0)
            self._expected[sender] = expected + (message.seq == expected)
            if len(self._expected) > MAX_SENDERS:
                del self._expected[next(iter(self._expected))]
            if message.seq == expected:
                if message.seq % ACK_EVERY == 0 or not await self._socket.poll(0):
                    await self._acknowledge(sender, message.seq)
                return message.frames
            # A duplicate, or a gap that the sender fills when it resends.
            await self._acknowledge(sender, expected - 1)

    async def _acknowledge(self, sender: bytes, seq: int) -> None:
        await self._socket.send_multipart([sender, _encode(seq)])

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._context.term()


class StreamSenders:
    """One sender per address in use; used from one thread only."""

    def __init__(self) -> None:
        sockets.check_curve()  # rather than when the first message is sent
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._senders: dict[StreamAddress, StreamSender] = {}
        self._used_at: dict[StreamAddress, float] = {}

    def send(self, address: StreamAddress, frames: Sequence[bytes], now: float) -> None:
        """Queue one message for the receiver at `address`."""
        if address not in self._senders:
            self._senders[address] = StreamSender(self._context, address)
        self._used_at[address] = now
        self._senders[address].send(frames, now)

    def poll(self, now: float) -> list[StreamAddress]:
        """Poll all streams and close the unused ones; return the lost receivers, also closed."""
        lost = []
        for address, sender in list(self._senders.items()):
            sender.poll(now)
            if sender.is_lost(now):
                lost.append(address)
            if sender.is_lost(now) or (
                sender.is_idle() and now - self._used_at[address] > CLOSE_AFTER_S
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
