"""What the GlobalScheduler answers about the numbers of workers and draft workers."""

import dataclasses
import logging
from dataclasses import dataclass, field

import pytest

from cluster.placement.global_scheduler import GlobalScheduler
from cluster.placement.observer import SchedulerObserver
from cluster.placement.worker_views import SILENT_AFTER_S
from scheduler.placement import Placed
from scheduler.request import Request, Slo
from scheduler.scaling import LOOK_S, ScalingDecision, ScalingReason, ScalingSettings
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.reports import DraftWorkerReport, DraftWorkerStatus, TargetCounts, WorkerReport
from workers.token_stream import StreamAddress

TOKEN_S = 0.001
SETTINGS = ScalingSettings(max_workers=5, hold_s=60)


@dataclass
class Observer(SchedulerObserver):
    changes: list[ScalingDecision] = field(default_factory=list)

    def rescaled(self, decision: ScalingDecision) -> None:
        self.changes.append(decision)


class Cluster:
    """Workers that end each request within a second, and report once a second."""

    def __init__(self, settings: ScalingSettings | None = SETTINGS) -> None:
        self.now = 1000.0
        self.observer = Observer()
        self.scheduler = GlobalScheduler(
            lambda: self.now, self.observer, scaling=settings, draft_scaling=settings
        )
        self.worker_ids = ["a"]
        self.targets = TargetCounts()
        """Of each worker."""
        self._num_requests = 0

    async def run(self, seconds: int, num_requests: int, num_prompt_tokens: int = 190) -> None:
        """Let so many requests a second come, of 200 tokens each unless said otherwise."""
        for _ in range(seconds):
            self.now += 1
            ended: dict[str, dict[str, int | None]] = {name: {} for name in self.worker_ids}
            for _ in range(num_requests):
                self._num_requests += 1
                request = Request(f"r{self._num_requests}", num_prompt_tokens, 10, slo=Slo(1, 1))
                placed = await self.scheduler.place(request, self.worker_ids)
                assert isinstance(placed, Placed)
                ended[placed.worker_id][request.request_id] = 10
            for name in self.worker_ids:
                report = WorkerReport(
                    name, {}, ended[name], False, token_s=TOKEN_S, targets=self.targets
                )
                self.wanted = (await self.scheduler.report(report)).num_workers_wanted


async def test_the_work_that_is_offered_decides_on_the_number_of_workers() -> None:
    cluster = Cluster()

    await cluster.run(round(LOOK_S), 2)
    before = cluster.wanted
    await cluster.run(10, 2)
    assert (before, cluster.wanted) == (None, 1)
    assert not cluster.observer.changes

    await cluster.run(120, 5)  # a second of work in each
    assert cluster.wanted == 2
    assert cluster.scheduler.scaling is not None
    assert cluster.scheduler.scaling.load == pytest.approx(1.0, rel=0.15)
    cluster.worker_ids = ["a", "b"]
    await cluster.run(200, 1)
    assert cluster.wanted == 1

    found = [(change.num_wanted, change.reason) for change in cluster.observer.changes]
    assert found == [(2, ScalingReason.LOAD), (1, ScalingReason.IDLE)]


async def test_a_change_is_logged_with_its_numbers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cluster.placement.scaler")
    cluster = Cluster()

    await cluster.run(60, 5)

    [record] = [r for r in caplog.records if r.message == "other number of workers wanted"]
    assert "2 wanted, 1 ready: more work is foreseen" in str(vars(record)["decision"])


async def test_misses_that_workers_report_add_workers() -> None:
    cluster = Cluster()

    for _ in range(150):
        await cluster.run(1, 3)
        cluster.targets += TargetCounts(3, 1)

    assert cluster.wanted == 2
    assert cluster.observer.changes[0].reason is ScalingReason.MISSES
    assert cluster.observer.changes[0].attainment == pytest.approx(1 / 3)


async def test_what_workers_counted_before_a_restart_of_the_scheduler_is_not_counted_again() -> (
    None
):
    cluster = Cluster()
    cluster.targets = TargetCounts(1000, 0)

    await cluster.run(150, 3)

    assert cluster.wanted == 1
    assert cluster.scheduler.scaling
    assert cluster.scheduler.scaling.attainment is None


async def test_requests_that_wait_too_long_add_workers() -> None:
    cluster = Cluster()
    await cluster.run(40, 1)
    waiting = {f"w{number}": 5010 for number in range(20)}
    for name in waiting:
        request = Request(name, 5000, 10, slo=Slo(1, 1))
        await cluster.scheduler.place(request, ["a"])
    for _ in range(5):
        cluster.now += 1
        report = WorkerReport("a", waiting, {}, False, token_s=TOKEN_S)
        answer = await cluster.scheduler.report(report)

    decision = cluster.scheduler.scaling
    assert decision
    assert decision.queue_s == pytest.approx(20 * 5000 * TOKEN_S)
    assert (answer.num_workers_wanted or 0) > 1

    # Those that have a token do not wait.
    cluster.now += 1
    begun = dict.fromkeys(waiting, 9)
    await cluster.scheduler.report(dataclasses.replace(report, outstanding=begun))
    decision = cluster.scheduler.scaling
    assert decision
    assert decision.queue_s == 0


async def test_workers_that_do_not_serve_are_not_ready() -> None:
    cluster = Cluster()
    cluster.worker_ids = ["a", "b", "c", "d"]
    await cluster.run(40, 1)
    assert cluster.scheduler.scaling
    assert cluster.scheduler.scaling.num_ready == 4

    cluster.worker_ids = ["a", "b"]
    await cluster.scheduler.report(WorkerReport("c", {}, {}, draining=True))
    await cluster.run(round(4 * SILENT_AFTER_S), 1)  # and d is silent

    assert cluster.scheduler.scaling.num_ready == 2


async def test_without_settings_others_decide() -> None:
    cluster = Cluster(None)

    await cluster.run(120, 10)

    assert cluster.wanted is None
    assert cluster.scheduler.scaling is None


async def test_workers_without_a_profile_offer_no_measure_of_work() -> None:
    cluster = Cluster()
    for number in range(60):
        cluster.now += 1
        await cluster.scheduler.place(Request(str(number), 10**6, 10), ["a"])
        answer = await cluster.scheduler.report(WorkerReport("a", {}, {str(number): 10}, False))

    assert answer.num_workers_wanted == 1


async def test_busy_draft_workers_are_given_company() -> None:
    cluster = Cluster()
    address = DraftWorkerAddress("d", "incarnation", StreamAddress("tcp://host:1", b"token", b""))
    status = DraftWorkerStatus("d", 1, ("suffix",), 0, 0, busy_share=0.9, memory_bytes=0)
    answers = []
    for _ in range(60):
        cluster.now += 1
        report = DraftWorkerReport(address, status)
        answers.append(await cluster.scheduler.report_draft_worker(report))

    assert (answers[0].num_wanted, answers[-1].num_wanted) == (None, 2)
    assert answers[-1].peers == []
