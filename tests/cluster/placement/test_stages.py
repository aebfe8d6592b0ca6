"""The stage policy in the GlobalScheduler: what reports bring about in the answers to them."""

import pytest

from cluster.placement.global_scheduler import GlobalScheduler
from cluster.placement.observer import SchedulerObserver
from cluster.placement.stages import DECIDE_S
from scheduler.stage_policy import (
    ALONE,
    HOLD_S,
    SILENT_S,
    PolicyReason,
    StageReport,
    WorkerPolicy,
)
from tests.workers.fake_clock import FakeClock
from workers.drafts.draft_client import DraftCounts
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.reports import DraftStats, DraftWorkerReport, DraftWorkerStatus, WorkerReport
from workers.token_stream import StreamAddress

LATE = StageReport(num_decodes=4, work_s=1.0, late_decodes=2.0)
IDLE = StageReport()
DRAFTER = DraftWorkerAddress("d", "run", StreamAddress("tcp://127.0.0.1:1", b"token", b""))


class Changes(SchedulerObserver):
    """Keeps the changes of policies."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, WorkerPolicy]] = []

    def policy_changed(self, worker_id: str, policy: WorkerPolicy) -> None:
        self.seen.append((worker_id, policy))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture
def scheduler(clock: FakeClock, changes: Changes) -> GlobalScheduler:
    return GlobalScheduler(clock, changes, sets_stages=True)


async def answer(
    scheduler: GlobalScheduler,
    worker_id: str,
    stages: StageReport,
    drafts: DraftStats | None = None,
    death: str = "",
) -> WorkerPolicy | None:
    report = WorkerReport(worker_id, {}, {}, False, drafts, stages=stages, death=death)
    return (await scheduler.report(report)).policy


async def test_a_worker_whose_decodes_are_late_is_told_to_prefill_less(
    scheduler: GlobalScheduler, clock: FakeClock, changes: Changes
) -> None:
    told = []
    for _ in range(10):
        await answer(scheduler, "idle", IDLE)
        told.append(await answer(scheduler, "w", LATE))
        clock.now += HOLD_S / 4
    first, second = (
        WorkerPolicy(share, None, version, PolicyReason.DECODES_LATE)
        for version, share in ((1, 0.9), (2, 0.8))
    )

    # The first decision was made before the worker had reported.
    assert told == [ALONE] * 5 + [first] * 4 + [second]
    assert changes.seen == [("w", first), ("w", second)]
    assert scheduler.policies() == {"idle": ALONE, "w": second}


async def test_without_a_stage_policy_nobody_is_told_anything(clock: FakeClock) -> None:
    scheduler = GlobalScheduler(clock)
    for _ in range(9):
        assert await answer(scheduler, "w", LATE) is None
        clock.now += HOLD_S

    assert scheduler.policies() == {}


async def test_decisions_keep_their_distance(scheduler: GlobalScheduler, clock: FakeClock) -> None:
    await answer(scheduler, "w", LATE)
    clock.now += DECIDE_S / 2
    await answer(scheduler, "new", LATE)

    assert list(scheduler.policies()) == ["w"]
    clock.now += DECIDE_S / 2
    await answer(scheduler, "w", LATE)
    assert list(scheduler.policies()) == ["w", "new"]


async def test_what_a_silent_or_dead_worker_said_last_counts_no_more(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await answer(scheduler, "silent", StageReport(late_prefills=100.0))
    await answer(scheduler, "dead", StageReport(late_prefills=100.0))
    clock.now += SILENT_S
    assert await answer(scheduler, "w", LATE) is ALONE
    assert await answer(scheduler, "dead", IDLE, death="it failed") is None
    clock.now += HOLD_S

    policy = await answer(scheduler, "w", LATE)

    assert policy is not None
    assert policy.prefill_share == 0.9
    assert list(scheduler.policies()) == ["w"]


async def test_drafts_are_limited_on_a_saturated_draft_worker(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    status = DraftWorkerStatus("d", 1, ("suffix",), 3, 10, busy_share=1.0, memory_bytes=0)
    drafts = DraftStats({"suffix": DraftCounts(10, 10, 1)}, 0.1, 1.1, "run", 0.0)
    told = []
    for _ in range(3):
        await scheduler.report_draft_worker(DraftWorkerReport(DRAFTER, status))
        told.append(await answer(scheduler, "w", IDLE, drafts))
        clock.now += HOLD_S

    assert told[-1] == WorkerPolicy(1.0, 2, 2, PolicyReason.DRAFT_WORKER_FULL)
