"""Tests of the actors' replicas, without Serve around them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.replica import Replica as ReplicaOfServe

from cluster.config.app_config import parse_args
from cluster.observe.replica import Replica
from cluster.placement.scaling_policy import ANSWERED, WANTED
from cluster.replicas import DraftReplica, GlobalSchedulerReplica, WorkerReplica
from scheduler.placement import Placed
from scheduler.prefix_index import PrefixDelta
from scheduler.request import Request
from tests.workers.fake_engine import MALFORMED, FakeEngine, decode_tokens
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.engine.engine import EngineStats
from workers.engine_request import EngineRequest
from workers.errors import EngineDead, StepFailed, WorkerUnfit, WrongWorker
from workers.reports import (
    DraftReportAnswer,
    DraftStats,
    DraftWorkerReport,
    ReportAnswer,
    Stall,
    WorkerReport,
)
from workers.token_stream import StreamAddress, StreamReceiver

CONFIG = parse_args(
    {
        "metrics": False,
        "worker": {"device": "cuda", "report_interval_s": 0.01},
        "draft": {"drafters": ["suffix"], "cpus": 0},
    }
)
DRAFTER = DraftWorkerAddress("d", "incarnation", StreamAddress("tcp://127.0.0.1:1", b"token", b""))
NO_DRAFTS = DraftStats({}, 0.0, 1.0, None, 0.0)


class DraftedEngine(FakeEngine):
    """One whose drafts another process makes."""

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0.0, NO_DRAFTS)


@dataclass
class Answer:
    """What an actor answers, or the error that the call ends with."""

    value: Any

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class Beats:
    """Takes the beats of workers, the first of which it fails to."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Stall | None]] = []

    def remote(self, worker_id: str, stall: Stall | None) -> Any:
        self.heard.append((worker_id, stall))
        return Answer(RayActorError() if len(self.heard) == 1 else None)


class SchedulerHandle:
    """The handle of a GlobalScheduler that answers each report with the next of `answers`."""

    def __init__(self, *answers: Any) -> None:
        self.report = self.report_draft_worker = self
        self.beat = Beats()
        self.reports: list[WorkerReport | DraftWorkerReport] = []
        self._answers = list(answers)

    def remote(self, report: WorkerReport | DraftWorkerReport) -> Any:
        self.reports.append(report)
        return Answer(self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def _serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica's context without Serve; the logs stay those of the tests."""
    monkeypatch.setattr("cluster.observe.replica.replica_context", lambda: {"replica": "w1"})
    monkeypatch.setattr("cluster.observe.replica.set_up_logs", lambda config, **context: None)


@pytest.fixture
async def ended() -> AsyncIterator[list[Replica]]:
    """Replicas that end with the test, as Serve ends them."""
    replicas: list[Replica] = []
    yield replicas
    for replica in replicas:
        await asyncio.to_thread(replica.__del__)


def make_worker(
    monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, scheduler: Any
) -> WorkerReplica:
    monkeypatch.setattr(WorkerReplica, "_make_engine", lambda self, config: engine)
    return WorkerReplica(CONFIG, scheduler)


async def test_a_workers_replica_runs_what_was_placed_on_it_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, ended: list[Replica]
) -> None:
    replica = make_worker(monkeypatch, FakeEngine(), SchedulerHandle(ReportAnswer()))
    ended.append(replica)
    receiver = StreamReceiver("127.0.0.1")
    request = EngineRequest(Request("r.0", 10, 1), [])

    assert await replica.generate("w1", request, receiver.address) == "length"
    assert decode_tokens(await receiver.receive()) == {"r.0": [0]}
    assert isinstance(await replica.generate("w2", request, receiver.address), WrongWorker)
    malformed = EngineRequest(Request("r.1", 10, 1), MALFORMED)
    assert repr(await replica.generate("w1", malformed, receiver.address)) == repr(
        ValueError("malformed")
    )
    assert (await replica.status()).worker_id == "w1"
    receiver.close()


async def test_a_workers_replica_follows_what_its_reports_are_answered(
    monkeypatch: pytest.MonkeyPatch, ended: list[Replica]
) -> None:
    engine, scheduler = DraftedEngine(), SchedulerHandle(RayActorError(), ReportAnswer(DRAFTER))
    ended.append(make_worker(monkeypatch, engine, scheduler))
    await asyncio.sleep(0)
    await until(lambda: len(scheduler.reports) >= 1)
    ended[0]._worker._draining = True  # type: ignore[attr-defined]  # a change to report
    await until(lambda: engine.draft_worker == DRAFTER)

    assert scheduler.reports[:2] == [
        WorkerReport("w1", {}, {}, draining, NO_DRAFTS) for draining in (False, True)
    ]


async def test_a_worker_hands_serve_the_latest_number_that_it_was_answered(
    monkeypatch: pytest.MonkeyPatch, ended: list[Any]
) -> None:
    ended.append(replica := make_worker(monkeypatch, FakeEngine(), SchedulerHandle(ReportAnswer())))
    before = replica.record_autoscaling_stats()
    began_s = time.time()
    replica.follow(ReportAnswer(num_workers_wanted=3))
    replica.follow(ReportAnswer())  # of a GlobalScheduler that has just started
    stats = replica.record_autoscaling_stats()

    assert before == {}
    assert stats[WANTED] == 3
    assert began_s <= stats[ANSWERED] <= time.time()


async def test_a_worker_says_that_it_lives_and_that_its_step_stalls(
    monkeypatch: pytest.MonkeyPatch, ended: list[Any]
) -> None:
    monkeypatch.setattr("cluster.replicas.BEAT_S", 0.01)
    monkeypatch.setattr("workers.engine.engine_loop.STALL_S", 0.01)
    engine, scheduler = FakeEngine(), SchedulerHandle(ReportAnswer())
    engine.predicted_s = 0.001
    ended.append(replica := make_worker(monkeypatch, engine, scheduler))
    await until(lambda: len(scheduler.beat.heard) > 2)
    assert set(scheduler.beat.heard) == {("w1", None)}

    engine.go_on.clear()
    receiver = StreamReceiver("127.0.0.1")
    request = EngineRequest(Request("r.0", 10, 1), [])
    call = asyncio.create_task(replica.generate("w1", request, receiver.address))
    await until(lambda: scheduler.beat.heard[-1][1] is not None)
    stall = scheduler.beat.heard[-1][1]
    engine.go_on.set()
    await call
    receiver.close()

    assert stall
    assert stall.suspects == {"r.0"}


async def test_reports_wait_for_the_answer_to_the_one_before_and_become_one(
    monkeypatch: pytest.MonkeyPatch, ended: list[Replica]
) -> None:
    answered = asyncio.Event()

    class Unreachable(SchedulerHandle):
        def remote(self, report: WorkerReport | DraftWorkerReport) -> Any:
            answer = super().remote(report)

            async def wait() -> Any:
                await answered.wait()
                return await answer

            return wait()

    engine, scheduler = FakeEngine(), Unreachable(ReportAnswer())
    replica = make_worker(monkeypatch, engine, scheduler)
    ended.append(replica)
    receiver = StreamReceiver("127.0.0.1")
    await until(lambda: len(scheduler.reports) == 1)
    for number in range(3):
        request = EngineRequest(Request(f"r.{number}", 10, 1), [])
        await replica.generate("w1", request, receiver.address)
    reports = replica._telemetry._reports
    await until(lambda: reports._next is not None and "r.2" in reports._next.finished)
    for seq in (2, 3):
        engine.prefix = PrefixDelta("1", seq, "format", bytes([seq] * 8))
        await until(lambda seq=seq: getattr(reports._next.prefix, "seq", 0) == seq)  # type: ignore[misc, union-attr]
    assert len(scheduler.reports) == 1
    answered.set()
    await until(lambda: len(scheduler.reports) == 2)

    [_, report] = scheduler.reports
    assert isinstance(report, WorkerReport)
    assert report.prefix == PrefixDelta("1", 3, "format", bytes([2] * 8 + [3] * 8), num_joined=2)
    assert report.finished == {"r.0": 1, "r.1": 1, "r.2": 1}
    receiver.close()


async def test_a_workers_replica_drains_from_when_serve_begins_to_stop_it(
    monkeypatch: pytest.MonkeyPatch, ended: list[Replica]
) -> None:
    replica = make_worker(monkeypatch, FakeEngine(), SchedulerHandle(ReportAnswer()))
    ended.append(replica)
    # What Serve calls then, of a replica that has no calls.
    of_serve = SimpleNamespace(
        _deployment_config=SimpleNamespace(graceful_shutdown_wait_loop_s=0),
        get_num_ongoing_requests=lambda: 0,
    )
    assert not (await replica.status()).draining
    await ReplicaOfServe._drain_ongoing_requests(of_serve)

    assert (await replica.status()).draining


async def test_the_end_of_a_workers_replica_ends_its_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeEngine()
    replica = make_worker(monkeypatch, engine, SchedulerHandle(ReportAnswer()))
    replica.check_health()
    await asyncio.to_thread(replica.__del__)
    await asyncio.to_thread(replica.__del__)  # Serve and Python may both call it

    assert engine.is_shut_down
    with pytest.raises(EngineDead):
        replica.check_health()


async def test_a_workers_process_ends_with_its_engine_when_its_callers_know(
    monkeypatch: pytest.MonkeyPatch, ended: list[Replica]
) -> None:
    engine, scheduler = FakeEngine(), SchedulerHandle(ReportAnswer())
    exits: list[int] = []
    monkeypatch.setattr("cluster.replicas.os._exit", exits.append)
    replica = make_worker(monkeypatch, engine, scheduler)
    ended.append(replica)
    receiver = StreamReceiver("127.0.0.1")
    engine.go_on.clear()
    call = asyncio.create_task(
        replica.generate("w1", EngineRequest(Request("r.0", 10, 9), []), receiver.address)
    )
    await until(engine.is_stepping.is_set)
    engine.step_error = OSError("device gone")
    engine.go_on.set()

    reason = "the engine failed: OSError('device gone')"
    assert repr(await call) == repr(StepFailed(reason))
    assert exits == []
    assert scheduler.reports[-1] == WorkerReport("w1", {}, {}, draining=False, death=reason)
    await until(lambda: exits == [1])
    receiver.close()


async def test_a_workers_replica_is_unhealthy_when_the_global_scheduler_finds_it_unfit(
    monkeypatch: pytest.MonkeyPatch, ended: list[Replica]
) -> None:
    replica = make_worker(monkeypatch, FakeEngine(), SchedulerHandle(ReportAnswer(unfit="slow")))
    ended.append(replica)

    def is_unhealthy() -> bool:
        try:
            replica.check_health()
        except WorkerUnfit:
            return True
        return False

    await until(is_unhealthy)


async def test_a_replica_whose_engine_cannot_be_made_ends_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: WorkerReplica, config: object) -> FakeEngine:
        raise OSError("no such device")

    monkeypatch.setattr(WorkerReplica, "_make_engine", fail)
    replica = WorkerReplica.__new__(WorkerReplica)
    with pytest.raises(OSError, match="no such device"):
        replica.__init__(CONFIG, SchedulerHandle(ReportAnswer()))  # type: ignore[misc]
    replica.__del__()


async def test_the_global_schedulers_replica_places_and_takes_reports(
    ended: list[Replica],
) -> None:
    replica = GlobalSchedulerReplica(CONFIG)
    ended.append(replica)
    await replica.report(WorkerReport("busy", {"x": 100}, {}, draining=False))

    placed = await replica.place(Request("r", 10, 5), ["busy", "idle"])
    assert isinstance(placed, Placed)
    assert placed.worker_id == "idle"
    assert (await replica.placements(["r"]))["r"].chosen.worker_id == "idle"
    assert [load.worker_id for load in await replica.loads()] == ["busy", "idle"]
    assert await replica.draft_workers() == []
    replica._exporting.cancel()


async def test_a_draft_workers_replica_reports_and_meets_the_others(
    monkeypatch: pytest.MonkeyPatch, ended: list[Replica]
) -> None:
    monkeypatch.setattr("cluster.replicas.make_drafters", lambda *_: {})
    scheduler = SchedulerHandle(DraftReportAnswer([DRAFTER], num_wanted=2))
    replica = DraftReplica(CONFIG, scheduler)
    ended.append(replica)
    await until(lambda: replica._draft_worker._peers == [DRAFTER])

    [report, *_] = scheduler.reports
    assert isinstance(report, DraftWorkerReport)
    assert report.address.draft_worker_id == "w1"
    assert replica.record_autoscaling_stats()[WANTED] == 2
    assert await replica.spans(0.0) == ("w1", [])
    replica.check_health()
    await asyncio.to_thread(replica.__del__)
    with pytest.raises(RuntimeError):
        replica.check_health()
    assert "drafter" not in {thread.name for thread in threading.enumerate()}
