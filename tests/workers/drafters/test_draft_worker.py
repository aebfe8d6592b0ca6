import dataclasses
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from workers import sockets
from workers.config import MAX_DRAFTS, DraftConfig
from workers.cpus import claim_cpus
from workers.drafters.draft_contexts import MIN_MEMORY
from workers.drafters.draft_worker import FORGET_AFTER_S, REPORT_INTERVAL_S, DraftWorker
from workers.drafters.drafter import ContextKey, Draft, HiddenStates
from workers.drafters.make import make_drafters
from workers.drafters.suffix_drafter import SuffixDrafter
from workers.drafts.draft_stream import (
    ContextDelta,
    ContextsMessage,
    DraftsMessage,
    DraftTree,
    DraftWorkerAddress,
    decode_drafts,
    encode,
)
from workers.reports import DraftWorkerReport, DraftWorkerStatus
from workers.timeline import Span

NODE = frozenset({100, 101, 102})
"""The cores of the node as these tests see it, whatever machine runs them."""

A, B = ContextKey("w", "a"), ContextKey("w", "b")


class FakeClock:
    """Time that moves when a test says so."""

    def __init__(self, now: float) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        """By the clock on the wall it is later."""
        return self.now + 1000


@dataclasses.dataclass
class FakeDrafter:
    """Guesses that each token is one more than that before it, and notes what it hears."""

    hidden_size: int = 0
    vocab_size: int = 0
    num_guesses: int = 2
    """Guesses in the first step; each later one has one more."""
    num_steps: int = 1
    """Steps for a context."""
    on_step: Callable[[], object] = lambda: None
    extended: list[tuple[ContextKey, int, list[int]]] = dataclasses.field(default_factory=list)
    states: list[HiddenStates | None] = dataclasses.field(default_factory=list)
    forgotten: list[ContextKey] = dataclasses.field(default_factory=list)
    learnt: list[list[int]] = dataclasses.field(default_factory=list)
    is_shut_down: bool = False
    _last: dict[ContextKey, tuple[int, int]] = dataclasses.field(default_factory=dict)
    _num_left: int = 0

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        self.extended.append((key, position, token_ids))
        self.states.append(hidden_states)
        self._last[key] = (position + len(token_ids), token_ids[-1])
        self._num_left = self.num_steps

    def learn(self, token_ids: list[int]) -> None:
        self.learnt.append(token_ids)

    def forget(self, key: ContextKey) -> None:
        self.forgotten.append(key)
        self._last.pop(key, None)

    def has_work(self) -> bool:
        return self._num_left > 0

    def step(self) -> dict[ContextKey, Draft]:
        self.on_step()
        count = self.num_guesses + self.num_steps - self._num_left
        self._num_left -= 1
        return {
            key: Draft(
                position,
                tuple(range(token + 1, token + 1 + count)),
                tuple(range(-1, count - 1)),
                (0.5,) * count,
            )
            for key, (position, token) in self._last.items()
        }

    def shutdown(self) -> None:
        self.is_shut_down = True


def hang(stepping: threading.Event, go_on: threading.Event) -> None:
    """Be in a step until it may go on."""
    stepping.set()
    go_on.wait(30)


class Setup:
    """A draft worker, and the GlobalScheduler that it reports to."""

    def __init__(self, config: DraftConfig, drafters: dict[str, FakeDrafter], host: str) -> None:
        self.reports: queue.Queue[DraftWorkerReport] = queue.Queue()
        self.worker = DraftWorker("d", config, lambda: dict(drafters), self.reports.put, host)
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._peers: list[Peer] = []

    @property
    def address(self) -> DraftWorkerAddress:
        return self.worker.address

    def peer(self, name: str = "w") -> "Peer":
        """A worker's connection to it."""
        self._peers.append(Peer(self._zmq, self.address, name))
        return self._peers[-1]

    def tree(self, name: str, request_id: str, position: int, *token_ids: int) -> DraftTree:
        count = len(token_ids)
        return DraftTree(
            request_id, name, position, [*token_ids], [*range(-1, count - 1)], [0.5] * count
        )

    def answer(self, seq: int, *trees: DraftTree, unknown: tuple[str, ...] = ()) -> DraftsMessage:
        return DraftsMessage(self.address.incarnation, seq, [*trees], [*unknown])

    def close(self) -> None:
        self.worker.shutdown()
        self._zmq.destroy(linger=0)


class Peer:
    """A worker's end of a connection."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: DraftWorkerAddress, name: str
    ) -> None:
        self._address, self._name = address, name
        self._seq = 0
        stream = address.stream
        self.socket = sockets.connect(context, stream.endpoint, stream.public_key, {})

    def say(
        self, *contexts: ContextDelta, finished: tuple[str, ...] = (), token: bytes | None = None
    ) -> None:
        self._seq += 1
        message = ContextsMessage(
            self._address.stream.token if token is None else token,
            self._name,
            self._seq,
            [*contexts],
            [*finished],
        )
        assert sockets.send(self.socket, encode(message))

    def ask(self, *contexts: ContextDelta, finished: tuple[str, ...] = ()) -> DraftsMessage:
        self.say(*contexts, finished=finished)
        return self.next_answer()

    def next_answer(self) -> DraftsMessage:
        assert self.socket.poll(30_000)
        return decode_drafts(sockets.joined(self.socket.recv_multipart()))


MakeSetup = Callable[..., Setup]


@pytest.fixture
def make_setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeSetup]:
    monkeypatch.setattr("workers.drafters.draft_worker.IDLE_WAIT_S", 0.01)
    setups = []

    def make_setup(*, host: str = "127.0.0.1", cpus: int = 0, **drafters: FakeDrafter) -> Setup:
        setups.append(Setup(DraftConfig(cpus=cpus), drafters, host))
        return setups[-1]

    yield make_setup
    for setup in setups:
        setup.close()


@pytest.fixture
def drafter() -> FakeDrafter:
    return FakeDrafter()


@pytest.fixture
def setup(clock: FakeClock, make_setup: MakeSetup, drafter: FakeDrafter) -> Setup:
    """With a clock that stands still, it does not report."""
    return make_setup(fake=drafter)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock(100.0)
    monkeypatch.setattr("workers.drafters.draft_worker.time", clock)
    monkeypatch.setattr("workers.timeline.time", clock)
    return clock


def delta(
    request_id: str, position: int, *token_ids: int, num_wanted: int = 4, states: bytes = b""
) -> ContextDelta:
    return ContextDelta(request_id, position, [*token_ids], num_wanted, states)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread does that nothing is sent for."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_new_tokens_are_answered_with_drafts(setup: Setup) -> None:
    peer = setup.peer()
    answers = [peer.ask(delta("a", 0, 1, 2, 3)), peer.ask(delta("a", 3, 4))]

    assert answers == [
        setup.answer(1, setup.tree("fake", "a", 3, 4, 5)),
        setup.answer(2, setup.tree("fake", "a", 4, 5, 6)),
    ]


def test_a_drafter_gets_what_is_new(setup: Setup, drafter: FakeDrafter) -> None:
    peer = setup.peer()
    peer.ask(delta("a", 0, 1, 2, 3), delta("b", 0, 7))
    peer.ask(delta("b", 1, 8, 9))

    assert drafter.extended == [(A, 0, [1, 2, 3]), (B, 0, [7]), (B, 1, [8, 9])]


def test_drafts_of_many_requests_go_in_one_message(setup: Setup) -> None:
    assert setup.peer().ask(delta("a", 0, 1), delta("b", 0, 7)) == setup.answer(
        1, setup.tree("fake", "a", 1, 2, 3), setup.tree("fake", "b", 1, 8, 9)
    )


def test_where_no_drafts_are_wanted_the_drafters_hear_of_nothing(
    setup: Setup, drafter: FakeDrafter
) -> None:
    peer = setup.peer()
    answers = [
        peer.ask(delta("a", 0, 1, 2, num_wanted=0)),
        peer.ask(delta("a", 2, 3, num_wanted=0)),
    ]

    assert answers == [setup.answer(1), setup.answer(2)]
    assert drafter.extended == []


def test_when_drafts_are_wanted_again_the_drafters_get_all_they_missed(
    setup: Setup, drafter: FakeDrafter
) -> None:
    peer = setup.peer()
    peer.ask(delta("a", 0, 1))
    peer.ask(delta("a", 1, 2, num_wanted=0))
    peer.ask(delta("a", 2, 3, 4, num_wanted=0))
    peer.ask(delta("a", 4, 5))

    assert drafter.extended == [(A, 0, [1]), (A, 1, [2, 3, 4, 5])]


def test_position_0_starts_a_request_again(setup: Setup, drafter: FakeDrafter) -> None:
    peer = setup.peer()
    peer.ask(delta("a", 0, 1, 2, 3))
    answer = peer.ask(delta("a", 0, 7))

    assert answer == setup.answer(2, setup.tree("fake", "a", 1, 8, 9))
    assert drafter.extended == [(A, 0, [1, 2, 3]), (A, 0, [7])]


@pytest.mark.parametrize("position", [2, 4])
def test_a_request_of_which_tokens_are_missing_is_forgotten_and_asked_for(
    setup: Setup, drafter: FakeDrafter, position: int
) -> None:
    peer = setup.peer()
    peer.ask(delta("a", 0, 1, 2, 3))
    answers = [peer.ask(delta("a", position, 9)), peer.ask(delta("a", 0, 1, 2, 3, 4))]

    assert answers == [
        setup.answer(2, unknown=("a",)),
        setup.answer(3, setup.tree("fake", "a", 4, 5, 6)),
    ]
    assert drafter.forgotten == [A]
    assert drafter.extended == [(A, 0, [1, 2, 3]), (A, 0, [1, 2, 3, 4])]


def test_an_unknown_request_is_asked_for(setup: Setup, drafter: FakeDrafter) -> None:
    assert setup.peer().ask(delta("a", 3, 4)) == setup.answer(1, unknown=("a",))
    assert drafter.extended == []


def test_a_finished_request_is_forgotten_by_the_drafters(
    setup: Setup, drafter: FakeDrafter
) -> None:
    peer = setup.peer()
    peer.ask(delta("a", 0, 1), delta("b", 0, 1))
    answer = peer.ask(finished=("a", "never heard of"))

    assert (answer, drafter.forgotten) == (setup.answer(2), [A])


def test_a_request_that_finished_and_starts_again_at_once_is_a_new_one(
    setup: Setup, drafter: FakeDrafter
) -> None:
    peer = setup.peer()
    peer.ask(delta("a", 0, 1, 2, 3))
    answer = peer.ask(delta("a", 0, 7), finished=("a",))

    assert answer == setup.answer(2, setup.tree("fake", "a", 1, 8, 9))
    assert drafter.forgotten == [A]


def test_requests_of_two_workers_are_kept_apart(setup: Setup, drafter: FakeDrafter) -> None:
    one, other = setup.peer("one"), setup.peer("other")
    one.ask(delta("a", 0, 1))
    answer = other.ask(delta("a", 1, 2))

    assert answer == setup.answer(1, unknown=("a",))
    assert drafter.extended == [(ContextKey("one", "a"), 0, [1])]


def test_drafts_go_to_the_worker_whose_request_it_is(setup: Setup) -> None:
    one, other = setup.peer("one"), setup.peer("other")
    one.ask(delta("a", 0, 1))
    other.ask(delta("b", 0, 7))

    # The fake drafts for all that it knows in each step.
    assert one.next_answer() == setup.answer(1, setup.tree("fake", "a", 1, 2, 3))


def test_each_drafter_sends_its_own_drafts(clock: FakeClock, make_setup: MakeSetup) -> None:
    setup = make_setup(model=FakeDrafter(num_guesses=1), suffix=FakeDrafter())
    peer = setup.peer()
    peer.say(delta("a", 0, 1))

    assert [peer.next_answer() for _ in range(2)] == [
        setup.answer(1, setup.tree("model", "a", 1, 2)),
        setup.answer(1, setup.tree("suffix", "a", 1, 2, 3)),
    ]


def test_better_drafts_follow_step_by_step(clock: FakeClock, make_setup: MakeSetup) -> None:
    setup = make_setup(fake=FakeDrafter(num_steps=3))
    peer = setup.peer()
    peer.say(delta("a", 0, 1))

    assert [peer.next_answer() for _ in range(3)] == [
        setup.answer(1, setup.tree("fake", "a", 1, 2, 3)),
        setup.answer(1, setup.tree("fake", "a", 1, 2, 3, 4)),
        setup.answer(1, setup.tree("fake", "a", 1, 2, 3, 4, 5)),
    ]


def test_a_draft_without_tokens_is_not_sent(clock: FakeClock, make_setup: MakeSetup) -> None:
    setup = make_setup(fake=FakeDrafter(num_guesses=0))

    assert setup.peer().ask(delta("a", 0, 1)) == setup.answer(1)


def test_what_comes_while_it_drafts_is_taken_in_before_the_next_step(
    clock: FakeClock, make_setup: MakeSetup
) -> None:
    stepping, go_on = threading.Event(), threading.Event()
    drafter = FakeDrafter(on_step=lambda: hang(stepping, go_on))
    setup = make_setup(fake=drafter)
    one, other = setup.peer("one"), setup.peer("other")
    one.say(delta("a", 0, 1))
    stepping.wait(30)
    one.say(delta("a", 1, 2))
    go_on.set()

    answers = [one.next_answer()]
    while answers[-1].seq < 2:
        answers.append(one.next_answer())
    assert answers[0] == setup.answer(1, setup.tree("fake", "a", 1, 2, 3))
    assert answers[-1] == setup.answer(2, setup.tree("fake", "a", 2, 3, 4))
    assert other.ask() == setup.answer(1)


def test_hidden_states_go_to_the_drafters_that_want_them(
    clock: FakeClock, make_setup: MakeSetup
) -> None:
    wanting, other = FakeDrafter(hidden_size=4), FakeDrafter()
    states = np.arange(8, dtype=np.float16).reshape(2, 4)
    peer = make_setup(head=wanting, suffix=other).peer()
    peer.ask(delta("a", 0, 1, 2, 3, states=states.tobytes()))
    peer.next_answer()
    peer.ask(delta("a", 3, 4))

    assert other.states == [None, None]
    assert [got is None for got in wanting.states] == [False, True]
    np.testing.assert_array_equal(wanting.states[0], states)


def test_a_worker_that_connects_again_is_answered_there_though_it_counts_from_1(
    setup: Setup, drafter: FakeDrafter
) -> None:
    first = setup.peer()
    first.ask(delta("a", 0, 1, num_wanted=0))
    again = setup.peer()

    assert again.ask(delta("a", 1, 2, num_wanted=0)) == setup.answer(1)


def test_a_wrong_token_is_ignored(setup: Setup, drafter: FakeDrafter) -> None:
    peer = setup.peer()
    peer.say(delta("a", 0, 1), token=b"0" * 16)
    peer.say(delta("b", 0, 7))

    # On one connection: when this is answered, the other message has been read.
    assert peer.next_answer() == setup.answer(2, setup.tree("fake", "b", 1, 8, 9))
    assert drafter.extended == [(B, 0, [7])]


@pytest.mark.parametrize(
    "garbage",
    [
        [b""],
        [b"", b"", b""],
        [b"\xc1"],
        [b"GET / HTTP/1.1\r\n\r\n"],
        [msgspec.msgpack.encode((b"token", "w", 1, [], 5))],
        [msgspec.msgpack.encode((b"token", "w", 1, [("a", 0, ["text"], 1)], []))],
        [b"\x95" + msgspec.msgpack.encode(b"token") + b"\xa2\xff\xfe\x01\x90\x90"],
        [b"\x96" + msgspec.msgpack.encode(b"token") + b"\xa1w\x01\x90\x90" + b"\x91" * 100_000],
    ],
    ids=["empty", "parts", "no type", "http", "types", "deep types", "no utf-8", "nested"],
)
def test_garbage_is_ignored(setup: Setup, garbage: list[bytes]) -> None:
    peer = setup.peer()
    if len(garbage) == 1:
        assert sockets.send(peer.socket, garbage[0])
    else:
        peer.socket.send_multipart(garbage)

    assert peer.ask(delta("a", 0, 1)) == setup.answer(1, setup.tree("fake", "a", 1, 2, 3))
    setup.worker.check_health()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (delta("a", 0, 1, 10), delta("a", 0, 1, 9)),
        (delta("a", 0, 1, 2, states=bytes(9)), delta("a", 0, 1, 2, states=bytes(8))),
        (delta("a", 0, 1, 2, states=bytes(6)), delta("a", 0, 1, 2, states=bytes(16))),
    ],
    ids=["beyond the vocabulary", "odd bytes", "another width"],
)
def test_tokens_that_no_drafter_could_take_in_are_dropped_alone(
    clock: FakeClock, make_setup: MakeSetup, wrong: ContextDelta, right: ContextDelta
) -> None:
    drafter = FakeDrafter(hidden_size=4, vocab_size=10)
    setup = make_setup(fake=drafter)
    peer = setup.peer()
    peer.ask(wrong, delta("b", 0, 7))
    peer.ask(right)

    assert drafter.extended == [(B, 0, [7]), (A, 0, right.token_ids)]
    assert setup.worker.dropped.count == 1


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1000)])
def test_a_connection_that_does_not_speak_the_protocol_is_ignored(
    setup: Setup, garbage: bytes
) -> None:
    host, port = setup.address.stream.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(garbage)

        assert setup.peer().ask() == setup.answer(1)


def test_a_worker_that_does_not_read_holds_up_nobody(
    clock: FakeClock, make_setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.drafters.draft_worker.MAX_UNREAD", 2)
    drafter = FakeDrafter(num_guesses=20_000, num_steps=300)
    setup = make_setup(fake=drafter)
    deaf, other = setup.peer("deaf"), setup.peer("other")
    deaf.say(delta("a", 0, 1))
    until(lambda: bool(drafter.extended))
    while drafter.has_work():
        assert other.ask().incarnation == setup.address.incarnation


def test_a_drafter_that_fails_fails_the_health_check(
    clock: FakeClock, make_setup: MakeSetup
) -> None:
    def fail() -> None:
        raise OSError("device gone")

    drafters = {"fake": FakeDrafter(on_step=fail), "other": FakeDrafter()}
    setup = make_setup(**drafters)
    setup.worker.check_health()
    setup.peer().say(delta("a", 0, 1))
    until(lambda: not setup.worker._thread.is_alive())

    with pytest.raises(RuntimeError) as dead:
        setup.worker.check_health()
    assert str(dead.value) == "drafting failed: OSError('device gone')"
    assert [drafter.is_shut_down for drafter in drafters.values()] == [True, True]


def test_shutdown_ends_the_thread_and_the_drafters(setup: Setup, drafter: FakeDrafter) -> None:
    setup.peer().ask(delta("a", 0, 1))
    setup.worker.shutdown()

    assert (setup.worker._thread.is_alive(), drafter.is_shut_down) == (False, True)


def test_shutdown_does_not_wait_for_ever_for_a_step_that_hangs(
    clock: FakeClock, make_setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.drafters.draft_worker.STOP_TIMEOUT_S", 0.01)
    stepping, go_on = threading.Event(), threading.Event()
    setup = make_setup(fake=FakeDrafter(on_step=lambda: hang(stepping, go_on)))
    setup.peer().say(delta("a", 0, 1))
    stepping.wait(30)
    setup.worker.shutdown()

    assert setup.worker._thread.is_alive()
    go_on.set()
    setup.worker._thread.join(30)


def test_it_reports_its_requests_and_the_share_of_its_time_that_it_drafts(
    clock: FakeClock, make_setup: MakeSetup
) -> None:
    def take_a_while() -> None:
        clock.now += REPORT_INTERVAL_S / 4

    setup = make_setup(fake=FakeDrafter(on_step=take_a_while))
    setup.peer().ask(delta("a", 0, 1), delta("b", 0, 1))
    clock.now = 100 + REPORT_INTERVAL_S
    first = setup.reports.get(timeout=30)
    clock.now += REPORT_INTERVAL_S
    second = setup.reports.get(timeout=30)

    assert [first, second] == [
        DraftWorkerReport(
            setup.address,
            DraftWorkerStatus("d", os.getpid(), ("fake",), 2, 4, share, report.status.memory_bytes),
        )
        for report, share in ((first, 0.25), (second, 0.0))
    ]
    assert first.status.memory_bytes > 0


def test_requests_of_a_worker_that_is_silent_for_long_are_forgotten(
    clock: FakeClock, setup: Setup, drafter: FakeDrafter
) -> None:
    silent, living = setup.peer("silent"), setup.peer("living")
    silent.ask(delta("a", 0, 1, num_wanted=0), delta("b", 0, 1, num_wanted=0))
    living.ask(delta("a", 0, 1, num_wanted=0))
    clock.now = 100 + FORGET_AFTER_S
    reports = [setup.reports.get(timeout=30)]
    living.ask(delta("a", 1, 2, num_wanted=0))
    clock.now += REPORT_INTERVAL_S
    reports.append(setup.reports.get(timeout=30))

    assert [report.status.num_contexts for report in reports] == [3, 1]
    assert drafter.forgotten == [ContextKey("silent", "a"), ContextKey("silent", "b")]
    assert silent.ask(delta("a", 1, 2)) == setup.answer(2, unknown=("a",))


@pytest.fixture
def others(clock: FakeClock, make_setup: MakeSetup) -> dict[str, Setup]:
    """Draft workers that share what is written: there, and what each of their drafters learnt."""
    setups = {name: make_setup(fake=FakeDrafter()) for name in ("one", "two", "three")}
    addresses = {name: setup.address for name, setup in setups.items()}
    for name, setup in setups.items():
        setup.worker.set_peers([addresses[other] for other in addresses if other != name])
    return setups


def has_learnt(setup: Setup) -> bool:
    return bool(learnt(setup))


def learnt(setup: Setup) -> list[list[int]]:
    drafter = setup.worker._drafters["fake"]
    assert isinstance(drafter, FakeDrafter)
    return drafter.learnt


def test_the_output_of_a_request_that_ended_is_sent_to_the_other_draft_workers(
    others: dict[str, Setup], clock: FakeClock
) -> None:
    output = [*range(MIN_MEMORY)]
    peer = others["one"].peer()
    peer.ask(delta("a", 0, 1, 2), delta("b", 0, 7))
    peer.ask(delta("a", 2, *output[:1]), delta("b", 1, *output))
    peer.ask(delta("a", 3, *output[1:]))
    peer.ask(finished=("a",))
    clock.now += REPORT_INTERVAL_S
    for name in ("two", "three"):
        until(partial(has_learnt, others[name]))

    assert [learnt(setup) for setup in others.values()] == [[], [output], [output]]


def test_a_shorter_output_is_not_shared(others: dict[str, Setup], clock: FakeClock) -> None:
    peer = others["one"].peer()
    peer.ask(delta("a", 0, *range(100)), delta("b", 0, 7))
    peer.ask(delta("a", 100, *range(MIN_MEMORY - 1)), delta("b", 1, *range(MIN_MEMORY)))
    peer.ask(finished=("a", "b"))
    clock.now += REPORT_INTERVAL_S
    until(lambda: bool(learnt(others["two"])))

    assert learnt(others["two"]) == [[*range(MIN_MEMORY)]]


def test_what_is_learnt_is_not_shared_again(others: dict[str, Setup], clock: FakeClock) -> None:
    for number, name in enumerate(("one", "two")):
        peer = others[name].peer()
        peer.ask(delta("a", 0, 1), delta("b", 0, 1))
        peer.ask(delta("a", 1, *[number] * MIN_MEMORY))
        peer.ask(finished=("a",))
        clock.now += REPORT_INTERVAL_S
        until(lambda number=number: len(learnt(others["three"])) > number)  # type: ignore[misc]

    outputs = [[number] * MIN_MEMORY for number in (0, 1)]
    expected = [outputs[1:], outputs[:1], outputs]
    until(lambda: [len(learnt(setup)) for setup in others.values()] == [*map(len, expected)])
    assert [learnt(setup) for setup in others.values()] == expected


def test_draft_workers_that_are_gone_hold_up_nothing(
    others: dict[str, Setup], clock: FakeClock
) -> None:
    others["two"].worker.shutdown()
    peer = others["one"].peer()
    peer.ask(delta("a", 0, 1))
    peer.ask(delta("a", 1, *range(MIN_MEMORY)))
    peer.ask(finished=("a",))
    clock.now += REPORT_INTERVAL_S
    until(lambda: bool(learnt(others["three"])))
    others["one"].worker.set_peers([])
    clock.now += REPORT_INTERVAL_S
    until(lambda: not others["one"].worker._to_peers)

    assert peer.ask() == others["one"].answer(4)


async def test_spans_show_what_was_drafted_when(clock: FakeClock, make_setup: MakeSetup) -> None:
    def take_a_second() -> None:
        clock.now += 1

    setup = make_setup(fake=FakeDrafter(on_step=take_a_second))
    peer = setup.peer()
    peer.ask(delta("a", 0, 1))
    peer.ask(delta("b", 0, 1))

    assert [await setup.worker.spans(since_s) for since_s in (0.0, 1101.0, 1102.0)] == [
        ("d", [Span("fake", 1100, 1101, {"a": 2}), Span("fake", 1101, 1102, {"a": 2, "b": 2})]),
        ("d", [Span("fake", 1101, 1102, {"a": 2, "b": 2})]),
        ("d", []),
    ]


def test_each_start_has_an_incarnation_a_token_and_a_port_of_its_own(make_setup: MakeSetup) -> None:
    one, other = make_setup().address, make_setup().address

    assert one.draft_worker_id == other.draft_worker_id == "d"
    assert one.incarnation != other.incarnation
    assert one.stream.token != other.stream.token
    assert one.stream.endpoint != other.stream.endpoint


def test_an_ipv6_address_works_like_any_other(make_setup: MakeSetup) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    setup = make_setup(host="::1", fake=FakeDrafter())

    assert setup.address.stream.endpoint.startswith("tcp://[::1]:")
    assert setup.peer().ask() == setup.answer(1)


def test_cores_of_its_own_are_claimed_until_the_shutdown(
    make_setup: MakeSetup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pinned = set()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(NODE))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: pinned.add(tuple(cpus)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    setup = make_setup(cpus=2, fake=FakeDrafter())
    with pytest.raises(RuntimeError):
        claim_cpus(2, timeout_s=0)
    setup.worker.shutdown()

    assert pinned == {(100, 101)}
    again = claim_cpus(2, timeout_s=0)
    assert again.cpus == (100, 101)
    again.release()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_workers": 0}, "num_workers (0) must be at least 1"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens (0) must be at least 1"),
        (
            {"num_speculative_tokens": MAX_DRAFTS + 1},
            "num_speculative_tokens (129) must be at most 128, which is what vLLM verifies",
        ),
        ({"memory_tokens": -1}, "memory_tokens (-1) must be at least 1"),
        ({"model_kv_cache_gib": 0.0}, "model_kv_cache_gib (0.0) must be positive"),
        ({"model_kv_cache_gib": float("nan")}, "model_kv_cache_gib (nan) must be positive"),
        ({"cpus": -1}, "cpus (-1) must not be negative"),
        (
            {"drafters": ()},
            "drafters ([]) must name one or more of suffix, model and head, each once; leave "
            "`draft` out to switch speculation off",
        ),
        (
            {"drafters": ("suffix", "suffix")},
            "drafters (['suffix', 'suffix']) must name one or more of suffix, model and head, "
            "each once; leave `draft` out to switch speculation off",
        ),
        (
            {"drafters": ("model",)},
            "model (None) and the drafter `model` need each other: give both or none",
        ),
        (
            {"model": "some/model"},
            "model (some/model) and the drafter `model` need each other: give both or none",
        ),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        DraftConfig(**wrong)

    assert str(refused.value) == message


def test_drafters_are_made_by_their_names() -> None:
    drafters = make_drafters(DraftConfig(memory_tokens=10), "target", lambda name: name)

    assert {name: type(drafter) for name, drafter in drafters.items()} == {"suffix": SuffixDrafter}
