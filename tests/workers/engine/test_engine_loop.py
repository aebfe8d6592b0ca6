import asyncio
import concurrent.futures
import math
import os
import re
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import zmq

from scheduler.prefill_queue import QueuedPrefill, QueueReport
from scheduler.request import Request, Slo
from tests.workers.fake_clock import FakeClock
from tests.workers.fake_engine import MALFORMED, FakeEngine, decode_tokens
from workers.engine.engine import EngineStats
from workers.engine.engine_loop import EngineLoop, LoopState
from workers.engine_request import EngineRequest, Grammar
from workers.errors import ClientLost, EngineDead, PoisonFound, StepFailed
from workers.reports import TargetCounts
from workers.token_stream import StreamAddress, StreamReceiver

NOBODY = StreamAddress("tcp://127.0.0.1:1", b"token", zmq.curve_keypair()[0])

StartLoop = Callable[[FakeEngine], EngineLoop]


class Reports:
    """Keeps what a loop reports."""

    def __init__(self) -> None:
        self.states: list[LoopState] = []
        self.deaths: list[str] = []
        self.threads: set[str] = set()

    def report_death(self, reason: str) -> None:
        self.deaths.append(reason)

    def report_load(self, state: LoopState) -> None:
        self.threads.add(threading.current_thread().name)
        self.states.append(state)


def make_loop(engine: FakeEngine, reports: Reports | None = None) -> EngineLoop:
    return EngineLoop(lambda: engine, reports or Reports(), 1.0)


class Client:
    """Receives what engines send to it."""

    def __init__(self) -> None:
        self._receiver = StreamReceiver("127.0.0.1")
        self._receiving = asyncio.create_task(self._receive())
        self.address = self._receiver.address
        self.tokens: dict[str, list[int]] = {}

    async def has(self, tokens: dict[str, list[int]]) -> None:
        """Wait until exactly these tokens came, by request id."""
        await until(lambda: self.tokens == tokens)

    def close(self) -> None:
        self._receiving.cancel()
        self._receiver.close()

    async def _receive(self) -> None:
        while True:
            for request_id, new in decode_tokens(await self._receiver.receive()).items():
                self.tokens.setdefault(request_id, []).extend(new)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    client.close()


@pytest.fixture
async def other_client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    client.close()


@pytest.fixture
async def start(client: Client) -> AsyncIterator[StartLoop]:
    """Starts loops, and ends them with the test, while their client still listens."""
    loops: list[tuple[FakeEngine, EngineLoop]] = []

    def start(engine: FakeEngine) -> EngineLoop:
        loops.append((engine, make_loop(engine)))
        return loops[-1][1]

    yield start
    for engine, loop in loops:
        engine.go_on.set()
        await asyncio.to_thread(loop.stop)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def outcome(future: concurrent.futures.Future[Any]) -> Any:
    """What a request came to: its finish reason or its error."""
    [result] = await asyncio.wait_for(
        asyncio.gather(asyncio.wrap_future(future), return_exceptions=True), 30
    )
    return result


async def state(loop: EngineLoop) -> LoopState:
    return await asyncio.wait_for(asyncio.wrap_future(loop.state()), 30)


async def turn(loop: EngineLoop) -> None:
    """Wait until the loop has come round, with the report that this may bring."""
    for _ in range(2):
        await state(loop)


def request(request_id: str, max_tokens: int = 3, core: list[bytes] | None = None) -> EngineRequest:
    return EngineRequest(Request(request_id, 10, max_tokens), core or [])


async def test_tokens_arrive_in_order_and_the_future_gives_the_finish_reason(
    start: StartLoop, client: Client
) -> None:
    loop = start(FakeEngine())
    futures = [loop.add(request(name, max_tokens=5), client.address) for name in "ab"]

    assert [await outcome(future) for future in futures] == ["length", "length"]
    await client.has({"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 3, 4]})


async def test_each_client_gets_the_tokens_of_its_own_requests(
    start: StartLoop, client: Client, other_client: Client
) -> None:
    loop = start(FakeEngine())
    futures = [
        loop.add(request("a"), client.address),
        loop.add(request("b"), other_client.address),
    ]

    assert [await outcome(future) for future in futures] == ["length", "length"]
    await client.has({"a": [0, 1, 2]})
    await other_client.has({"b": [0, 1, 2]})


async def test_only_the_engine_thread_touches_the_engine(start: StartLoop, client: Client) -> None:
    engine = FakeEngine()
    loop = start(engine)
    done = loop.add(request("a"), client.address)
    loop.abort(["b"])
    await state(loop)
    await outcome(done)
    await asyncio.to_thread(loop.stop)

    assert (engine.threads, engine.is_shut_down) == ({"engine"}, True)


async def test_an_aborted_request_is_in_no_further_step(start: StartLoop, client: Client) -> None:
    engine = FakeEngine()
    loop = start(engine)
    engine.go_on.clear()
    aborted = loop.add(request("a"), client.address)
    await until(engine.is_stepping.is_set)
    other = loop.add(request("b"), client.address)
    loop.abort(["a", "unknown"])
    engine.go_on.set()

    assert [await outcome(aborted), await outcome(other)] == ["abort", "length"]
    assert engine.steps == [["a"], ["b"], ["b"], ["b"]]
    await client.has({"a": [0], "b": [0, 1, 2]})


async def test_a_request_cancelled_before_it_reached_the_engine_never_does(
    start: StartLoop, client: Client
) -> None:
    engine = FakeEngine()
    loop = start(engine)
    engine.go_on.clear()
    first = loop.add(request("a"), client.address)
    await until(engine.is_stepping.is_set)
    cancelled = loop.add(request("b"), client.address)
    assert cancelled.cancel()
    engine.go_on.set()
    await outcome(first)

    assert engine.steps == [["a"], ["a"], ["a"]]


async def test_a_refused_request_fails_alone(start: StartLoop, client: Client) -> None:
    loop = start(FakeEngine())
    good = loop.add(request("a"), client.address)
    bad = loop.add(request("b", core=MALFORMED), client.address)

    assert [await outcome(good), repr(await outcome(bad))] == ["length", "ValueError('malformed')"]
    loop.check(step_timeout_s=60)


async def test_an_engine_that_fails_takes_all_its_requests_with_it(
    start: StartLoop, client: Client
) -> None:
    engine = FakeEngine()
    loop = start(engine)
    engine.go_on.clear()
    futures = [loop.add(request("in the step"), client.address)]
    await until(engine.is_stepping.is_set)
    futures += [loop.add(request("not yet taken"), client.address)]
    unanswered = loop.state()
    engine.step_error = OSError("device gone")
    engine.go_on.set()
    outcomes = [await outcome(future) for future in futures]
    outcomes += [await outcome(unanswered)]
    outcomes += [await outcome(loop.add(request("too late"), client.address))]
    outcomes += [await outcome(loop.state())]

    reason = "the engine failed: OSError('device gone')"
    suspect, dead = repr(StepFailed(reason)), repr(EngineDead(reason))
    assert [repr(outcome) for outcome in outcomes] == [suspect] + [dead] * 4
    assert loop.has_failed
    with pytest.raises(EngineDead, match="device gone"):
        loop.check(step_timeout_s=60)
    await until(lambda: engine.is_shut_down)


async def test_only_requests_in_the_failing_step_are_suspects_and_the_owner_learns_first(
    client: Client,
) -> None:
    engine, reports = FakeEngine(max_num_seqs=1), Reports()
    loop = make_loop(engine, reports)
    engine.go_on.clear()
    futures = [loop.add(request("in the step", max_tokens=10**9), client.address)]
    await until(engine.is_stepping.is_set)
    futures += [loop.add(request("queued"), client.address)]
    engine.go_on.set()
    await until(lambda: len(engine.steps) > 2)
    deaths_then: list[list[str]] = []
    futures[0].add_done_callback(lambda _: deaths_then.append(list(reports.deaths)))
    engine.step_error = OSError("device gone")

    assert [type(await outcome(future)) for future in futures] == [StepFailed, EngineDead]
    assert deaths_then == [["the engine failed: OSError('device gone')"]]
    await asyncio.to_thread(loop.wait_flushed)
    await asyncio.to_thread(loop.stop)


async def test_no_caller_is_left_waiting_when_the_engine_fails_under_load(
    start: StartLoop, client: Client
) -> None:
    engine = FakeEngine()
    loop = start(engine)

    def add_many(name: str) -> list[concurrent.futures.Future[Any]]:
        return [
            future
            for number in range(200)
            for future in (
                loop.add(request(f"{name}{number}", 10**9), client.address),
                loop.state(),
            )
        ]

    adding = [asyncio.to_thread(add_many, name) for name in "abc"]
    engine.step_error = OSError("device gone")
    futures = [future for added in await asyncio.gather(*adding) for future in added]
    outcomes = [await outcome(future) for future in futures]

    assert {type(outcome) for outcome in outcomes} <= {EngineDead, StepFailed, LoopState}


async def test_an_engine_that_fails_between_steps_is_dead_too(start: StartLoop) -> None:
    engine = FakeEngine()
    loop = start(engine)
    engine.stats_error = OSError("device gone")

    assert repr(await outcome(loop.state())) == repr(
        EngineDead("the engine failed: OSError('device gone')")
    )
    with pytest.raises(EngineDead, match="device gone"):
        loop.check(step_timeout_s=60)


async def test_a_caller_that_no_longer_waits_for_the_state_does_no_harm(
    start: StartLoop, client: Client
) -> None:
    engine = FakeEngine()
    loop = start(engine)
    engine.go_on.clear()
    done = loop.add(request("a"), client.address)
    await until(engine.is_stepping.is_set)
    assert loop.state().cancel()
    engine.go_on.set()

    assert await outcome(done) == "length"


async def test_only_a_step_that_runs_too_long_counts_as_hanging(
    start: StartLoop, client: Client
) -> None:
    engine = FakeEngine()
    loop = start(engine)
    loop.check(step_timeout_s=0)
    engine.go_on.clear()
    done = loop.add(request("a"), client.address)
    await until(engine.is_stepping.is_set)
    loop.check(step_timeout_s=60)
    engine.go_on.set()
    await outcome(done)

    loop.check(step_timeout_s=0)


async def test_an_engine_that_hangs_is_given_up_with_all_its_calls(
    start: StartLoop, client: Client
) -> None:
    engine = FakeEngine()
    loop = start(engine)
    engine.go_on.clear()
    hanging = loop.add(request("a"), client.address)
    await until(engine.is_stepping.is_set)
    unanswered = loop.state()
    for _ in range(2):
        with pytest.raises(EngineDead, match="a step has been running for 0 s"):
            loop.check(step_timeout_s=0)

    assert [type(await outcome(future)) for future in (hanging, unanswered)] == [
        StepFailed,
        EngineDead,
    ]
    assert loop.has_failed
    await asyncio.to_thread(loop.wait_flushed)


def test_the_constructor_raises_what_making_the_engine_raises() -> None:
    def make_engine() -> FakeEngine:
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device"):
        EngineLoop(make_engine, Reports(), 1.0)
    assert "engine" not in {thread.name for thread in threading.enumerate()}


async def test_the_state_counts_requests_steps_and_outstanding_tokens(
    start: StartLoop, client: Client
) -> None:
    engine = FakeEngine(max_num_seqs=1)
    loop = start(engine)
    before = await state(loop)
    engine.go_on.clear()
    futures = [loop.add(request("a", max_tokens=2), client.address)]
    await until(engine.is_stepping.is_set)
    futures += [loop.add(request("b", max_tokens=2), client.address)]
    during = loop.state()
    engine.go_on.set()
    during_state = await asyncio.wait_for(asyncio.wrap_future(during), 30)
    for future in futures:
        await outcome(future)

    assert [before, during_state, await state(loop)] == [
        LoopState(EngineStats(0, 0, 0.0), num_steps=0, outstanding={}),
        LoopState(EngineStats(1, 1, 1 / 8), num_steps=1, outstanding={"a": 1, "b": 12}),
        LoopState(EngineStats(0, 0, 0.0), num_steps=4, outstanding={}),
    ]


async def test_a_step_that_does_not_run_the_model_is_not_counted(
    start: StartLoop, client: Client
) -> None:
    engine = FakeEngine()
    engine.runs_model = False
    loop = start(engine)
    done = loop.add(request("a"), client.address)
    await until(lambda: engine.num_empty_steps > 0)
    num_steps = (await state(loop)).num_steps
    engine.runs_model = True

    assert (num_steps, await outcome(done), (await state(loop)).num_steps) == (0, "length", 3)


async def test_a_client_that_is_lost_loses_its_requests_and_no_other(
    start: StartLoop, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.token_stream.LOST_AFTER_S", 0.2)
    engine = FakeEngine()
    loop = start(engine)
    gone = [loop.add(request(name, max_tokens=10**9), NOBODY) for name in "ab"]
    outcomes = [await outcome(future) for future in gone]
    other = loop.add(request("c"), client.address)

    assert [type(outcome) for outcome in outcomes] == [ClientLost, ClientLost]
    assert await outcome(other) == "length"
    assert not engine.has_requests()


async def test_a_report_is_due_once_in_an_interval_with_all_that_ended_since(
    client: Client,
) -> None:
    reports, clock, engine = Reports(), FakeClock(), FakeEngine()
    loop = EngineLoop(lambda: engine, reports, 0.25, clock)
    await until(lambda: len(reports.states) == 1)
    done = loop.add(request("a", max_tokens=2), client.address)
    await outcome(done)
    await outcome(loop.add(request("b", core=MALFORMED), client.address))
    loop.abort(["never came"])
    clock.now += 0.24
    await turn(loop)
    num_early = len(reports.states)
    engine.go_on.clear()
    engine.is_stepping.clear()
    running = loop.add(request("c", max_tokens=2), client.address)
    await until(engine.is_stepping.is_set)
    clock.now += 0.01
    engine.go_on.set()
    await outcome(running)
    clock.now += 0.25
    await turn(loop)
    await asyncio.to_thread(loop.stop)

    assert num_early == 1
    assert reports.states == [
        LoopState(EngineStats(0, 0, 0.0), num_steps=0, outstanding={}),
        LoopState(
            EngineStats(1, 0, 1 / 8),
            num_steps=3,
            outstanding={"c": 1},
            finished={"a": 2, "b": None, "never came": None},
        ),
        LoopState(EngineStats(0, 0, 0.0), num_steps=4, outstanding={}, finished={"c": 2}),
    ]
    assert reports.threads == {"engine"}


async def test_requests_with_targets_are_counted_when_they_end(client: Client) -> None:
    engine = FakeEngine()
    loop = make_loop(engine)

    def with_targets(request_id: str, **fields: Any) -> EngineRequest:
        return EngineRequest(Request(request_id, 10, 3, **fields), [])

    generous, hopeless = Slo(100.0, 100.0), Slo(1e-9, 100.0)
    await outcome(loop.add(with_targets("none"), client.address))
    await outcome(loop.add(with_targets("met", slo=generous), client.address))
    await outcome(loop.add(with_targets("late", slo=hopeless), client.address))
    await outcome(loop.add(with_targets("slow", slo=Slo(100.0, 1e-9)), client.address))
    # Its first token came from another worker.
    resumed = with_targets("resumed", slo=hopeless, num_prior_tokens=1)
    await outcome(loop.add(resumed, client.address))
    engine.go_on.clear()
    aborted = loop.add(with_targets("aborted", slo=generous), client.address)
    loop.abort(["aborted"])
    engine.go_on.set()
    await outcome(aborted)
    counts = (await state(loop)).targets
    await asyncio.to_thread(loop.stop)

    assert counts == TargetCounts(num_judged=4, num_met=2)


async def test_asking_for_the_state_takes_nothing_from_the_next_report(client: Client) -> None:
    reports, clock = Reports(), FakeClock()
    loop = EngineLoop(FakeEngine, reports, 0.25, clock)
    await until(lambda: len(reports.states) == 1)
    await outcome(loop.add(request("a"), client.address))
    asked = await state(loop)
    clock.now += 1
    await turn(loop)
    await asyncio.to_thread(loop.stop)

    assert (asked.finished, reports.states[-1].finished) == ({}, {"a": 3})


async def test_stopping_waits_for_the_last_tokens_to_arrive() -> None:
    loop = make_loop(FakeEngine())
    receiver = StreamReceiver("127.0.0.1")
    assert await outcome(loop.add(request("a", max_tokens=1), receiver.address)) == "length"
    stopping = asyncio.create_task(asyncio.to_thread(loop.stop))
    await asyncio.sleep(0.05)
    assert not stopping.done()

    assert decode_tokens(await asyncio.wait_for(receiver.receive(), 30)) == {"a": [0]}
    await stopping
    receiver.close()


async def test_stopping_waits_for_a_client_that_takes_nothing_only_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.engine.engine_loop.FLUSH_S", 0.05)
    engine = FakeEngine()
    loop = make_loop(engine)
    assert await outcome(loop.add(request("a", max_tokens=1), NOBODY)) == "length"
    await asyncio.to_thread(loop.stop)

    assert engine.is_shut_down


async def test_stopping_leaves_nothing_behind(client: Client) -> None:
    num_files = len(os.listdir("/proc/self/fd"))
    engine = FakeEngine()
    loop = make_loop(engine)
    finished = loop.add(request("a"), client.address)
    assert await outcome(finished) == "length"
    running = loop.add(request("b", max_tokens=10**9), client.address)
    await until(lambda: "b" in client.tokens)
    await asyncio.to_thread(loop.stop)
    await asyncio.to_thread(loop.stop)

    assert repr(await outcome(running)) == repr(EngineDead("the engine was stopped"))
    assert engine.is_shut_down
    assert "engine" not in {thread.name for thread in threading.enumerate()}
    await until(lambda: len(os.listdir("/proc/self/fd")) <= num_files)


async def test_an_engine_that_recovers_goes_on_without_the_cause(
    start: StartLoop, client: Client
) -> None:
    engine = FakeEngine()
    engine.go_on.clear()
    loop = start(engine)
    cause = loop.add(request("cause", 3), client.address)
    other = loop.add(request("other", 3), client.address)
    engine.causes, engine.step_error = ["cause"], RuntimeError("shapes differ")
    engine.go_on.set()

    with pytest.raises(PoisonFound, match="RuntimeError: shapes differ"):
        await asyncio.wrap_future(cause)
    assert await asyncio.wrap_future(other) == "length"
    assert not loop.has_failed
    loop.check(1.0)


async def test_a_step_that_takes_much_longer_than_expected_stalls(
    start: StartLoop, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.engine.engine_loop.STALL_S", 0.05)
    engine = FakeEngine()
    loop = start(engine)
    before = loop.stall()
    loop.add(request("old", 1000), client.address)
    await until(lambda: len(client.tokens.get("old", [])) > 1)
    engine.go_on.clear()
    await asyncio.sleep(0.1)  # a step may have begun before
    loop.add(request("new", 3), client.address)
    stalls = []
    for engine.predicted_s in (math.inf, 100.0, 0.001):
        await asyncio.sleep(0.1)
        stalls.append(loop.stall())
    engine.go_on.set()
    await until(lambda: loop.stall() is None)

    assert (before, stalls[:2]) == (None, [None, None])
    assert stalls[2]
    assert stalls[2].took_s > 0.2
    assert stalls[2].suspects == frozenset()  # the old one has tokens, the new one waits
    assert re.fullmatch(r"a step has .* 0\.\d s, expected 0\.0\d s", str(stalls[2]))


async def test_requests_that_have_no_token_are_the_suspects_of_a_stall(
    start: StartLoop, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.engine.engine_loop.STALL_S", 0.01)
    engine = FakeEngine(max_num_seqs=1)
    engine.predicted_s = 0.001
    engine.go_on.clear()
    loop = start(engine)
    loop.add(request("first", 3), client.address)
    loop.add(request("waits", 3), client.address)
    await until(lambda: loop.stall() is not None)

    assert (stall := loop.stall())
    assert stall.suspects == {"first"}
    engine.go_on.set()


async def test_a_request_whose_grammar_is_being_compiled_counts_as_one_that_waits(
    start: StartLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, compiled = FakeEngine(), asyncio.Event()

    async def prepare(grammar: Grammar) -> None:
        await compiled.wait()

    monkeypatch.setattr(engine, "prepare", prepare)
    loop = start(engine)
    preparing = asyncio.create_task(loop.prepare(Request("r", 10, 3), Grammar("REGEX", "a*")))
    await asyncio.sleep(0)
    during = await asyncio.wrap_future(loop.state())
    compiled.set()
    await preparing
    after = await asyncio.wrap_future(loop.state())

    assert (during.outstanding, after.outstanding) == ({"r": 13}, {})


async def test_a_request_whose_grammar_is_being_compiled_is_in_the_queue_with_its_whole_prompt(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports, clock, engine, compiled = Reports(), FakeClock(), FakeEngine(), asyncio.Event()
    other = QueuedPrefill(3, 7, math.inf)
    engine.queued = QueueReport({"other": other}, num_tokens=7)

    async def prepare(grammar: Grammar) -> None:
        await compiled.wait()

    monkeypatch.setattr(engine, "prepare", prepare)
    loop = EngineLoop(lambda: engine, reports, 0.25, clock)
    await until(lambda: len(reports.states) == 1)
    asked = Request("r", 10, 3, 1, Slo(ttft_s=2.0), num_prior_tokens=2)
    preparing = asyncio.create_task(loop.prepare(asked, Grammar("REGEX", "a*")))
    await asyncio.sleep(0)
    clock.now += 0.25
    await until(lambda: len(reports.states) == 2)
    compiled.set()
    await preparing
    clock.now += 0.25
    await until(lambda: len(reports.states) == 3)
    await asyncio.to_thread(loop.stop)

    alone = QueueReport({"other": other}, num_tokens=7)
    both = QueueReport({"other": other, "r": QueuedPrefill(12, 12, 2.0, 1)}, num_tokens=19)
    assert [state.queue for state in reports.states] == [alone, both, alone]
