import asyncio
import dataclasses
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from scheduler.policy import StepPolicy
from scheduler.prefill_queue import QueuedPrefill, QueueReport
from scheduler.prefix_index import PrefixDelta
from scheduler.request import Request
from scheduler.stage_policy import PolicyReason, StageReport, WorkerPolicy
from tests.workers.fake_clock import FakeClock
from tests.workers.fake_engine import IMPOSSIBLE, MALFORMED, FakeEngine, decode_tokens
from workers.config import WorkerConfig
from workers.cpus import claim_cpus
from workers.engine_request import EngineRequest
from workers.errors import (
    ClientLost,
    EngineDead,
    GrammarRefused,
    StepFailed,
    WorkerDraining,
    WorkerUnfit,
    WrongWorker,
)
from workers.reports import ReportAnswer, WorkerObserver, WorkerReport, WorkerStatus
from workers.token_stream import StreamAddress, StreamReceiver
from workers.worker import MOVE_AFTER_S, Worker

NOBODY = StreamAddress("tcp://127.0.0.1:1", b"token", zmq.curve_keypair()[0])

NODE = frozenset({100, 101, 102})
"""The cores of the node as these tests see it, whatever machine runs them."""

LONG = 10**9
"""Output tokens of a request that does not end by itself."""


class Reports(WorkerObserver):
    """Keeps a worker's reports."""

    def __init__(self) -> None:
        self.sent: list[WorkerReport] = []

    def reported(self, report: WorkerReport) -> None:
        self.sent.append(report)


class Setup:
    """A worker with what surrounds it: its engine, its observer and a client."""

    def __init__(self, **config: Any) -> None:
        self.engine = FakeEngine()
        self.clock = FakeClock()
        observer = Reports()
        self.reports = observer.sent
        self.receiver = StreamReceiver("127.0.0.1")
        self.worker = Worker(
            "w",
            WorkerConfig(**({"device": "cuda"} | config)),
            lambda: self.engine,
            observer,
            self.clock,
        )

    def generate(
        self, request_id: str, max_tokens: int = 3, core: list[bytes] | None = None
    ) -> asyncio.Task[str]:
        """Call `generate` with a prompt of ten tokens."""
        return asyncio.create_task(
            self.worker.generate(
                "w",
                EngineRequest(Request(request_id, 10, max_tokens), core or []),
                self.receiver.address,
            )
        )

    async def next_tokens(self) -> dict[str, list[int]]:
        return decode_tokens(await asyncio.wait_for(self.receiver.receive(), 30))

    async def close(self) -> None:
        self.engine.go_on.set()
        reading = asyncio.create_task(self._read())
        await asyncio.to_thread(self.worker.shutdown)
        reading.cancel()
        self.receiver.close()

    async def _read(self) -> None:
        while True:
            await self.receiver.receive()


MakeSetup = Callable[..., Setup]


@pytest.fixture
async def make_setup() -> AsyncIterator[MakeSetup]:
    setups = []

    def make_setup(**config: Any) -> Setup:
        setups.append(Setup(**config))
        return setups[-1]

    yield make_setup
    for setup in setups:
        await setup.close()


@pytest.fixture
def setup(make_setup: MakeSetup) -> Setup:
    return make_setup()


@pytest.fixture
def _node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(NODE))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def turn(setup: Setup) -> None:
    """Wait until the engine's loop has come round, with the report that this may bring."""
    before = setup.engine.num_looks
    while setup.engine.num_looks < before + 3:
        await asyncio.wait_for(setup.worker.status(), 30)


async def test_generate_returns_the_finish_reason_and_its_tokens_come_in_order(
    setup: Setup,
) -> None:
    calls = [setup.generate("a"), setup.generate("b")]
    finish_reasons = await asyncio.gather(*calls)
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    while not all(len(got) == 3 for got in tokens.values()):
        for request_id, new in (await setup.next_tokens()).items():
            tokens[request_id] += new

    assert finish_reasons == ["length", "length"]
    assert tokens == {"a": [0, 1, 2], "b": [0, 1, 2]}


async def test_cancelling_generate_aborts_the_request_in_the_engine(setup: Setup) -> None:
    call = setup.generate("a", LONG)
    await setup.next_tokens()
    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: not setup.engine.has_requests())


async def test_generate_cancelled_before_the_engine_took_it_leaves_nothing_there(
    setup: Setup,
) -> None:
    setup.engine.go_on.clear()
    running = setup.generate("a")
    await until(setup.engine.is_stepping.is_set)
    call = setup.generate("b")
    await asyncio.sleep(0)  # it is on its way to the engine
    call.cancel()
    setup.engine.go_on.set()

    with pytest.raises(asyncio.CancelledError):
        await call
    assert await running == "length"
    assert setup.engine.steps == [["a"], ["a"], ["a"]]


async def test_a_malformed_request_fails_alone(setup: Setup) -> None:
    good, bad = setup.generate("a"), setup.generate("b", core=MALFORMED)

    with pytest.raises(ValueError, match="malformed"):
        await bad
    assert await good == "length"
    setup.worker.check_health()


async def test_a_request_that_was_placed_on_another_worker_is_refused(setup: Setup) -> None:
    request = EngineRequest(Request("a", 10, 3), [])

    with pytest.raises(WrongWorker, match="worker dead is gone, and this is w"):
        await setup.worker.generate("dead", request, setup.receiver.address)
    assert not setup.engine.has_requests()


async def test_a_failed_engine_fails_every_request_and_the_health_check(setup: Setup) -> None:
    setup.engine.go_on.clear()
    calls = [setup.generate("a"), setup.generate("b")]
    await until(setup.engine.is_stepping.is_set)
    setup.engine.step_error = OSError("device gone")
    setup.engine.go_on.set()
    outcomes: list[object] = [*await asyncio.gather(*calls, return_exceptions=True)]
    outcomes += await asyncio.gather(setup.generate("too late"), return_exceptions=True)
    outcomes += await asyncio.gather(setup.worker.status(), return_exceptions=True)

    reason = "the engine failed: OSError('device gone')"
    suspect, dead = repr(StepFailed(reason)), repr(EngineDead(reason))
    told = [repr(outcome) for outcome in outcomes]
    assert (told[0], told[2:]) == (suspect, [dead, dead])
    assert told[1] in (suspect, dead)  # in the step, or not yet
    assert setup.reports[-1] == WorkerReport("w", {}, {}, draining=False, death=reason)
    await asyncio.wait_for(setup.worker.until_dead(), 30)
    with pytest.raises(EngineDead, match="device gone"):
        setup.worker.check_health()


async def test_a_worker_notices_by_itself_that_its_engine_hangs(make_setup: MakeSetup) -> None:
    setup = make_setup(step_timeout_s=0.001)
    setup.engine.go_on.clear()
    hanging = setup.generate("a")
    await asyncio.wait_for(setup.worker.until_dead(), 30)

    with pytest.raises(StepFailed, match="a step has been running"):
        await hanging
    assert "a step has been running" in setup.reports[-1].death


async def test_a_worker_that_is_to_be_replaced_says_so_and_goes_on_until_then(
    setup: Setup,
) -> None:
    setup.worker.follow(ReportAnswer(unfit="it is slow"))

    with pytest.raises(WorkerUnfit, match="it is slow"):
        setup.worker.check_health()
    assert await setup.generate("a") == "length"
    setup.worker.follow(ReportAnswer())
    setup.worker.check_health()


async def test_a_worker_says_that_it_has_a_request_under_which_an_engine_died(
    setup: Setup,
) -> None:
    await turn(setup)
    setup.engine.go_on.clear()
    suspect = Request("a", 10, LONG, num_engine_deaths=1)
    running = asyncio.create_task(
        setup.worker.generate("w", EngineRequest(suspect, []), setup.receiver.address)
    )
    await until(setup.engine.is_stepping.is_set)
    setup.clock.now += 1
    setup.engine.go_on.set()
    await until(lambda: len(setup.reports) == 2)
    running.cancel()

    assert [report.on_trial for report in setup.reports] == [False, True]


async def test_a_step_that_hangs_fails_the_health_check_and_refuses_requests(
    make_setup: MakeSetup,
) -> None:
    setup = make_setup(step_timeout_s=0.001)
    setup.worker.check_health()
    setup.engine.go_on.clear()
    hanging = setup.generate("a")
    await until(setup.engine.is_stepping.is_set)
    await asyncio.sleep(0.002)

    with pytest.raises(EngineDead, match="a step has been running"):
        setup.worker.check_health()
    with pytest.raises(EngineDead, match="a step has been running"):
        await setup.generate("b")
    with pytest.raises(StepFailed, match="a step has been running"):
        await hanging


async def test_a_client_that_is_lost_fails_its_requests(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.token_stream.LOST_AFTER_S", 0.1)

    with pytest.raises(ClientLost, match="is not reading its stream"):
        await asyncio.wait_for(
            setup.worker.generate("w", EngineRequest(Request("a", 10, LONG), []), NOBODY), 30
        )
    assert not setup.engine.has_requests()


async def test_draining_refuses_new_requests_and_waits_for_the_old(setup: Setup) -> None:
    setup.engine.go_on.clear()
    old = setup.generate("old")
    await until(setup.engine.is_stepping.is_set)
    setup.worker.drain()
    with pytest.raises(WorkerDraining, match="worker w is draining"):
        await setup.generate("new")
    assert not old.done()
    setup.engine.go_on.set()

    assert await asyncio.wait_for(old, 30) == "length"


@pytest.mark.parametrize(
    ("others_serve", "since_s", "moves"),
    [(True, MOVE_AFTER_S, True), (True, MOVE_AFTER_S - 0.1, False), (False, 1000.0, False)],
    ids=["a while ago", "just now", "there is no other"],
)
async def test_what_runs_on_a_draining_worker_moves_if_another_one_serves(
    setup: Setup, others_serve: bool, since_s: float, moves: bool
) -> None:
    running = setup.generate("a", LONG)
    await until(lambda: bool(setup.engine.steps))
    setup.worker.drain()
    setup.clock.now += since_s
    setup.worker.drain()  # Serve says so again after a restart of its controller
    setup.worker.follow(ReportAnswer(others_serve=others_serve))

    if moves:
        with pytest.raises(WorkerDraining, match="worker w leaves, and another one serves"):
            await asyncio.wait_for(running, 30)
        await until(lambda: not setup.engine.has_requests())
    else:
        await turn(setup)
        assert not running.done()
        running.cancel()


async def test_a_worker_that_is_to_stay_keeps_its_requests(setup: Setup) -> None:
    running = setup.generate("a", LONG)
    await until(lambda: bool(setup.engine.steps))
    setup.clock.now += 1000
    setup.worker.follow(ReportAnswer(others_serve=True))
    await turn(setup)

    assert not running.done()
    running.cancel()


@pytest.mark.usefixtures("_node")
async def test_the_status_counts_what_runs_and_waits(setup: Setup, make_setup: MakeSetup) -> None:
    on_cpus = make_setup(device="cpu", cpus=2)
    idle = await on_cpus.worker.status()
    setup.engine.go_on.clear()
    call = setup.generate("a", LONG)
    await until(setup.engine.is_stepping.is_set)
    busy_call = asyncio.create_task(setup.worker.status())
    await asyncio.sleep(0)
    setup.engine.go_on.set()
    busy = await busy_call
    call.cancel()

    nothing = WorkerStatus(
        worker_id="w",
        pid=os.getpid(),
        cpus=(),
        num_running=0,
        num_waiting=0,
        num_outstanding_tokens=0,
        num_steps=0,
        kv_cache_usage=0.0,
        memory_bytes=0,
        draining=False,
    )
    assert idle.memory_bytes > 1 << 20
    assert dataclasses.replace(idle, memory_bytes=0) == dataclasses.replace(
        nothing, cpus=(100, 101)
    )
    assert dataclasses.replace(busy, memory_bytes=0) == dataclasses.replace(
        nothing,
        num_running=1,
        num_outstanding_tokens=LONG - 1,
        num_steps=1,
        kv_cache_usage=1 / 8,
    )


async def test_a_worker_has_started_when_its_first_report_is_answered(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    before = (await setup.worker.status()).start
    with caplog.at_level(logging.INFO, "workers.worker"):
        setup.worker.follow(ReportAnswer())
        setup.worker.follow(ReportAnswer())

    after = (await setup.worker.status()).start
    assert (list(before), list(after)) == ([], ["report"])
    assert caplog.messages == ["worker started"]
    assert vars(caplog.records[0])["took_s"] > 0


async def test_an_idle_worker_reports_as_a_heartbeat(setup: Setup) -> None:
    counts = []
    for setup.clock.now in (100.0, 101.75, 102.0, 103.75, 104.0):
        await turn(setup)
        counts.append(len(setup.reports))

    assert counts == [1, 1, 2, 2, 3]
    assert setup.reports == [WorkerReport("w", {}, {}, draining=False)] * 3


async def test_changes_are_reported_together_once_the_interval_is_over(setup: Setup) -> None:
    await turn(setup)
    await setup.generate("a")
    await asyncio.gather(setup.generate("b", core=MALFORMED), return_exceptions=True)
    setup.engine.go_on.clear()
    call = setup.generate("c", LONG)
    await until(setup.engine.is_stepping.is_set)
    setup.clock.now = 100.24
    setup.engine.runs_model = False
    setup.engine.go_on.set()
    await turn(setup)
    assert setup.reports[1:] == []
    setup.clock.now = 100.25
    await turn(setup)
    call.cancel()

    finished = {"a": 3, "b": None}
    assert setup.reports[1:] == [WorkerReport("w", {"c": 10 + LONG}, finished, draining=False)]


async def test_what_has_changed_in_the_prefix_cache_is_reported_once(setup: Setup) -> None:
    await turn(setup)
    delta = PrefixDelta("1", 1, "format", bytes(8), snapshot=True)
    setup.engine.prefix = delta
    for _ in range(3):
        setup.clock.now += 0.25
        await turn(setup)
    assert [report.prefix for report in setup.reports] == [None, delta]
    setup.clock.now += 2
    await turn(setup)
    await turn(setup)

    assert [report.prefix for report in setup.reports] == [None, delta, delta.settled()]
    assert delta.settled() == PrefixDelta("1", 1, "format", b"", num_joined=0)


async def test_many_changes_in_the_prefix_cache_are_reported_at_once(setup: Setup) -> None:
    await turn(setup)
    setup.engine.prefix = delta = PrefixDelta("1", 1, "format", bytes(8 * 5000), snapshot=True)
    await turn(setup)
    assert len(setup.reports) == 1
    setup.engine.prefix_due = True
    await turn(setup)

    assert [report.prefix for report in setup.reports] == [None, delta]


async def test_a_worker_tells_all_of_its_prefix_cache_when_it_is_asked(setup: Setup) -> None:
    setup.worker.follow(ReportAnswer())
    setup.worker.follow(ReportAnswer(resync_prefix=True))
    await until(lambda: setup.engine.num_prefix_resyncs == 1)

    assert setup.engine.threads == {"engine"}


async def test_a_worker_keeps_to_the_policy_of_the_latest_answer(setup: Setup) -> None:
    policy = WorkerPolicy(0.5, 2, 3, PolicyReason.DECODES_LATE)
    for answer in (
        ReportAnswer(),
        ReportAnswer(policy=policy),
        ReportAnswer(policy=policy),  # it is to be set again, or it lapses
        ReportAnswer(),
        ReportAnswer(),
    ):
        setup.worker.follow(answer)
    await until(lambda: len(setup.engine.policies) == 3)
    await turn(setup)

    assert setup.engine.policies == [policy, policy, None]
    assert setup.engine.threads == {"engine"}


async def test_what_the_stage_policy_is_to_know_is_reported(setup: Setup) -> None:
    await turn(setup)
    setup.engine.staged = StageReport(num_decodes=2, late_decodes=1.0)
    setup.clock.now += 1
    await turn(setup)

    assert [report.stages for report in setup.reports] == [StageReport(), setup.engine.staged]


async def test_time_that_goes_by_is_no_change_of_the_queue(setup: Setup) -> None:
    await turn(setup)
    queues = [
        QueueReport({"r": QueuedPrefill(num_new_tokens, 10, due_in_s)})
        for num_new_tokens, due_in_s in ((10, 5.0), (10, 4.75), (3, 4.5))
    ]
    for setup.engine.queued in queues:
        setup.clock.now += 0.25
        await turn(setup)

    assert [report.queue for report in setup.reports] == [QueueReport(), queues[0], queues[2]]


async def test_draining_is_reported(setup: Setup) -> None:
    await turn(setup)
    setup.worker.drain()
    setup.clock.now = 100.25
    await turn(setup)

    assert setup.reports[1:] == [WorkerReport("w", {}, {}, draining=True)]


@pytest.mark.usefixtures("_node")
async def test_the_cores_are_held_until_shutdown(make_setup: MakeSetup) -> None:
    setup = make_setup(device="cpu", cpus=3)
    with pytest.raises(RuntimeError, match="only 0 of the 3"):
        claim_cpus(1, timeout_s=0)
    await setup.close()

    again = claim_cpus(3, timeout_s=0)
    assert again.cpus == (100, 101, 102)
    again.release()


@pytest.mark.usefixtures("_node")
def test_a_worker_whose_engine_cannot_be_made_raises_its_error_and_gives_its_cores_back() -> None:
    def make_engine() -> FakeEngine:
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device") as kept:  # and what it refers to
        Worker("w", WorkerConfig(cpus=3), make_engine)

    again = claim_cpus(3, timeout_s=0)
    assert (again.cpus, kept.type) == ((100, 101, 102), OSError)
    again.release()


@pytest.mark.parametrize("name", ["cpus", "step_timeout_s", "slow_timeout_s", "report_interval_s"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_config_refuses_what_is_not_positive(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} \({value}\) must be positive$"):
        WorkerConfig(**{name: value})


async def test_a_worker_records_under_its_own_name(make_setup: MakeSetup) -> None:
    setup = make_setup(record="/runs/night")

    assert setup.engine.record_path == Path("/runs/night.w.jsonl")
    assert setup.engine.threads == {"engine"}
    assert make_setup().engine.record_path is None


def test_there_is_nothing_to_record_of_vllms_own_scheduler() -> None:
    with pytest.raises(ValueError, match=r"record \(night\) needs a step_policy of ours"):
        WorkerConfig(step_policy=StepPolicy(name="vllm"), record="night")


async def test_a_request_whose_grammar_is_refused_never_reaches_the_engine(
    make_setup: MakeSetup,
) -> None:
    setup = make_setup()
    refused = EngineRequest(Request("a", 10, 3), [], grammar=IMPOSSIBLE)

    with pytest.raises(GrammarRefused, match="impossible"):
        await setup.worker.generate("w", refused, setup.receiver.address)
    assert await setup.generate("b") == "length"

    assert all("a" not in step for step in setup.engine.steps)
    setup.clock.now += 10
    await setup.worker.status()
    assert any("a" in report.finished for report in setup.reports)
