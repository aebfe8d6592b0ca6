"""What peers can do to a stream: without its key nothing, and with it no harm.

The receivers run in processes of their own, so that what they hold is theirs.
"""

import contextlib
import itertools
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec
import pytest
import zmq
import zmq.utils.z85
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.listening_process import (
    HIDDEN_SIZE,
    HOST,
    VOCAB_SIZE,
    Limits,
    Listening,
    draft,
    receive_tokens,
)
from tests.workers.strangers import (
    HANDSHAKES,
    HUGE,
    NESTED,
    WAIT_MS,
    Attack,
    Strangers,
    attacks,
    in_parts,
)
from workers import sockets
from workers.drafts.draft_stream import (
    ContextDelta,
    ContextsMessage,
    DraftsMessage,
    DraftWorkerAddress,
    decode_drafts,
    encode,
)
from workers.token_stream import StreamAddress, StreamSender

MIB = 1 << 20
MAX_GROWTH_BYTES = 16 * MIB
"""What a process may hold more after it was attacked for long: pages that come and go."""

Socket = zmq.Socket[bytes]


@pytest.fixture
def context() -> Iterator[zmq.Context[Socket]]:
    context: zmq.Context[Socket] = zmq.Context()
    yield context
    context.destroy(linger=0)


class LegalSender:
    """One of our own, whose messages all arrive in order meanwhile."""

    def __init__(self, listening: Listening) -> None:
        self._context: zmq.Context[Socket] = zmq.Context()
        self._listening = listening
        self._sender = StreamSender(self._context, listening.address)
        self._numbers = itertools.count()

    def check(self, num_messages: int = 3) -> int:
        """Send messages and wait until they have come; gives the messages dropped by then."""
        sent = [[b"legal", b"%d" % next(self._numbers)] for _ in range(num_messages)]
        for frames in sent:
            self._sender.send(frames, time.monotonic())
        come: list[list[bytes]] = []
        num_dropped = 0
        ends_s = time.monotonic() + WAIT_MS / 1000
        while len(come) < len(sent):
            assert time.monotonic() < ends_s
            self._sender.poll(time.monotonic())
            while self._listening.has_heard():
                frames, num_dropped = self._listening.hear()
                if frames[:1] == [b"legal"]:  # a stranger with key and token is one of ours
                    come.append(frames)
            time.sleep(0.001)
        assert come == sent
        return num_dropped

    def close(self) -> None:
        self._sender.close()
        self._context.term()


@pytest.fixture(scope="module")
def tokens() -> Iterator[Listening]:
    with Listening(receive_tokens) as listening:
        yield listening


@pytest.fixture(scope="module")
def legal(tokens: Listening) -> Iterator[LegalSender]:
    legal = LegalSender(tokens)
    legal.check()
    yield legal
    legal.close()


def token_messages(address: StreamAddress) -> list[bytes]:
    """Messages of one who knows key and token and is broken, one of them good."""
    token = address.token
    head = b"\x93" + msgspec.msgpack.encode(token)
    values: list[object] = [
        (token, 0, [b"mutant"]),
        (token, 7, [b"mutant", b"x" * 200_000]),
        (token, -1, []),
        (token, (1 << 64) - 1, [b""]),
        (token, 1.0, []),
        (token, None, []),
        (token, 0),
        (token, 0, ["text"]),
        (token, 0, [b""] * 5000),
        (token[:-1], 0, []),
        ("text", 0, []),
        {"token": token, "seq": 0, "frames": []},
        [],
        None,
    ]
    return [
        *map(msgspec.msgpack.encode, values),
        *(head + b"\x00" + huge for huge in HUGE),
        *HUGE,
        NESTED,
        head + b"\x00" + NESTED,
        b"\x94" + head[1:] + b"\x00\x90" + NESTED,
    ]


def token_probe(address: StreamAddress) -> bytes:
    return msgspec.msgpack.encode((address.token, 0, [b"probe"]))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_strangers_send_the_messages_of_a_legal_sender_arrive(
    tokens: Listening, legal: LegalSender, data: st.DataObject
) -> None:
    address = tokens.address
    strangers = Strangers(address, token_probe(address))
    try:
        for attack in data.draw(st.lists(attacks(token_messages(address)), min_size=1, max_size=6)):
            strangers.attack(attack)
            legal.check(1)
    finally:
        strangers.close()


def rounds(messages: Sequence[bytes]) -> list[Attack]:
    """One attack of each kind."""
    strangers = [Attack("tcp", (handshake,), stays=True) for handshake in HANDSHAKES]
    strangers += [Attack("tcp", (handshake,), stays=False) for handshake in HANDSHAKES]
    strangers += [Attack("without encryption", in_parts(message)) for message in messages[:2]]
    strangers += [Attack("another key", in_parts(message)) for message in messages[:2]]
    ours = [Attack("with the key", in_parts(message)) for message in messages]
    return [*strangers, *ours, Attack("with the key", (b"x" * MIB,))]


def test_who_attacks_a_stream_for_long_takes_no_memory_and_no_descriptor_of_it(
    tokens: Listening, legal: LegalSender
) -> None:
    address = tokens.address
    kinds = rounds(token_messages(address))
    held: list[int] = []
    num_fds: list[int] = []
    for num_rounds in (3, 12):
        strangers = Strangers(address, token_probe(address))
        for attack in kinds * num_rounds:
            strangers.attack(attack)
            legal.check(1)
        strangers.close()
        legal.check()
        until_settled(tokens, num_fds)
        held.append(tokens.memory_bytes)

    assert held[1] < held[0] + MAX_GROWTH_BYTES
    assert num_fds[1] <= num_fds[0]


def until_settled(listening: Listening, num_fds: list[int]) -> None:
    """Wait for what is closed to be closed there; notes the descriptors that are left."""
    before, ends_s = listening.num_fds, time.monotonic() + 30
    while time.monotonic() < ends_s:
        time.sleep(0.3)
        if (now := listening.num_fds) == before:
            break
        before = now
    num_fds.append(before)


def test_who_does_not_finish_the_handshake_is_thrown_out_and_holds_little_until_then() -> None:
    with Listening(receive_tokens, Limits(handshake_ms=1500)) as tokens:
        legal = LegalSender(tokens)
        legal.check()
        before = tokens.memory_bytes
        where = sockets.host_and_port(tokens.address.endpoint)
        # What fills most memory without the key: a part of a command that does not end.
        begun = sockets.CURVE_GREETING + b"\x06" + (1 << 16).to_bytes(8, "big") + b"x" * 60_000
        strangers = [socket.create_connection(where, timeout=30) for _ in range(300)]
        for stranger in strangers[::2]:  # the others say nothing
            with contextlib.suppress(ConnectionError):  # on a slow machine it is thrown out before
                stranger.sendall(begun)
        legal.check()
        grown = tokens.memory_bytes - before
        for stranger in strangers:
            with stranger, contextlib.suppress(ConnectionError):
                while stranger.recv(1 << 16):  # to the end: it greets, and closes
                    pass
        legal.check()
        legal.close()

    assert grown < len(strangers) * (sockets.MAX_PART_BYTES + 64_000) + MAX_GROWTH_BYTES


def test_a_stranger_who_says_that_he_will_send_much_is_thrown_out_at_once(
    tokens: Listening, legal: LegalSender
) -> None:
    before = tokens.memory_bytes
    where = sockets.host_and_port(tokens.address.endpoint)
    with socket.create_connection(where, timeout=30) as stranger:
        stranger.sendall(sockets.CURVE_GREETING + b"\x06" + (1 << 34).to_bytes(8, "big"))
        with pytest.raises(ConnectionError):
            stranger.sendall(bytes(1000 * MIB))
    legal.check()

    assert tokens.memory_bytes < before + MAX_GROWTH_BYTES


def test_strangers_who_take_all_descriptors_hold_up_new_connections_only() -> None:
    with Listening(receive_tokens, Limits(max_fds=100)) as tokens:
        legal = LegalSender(tokens)
        legal.check()
        where = sockets.host_and_port(tokens.address.endpoint)
        strangers = [socket.create_connection(where) for _ in range(150)]
        legal.check()
        for stranger in strangers:
            stranger.close()
        newcomer = LegalSender(tokens)
        newcomer.check()
        newcomer.close()
        legal.check()
        legal.close()


@pytest.mark.parametrize("way", ["without encryption", "another key"])
def test_who_does_not_know_the_key_gets_nothing_through(
    context: zmq.Context[Socket], way: str
) -> None:
    with Listening(receive_tokens) as tokens:
        address = tokens.address
        if way == "another key":
            stranger = sockets.connect(context, address.endpoint, zmq.curve_keypair()[0], {})
        else:
            stranger = context.socket(zmq.DEALER)
            stranger.linger = 0
        ends = stranger.get_monitor_socket(
            zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        stranger.connect(address.endpoint)
        stranger.send(msgspec.msgpack.encode((address.token, 0, [b"legal", b"0"])))
        assert ends.poll(WAIT_MS)  # it was thrown out
        legal = LegalSender(tokens)

        assert legal.check() == 0
        assert not stranger.poll(0)
        legal.close()


def test_who_knows_the_key_and_another_token_gets_nothing_through(
    context: zmq.Context[Socket],
) -> None:
    with Listening(receive_tokens) as tokens:
        wrong = msgspec.structs.replace(tokens.address, token=b"0" * 16)
        stranger = StreamSender(context, wrong)
        stranger.send([b"legal", b"0"], now=0.0)
        legal = LegalSender(tokens)
        while legal.check() == 0:  # until it has been read
            pass
        stranger.poll(now=0.0)

        assert not stranger.is_idle()
        stranger.close()
        legal.close()


class Relay:
    """Carries a TCP connection to an endpoint, and keeps all that it carries."""

    def __init__(self, endpoint: str) -> None:
        self.seen = b""
        self._there = sockets.host_and_port(endpoint)
        self._server = socket.create_server((HOST, 0))
        self.endpoint = f"tcp://{HOST}:{self._server.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with (
            self._server,
            self._server.accept()[0] as near,
            socket.create_connection(self._there) as far,
            contextlib.suppress(OSError),
        ):
            ends = {near: far, far: near}
            while True:
                for side in select.select([near, far], [], [])[0]:
                    if not (data := side.recv(1 << 16)):
                        return
                    self.seen += data
                    ends[side].sendall(data)


SECRET = b"what the model has told its user"


def test_who_listens_on_the_wire_reads_nothing(context: zmq.Context[Socket]) -> None:
    with Listening(receive_tokens) as tokens:
        relay = Relay(tokens.address.endpoint)
        address = msgspec.structs.replace(tokens.address, endpoint=relay.endpoint)
        sender = StreamSender(context, address)
        sent = [[SECRET], [SECRET * 10_000]]
        for frames in sent:
            sender.send(frames, now=0.0)
        assert [tokens.hear() for _ in sent] == [(frames, 0) for frames in sent]
        sender.close()

    key = address.public_key
    for secret in (SECRET, address.token, key, zmq.utils.z85.decode(key)):
        assert secret not in relay.seen
    assert len(relay.seen) > 10_000 * len(SECRET)


def test_without_encryption_he_would_read_it(context: zmq.Context[Socket]) -> None:
    listening, sender = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    relay = Relay(f"tcp://{HOST}:{listening.bind_to_random_port(f'tcp://{HOST}')}")
    sender.connect(relay.endpoint)
    sender.send(SECRET)
    assert listening.poll(WAIT_MS)

    assert SECRET in relay.seen


# Drafts


@pytest.fixture(scope="module")
def drafts() -> Iterator[Listening]:
    with Listening(draft) as listening:
        yield listening


class LegalWorker:
    """A worker of ours that is answered meanwhile."""

    def __init__(self, address: DraftWorkerAddress) -> None:
        self._context: zmq.Context[Socket] = zmq.Context()
        self._address = address
        stream = address.stream
        self._socket = sockets.connect(self._context, stream.endpoint, stream.public_key, {})
        self._seqs = itertools.count(1)

    def check(self) -> None:
        """Send new tokens and wait for the drafts."""
        seq = next(self._seqs)
        # What begins again goes on as it did before.
        delta = ContextDelta(f"legal {seq}", 0, [1, 2, 3, 4, 5, 1, 2, 3], 4)
        sockets.send(self._socket, contexts_message(self._address, seq, delta, name="legal"))
        answer = DraftsMessage("", 0, [], [])
        while answer.seq < seq:
            assert self._socket.poll(WAIT_MS)
            answer = decode_drafts(sockets.joined(self._socket.recv_multipart()))
        assert answer.incarnation == self._address.incarnation
        assert [(tree.request_id, tree.token_ids[0]) for tree in answer.drafts] == [
            (f"legal {seq}", 4)
        ]

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture(scope="module")
def worker(drafts: Listening) -> Iterator[LegalWorker]:
    worker = LegalWorker(drafts.address)
    worker.check()
    yield worker
    worker.close()


def contexts_message(
    address: DraftWorkerAddress, seq: int, *deltas: ContextDelta, name: str = "stranger"
) -> bytes:
    finished = [f"legal {seq - 1}"]
    return encode(ContextsMessage(address.stream.token, name, seq, [*deltas], finished))


def contexts_messages(address: DraftWorkerAddress) -> list[bytes]:
    """Messages of a worker that is broken, one of them good."""
    token = address.stream.token
    bad: list[object] = [
        ("a", -1, [1], 1, b""),
        ("a", 0, [], 1, b""),
        ("a", 0, [-1], 1, b""),
        ("a", 0, [VOCAB_SIZE], 1, b""),
        ("a", 0, [1 << 40], 1, b""),
        ("a", 0, [(1 << 64) - 1], 1, b""),
        ("a", 1 << 63, [1], 1, b""),
        ("a", 0, [1], -1, b""),
        ("a", 0, [1, 2], 1, b"x" * (2 * HIDDEN_SIZE + 1)),
        ("a", 0, [1, 2], 1, b"x" * 2 * (HIDDEN_SIZE - 1)),
        ("a", 0, [1, 2], 1, b"x" * 2 * HIDDEN_SIZE * 1000),
        ("a", 0, [1.5], 1, b""),
        ("a", 0, "text", 1, b""),
        (1, 0, [1], 1, b""),
    ]
    values: list[object] = [
        (token, "stranger", 1, [("a", 0, [1, 2], 1, b"x" * 2 * HIDDEN_SIZE)], ["b"], [[1, 2]]),
        *((token, "stranger", 1, [delta], [], []) for delta in bad),
        (token, "stranger", -1, [], [], []),
        (token, "stranger", (1 << 64) - 1, [], [], []),
        (token, "stranger", 1, [], [], [[]]),
        (token, "stranger", 1, [], [], [[1 << 40]]),
        (token, "x" * 100_000, 1, [], [], []),
        (token[:-1], "stranger", 1, [], []),
        None,
    ]
    head = b"\x96" + msgspec.msgpack.encode(token) + b"\xa1x\x01"
    return [
        *map(msgspec.msgpack.encode, values),
        *(head + huge for huge in HUGE),
        *HUGE,
        NESTED,
        head + NESTED,
        b"\x97" + head[1:] + b"\x90\x90\x90" + NESTED,
    ]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_strangers_send_a_draft_worker_answers_its_workers(
    drafts: Listening, worker: LegalWorker, data: st.DataObject
) -> None:
    address = drafts.address
    strangers = Strangers(address.stream, contexts_message(address, 1, name="probe"))
    messages = contexts_messages(address)
    try:
        for attack in data.draw(st.lists(attacks(messages), min_size=1, max_size=6)):
            strangers.attack(attack)
            worker.check()
    finally:
        strangers.close()
    assert drafts.ask() >= 0


def test_who_attacks_a_draft_worker_for_long_takes_no_memory_and_no_descriptor_of_it(
    drafts: Listening, worker: LegalWorker
) -> None:
    address = drafts.address
    kinds = rounds(contexts_messages(address))
    held: list[int] = []
    num_fds: list[int] = []
    for num_rounds in (3, 12):
        strangers = Strangers(address.stream, contexts_message(address, 1, name="probe"))
        for attack in kinds * num_rounds:
            strangers.attack(attack)
            worker.check()
        strangers.close()
        until_settled(drafts, num_fds)
        held.append(drafts.memory_bytes)

    assert held[1] < held[0] + MAX_GROWTH_BYTES
    assert num_fds[1] <= num_fds[0]
    assert drafts.ask() > 100
