import random

from scheduler.fleet import NUM_CACHED, NUM_SHORT, Fleet
from scheduler.prefill_queue import PrefillCost, QueuedPrefill, QueueReport
from scheduler.prefix_index import PrefixDelta, pack
from scheduler.request import Request, Slo

FORMAT = "test//100"
COST = PrefillCost(token_s=0.01)


def request(name: str, *blocks: int) -> Request:
    return Request(
        name,
        num_prompt_tokens=100 * len(blocks) + 1,
        max_tokens=10,
        slo=Slo(ttft_s=100.0),
        block_hashes=pack(blocks),
        prefix_format=FORMAT,
    )


def reported(fleet: Fleet, worker_id: str, seq: int, *blocks: int, **queued: int) -> bool:
    queue = QueueReport({name: QueuedPrefill(n, n, 100.0) for name, n in queued.items()}, COST)
    delta = PrefixDelta("life", seq, FORMAT, pack(blocks), snapshot=seq == 1)
    return fleet.report(worker_id, queue, list(queued), delta, 0.0)


def cached(fleet: Fleet, one: Request) -> dict[str, int]:
    return {
        worker_id: forecast.num_cached_tokens
        for worker_id, forecast in fleet.forecasts(one, ["a", "b"], 0.0).items()
    }


def test_a_forecast_knows_queue_and_cache_of_each_worker() -> None:
    fleet = Fleet()
    reported(fleet, "a", 1, 1, 2, q=500)
    reported(fleet, "b", 1)

    forecasts = fleet.forecasts(request("r", 1, 2, 3), ["a", "b"], 0.0)

    assert forecasts["a"].num_cached_tokens == 200
    assert forecasts["a"].ttft_s > 5.0
    assert forecasts["b"].num_cached_tokens == 0
    assert forecasts["b"].ttft_s < 3.1


def test_a_burst_with_one_new_prefix_finds_it_where_the_first_was_placed() -> None:
    fleet = Fleet()
    reported(fleet, "a", 1)
    reported(fleet, "b", 1)

    fleet.place("b", request("first", 1, 2), 0.0)

    assert cached(fleet, request("second", 1, 2, 3)) == {"a": 0, "b": 200}


def test_what_was_expected_is_forgotten_if_it_never_comes() -> None:
    fleet = Fleet()
    reported(fleet, "a", 1)
    fleet.place("a", request("first", 1, 2), 0.0)
    reported(fleet, "a", 2, first=200)
    assert cached(fleet, request("second", 1, 2))["a"] == 200

    fleet.report("a", QueueReport({}, COST), ["first"], PrefixDelta("life", 3, FORMAT, b""), 0.0)

    assert cached(fleet, request("second", 1, 2))["a"] == 0


def test_what_was_expected_stays_when_it_is_reported() -> None:
    fleet = Fleet()
    reported(fleet, "a", 1)
    fleet.place("a", request("first", 1, 2), 0.0)
    delta = PrefixDelta("life", 2, FORMAT, pack([1, 2]))

    fleet.report("a", QueueReport({}, COST), ["first"], delta, 0.0)

    assert cached(fleet, request("second", 1, 2))["a"] == 200
    assert fleet.index.num_blocks_of("a") == 2


def test_a_worker_that_is_gone_has_nothing() -> None:
    fleet = Fleet()
    reported(fleet, "a", 1, 1, 2, q=500)
    fleet.forget("a")

    forecast = fleet.forecasts(request("r", 1, 2), ["a"], 0.0)["a"]

    assert (forecast.num_cached_tokens, forecast.ttft_s) == (0, forecast.prefill_s)


def test_after_a_gap_a_snapshot_is_wanted() -> None:
    fleet = Fleet()
    assert reported(fleet, "a", 1, 1)
    assert not reported(fleet, "a", 3, 2)


WORKERS = [f"w{number:02}" for number in range(60)]


def queue(num_tokens: int) -> QueueReport:
    return QueueReport({"x": QueuedPrefill(num_tokens, num_tokens, 9.0)})


def test_of_many_workers_those_with_short_queues_or_much_of_the_prompt_are_compared() -> None:
    draw, fleet = random.Random(0), Fleet()
    for round_ in range(3):  # what was reported last counts
        todo = {one: draw.randrange(1, 8000) for one in WORKERS}
        for one in WORKERS:
            fleet.report(one, queue(todo[one]), (), None, round_)
    cached = dict(zip(draw.sample(WORKERS, 12), range(5, 17), strict=True))
    for one, num_blocks in cached.items():
        blocks = pack(range(1, num_blocks + 1))
        fleet.report(
            one, queue(todo[one]), (), PrefixDelta("1", 1, FORMAT, blocks, snapshot=True), 3.0
        )
    fleet.forget(gone := min(WORKERS, key=todo.__getitem__))
    listed = [one for one in WORKERS if one != gone]

    found = fleet.forecasts(request("r", *range(1, 21)), listed, 3.0)

    most = sorted(cached.keys() - {gone}, key=cached.__getitem__)[-NUM_CACHED:]
    shortest = sorted(listed, key=todo.__getitem__)[:NUM_SHORT]
    assert found.keys() == {*most, *shortest}
    assert all(found[one].num_cached_tokens == cached[one] * 100 for one in most)


def test_workers_that_have_not_reported_are_compared() -> None:
    fleet = Fleet()
    for one in WORKERS[2:]:
        fleet.report(one, queue(100), (), None, 0.0)

    assert {*WORKERS[:2]} <= fleet.forecasts(request("r", *range(1, 21)), WORKERS, 0.0).keys()


def test_what_was_placed_makes_a_queue_longer() -> None:
    fleet = Fleet()
    placed = []
    for number in range(len(WORKERS)):
        new = Request(str(number), 100, 9)
        found = fleet.forecasts(new, WORKERS, 0.0)
        placed.append(min(found, key=lambda one: found[one].ttft_s))
        fleet.place(placed[-1], new, 0.0)

    assert sorted(placed) == WORKERS
