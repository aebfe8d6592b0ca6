import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Iterator, Sequence

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import sockets, token_stream
from workers.token_stream import (
    CLOSE_AFTER_S,
    LOST_AFTER_S,
    StreamAddress,
    StreamReceiver,
    StreamSender,
    StreamSenders,
)

Socket = zmq.Socket[bytes]
NOBODY = StreamAddress("tcp://127.0.0.1:1", b"token", zmq.curve_keypair()[0])


@pytest.fixture
async def receiver() -> AsyncIterator[StreamReceiver]:
    receiver = StreamReceiver("127.0.0.1")
    yield receiver
    receiver.close()


@pytest.fixture
def senders() -> Iterator[StreamSenders]:
    senders = StreamSenders()
    yield senders
    senders.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[Socket]]:
    context: zmq.Context[Socket] = zmq.Context()
    yield context
    context.destroy(linger=0)


class CuttingProxy:
    """Forwards TCP to a stream's address, and cuts connections.

    The first connections end after `cuts` bytes sent through them, later ones when `cut` is called.
    """

    def __init__(self, target: StreamAddress, cuts: Sequence[int] = (), port: int = 0) -> None:
        self._target = target
        self._cuts = iter(cuts)
        self._port = port
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> "CuttingProxy":
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self._port)
        port = self._server.sockets[0].getsockname()[1]
        self.address = StreamAddress(
            f"tcp://127.0.0.1:{port}", self._target.token, self._target.public_key
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        while self._open:
            self.cut()
            await asyncio.sleep(0)

    @property
    def num_connections(self) -> int:
        return len(self._open) // 2

    def cut(self) -> None:
        """End all connections at once, with what is under way on them."""
        for writer in self._open:
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self._target.endpoint.removeprefix("tcp://").split(":")
        upper_reader, upper_writer = await asyncio.open_connection(host, port)
        ends = {writer, upper_writer}
        self._open |= ends
        budget = next(self._cuts, None)
        with contextlib.suppress(ConnectionError):
            await asyncio.wait(
                [
                    asyncio.create_task(self._copy(reader, upper_writer, budget)),
                    asyncio.create_task(self._copy(upper_reader, writer, None)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        for end in ends:
            end.transport.abort()
        self._open -= ends

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096 if budget is None else min(4096, budget)):
                writer.write(data)
                await writer.drain()
                if budget is not None and (budget := budget - len(data)) == 0:
                    return


async def tend(sender: StreamSender) -> None:
    """Look after a stream for ever, on a clock that runs ten times too fast."""
    for now in itertools.count(step=0.1):
        sender.poll(now)
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def tended(sender: StreamSender) -> AsyncIterator[None]:
    task = asyncio.create_task(tend(sender))
    try:
        async with asyncio.timeout(30):
            yield
    finally:
        task.cancel()


async def all_acknowledged(sender: StreamSender, receiver: StreamReceiver) -> None:
    """Wait until the sender knows that all has arrived; nothing arrives a second time."""
    repeated = asyncio.create_task(receiver.receive())
    while not sender.is_idle():
        await asyncio.sleep(0.01)
    assert not repeated.done()
    repeated.cancel()


async def receive(receiver: StreamReceiver, count: int) -> list[list[bytes]]:
    return [await asyncio.wait_for(receiver.receive(), 30) for _ in range(count)]


def numbered(count: int) -> list[list[bytes]]:
    return [[b"message", str(number).encode()] for number in range(count)]


def message(token: bytes, seq: int, *frames: bytes) -> bytes:
    """A message as it is before it is encrypted."""
    return msgspec.msgpack.encode((token, seq, frames))


def connected(context: zmq.Context[Socket], address: StreamAddress) -> Socket:
    """A socket of somebody who knows the address, but is none of our senders."""
    return sockets.connect(context, address.endpoint, address.public_key, {})


def test_a_zeromq_that_cannot_encrypt_is_an_error_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")

    with pytest.raises(RuntimeError, match="without CURVE"):
        StreamSenders()


def test_an_address_in_a_log_shows_no_secret() -> None:
    assert repr(NOBODY) == "StreamAddress('tcp://127.0.0.1:1')"


async def has_free(host: str, port: int) -> None:
    """Wait until somebody else has given a port back."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(OSError), socket.create_server((host, port)):
                return
            await asyncio.sleep(0.01)


def answer_http(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    writer.close()


@pytest.mark.parametrize("speaks", ["http", "zeromq without encryption", "curve of another key"])
async def test_a_sender_outlasts_whoever_speaks_at_its_receivers_port_meanwhile(
    receiver: StreamReceiver, context: zmq.Context[Socket], speaks: str
) -> None:
    host, _ = sockets.host_and_port(receiver.address.endpoint)
    async with contextlib.AsyncExitStack() as ending:
        with socket.create_server((host, 0)) as free:
            taken = free.getsockname()[1]
        address = msgspec.structs.replace(receiver.address, endpoint=f"tcp://{host}:{taken}")
        if speaks == "http":
            other = await asyncio.start_server(answer_http, host, taken)
            ending.callback(other.close)
        elif speaks == "curve of another key":
            ending.callback(sockets.listen(context, host, {}, (taken, taken))[0].close)
        else:
            plain = context.socket(zmq.ROUTER)
            plain.bind(address.endpoint)
            ending.callback(plain.close)
        sender = StreamSender(context, address)
        for frames in numbered(5):  # it waits for nobody
            sender.send(frames, now=0.0)
            await asyncio.sleep(0.05)
    await has_free(host, taken)
    async with CuttingProxy(receiver.address, port=taken), tended(sender):
        received = await receive(receiver, 5)
        await all_acknowledged(sender, receiver)

    assert received == numbered(5)


async def test_messages_arrive_whole_and_in_order(
    receiver: StreamReceiver, senders: StreamSenders
) -> None:
    sent = [[b""], [b"a", b"", b"b" * 1_000_000], [], *numbered(100)]
    for frames in sent:
        senders.send(receiver.address, frames, now=0.0)

    assert await receive(receiver, len(sent)) == sent


async def test_messages_of_many_senders_arrive_each_in_their_order(
    receiver: StreamReceiver, context: zmq.Context[Socket]
) -> None:
    streams = {str(name).encode(): StreamSender(context, receiver.address) for name in range(20)}
    for frames in numbered(30):
        for name, sender in streams.items():
            sender.send([name, *frames], now=0.0)
    received = await receive(receiver, 20 * 30)

    assert {name: [f[1:] for f in received if f[0] == name] for name in streams} == dict.fromkeys(
        streams, numbered(30)
    )


async def test_what_was_received_is_acknowledged(
    receiver: StreamReceiver, context: zmq.Context[Socket]
) -> None:
    sender = StreamSender(context, receiver.address)
    for frames in numbered(40):
        sender.send(frames, now=0.0)
    assert not sender.is_idle()

    async with tended(sender):
        await receive(receiver, 40)
        await all_acknowledged(sender, receiver)


async def test_what_is_repeated_or_out_of_order_is_answered_with_the_last_in_order(
    receiver: StreamReceiver, context: zmq.Context[Socket]
) -> None:
    sender = connected(context, receiver.address)
    sender.send(message(receiver.address.token, 0))
    await receive(receiver, 1)
    for seq in (0, 2, 1):
        sender.send(message(receiver.address.token, seq))
    await receive(receiver, 1)

    acknowledged = [msgspec.msgpack.decode(sender.recv()) for _ in range(4) if sender.poll(10_000)]
    assert acknowledged == [0, 0, 0, 1]


async def test_an_ipv6_address_works_like_any_other(senders: StreamSenders) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    receiver = StreamReceiver("::1")
    senders.send(receiver.address, [b"hello"], now=0.0)

    assert await receive(receiver, 1) == [[b"hello"]]
    receiver.close()


async def test_a_connection_cut_in_the_middle_loses_and_repeats_nothing(
    receiver: StreamReceiver, context: zmq.Context[Socket]
) -> None:
    received: list[list[bytes]] = []
    async with CuttingProxy(receiver.address) as proxy:
        sender = StreamSender(context, proxy.address)
        async with tended(sender):
            for number, frames in enumerate(numbered(60)):
                sender.send(frames, now=0.0)
                if number % 20 == 10:
                    received += await receive(receiver, 3)
                    proxy.cut()
            received += await receive(receiver, 60 - len(received))
            await all_acknowledged(sender, receiver)

    assert received == numbered(60)


@given(cuts=st.lists(st.integers(0, 3000), max_size=3))
@settings(max_examples=8, deadline=None)
async def test_wherever_connections_break_each_message_comes_once_and_in_order(
    cuts: list[int],
) -> None:
    receiver, context = StreamReceiver("127.0.0.1"), zmq.Context()
    async with CuttingProxy(receiver.address, cuts) as proxy:
        sender = StreamSender(context, proxy.address)
        async with tended(sender):
            for frames in numbered(40):
                sender.send(frames, now=0.0)
            received = await receive(receiver, 40)
            await all_acknowledged(sender, receiver)

    assert received == numbered(40)
    context.destroy(linger=0)
    receiver.close()


@given(arrivals=st.lists(st.integers(0, 9), max_size=30))
@settings(deadline=None)
async def test_whatever_is_repeated_or_missing_each_message_comes_once_and_in_order(
    arrivals: list[int],
) -> None:
    receiver, context = StreamReceiver("127.0.0.1"), zmq.Context()
    sender = connected(context, receiver.address)
    # Go-back-N sends the whole sequence again in the end, whatever came of it before.
    for number in [*arrivals, *range(10), 10]:
        sender.send(message(receiver.address.token, number, str(number).encode()))

    assert await receive(receiver, 11) == [[str(number).encode()] for number in range(11)]
    context.destroy(linger=0)
    receiver.close()


async def test_a_wrong_token_is_ignored(
    receiver: StreamReceiver, context: zmq.Context[Socket], senders: StreamSenders
) -> None:
    stranger = StreamSender(context, msgspec.structs.replace(receiver.address, token=b"0" * 16))
    stranger.send([b"from a stranger"], now=0.0)
    senders.send(receiver.address, [b"hello"], now=0.0)
    received = await receive(receiver, 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(receiver.receive(), 0.1)
    stranger.poll(now=0.1)

    assert (received, stranger.is_idle()) == ([[b"hello"]], False)


@given(
    garbage=st.lists(
        st.lists(st.binary(max_size=20), min_size=1, max_size=3)
        | st.just([b""])
        | st.just([msgspec.msgpack.encode(("a text", 0, []))])
        | st.just([msgspec.msgpack.encode((b"token", "a text", []))])
        | st.just([msgspec.msgpack.encode((b"token", -1, []))]),
        min_size=1,
        max_size=5,
    )
)
@settings(deadline=None)
async def test_garbage_from_a_stranger_is_ignored(garbage: list[list[bytes]]) -> None:
    receiver, senders, context = StreamReceiver("127.0.0.1"), StreamSenders(), zmq.Context()
    stranger = connected(context, receiver.address)
    for frames in garbage:
        stranger.send_multipart(frames)
    # Behind the garbage, on the same connection: when it arrives, the garbage has been read.
    stranger.send(message(receiver.address.token, 0, b"read"))
    assert await receive(receiver, 1) == [[b"read"]]

    senders.send(receiver.address, [b"hello"], now=0.0)
    assert await receive(receiver, 1) == [[b"hello"]]
    context.destroy(linger=0)
    senders.close()
    receiver.close()


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1000)])
async def test_a_connection_that_does_not_speak_the_protocol_is_ignored(
    receiver: StreamReceiver, senders: StreamSenders, garbage: bytes
) -> None:
    host, port = receiver.address.endpoint.removeprefix("tcp://").split(":")
    _, writer = await asyncio.open_connection(host, port)
    writer.write(garbage)
    await writer.drain()
    senders.send(receiver.address, [b"hello"], now=0.0)

    assert await receive(receiver, 1) == [[b"hello"]]
    writer.close()


async def test_garbage_instead_of_acknowledgements_does_not_stop_a_sender(
    context: zmq.Context[Socket],
) -> None:
    stranger, endpoint, public_key = sockets.listen(context, "127.0.0.1", {})
    sender = StreamSender(context, StreamAddress(endpoint, b"token", public_key))
    sender.send([b"hello"], now=0.0)
    assert stranger.poll(10_000)
    name, *_ = stranger.recv_multipart()
    too_far, nested = msgspec.msgpack.encode(1), b"\x91" * 50_000
    for garbage in ([b""], [b"\xc1"], [b"a text", b""], [too_far], [b"\xdd\xff"], [nested]):
        stranger.send_multipart([name, *garbage])
    await asyncio.sleep(0.1)
    sender.poll(0.0)
    assert not sender.is_idle()
    stranger.send_multipart([name, msgspec.msgpack.encode(0)])

    async with tended(sender):
        while not sender.is_idle():  # it reads the acknowledgement behind the garbage
            await asyncio.sleep(0.01)


def test_what_is_not_acknowledged_is_sent_again_with_growing_pauses(
    context: zmq.Context[Socket],
) -> None:
    silent, endpoint, public_key = sockets.listen(context, "127.0.0.1", {})
    sender = StreamSender(context, StreamAddress(endpoint, b"token", public_key))
    sender.send([b"hello"], now=100.0)
    for half_seconds in range(2 * 31):
        sender.poll(100.0 + half_seconds / 2)

    # At once, and after 1, 2, 4, 8 and 16 s.
    assert [silent.poll(10_000) and silent.recv_multipart()[1] for _ in range(6)] == [
        message(b"token", 0, b"hello")
    ] * 6
    assert not silent.poll(100)


def test_a_receiver_that_stays_silent_is_lost_once(senders: StreamSenders) -> None:
    senders.send(NOBODY, [b"hello"], now=100.0)
    times = (100.0, 100.0 + LOST_AFTER_S, 100.1 + LOST_AFTER_S, 100.2 + LOST_AFTER_S)

    assert [senders.poll(now) for now in times] == [[], [], [NOBODY], []]


def test_a_receiver_that_owes_too_much_is_lost_at_once(
    senders: StreamSenders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_stream, "MAX_UNACKED_BYTES", 100_000)
    for _ in range(9):
        senders.send(NOBODY, [b"x" * 10_000], 1000.0)
    assert senders.poll(1000.0) == []

    senders.send(NOBODY, [b"x" * 10_000], 1000.0)

    assert senders.poll(1000.0) == [NOBODY]
    assert senders.is_idle()


async def test_a_receiver_forgets_the_streams_that_it_has_not_heard_for_longest(
    receiver: StreamReceiver,
    context: zmq.Context[Socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_stream, "MAX_SENDERS", 2)
    streams = [StreamSender(context, receiver.address) for _ in range(3)]
    for stream in streams:
        stream.send([b"first"], 0.0)
        assert await receiver.receive() == [b"first"]

    assert len(receiver._expected) == 2
    for stream in streams[1:]:
        stream.send([b"second"], 0.0)
        assert await receiver.receive() == [b"second"]


def test_more_messages_do_not_put_off_the_loss_of_a_silent_receiver(senders: StreamSenders) -> None:
    lost = []
    for second in range(100, 100 + int(LOST_AFTER_S) + 2):
        senders.send(NOBODY, [b"hello"], now=float(second))
        lost += senders.poll(float(second))

    assert lost == [NOBODY]


async def test_a_receiver_that_was_idle_for_long_has_the_full_time_to_answer(
    receiver: StreamReceiver, context: zmq.Context[Socket]
) -> None:
    sender = StreamSender(context, receiver.address)
    sender.send([b"hello"], now=0.0)
    async with tended(sender):
        await receiver.receive()
        await all_acknowledged(sender, receiver)
    sender.send([b"again"], now=1000.0)

    assert [sender.is_lost(1000.0 + LOST_AFTER_S), sender.is_lost(1000.1 + LOST_AFTER_S)] == [
        False,
        True,
    ]


async def test_an_idle_stream_is_closed_and_opened_again_when_needed(
    receiver: StreamReceiver, senders: StreamSenders
) -> None:
    async with CuttingProxy(receiver.address) as proxy, asyncio.timeout(30):
        senders.send(proxy.address, [b"one"], now=0.0)
        assert await receiver.receive() == [b"one"]
        while not senders.is_idle():
            senders.poll(0.0)
            await asyncio.sleep(0.01)

        assert senders.poll(CLOSE_AFTER_S) == []
        assert proxy.num_connections == 1
        assert senders.poll(CLOSE_AFTER_S + 0.1) == []
        while proxy.num_connections:
            await asyncio.sleep(0.01)
        senders.send(proxy.address, [b"two"], now=CLOSE_AFTER_S + 1)
        assert await receiver.receive() == [b"two"]


def test_a_stream_in_use_is_not_idle(senders: StreamSenders) -> None:
    assert senders.is_idle()
    senders.send(NOBODY, [b"hello"], now=0.0)
    assert not senders.is_idle()


def test_closing_drops_what_nobody_took() -> None:
    senders = StreamSenders()
    senders.send(NOBODY, [b"hello"], now=0.0)
    senders.close()

    assert senders.is_idle()
