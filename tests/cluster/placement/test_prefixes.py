"""The GlobalScheduler and what the workers tell of their queues and prefix caches."""

import logging
from typing import Any

import pytest

from cluster.placement.global_scheduler import GlobalScheduler
from cluster.placement.prefix_watch import (
    MAX_RESYNCS,
    MISMATCH_S,
    RESYNC_TIMEOUT_S,
    TOLD_AFTER_REQUESTS,
)
from cluster.placement.worker_views import SILENT_AFTER_S, SWEEP_S
from scheduler.placement import Placed, Placement, PlacementReason
from scheduler.prefill_queue import QueuedPrefill, QueueReport
from scheduler.prefix_index import PrefixDelta, pack
from scheduler.request import Request, Slo
from tests.workers.fake_clock import FakeClock
from workers.reports import WorkerReport

BLOCK = 32
FORMAT = f"sha256/0/{BLOCK}/model"
MANY = [f"w{number:03}" for number in range(100)]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1000.0)


@pytest.fixture
def scheduler(clock: FakeClock) -> GlobalScheduler:
    return GlobalScheduler(clock, max_num_seqs=4)


def request(request_id: str, first_block: int = 0, num_blocks: int = 10, **more: Any) -> Request:
    return Request(
        request_id,
        BLOCK * num_blocks + 1,
        5,
        block_hashes=pack(range(first_block, first_block + num_blocks)),
        prefix_format=FORMAT,
        **more,
    )


def delta(seq: int, *stored: int, snapshot: bool = False, format: str = FORMAT) -> PrefixDelta:
    return PrefixDelta("life", seq, format, pack(stored), snapshot=snapshot)


async def tell(scheduler: GlobalScheduler, worker_id: str, **said: Any) -> bool:
    """Report; returns whether a snapshot is asked for."""
    outstanding = said.pop("outstanding", {})
    finished = said.pop("finished", {})
    answer = await scheduler.report(
        WorkerReport(worker_id, outstanding, finished, said.pop("draining", False), **said)
    )
    return answer.resync_prefix


async def ask(scheduler: GlobalScheduler, request: Request, workers: list[str]) -> Placement:
    answer = await scheduler.place(request, workers)
    assert isinstance(answer, Placed)
    placement = (await scheduler.placements([request.request_id]))[request.request_id]
    assert placement.chosen.worker_id == answer.worker_id
    assert placement.chosen.forecast == answer.forecast
    return placement


async def test_a_prompt_goes_where_it_is_cached(scheduler: GlobalScheduler) -> None:
    for worker_id in "abc":
        held = range(8) if worker_id == "b" else ()
        await tell(scheduler, worker_id, prefix=delta(1, *held, snapshot=True))

    placement = await ask(scheduler, request("r"), list("abc"))

    assert (placement.chosen.worker_id, placement.reason) == ("b", PlacementReason.PREFIX)
    assert placement.chosen.forecast
    assert placement.runner_up
    assert placement.runner_up.forecast
    assert placement.chosen.forecast.num_cached_tokens == 8 * BLOCK
    assert placement.runner_up.forecast.num_cached_tokens == 0
    assert placement.chosen.forecast.prefill_s == pytest.approx((2 * BLOCK + 1) * 0.001)


async def test_prompts_that_begin_alike_go_together_before_any_is_computed(
    scheduler: GlobalScheduler,
) -> None:
    for worker_id in "abc":
        await tell(scheduler, worker_id, prefix=delta(1, snapshot=True))

    placements = [await ask(scheduler, request(str(n)), list("abc")) for n in range(3)]

    assert len({placement.chosen.worker_id for placement in placements}) == 1


async def test_a_long_queue_is_avoided(scheduler: GlobalScheduler) -> None:
    queue = QueueReport({"x": QueuedPrefill(5000, 5000, 9.0)})
    await tell(scheduler, "a", queue=queue, outstanding={"x": 1})
    await tell(scheduler, "b", outstanding={"y": 5000})

    placement = await ask(scheduler, request("r"), ["a", "b"])

    assert placement.chosen.worker_id == "b"
    assert placement.reason is PlacementReason.SOONEST_TOKEN
    assert placement.runner_up
    assert placement.runner_up.forecast
    assert placement.runner_up.forecast.ttft_s == pytest.approx(5.0 + 0.001 * (10 * BLOCK + 1))


async def test_the_answer_says_what_the_workers_hash(scheduler: GlobalScheduler) -> None:
    await tell(scheduler, "a", prefix=delta(1, 1, snapshot=True, format="f/0/16/model"))

    placed = await scheduler.place(request("r"), ["a"])

    assert isinstance(placed, Placed)
    assert placed.prefix_format == "f/0/16/model"


async def test_formats_that_differ_are_counted_and_logged_once_if_that_lasts(
    scheduler: GlobalScheduler, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    await tell(scheduler, "a", prefix=delta(1, 1, snapshot=True, format="f/0/16/model"))
    counts = []
    with caplog.at_level(logging.WARNING):
        for number in range(4):
            await scheduler.place(request(str(number)), ["a"])
            clock.now += MISMATCH_S / 2 + 0.1
            counts.append(len(caplog.records))
            await scheduler.beat("a", None)

    assert counts == [0, 0, 1, 1]
    assert vars(caplog.records[0])["ingress"] == FORMAT
    assert vars(caplog.records[0])["worker"] == "f/0/16/model"
    assert scheduler.prefix_stats().num_format_mismatches >= 4


async def test_after_a_restart_a_few_workers_at_a_time_tell_all(clock: FakeClock) -> None:
    scheduler = GlobalScheduler(clock)

    asked = [one for one in MANY if await tell(scheduler, one, prefix=delta(7, 1))]
    again = [one for one in MANY if await tell(scheduler, one, prefix=delta(8, 1))]
    for one in asked[:2]:
        assert not await tell(scheduler, one, prefix=delta(9, 1, 2, snapshot=True))
    then = [one for one in MANY if await tell(scheduler, one, prefix=delta(10, 3))]

    assert (asked, again) == (MANY[:MAX_RESYNCS], [])
    assert then == MANY[MAX_RESYNCS : MAX_RESYNCS + 2]
    assert scheduler.prefix_stats().num_resyncs == MAX_RESYNCS + 2
    assert scheduler.prefix_stats().num_blocks == 3


async def test_a_worker_that_does_not_answer_is_asked_again(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    asked = []
    for _ in range(3):
        asked.append(await tell(scheduler, "a", prefix=delta(7, 1)))
        clock.now += RESYNC_TIMEOUT_S * 0.6

    assert asked == [True, False, True]


async def test_all_workers_are_known_in_the_end_whoever_dies_meanwhile(
    clock: FakeClock,
) -> None:
    scheduler = GlobalScheduler(clock)
    seqs, wanted, rounds = dict.fromkeys(MANY, 7), set[str](), 0
    while scheduler.prefix_stats().num_workers < len(MANY) - 3:
        rounds += 1
        for one in MANY[3:]:
            seqs[one] += 1
            change = delta(seqs[one], 1, snapshot=one in wanted)
            wanted.discard(one)
            if await tell(scheduler, one, prefix=change):
                wanted.add(one)
        if rounds == 1:
            for one in MANY[:3]:
                await tell(scheduler, one, prefix=delta(7, 1))
                await scheduler.bury(one, "killed")
        clock.now += 0.25

    assert rounds <= len(MANY) / MAX_RESYNCS + 2


@pytest.mark.parametrize("dies", ["its engine", "its process"])
async def test_what_a_dead_worker_had_is_forgotten(scheduler: GlobalScheduler, dies: str) -> None:
    await tell(scheduler, "a", prefix=delta(1, *range(10), snapshot=True))
    await tell(scheduler, "b", prefix=delta(1, snapshot=True))
    if dies == "its engine":
        await tell(scheduler, "a", death="a step failed")
    else:
        await scheduler.bury("a", "ActorDiedError")
    late = await tell(scheduler, "a", prefix=delta(2, 77))

    placement = await ask(scheduler, request("r"), ["a", "b"])

    assert placement.chosen.worker_id == "b"
    assert scheduler.prefix_stats().num_workers == 1
    assert not late


async def test_what_a_worker_had_is_forgotten_when_it_is_gone(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await tell(scheduler, "a", prefix=delta(1, *range(10), snapshot=True))
    clock.now += SILENT_AFTER_S + 0.1
    await tell(scheduler, "b", prefix=delta(1, snapshot=True))
    await ask(scheduler, request("r"), ["b"])

    assert scheduler.prefix_stats().num_workers == 1


async def test_placement_keeps_no_hashes(scheduler: GlobalScheduler) -> None:
    await ask(scheduler, request("r", slo=Slo(ttft_s=1.0)), ["a"])

    [(kept, _)] = scheduler._workers._views["a"].placed.values()
    assert (kept.block_hashes, kept.slo.ttft_s) == (b"", 1.0)


async def test_workers_that_tell_nothing_are_counted(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await tell(scheduler, "tells nothing")
    await tell(scheduler, "tells of no block", prefix=delta(1, snapshot=True))
    await tell(scheduler, "tells", prefix=delta(1, 1, snapshot=True))
    before = scheduler.prefix_stats().num_untold
    for number in range(TOLD_AFTER_REQUESTS + 1):
        for worker_id in ("tells of no block", "tells"):
            name = f"{number} {worker_id}"
            await ask(scheduler, request(name), [worker_id])
            await tell(scheduler, worker_id, finished={name: 1}, prefix=delta(1).settled())

    assert (before, scheduler.prefix_stats().num_untold) == (1, 2)


async def test_among_many_workers_those_that_are_worse_are_left_out(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    full = {str(number): 1 for number in range(4)}
    for worker_id in MANY[:4]:
        await tell(scheduler, worker_id, outstanding={"x": 9})
    clock.now += SILENT_AFTER_S + SWEEP_S
    busy = QueueReport({"x": QueuedPrefill(900, 900, 9.0)})
    for number, worker_id in enumerate(MANY[4:]):
        queue = busy if number != 90 else QueueReport()
        await tell(
            scheduler,
            worker_id,
            queue=QueueReport() if number < 20 else queue,
            outstanding=full if number < 10 else {"x": 9},
            draining=10 <= number < 20,
        )

    placement = await ask(scheduler, request("r"), MANY)

    assert placement.chosen.worker_id == MANY[94]
    assert placement.num_closed == 10
    assert placement.runner_up
    assert placement.runner_up.worker_id in MANY[24:]


async def test_if_all_of_many_workers_are_full_or_silent_the_full_ones_are_chosen(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    for worker_id in MANY[:50]:
        await tell(scheduler, worker_id)
    clock.now += SILENT_AFTER_S + SWEEP_S
    for worker_id in MANY[50:]:
        await tell(scheduler, worker_id, outstanding={str(number): 1 for number in range(4)})

    chosen = {(await ask(scheduler, request(str(n), 100 * n), MANY)).chosen for n in range(5)}

    assert all(load.worker_id in MANY[50:] and not load.silent for load in chosen)


async def test_the_last_of_many_workers_has_a_runner_up(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    for worker_id in MANY[1:]:
        await tell(scheduler, worker_id)
    clock.now += SILENT_AFTER_S + SWEEP_S
    await tell(scheduler, MANY[0], outstanding={"x": 9})

    placement = await ask(scheduler, request("r"), MANY)

    assert placement.chosen.worker_id == MANY[0]
    assert placement.reason is PlacementReason.OTHERS_SILENT


async def test_many_new_workers_all_get_requests(scheduler: GlobalScheduler) -> None:
    chosen = [(await ask(scheduler, request(str(n), 100 * n), MANY)).chosen for n in range(100)]

    assert {load.worker_id for load in chosen} == set(MANY)


async def test_without_forecasts_the_fewest_outstanding_tokens_decide(clock: FakeClock) -> None:
    scheduler = GlobalScheduler(clock, predicts=False)
    await tell(scheduler, "a", outstanding={"x": 90}, prefix=delta(1, *range(10), snapshot=True))
    await tell(scheduler, "b", outstanding={"y": 10})

    placement = await ask(scheduler, request("r"), ["a", "b"])

    assert placement.chosen.worker_id == "b"
    assert placement.chosen.forecast is None
