import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import fair_shares
from scheduler.fair_shares import (
    GONE_AFTER_S,
    HOLD_S,
    KNOWN_S,
    LOST_AFTER_S,
    MAX_RETRY_S,
    MAX_TENANTS,
    MAX_WAITING,
    MAX_WAITING_OF_TENANT,
    MIN_RETRY_S,
    DeviceTime,
    FairShares,
    device_time,
    num_places,
    yielding,
)
from scheduler.placement import RefusalReason, Refused, WorkerLoad, place
from scheduler.prefill_queue import Forecast
from scheduler.request import Request, Slo

NUM_SEATS = 8
RESERVE = 1
TWO = {"a": 1.0, "b": 1.0}


@dataclass(frozen=True)
class Asked:
    """A request that comes at some time and takes some time on its seat."""

    request: Request
    at_s: float
    seconds: float


@dataclass
class Seats:
    """Workers on whose seats requests take the time that they are charged; clients that ask again
    as they are told, or leave."""

    weights: Mapping[str, float] = field(default_factory=lambda: TWO)
    num_workers: int = 1
    leaves: frozenset[str] = frozenset()
    """Requests whose clients leave when they have to wait."""
    placed: list[tuple[float, Request]] = field(default_factory=list)
    """In their order."""
    refused: list[Request] = field(default_factory=list)
    gone: list[Request] = field(default_factory=list)
    most_running: int = 0

    def __post_init__(self) -> None:
        self.shares = FairShares(self.weights)
        self.running: dict[str, dict[str, float]] = {f"w{n}": {} for n in range(self.num_workers)}
        self.now = 0.0

    def run(self, asked: list[Asked], until_s: float = 1e9) -> None:
        events = [(one.at_s, number, "asks", one) for number, one in enumerate(asked)]
        heapq.heapify(events)
        number = len(events)
        while events and events[0][0] <= until_s:
            self.now, _, kind, one = heapq.heappop(events)
            number += 1
            if kind == "ends":
                for seats in self.running.values():
                    seats.pop(one.request.request_id, None)
                self.shares.end(one.request.request_id)
                continue
            answer = self.ask(one)
            if answer is None:
                heapq.heappush(events, (self.now + one.seconds, number, "ends", one))
            elif answer.is_final:
                self.refused.append(one.request)
            elif one.request.request_id in self.leaves:
                self.gone.append(one.request)
            else:
                assert MIN_RETRY_S <= answer.retry_after_s <= MAX_RETRY_S
                heapq.heappush(events, (self.now + answer.retry_after_s, number, "asks", one))

    def ask(self, one: Asked) -> Refused | None:
        request = yielding(one.request, self.shares.yields(one.request, self.now))
        loads = [
            WorkerLoad(worker_id, 0, len(seats), max_num_seqs=NUM_SEATS)
            for worker_id, seats in self.running.items()
        ]
        if (wait_s := self.shares.wait_s(request, loads, self.now)) is not None:
            return self.shares.wait(request, wait_s, self.now)
        placement = place(request, loads)
        assert placement
        worker_id = placement.chosen.worker_id
        self.shares.place(request, worker_id, DeviceTime(one.seconds), self.now)
        self.running[worker_id][request.request_id] = one.seconds
        self.most_running = max(self.most_running, *map(len, self.running.values()))
        self.placed.append((self.now, one.request))
        return None


def flood(
    tenant: str, num: int, at_s: float = 0.0, seconds: float = 1.0, every_s: float = 0.0
) -> list[Asked]:
    return [
        Asked(Request(f"{tenant}{n}", 10, 10, tenant=tenant), at_s + n * every_s, seconds)
        for n in range(num)
    ]


def seconds_by_tenant(seats: Seats, asked: list[Asked], until_s: float) -> dict[str, float]:
    """What each tenant was given until a time."""
    seconds = {one.request.request_id: one.seconds for one in asked}
    found = dict.fromkeys((request.tenant for _, request in seats.placed), 0.0)
    for at_s, request in seats.placed:
        if at_s <= until_s:
            found[request.tenant] += seconds[request.request_id]
    return found


A_FLOOD = st.builds(
    flood,
    st.sampled_from(["a", "b", "c"]),
    st.integers(1, 30),
    st.floats(0, 5),
    st.floats(0.05, 3),
    st.floats(0, 0.5),
)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(A_FLOOD, max_size=3, unique_by=lambda asked: asked[0].request.tenant),
    st.integers(1, 3),
    st.sets(st.integers(0, 29)),
)
def test_each_request_is_placed_refused_or_gone_once_and_nothing_is_left(
    floods: list[list[Asked]], num_workers: int, leaving: set[int]
) -> None:
    asked = [one for flood in floods for one in flood]
    leaves = frozenset(f"{tenant}{n}" for n in leaving for tenant in "abc")
    seats = Seats(num_workers=num_workers, leaves=leaves)

    seats.run(asked)

    ended = [request for _, request in seats.placed] + seats.gone + seats.refused
    assert sorted(one.request_id for one in ended) == sorted(
        one.request.request_id for one in asked
    )
    assert not seats.refused
    assert seats.most_running <= NUM_SEATS + RESERVE
    seats.shares.yields(Request("last", 1, 1, tenant="a"), seats.now + 2 * GONE_AFTER_S + KNOWN_S)
    assert seats.shares.num_waiting == 0
    assert list(seats.shares.shares()) == ["a"]
    assert seats.shares.shares()["a"].running_s == 0


@settings(deadline=None, max_examples=10)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]), st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2
    ),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.floats(0.3, 2.0)),
    st.integers(0, 1000),
)
def test_what_waiting_tenants_get_is_in_proportion_to_their_weights(
    weights: dict[str, float], sizes: dict[str, float], seed: int
) -> None:
    random = Random(seed)
    asked = []
    for tenant in weights:
        size = sizes.get(tenant, 1.0)
        asked += [
            replace(one, seconds=size * random.uniform(0.5, 1.5))
            for one in flood(tenant, int(120 / size))
        ]
    random.shuffle(asked)
    seats = Seats(weights)
    until_s = 12.0  # all still wait: the 120 s of work of one take at least 120 / 9 s

    seats.run(asked, until_s)

    got = seconds_by_tenant(seats, asked, until_s)
    total_s = sum(got.values())
    assert total_s > 0.4 * until_s * (NUM_SEATS - RESERVE)  # and the seats are used
    for tenant, weight in weights.items():
        own_s = total_s * weight / sum(weights.values())
        most_s = 1.5 * sizes.get(tenant, 1.0)
        assert got[tenant] == pytest.approx(own_s, rel=0.1, abs=3 * most_s)


def test_a_tenant_that_comes_to_seats_full_of_anothers_requests_goes_first() -> None:
    seats = Seats()
    seats.run(flood("a", 100, seconds=10.0) + flood("b", 1, at_s=1.0), until_s=2.0)

    assert [at_s for at_s, request in seats.placed if request.tenant == "b"] == [1.0]


def test_its_later_requests_go_first_until_it_has_as_many() -> None:
    asked = flood("a", 100, seconds=4.0) + flood("b", 100, at_s=1.0, seconds=4.0)
    seats = Seats()
    seats.run(asked, until_s=30.0)

    by_tenant = [request.tenant for at_s, request in seats.placed if at_s >= 1.0]
    assert by_tenant[:4] == ["b"] * 4
    assert Counter(by_tenant[:30])["b"] == pytest.approx(15 + 4, abs=2)


def test_an_idle_tenant_saves_nothing_up() -> None:
    """What it gets beyond its share when it comes is what the other has running."""
    asked = flood("a", 400, seconds=1.0) + flood("b", 400, at_s=20.0, seconds=1.0)
    seats = Seats()
    seats.run(asked, until_s=40.0)

    got = Counter(request.tenant for at_s, request in seats.placed if at_s >= 20.0)
    assert got["b"] - got["a"] == pytest.approx(NUM_SEATS, abs=4)


def test_light_use_beside_a_flood_is_no_credit() -> None:
    """One request at a time all along, then a flood of its own."""
    asked = flood("a", 400, seconds=1.0) + flood("b", 20, seconds=0.9, every_s=1.0)
    late = [
        replace(one, request=replace(one.request, request_id=f"late{one.request.request_id}"))
        for one in flood("b", 400, at_s=20.0, seconds=1.0)
    ]
    seats = Seats()
    seats.run(asked + late, until_s=40.0)

    got = Counter(request.tenant for at_s, request in seats.placed if at_s >= 20.0)
    assert 0 <= got["b"] - got["a"] <= NUM_SEATS + 2


def test_no_tenant_starves_however_many_others_come() -> None:
    asked = flood("a", 1, at_s=5.0, seconds=1.0)
    for n in range(20):
        asked += [
            replace(one, request=replace(one.request, tenant=f"t{n}", request_id=f"t{n}-{k}"))
            for k, one in enumerate(flood("t", 40, at_s=0.1 * n, every_s=0.3))
        ]
    seats = Seats()
    seats.run(asked)

    [waited_s] = [at_s - 5.0 for at_s, request in seats.placed if request.tenant == "a"]
    assert waited_s < 20 / (NUM_SEATS - RESERVE) + 1.0  # one of each of the others


def test_a_tenants_own_requests_go_by_priority_then_deadline() -> None:
    slos = {"late": Slo(30.0), "soon": Slo(5.0), "first": Slo(60.0)}
    asked = [replace(one, seconds=1 + n / 5) for n, one in enumerate(flood("a", 40))]
    for name, slo in slos.items():
        request = Request(name, 10, 10, priority=-(name == "first"), slo=slo, tenant="a")
        asked.append(Asked(request, 0.5, 1.0))
    seats = Seats()
    seats.run(asked)

    order = [request.request_id for _, request in seats.placed]
    assert sorted(slos, key=order.index) == ["first", "soon", "late"]
    assert order.index("late") < len(order) - 20  # before those without a deadline


def test_a_priority_counts_only_within_a_tenant() -> None:
    asked = flood("a", 100) + flood("b", 100)
    asked = [
        replace(one, request=replace(one.request, priority=-(10**6) * (one.request.tenant == "a")))
        for one in asked
    ]
    seats = Seats()
    seats.run(asked, until_s=8.0)

    got = Counter(request.tenant for _, request in seats.placed)
    assert got["a"] == pytest.approx(got["b"], abs=4)


def test_alone_in_the_config_a_tenant_never_waits() -> None:
    seats = Seats(weights={"a": 1.0})
    seats.run(flood("a", 100), until_s=0.0)

    assert len(seats.placed) == 100
    assert not any(request.priority for _, request in seats.placed)


def test_equal_histories_give_equal_decisions() -> None:
    asked = flood("a", 50) + flood("b", 50, at_s=1.0, seconds=0.3) + flood("c", 9, every_s=0.7)
    runs = [Seats(), Seats()]
    for seats in runs:
        seats.run(asked)

    assert runs[0].placed == runs[1].placed


def test_no_more_wait_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_shares, "MAX_WAITING_OF_TENANT", 20)
    monkeypatch.setattr(fair_shares, "MAX_WAITING", 30)
    seats = Seats()
    seats.run(flood("a", 60), until_s=0.0)
    seats.run(flood("b", 60), until_s=0.0)

    assert len(seats.refused) > 60
    assert seats.shares.num_waiting == 30
    assert seats.shares.shares()["a"].num_waiting == 20


def test_many_tenants_are_not_remembered_for_ever() -> None:
    shares = FairShares()
    for number in range(2 * MAX_TENANTS):
        request = Request(f"r{number}", 1, 1, tenant=f"t{number}")
        shares.yields(request, number / 1000)
        shares.place(request, "w", DeviceTime(1.0), number / 1000)
        shares.end(request.request_id)

    assert len(shares.shares()) <= MAX_TENANTS + 1


def test_one_that_stops_asking_is_passed_over_then_forgotten() -> None:
    leaves = frozenset({"a8"})
    seats = Seats(leaves=leaves)
    seats.run(flood("a", 12, seconds=1.0))

    assert [request.request_id for request in seats.gone] == ["a8"]
    assert seats.now < 3.5  # two rounds of seats, with pauses
    assert seats.shares.num_waiting == 1
    seats.shares.yields(Request("x", 1, 1, tenant="b"), seats.now + GONE_AFTER_S + 1)
    seats.shares.yields(Request("x", 1, 1, tenant="b"), seats.now + 2 * GONE_AFTER_S + 2)
    assert seats.shares.num_waiting == 0


def test_a_request_that_goes_on_elsewhere_does_not_wait() -> None:
    seats = Seats()
    seats.run(flood("a", 50), until_s=0.0)
    lost = Request("lost", 10, 10, tenant="a", num_attempts=1)

    assert seats.ask(Asked(lost, 0.0, 1.0)) is None


def test_what_requests_took_is_settled_when_they_end() -> None:
    shares = FairShares(TWO)
    request = Request("r", 10, 1000, tenant="a")
    shares.yields(request, 0.0)
    shares.place(request, "w", DeviceTime(1.0, 0.1, 1000), 0.0)
    assert shares.shares()["a"].running_s == pytest.approx(101.0)
    shares.end("r", 20)

    assert shares.shares()["a"].running_s == 0
    assert shares.shares()["a"].attained_s == pytest.approx(3.0)


def test_requests_that_a_worker_has_lost_run_no_more() -> None:
    shares = FairShares(TWO)
    for name, worker_id in (("r", "w"), ("s", "w"), ("t", "v")):
        shares.place(Request(name, 10, 10, tenant="a"), worker_id, DeviceTime(1.0), 0.0)
    shares.sweep("w", ["s"], LOST_AFTER_S)
    assert shares.shares()["a"].running_s == 3
    shares.sweep("w", ["s"], LOST_AFTER_S + 0.1)
    assert shares.shares()["a"].running_s == 2
    shares.forget("v")
    assert shares.shares()["a"].running_s == 1


def test_a_worker_has_room_while_a_prefill_would_soon_begin() -> None:
    def load(wait_s: float, num_requests: int = 1, fits: bool = True) -> WorkerLoad:
        forecast = Forecast(prefill_s=0.1, wait_s=wait_s, ttft_s=9.0, fits=fits)
        return WorkerLoad("w", 0, num_requests, max_num_seqs=NUM_SEATS, forecast=forecast)

    assert num_places([load(0.05)], yields=True) == 3
    assert num_places([load(0.05), load(0.05)], yields=True) == 6
    assert num_places([load(HOLD_S)], yields=True) == 1
    assert num_places([load(HOLD_S + 0.01)], yields=True) == 0
    assert num_places([load(9.0, num_requests=0)], yields=True) == NUM_SEATS - RESERVE
    assert num_places([load(0.1, fits=False)], yields=False) == 0
    assert num_places([load(0.1, NUM_SEATS - RESERVE)], yields=True) == 0
    assert num_places([load(0.1, NUM_SEATS)], yields=False) == 1
    assert num_places([replace(load(0.1), draining=True)], yields=False) == 0
    assert num_places([replace(load(0.1), on_trial=True)], yields=False) == 0


def test_a_request_costs_what_is_not_cached_and_what_it_will_give() -> None:
    request = Request("r", 100, 50, num_prior_tokens=10)
    load = WorkerLoad(
        *("w", 0, 0),
        token_s=0.01,
        slowness=2.0,
        tokens_per_decode=4.0,
        forecast=Forecast(num_cached_tokens=60, prefill_s=0.5, ttft_s=0.5),
    )

    assert device_time(request, load) == DeviceTime(0.5, 0.005, 40)
    assert device_time(request, load, 30).seconds() == pytest.approx(0.6)
    assert device_time(request, replace(load, token_s=None)).token_s == pytest.approx(0.0025)


def test_a_queued_request_asks_again_and_one_too_many_does_not() -> None:
    assert not Refused(RefusalReason.QUEUED, 1.0).is_final
    assert Refused(RefusalReason.OVERLOAD, 1.0).is_final
    assert MAX_WAITING_OF_TENANT < MAX_WAITING
