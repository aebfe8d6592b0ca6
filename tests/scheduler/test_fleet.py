from scheduler.fleet import Fleet
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


def test_of_many_workers_those_with_the_prefix_and_those_with_nothing_to_do_are_looked_at() -> None:
    fleet = Fleet()
    names = [f"w{index:03}" for index in range(100)]
    for index, name in enumerate(names):
        reported(fleet, name, 1, *((1, 2) if index == 99 else ()), q=index * 10)

    forecasts = fleet.forecasts(request("r", 1, 2), names, 0.0)

    assert len(forecasts) < 20
    assert {"w000", "w099"} <= forecasts.keys()
