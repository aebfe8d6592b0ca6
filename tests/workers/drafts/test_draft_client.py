import contextlib
import dataclasses
import itertools
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.strangers import mutations
from workers import sockets
from workers.config import DraftConfig
from workers.drafters.draft_worker import DraftWorker
from workers.drafters.drafter import ContextKey, Draft, HiddenStates
from workers.drafts.draft_client import (
    MAX_DRAFTERS,
    MAX_UNANSWERED,
    MIN_STEP_S,
    RETRY_S,
    DraftClient,
    DraftCounts,
    DraftPath,
)
from workers.drafts.draft_stream import (
    ContextDelta,
    ContextsMessage,
    DraftsMessage,
    DraftTree,
    DraftWorkerAddress,
    decode_contexts,
    encode,
)
from workers.token_stream import StreamAddress

VOCAB_SIZE = 1000
PUBLIC_KEY, SECRET_KEY = zmq.curve_keypair()
"""Those of every scripted worker."""
NOBODY = DraftWorkerAddress("d", "nobody", StreamAddress("tcp://127.0.0.1:1", b"token", PUBLIC_KEY))
NUM_GUESSES = 3
KEYS = ("a", "b", "c")


NO_TREES: dict[str, tuple[object, ...]] = {
    "negative position": (-1, [2], [-1], [0.5]),
    "negative token": (1, [-2], [-1], [0.5]),
    "token beyond the vocabulary": (1, [VOCAB_SIZE], [-1], [0.5]),
    "token beyond all": (1, [1 << 63], [-1], [0.5]),
    "parent behind its child": (1, [2, 3], [1, -1], [0.5, 0.5]),
    "parent of itself": (1, [2], [0], [0.5]),
    "negative parent": (1, [2], [-2], [0.5]),
    "fewer parents": (1, [2, 3], [-1], [0.5, 0.5]),
    "fewer probabilities": (1, [2, 3], [-1, 0], [0.5]),
    "no number": (1, [2], [-1], [math.nan]),
    "infinite": (1, [2], [-1], [math.inf]),
    "negative": (1, [2], [-1], [-0.5]),
}
"""What is no tree, from its position on."""
TREE = DraftTree("a", "s", 1, [2, 3, 4], [-1, 0, 0], [0.5, 0.25, 0.25])


def drafts_with(name: str) -> bytes:
    return msgspec.msgpack.encode(("scripted 0", 1, [("a", "s", *NO_TREES[name])], []))


class Oracle:
    """A drafter that guesses that each token is one more than that before it."""

    hidden_size = vocab_size = 0

    def __init__(self) -> None:
        self.extended: list[tuple[str, int, list[int]]] = []
        self.known: dict[str, list[int]] = {}
        self.stepping = threading.Event()
        self.is_blocked = False
        self.steps = threading.Semaphore(0)
        """Steps that it may do while it is blocked."""
        self._changed: set[ContextKey] = set()

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        known = self.known.setdefault(key.request_id, [])
        assert position in (0, len(known))
        known[position:] = token_ids
        self.extended.append((key.request_id, position, token_ids))
        self._changed.add(key)

    def learn(self, token_ids: list[int]) -> None:
        """What others have written is no help."""

    def forget(self, key: ContextKey) -> None:
        self.known.pop(key.request_id, None)
        self._changed.discard(key)

    def has_work(self) -> bool:
        return bool(self._changed)

    def step(self) -> dict[ContextKey, Draft]:
        self.stepping.set()
        if self.is_blocked:
            self.steps.acquire()
        drafts = {key: self._draft(self.known[key.request_id]) for key in self._changed}
        self._changed.clear()
        return drafts

    def shutdown(self) -> None:
        """Nothing to release."""

    def go_on(self) -> None:
        self.is_blocked = False
        self.steps.release(1000)

    def _draft(self, known: list[int]) -> Draft:
        guesses = range(known[-1] + 1, known[-1] + 1 + NUM_GUESSES)
        return Draft(len(known), tuple(guesses), tuple(range(-1, NUM_GUESSES - 1)), (0.5,) * 3)


class OracleWorker:
    """A draft worker with an oracle."""

    def __init__(self) -> None:
        self.oracle = Oracle()
        self.worker = DraftWorker(
            "d", DraftConfig(), lambda: {"oracle": self.oracle}, lambda report: None, "127.0.0.1"
        )
        self.address = self.worker.address

    def close(self) -> None:
        self.oracle.go_on()
        self.worker.shutdown()


class ScriptedWorker:
    """A draft worker that hears and says what a test wants."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], port: int = 0) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.curve_server, self._socket.curve_secretkey = True, SECRET_KEY
        until(lambda: self._is_bound(port))
        endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(endpoint.rpartition(":")[2])
        self.address = DraftWorkerAddress(
            "d", f"scripted {port}", StreamAddress(endpoint, b"token", PUBLIC_KEY)
        )
        self._peer = b""

    def _is_bound(self, port: int) -> bool:
        try:
            self._socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        except zmq.ZMQError:  # the one before is still closing its port
            return False
        return True

    def hear(self) -> ContextsMessage:
        assert self._socket.poll(30_000)
        self._peer, *parts = self._socket.recv_multipart()
        return decode_contexts(sockets.joined(parts))

    def has_mail(self) -> bool:
        """Whether something is there to be heard, or comes at once."""
        return bool(self._socket.poll(200))  # a handshake takes its time on a busy machine

    def say(
        self, seq: int, *trees: DraftTree, unknown: Sequence[str] = (), incarnation: str = ""
    ) -> None:
        self.say_raw(
            encode(
                DraftsMessage(incarnation or self.address.incarnation, seq, [*trees], [*unknown])
            )
        )

    def say_raw(self, body: bytes) -> None:
        assert sockets.send(self._socket, body, self._peer)

    def close(self) -> None:
        self._socket.close(linger=0)


@dataclasses.dataclass
class LossyPath:
    """Between a client and a draft worker; what it carries of them, a test says."""

    front: ScriptedWorker
    back: zmq.Socket[bytes]
    token: bytes

    def carry(self, loses_message: bool = False, loses_answer: bool = False) -> None:
        """Take one message there and its answer back."""
        message = self.front.hear()
        if not loses_message:
            message.token = self.token
            self.back.send(encode(message))
            assert self.back.poll(30_000)
            answer = self.back.recv()
            if not loses_answer:
                self.front.say_raw(answer)


@pytest.fixture(autouse=True)
def _quick_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.drafters.draft_worker.IDLE_WAIT_S", 0.01)


@pytest.fixture
def client() -> Iterator[DraftClient]:
    client = DraftClient("w", VOCAB_SIZE)
    yield client
    client.close()


@pytest.fixture
def make_oracle(client: DraftClient) -> Iterator[Callable[[], OracleWorker]]:
    workers = []

    def make_oracle() -> OracleWorker:
        workers.append(OracleWorker())
        return workers[-1]

    yield make_oracle
    for worker in workers:
        worker.close()


@pytest.fixture
def there(client: DraftClient, make_oracle: Callable[[], OracleWorker]) -> OracleWorker:
    """The draft worker that the client speaks to."""
    there = make_oracle()
    client.assign(there.address)
    return there


@pytest.fixture
def oracle(there: OracleWorker) -> Oracle:
    return there.oracle


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def scripted(client: DraftClient, context: zmq.Context[zmq.Socket[bytes]]) -> ScriptedWorker:
    """The draft worker that the client speaks to."""
    scripted = ScriptedWorker(context)
    client.assign(scripted.address)
    return scripted


def update(
    client: DraftClient,
    now: float = 0.0,
    num_wanted: int = NUM_GUESSES,
    **requests: Sequence[int],
) -> list[bool]:
    """What a worker does after a step."""
    sent = [
        client.update(request_id, tokens, num_wanted, b"", now)
        for request_id, tokens in requests.items()
    ]
    client.flush(now)
    return sent


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread; a client itself never waits."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def hear_all(client: DraftClient, now: float = 0.0) -> None:
    """Read answers until none is owed."""

    def is_answered() -> bool:
        client.poll(now)
        return client.silent_s(now + 1) == 0

    until(is_answered)


def hear(client: DraftClient, num_proposed: int) -> None:
    """Read answers until this many drafts have arrived since the start."""

    def has_come() -> bool:
        client.poll(0.0)
        return counts(client).proposed >= num_proposed

    until(has_come)


def counts(client: DraftClient) -> DraftCounts:
    """Counts of all drafters together."""
    return sum(client.counts_of.values(), DraftCounts())


def chain(position: int, *token_ids: int, request_id: str = "a", drafter: str = "s") -> DraftTree:
    count = len(token_ids)
    return DraftTree(
        request_id, drafter, position, [*token_ids], [*range(-1, count - 1)], [0.5] * count
    )


def path(*token_ids: int, drafter: str = "oracle") -> list[DraftPath]:
    return [DraftPath(drafter, [*token_ids], [0.5] * len(token_ids))]


def test_guesses_at_the_tokens_of_a_request_come_back(client: DraftClient, oracle: Oracle) -> None:
    sent = update(client, a=[1, 2, 3], b=[7])
    hear_all(client)

    assert sent == [True, True]
    assert client.paths("a", [1, 2, 3]) == path(4, 5, 6)
    assert client.paths("b", [7]) == path(8, 9, 10)
    assert counts(client) == DraftCounts(proposed=6)


def test_each_message_carries_only_what_is_new(client: DraftClient, oracle: Oracle) -> None:
    for a, b in [([1, 2, 3], [7]), ([1, 2, 3, 4], [7]), ([1, 2, 3, 4, 5, 6], [7, 8])]:
        update(client, a=a, b=b)
        hear_all(client)

    assert oracle.extended == [
        ("a", 0, [1, 2, 3]),
        ("b", 0, [7]),
        ("a", 3, [4]),
        ("a", 4, [5, 6]),
        ("b", 1, [8]),
    ]


def test_where_nothing_is_new_nothing_is_sent(client: DraftClient, oracle: Oracle) -> None:
    update(client, a=[1])
    hear_all(client)

    assert update(client, now=5.0, a=[1]) == [False]
    assert client.silent_s(6.0) == 0


def test_all_of_a_step_goes_in_one_message(client: DraftClient, scripted: ScriptedWorker) -> None:
    update(client, a=[1, 2], b=[7])
    scripted.hear()
    client.update("a", [1, 2, 3], 0, b"states", now=0.0)
    client.finish("b")
    client.flush(now=0.0)

    assert scripted.hear() == ContextsMessage(
        b"token", "w", 2, [ContextDelta("a", 2, [3], 0, b"states")], ["b"]
    )


def test_while_no_drafts_are_wanted_the_drafters_hear_nothing_and_later_all(
    client: DraftClient, oracle: Oracle
) -> None:
    for num_tokens in (3, 4, 5):
        update(client, num_wanted=0, a=[*range(num_tokens)])
        hear_all(client)
    before = (list(oracle.extended), client.paths("a", [*range(5)]))
    update(client, a=[*range(6)])
    hear_all(client)

    assert before == ([], [])
    assert oracle.extended == [("a", 0, [0, 1, 2, 3, 4, 5])]
    assert client.paths("a", [*range(6)]) == path(6, 7, 8)


def test_without_a_draft_worker_nothing_is_kept_or_sent(client: DraftClient) -> None:
    assert update(client, a=[1, 2]) == [False]
    client.finish("a")
    client.poll(0.0)

    assert client.paths("a", [1, 2]) == []
    assert (client.draft_worker, client.silent_s(1000.0)) == (None, 0)


def test_of_drafts_that_come_late_those_behind_the_new_tokens_are_used(
    client: DraftClient, oracle: Oracle
) -> None:
    oracle.is_blocked = True
    update(client, a=[1, 2, 3])
    assert oracle.stepping.wait(30)
    update(client, a=[1, 2, 3, 4])
    oracle.steps.release()
    hear(client, 3)

    assert client.paths("a", [1, 2, 3, 4]) == path(5, 6)
    assert counts(client) == DraftCounts(proposed=3, late=1)


def test_drafts_that_come_late_and_are_wrong_are_dropped(
    client: DraftClient, oracle: Oracle
) -> None:
    oracle.is_blocked = True
    update(client, a=[1, 2, 3])
    assert oracle.stepping.wait(30)
    update(client, a=[1, 2, 3, 9])
    oracle.steps.release()
    hear(client, 3)

    assert client.paths("a", [1, 2, 3, 9]) == client.paths("a", [1, 2, 3, 9]) == []
    assert counts(client) == DraftCounts(proposed=3, late=1, stale=3)


def test_drafts_that_are_all_late_are_dropped_and_not_stale(
    client: DraftClient, oracle: Oracle
) -> None:
    oracle.is_blocked = True
    update(client, a=[1, 2, 3])
    assert oracle.stepping.wait(30)
    update(client, a=[1, 2, 3, 4, 5, 6, 7])
    oracle.steps.release()
    hear(client, 3)

    assert client.paths("a", [1, 2, 3, 4, 5, 6]) == []
    assert counts(client) == DraftCounts(proposed=3, late=3)


def test_newer_drafts_take_the_place_of_older_ones_of_their_drafter(
    client: DraftClient, scripted: ScriptedWorker
) -> None:
    update(client, a=[1])
    scripted.hear()
    for tree in (chain(1, 2), chain(1, 5, 6), chain(1, 7, drafter="model")):
        scripted.say(1, tree)
    hear(client, 4)

    assert client.paths("a", [1]) == path(5, 6, drafter="s") + path(7, drafter="model")


TREE = DraftTree(
    "a",
    "s",
    position=1,
    # 10 -> 11 -> 12
    #    -> 13 -> 14
    # 20 -> 21
    token_ids=[10, 20, 11, 13, 21, 14, 12],
    parents=[-1, -1, 0, 0, 1, 3, 2],
    probs=[0.6, 0.3, 0.2, 0.7, 0.9, 0.8, 0.1],
)


@pytest.mark.parametrize(
    ("new", "token_ids", "probs"),
    [
        ([], [10, 13, 14], [0.6, 0.7, 0.8]),
        ([10], [13, 14], [0.7, 0.8]),
        ([20], [21], [0.9]),
        ([10, 11], [12], [0.1]),
        ([10, 13], [14], [0.8]),
    ],
)
def test_a_tree_is_followed_along_the_tokens_that_came(
    client: DraftClient,
    scripted: ScriptedWorker,
    new: list[int],
    token_ids: list[int],
    probs: list[float],
) -> None:
    update(client, a=[1])
    scripted.hear()
    scripted.say(1, TREE)
    hear_all(client)

    assert client.paths("a", [1, *new]) == [DraftPath("s", token_ids, probs)]
    assert counts(client) == DraftCounts(proposed=7)


@pytest.mark.parametrize(
    ("new", "num_stale"),
    [([20, 21], 0), ([10, 11, 12], 0), ([30], 7), ([10, 21], 7), ([20, 21, 22], 7)],
)
def test_a_tree_that_the_tokens_have_left_is_dropped(
    client: DraftClient, scripted: ScriptedWorker, new: list[int], num_stale: int
) -> None:
    update(client, a=[1])
    scripted.hear()
    scripted.say(1, TREE)
    hear_all(client)

    # Also where the tokens were fewer again, it would be gone.
    assert (client.paths("a", [1, *new]), client.paths("a", [1])) == ([], [])
    assert counts(client) == DraftCounts(proposed=7, stale=num_stale)


@pytest.mark.parametrize(("num_new", "num_late"), [(0, 0), (1, 2), (2, 5), (3, 7), (4, 7)])
def test_late_drafts_are_those_whose_place_is_taken_on_any_branch(
    client: DraftClient, scripted: ScriptedWorker, num_new: int, num_late: int
) -> None:
    update(client, a=[1])
    update(client, a=[1, *range(10, 10 + num_new)])
    scripted.hear()
    scripted.say(1, TREE)
    hear(client, 7)

    assert counts(client) == DraftCounts(proposed=7, late=num_late)


def test_drafts_for_a_request_that_has_ended_are_stale(
    client: DraftClient, scripted: ScriptedWorker
) -> None:
    update(client, a=[1])
    scripted.hear()
    client.finish("a")
    scripted.say(1, chain(1, 2, 3))
    hear_all(client)

    assert client.paths("a", [1]) == []
    assert counts(client) == DraftCounts(proposed=2, stale=2)


def test_what_another_incarnation_says_is_dropped(
    client: DraftClient, scripted: ScriptedWorker
) -> None:
    update(client, a=[1])
    scripted.hear()
    scripted.say(1, chain(1, 5, 6), unknown=["a"], incarnation="another")
    scripted.say(0, chain(1, 2))
    hear(client, 1)

    assert client.paths("a", [1]) == path(2, drafter="s")
    assert counts(client) == DraftCounts(proposed=1, stale=2)
    assert client.silent_s(1.0) == 1
    update(client, a=[1, 2])
    assert scripted.hear().contexts == [ContextDelta("a", 1, [2], NUM_GUESSES)]


def test_another_draft_worker_is_sent_everything_from_the_beginning(
    client: DraftClient, there: OracleWorker, make_oracle: Callable[[], OracleWorker]
) -> None:
    update(client, a=[1, 2, 3], b=[7])
    hear_all(client)
    there.close()
    update(client, a=[1, 2, 3, 4], b=[7])
    restarted = make_oracle()
    client.assign(restarted.address)
    # Until it has answered, what the first one said is used.
    meanwhile = client.paths("a", [1, 2, 3, 4])
    update(client, a=[1, 2, 3, 4, 5], b=[7])
    hear_all(client)

    assert client.draft_worker == restarted.address
    assert meanwhile == path(5, 6)
    assert restarted.oracle.extended == [("a", 0, [1, 2, 3, 4, 5]), ("b", 0, [7])]
    assert client.paths("a", [1, 2, 3, 4, 5]) == path(6, 7, 8)


def test_another_draft_worker_is_not_sent_requests_that_ended_before(
    client: DraftClient, scripted: ScriptedWorker, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    update(client, a=[1], b=[7])
    client.finish("a")
    other = ScriptedWorker(context)
    client.assign(other.address)
    update(client, b=[7, 8])

    assert other.hear() == ContextsMessage(
        b"token", "w", 1, [ContextDelta("b", 0, [7, 8], NUM_GUESSES)], []
    )


def test_the_same_draft_worker_assigned_again_changes_nothing(
    client: DraftClient, there: OracleWorker
) -> None:
    update(client, a=[1])
    hear_all(client)
    client.assign(there.address)
    update(client, a=[1, 2])
    hear_all(client)

    assert there.oracle.extended == [("a", 0, [1]), ("a", 1, [2])]


def test_a_draft_worker_that_it_comes_back_to_is_sent_everything_and_answers(
    client: DraftClient, there: OracleWorker, make_oracle: Callable[[], OracleWorker]
) -> None:
    for worker in (there, make_oracle(), there):
        client.assign(worker.address)
        update(client, num_wanted=0, a=[1, 2])
        hear_all(client)
    update(client, a=[1, 2, 3])
    hear_all(client)

    assert there.oracle.extended == [("a", 0, [1, 2, 3])]


def test_a_new_process_on_the_port_of_the_old_is_not_believed_and_its_own_address_is(
    client: DraftClient, scripted: ScriptedWorker, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    update(client, a=[1])
    scripted.hear()
    scripted.say(1, chain(1, 2, 3))
    hear_all(client)
    scripted.close()
    taker = ScriptedWorker(context, scripted.port)
    tokens = [1]
    while not taker.has_mail():  # what was sent before the connection broke is lost
        tokens.append(len(tokens) + 1)
        update(client, RETRY_S * len(tokens), a=tokens)
    message = taker.hear()
    taker.say(message.seq, chain(2, 8))

    def is_counted() -> bool:
        client.poll(0.0)
        return counts(client).stale == 1

    until(is_counted)
    before = (client.paths("a", [1, 2]), client.silent_s(RETRY_S * 3))
    client.assign(taker.address)
    update(client, a=[1, 2])
    while message.contexts[0].position:  # on the connection before
        message = taker.hear()
    taker.say(message.seq, chain(2, 8))
    hear_all(client)

    assert before == (path(3, drafter="s"), RETRY_S)
    assert message.contexts == [ContextDelta("a", 0, [1, 2], NUM_GUESSES)]
    assert client.paths("a", [1, 2]) == path(8, drafter="s")


def test_a_request_that_the_draft_worker_does_not_know_is_sent_whole_again(
    client: DraftClient, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It forgets everybody after each of its turns.
    monkeypatch.setattr("workers.drafters.draft_worker.REPORT_INTERVAL_S", -1.0)
    monkeypatch.setattr("workers.drafters.draft_worker.FORGET_AFTER_S", -1.0)
    for tokens in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]):
        update(client, a=tokens)
        hear_all(client)
        until(lambda: not oracle.known)

    assert oracle.extended == [("a", 0, [1, 2, 3]), ("a", 0, [1, 2, 3, 4, 5])]


@given(
    steps=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(KEYS), st.integers(1, 3), min_size=1),
            st.booleans(),
            st.booleans(),
            st.sampled_from([0, NUM_GUESSES]),
            st.sampled_from(["", *KEYS]),
        ),
        max_size=12,
    )
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_lost_the_draft_worker_knows_all_in_the_end(
    steps: list[tuple[dict[str, int], bool, bool, int, str]],
) -> None:
    with contextlib.ExitStack() as ending:
        context, there, client = zmq.Context(), OracleWorker(), DraftClient("w", VOCAB_SIZE)
        for end in (lambda: context.destroy(linger=0), there.close, client.close):
            ending.callback(end)
        stream = there.address.stream
        back = sockets.connect(context, stream.endpoint, stream.public_key, {})
        lossy = LossyPath(ScriptedWorker(context), back, stream.token)
        client.assign(
            DraftWorkerAddress("d", there.address.incarnation, lossy.front.address.stream),
        )
        requests: dict[str, tuple[str, list[int]]] = {}
        ids = itertools.count()
        clean = ({key: 1 for key in KEYS}, False, False, NUM_GUESSES, "")
        now = 0.0
        # First the tokens that were lost are missed, then all is sent again.
        for grows, loses_message, loses_answer, num_wanted, ends in [*steps, *[clean] * 3]:
            now += RETRY_S
            if ends in requests:
                client.finish(requests.pop(ends)[0])
            for key, count in grows.items():
                _, known = requests.setdefault(key, (f"{key}{next(ids)}", [10 * len(requests)]))
                known += range(known[-1] + 1, known[-1] + 1 + count)
            client.poll(now)
            grown = dict(requests[key] for key in grows)
            assert update(client, now, num_wanted, **grown) == [True] * len(grows)
            lossy.carry(loses_message, loses_answer)
            if not (loses_message or loses_answer):
                hear_all(client, now)

        for request_id, known in requests.values():
            assert there.oracle.known[request_id] == known
            assert client.paths(request_id, known) == path(
                *range(known[-1] + 1, known[-1] + 1 + NUM_GUESSES)
            )


def test_a_request_that_begins_again_under_its_id_is_sent_whole(
    client: DraftClient, oracle: Oracle
) -> None:
    for tokens in ([1, 2, 3], [7]):
        update(client, a=tokens)
        hear_all(client)

    assert oracle.extended == [("a", 0, [1, 2, 3]), ("a", 0, [7])]
    assert client.paths("a", [7]) == path(8, 9, 10)


def test_a_draft_worker_that_owes_answers_gets_a_message_now_and_then(
    client: DraftClient, scripted: ScriptedWorker
) -> None:
    times = [*[0.0] * (MAX_UNANSWERED + 2), RETRY_S / 2, RETRY_S, RETRY_S, 2 * RETRY_S]
    sent = [
        update(client, now, a=[*range(1 + number)])[0]  # each step gives a token
        for number, now in enumerate(times)
    ]

    assert sent == [True] * MAX_UNANSWERED + [False, False, False, True, False, True]
    messages = [scripted.hear() for _ in range(sent.count(True))]
    assert [message.seq for message in messages] == [*range(1, len(messages) + 1)]
    assert [token for message in messages for token in message.contexts[0].token_ids] == [
        *range(len(times))
    ]
    assert counts(client) == DraftCounts()


def test_a_draft_worker_that_was_blocked_knows_all_when_it_goes_on(
    client: DraftClient, oracle: Oracle
) -> None:
    oracle.is_blocked = True
    update(client, a=[0])
    assert oracle.stepping.wait(30)
    sent = [update(client, a=[*range(num_tokens)])[0] for num_tokens in range(2, 50)]
    client.finish("b")
    oracle.go_on()
    hear_all(client)
    update(client, a=[*range(50)])
    hear_all(client)

    assert oracle.known == {"a": [*range(50)]}
    assert client.paths("a", [*range(50)]) == path(50, 51, 52)
    assert sent.count(False) == 48 - MAX_UNANSWERED + 1


def test_one_answer_is_for_all_messages_before_it(
    client: DraftClient, scripted: ScriptedWorker
) -> None:
    for num_tokens in (1, 2, 3, 4):
        update(client, a=[*range(num_tokens)])
        scripted.hear()
    scripted.say(4)
    hear_all(client)

    assert update(client, a=[*range(5)]) == [True]


def test_silence_is_counted_from_the_last_answer_or_the_first_message_that_owes_one(
    client: DraftClient, scripted: ScriptedWorker
) -> None:
    silences = [client.silent_s(5.0)]
    for now, tokens in ((10.0, [1]), (11.0, [1, 2])):
        update(client, now, a=tokens)
        scripted.hear()
        silences.append(client.silent_s(now + 0.5))
    scripted.say(1, chain(1, 2))

    def has_come() -> bool:
        client.poll(12.0)
        return counts(client).proposed == 1

    until(has_come)
    silences.append(client.silent_s(13.0))
    scripted.say(2)
    hear_all(client, 14.0)

    assert [*silences, client.silent_s(20.0)] == [0, 0.5, 1.5, 1, 0]


def test_an_answer_that_is_about_to_come_is_given_a_moment(
    client: DraftClient, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.drafts.draft_client.HOLD_MS", 30_000)
    update(client, a=[1])
    client.await_answer(step_s=1.0, now=0.0)

    assert client.paths("a", [1]) == path(2, 3, 4)


def test_before_a_short_step_and_where_none_is_owed_no_answer_is_waited_for(
    client: DraftClient, scripted: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.drafts.draft_client.HOLD_MS", 10**9)
    client.await_answer(step_s=1.0, now=0.0)
    update(client, a=[1])
    client.await_answer(step_s=MIN_STEP_S / 2, now=0.0)

    assert client.silent_s(1.0) == 1


def wait_often(client: DraftClient, count: int) -> float:
    """How long a worker waits in total before `count` steps."""
    began_s = time.monotonic()
    for _ in range(count):
        client.await_answer(step_s=1.0, now=0.0)
    return time.monotonic() - began_s


def test_a_draft_worker_that_is_never_in_time_is_seldom_waited_for(
    client: DraftClient, scripted: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.drafts.draft_client.HOLD_MS", 20)
    update(client, a=[1])

    # Eleven times at first, and then once in 32.
    assert 13 * 0.02 <= wait_often(client, 100) + 0.01 < 50 * 0.02


def test_another_draft_worker_is_waited_for_whatever_the_one_before_was(
    client: DraftClient,
    scripted: ScriptedWorker,
    make_oracle: Callable[[], OracleWorker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update(client, a=[1])
    wait_often(client, 12)
    monkeypatch.setattr("workers.drafts.draft_client.HOLD_MS", 30_000)
    client.assign(make_oracle().address)
    update(client, a=[1])
    client.await_answer(step_s=1.0, now=0.0)

    assert client.paths("a", [1]) == path(2, 3, 4)


@pytest.mark.parametrize("listens", [False, True])
def test_a_dead_draft_worker_costs_no_error_and_keeps_nothing(
    client: DraftClient, context: zmq.Context[zmq.Socket[bytes]], listens: bool
) -> None:
    silent = ScriptedWorker(context)
    client.assign(silent.address if listens else NOBODY)
    num_sent = 0
    for step in range(2000):
        now = step / 10
        for life in range(3):
            num_sent += any(
                update(client, now, num_wanted=NUM_GUESSES, **{f"{step}": [7] * (life + 1)})
            )
            client.poll(now)
            assert client.paths(f"{step}", [7]) == []
        client.finish(f"{step}")
    # In its queues all fits in: nothing but a message a second.
    assert num_sent <= MAX_UNANSWERED + 2000 / 10 / RETRY_S
    assert client.silent_s(200.0) == 200

    kept = (client._contexts, client._deltas, client._finished)
    assert sum(map(len, kept)) < 10 * MAX_UNANSWERED


def test_after_a_dead_draft_worker_a_living_one_is_sent_everything(
    client: DraftClient, make_oracle: Callable[[], OracleWorker]
) -> None:
    client.assign(NOBODY)
    for second in range(50):
        update(client, second * RETRY_S, a=[*range(second + 1)])
    there = make_oracle()
    client.assign(there.address)
    update(client, 50.0, a=[*range(51)])
    hear_all(client, 50.0)

    assert there.oracle.extended == [("a", 0, [*range(51)])]


def test_messages_that_find_no_room_are_sent_again_later(
    client: DraftClient, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    client.assign(
        DraftWorkerAddress(
            "d", "back", StreamAddress(f"tcp://127.0.0.1:{port}", b"token", PUBLIC_KEY)
        )
    )
    for second in range(50):
        update(client, second * RETRY_S, a=[*range(second + 1)])
    back = ScriptedWorker(context, port)
    heard: list[int] = []
    now = 50 * RETRY_S
    while len(heard) < 51:
        now += RETRY_S
        update(client, now, a=[*range(51)])
        while back.has_mail():
            (delta,) = back.hear().contexts
            assert delta.position == len(heard)
            heard += delta.token_ids

    assert heard == [*range(51)]


def test_a_wrong_token_is_refused(there: OracleWorker, client: DraftClient) -> None:
    stream = there.address.stream
    stranger = DraftClient("stranger", VOCAB_SIZE)
    stranger.assign(
        DraftWorkerAddress(
            "d",
            there.address.incarnation,
            StreamAddress(stream.endpoint, b"0" * 16, stream.public_key),
        )
    )
    update(stranger, a=[7, 8])
    update(client, a=[1])
    hear_all(client)
    stranger.poll(1.0)

    assert there.oracle.extended == [("a", 0, [1])]
    assert stranger.silent_s(1.0) == 1
    stranger.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xc1",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        msgspec.msgpack.encode(("scripted 0", "text", [], [])),
        b"\x94\xa2\xff\xfe\x01\x90\x90",
        b"\x95\xaascripted 0\x01\x90\x90" + b"\x91" * 100_000,
        b"\x94\xaascripted 0\x01\xdd\xff\xff\xff\xff",
        *map(drafts_with, NO_TREES),
    ],
    ids=["empty", "no type", "http", "types", "no utf-8", "nested", "huge", *NO_TREES],
)
def test_garbage_instead_of_drafts_is_ignored(
    client: DraftClient, scripted: ScriptedWorker, garbage: bytes
) -> None:
    update(client, a=[1])
    scripted.hear()
    scripted.say_raw(garbage)
    scripted.say(1, chain(1, 2))
    hear_all(client)

    assert client.paths("a", [1]) == path(2, drafter="s")
    assert client.dropped.count == 1


@given(
    bodies=st.lists(
        st.binary(max_size=200) | mutations(encode(DraftsMessage("scripted 0", 1, [TREE], ["a"]))),
        max_size=20,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_a_draft_worker_sends_a_worker_goes_on(bodies: list[bytes]) -> None:
    with contextlib.ExitStack() as ending:
        context, client = zmq.Context(), DraftClient("w", VOCAB_SIZE)
        for end in (lambda: context.destroy(linger=0), client.close):
            ending.callback(end)
        scripted = ScriptedWorker(context)
        client.assign(scripted.address)
        update(client, a=[1])
        scripted.hear()
        for body in bodies:
            scripted.say_raw(body)
        scripted.say(1, DraftTree("a", "last", 1, [7], [-1], [0.5]))

        def has_heard_the_last() -> bool:
            client.poll(0.0)
            used = client.paths("a", [1])
            assert all(0 <= token < VOCAB_SIZE for path in used for token in path.token_ids)
            return "last" in {path.drafter for path in used}

        until(has_heard_the_last)


def test_a_draft_worker_that_names_ever_new_drafters_is_not_counted_for_all(
    client: DraftClient, scripted: ScriptedWorker
) -> None:
    update(client, a=[1])
    scripted.hear()
    for number in range(10 * MAX_DRAFTERS):
        scripted.say(1, DraftTree("a", f"drafter {number}", 1, [7], [-1], [0.5]))
        client.poll(0.0)

    def has_dropped_the_last() -> bool:
        client.poll(0.0)
        return client.dropped.count == 9 * MAX_DRAFTERS

    until(has_dropped_the_last)

    assert len(client.counts_of) == len(client.paths("a", [1])) == MAX_DRAFTERS


def test_drafts_come_again_when_who_spoke_something_else_at_the_port_is_gone(
    client: DraftClient, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    other = context.socket(zmq.ROUTER)
    other.linger = 0
    port = other.bind_to_random_port("tcp://127.0.0.1")
    endpoint = f"tcp://127.0.0.1:{port}"
    client.assign(DraftWorkerAddress("d", "back", StreamAddress(endpoint, b"token", PUBLIC_KEY)))
    for step in range(100):  # until the connection is given up
        update(client, 0.0, a=[*range(step + 1)])
        time.sleep(0.002)
    other.close()
    back = ScriptedWorker(context, port)
    retries = itertools.count(1)

    def hears() -> bool:
        retry = next(retries)  # with a new token, as what was sent meanwhile may be lost
        update(client, retry * RETRY_S, a=[*range(100 + retry)])
        return back.has_mail()

    until(hears)

    assert back.hear().worker == "w"


def test_finished_requests_are_forgotten_by_the_drafter(
    client: DraftClient, oracle: Oracle
) -> None:
    update(client, a=[1], b=[7])
    hear_all(client)
    client.finish("a")
    client.finish("never sent")
    update(client, b=[7, 8])
    hear_all(client)

    assert set(oracle.known) == {"b"}
    assert client.paths("a", [1]) == []


def test_of_a_request_that_ends_before_it_is_sent_nothing_is_left(
    client: DraftClient, oracle: Oracle
) -> None:
    client.update("a", [1], NUM_GUESSES, b"", now=0.0)
    client.update("b", [7], NUM_GUESSES, b"", now=0.0)
    client.finish("a")
    client.flush(now=0.0)
    hear_all(client)

    assert oracle.extended == [("b", 0, [7])]


def test_a_request_that_ended_is_another_one_when_its_id_comes_again(
    client: DraftClient, oracle: Oracle
) -> None:
    update(client, a=[1, 2])
    hear_all(client)
    client.finish("a")
    update(client, a=[7, 8, 9])
    hear_all(client)

    assert oracle.extended == [("a", 0, [1, 2]), ("a", 0, [7, 8, 9])]
    assert client.paths("a", [7, 8, 9]) == path(10, 11, 12)


def test_verified_drafts_are_counted_by_their_place() -> None:
    counts = DraftCounts()
    for num_drafts, num_accepted in ((3, 1), (1, 1), (2, 0), (4, 4)):
        counts.count(num_drafts, num_accepted)

    assert counts == DraftCounts(
        verified=10, accepted=6, verified_at=[4, 3, 2, 1], accepted_at=[3, 1, 1, 1]
    )


def test_closing_twice_is_closing_once(there: OracleWorker) -> None:
    client = DraftClient("w", VOCAB_SIZE)
    client.assign(there.address)
    update(client, a=[1])
    client.close()
    client.close()

    assert client.draft_worker is None
