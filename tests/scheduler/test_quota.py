"""Quotas: what an account grants to the purses of several ingresses, with a clock of the test."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.purse import Purse
from scheduler.quota import Account, Quota

SYNC_S = 0.5


@dataclass
class Cluster:
    """Ingresses and the account of one tenant, as the app wires them."""

    quota: Quota
    num_ingresses: int = 2
    now: float = 0.0
    reachable: bool = True
    account: Account | None = None
    purses: list[Purse] = field(default_factory=list)
    live: list[tuple[int, float]] = field(default_factory=list)
    num_asked: int = 0
    retry_after_s: float = 0.0

    def __post_init__(self) -> None:
        self.purses = [
            Purse(self.quota, self.num_ingresses, 0.0) for _ in range(self.num_ingresses)
        ]

    def draw(self, index: int, has_call: bool = False) -> None:
        purse = self.purses[index]
        if not self.reachable:
            purse.refill(self.now)
            return
        self.num_asked += 1
        draw = purse.draw(has_call, self.now)
        if self.account is None:
            self.account = Account(self.quota, draw.levels, self.now)
        purse.take(self.account.draw(str(index), draw, self.now), self.now)

    def call(self, index: int) -> bool:
        """A call at one ingress; whether it is admitted."""
        purse = self.purses[index]
        charged = purse.admit()
        if charged is None and not purse.shortage(self.now):
            self.draw(index, has_call=True)
            charged = purse.admit()
        if charged is not None:
            self.live.append((index, charged))
            return True
        shortage = purse.shortage(self.now)
        assert shortage is not None
        self.retry_after_s = shortage.retry_after_s
        return False

    def end(self, num_tokens: int = 0) -> None:
        """End the oldest call."""
        index, charged = self.live.pop(0)
        self.purses[index].settle(charged, num_tokens, 0.1)
        if self.purses[index].hoards:
            self.draw(index)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with the draws that an ingress makes by itself."""
        end_s = self.now + seconds
        while self.now < end_s:
            step_s = min(SYNC_S - self.now % SYNC_S, end_s - self.now)
            self.now += max(step_s, 1e-9)
            if self.now % SYNC_S < 1e-6:
                for index, purse in enumerate(self.purses):
                    if not purse.is_empty:
                        self.draw(index)


def flood(
    cluster: Cluster,
    seconds: float,
    per_s: float,
    weights: tuple[int, ...] = (1, 1),
    tokens: int = 0,
) -> int:
    """Calls at a rate, spread over the ingresses by weight; the number of those admitted."""
    turns = [index for index, weight in enumerate(weights) for _ in range(weight)]
    admitted = 0
    for number in range(round(seconds * per_s)):
        if cluster.call(turns[number % len(turns)]):
            admitted += 1
            cluster.end(tokens)
        cluster.pass_time(1 / per_s)
    return admitted


@pytest.mark.parametrize("per_minute", [6, 60, 600, 6000])
@pytest.mark.parametrize("weights", [(1, 1), (9, 1), (1, 0)])
def test_a_flood_over_several_ingresses_gets_the_quota(
    per_minute: int, weights: tuple[int, ...]
) -> None:
    cluster = Cluster(Quota(requests_per_s=per_minute / 60))

    admitted = flood(cluster, 60, 10 * per_minute / 60, weights)

    burst = max(3 * per_minute / 60, 1)
    assert 0.95 * per_minute <= admitted <= per_minute + burst
    assert flood(cluster, 60, 10 * per_minute / 60, weights) == pytest.approx(per_minute, rel=0.02)


@pytest.mark.parametrize("tokens", [1, 150, 3000])
def test_a_flood_gets_its_quota_of_tokens_however_long_its_calls_are(tokens: int) -> None:
    cluster = Cluster(Quota(tokens_per_s=1000))
    flood(cluster, 60, 20, tokens=tokens)

    admitted = flood(cluster, 60, min(10 * 1000 / tokens, 2000), tokens=tokens)

    assert admitted * tokens == pytest.approx(60 * 1000, rel=0.05)


@pytest.mark.parametrize("max_concurrency", [1, 2, 5, 100])
def test_no_more_calls_run_at_the_same_time_and_none_is_refused_before(
    max_concurrency: int,
) -> None:
    cluster = Cluster(Quota(max_concurrency=max_concurrency))
    for number in range(max_concurrency * 3):
        assert cluster.call(number % 2) is (number < max_concurrency), number
    for _ in range(50):  # whoever ends, the next is admitted at once, at any ingress
        cluster.end()
        cluster.pass_time(0.06)
        assert cluster.call(0)
        assert not cluster.call(1)


def test_what_a_tenant_saves_up_is_its_burst() -> None:
    cluster = Cluster(Quota(requests_per_s=1, burst_s=10))

    first = sum(cluster.call(0) for _ in range(30))
    cluster.pass_time(5)
    then = sum(cluster.call(1) for _ in range(30))
    cluster.pass_time(1000)

    assert (first, then) == (10, 5)
    assert sum(cluster.call(number % 2) for number in range(30)) == 10


@pytest.mark.parametrize("quota", [Quota(requests_per_s=2), Quota(tokens_per_s=100)])
def test_a_refusal_says_truly_when_to_come_again(quota: Quota) -> None:
    cluster = Cluster(quota)
    while cluster.call(0):
        cluster.end(130)
    wait_s = cluster.retry_after_s

    cluster.pass_time(wait_s * 0.9)
    assert not cluster.call(0)
    cluster.pass_time(wait_s * 0.11 + 1e-6)
    assert cluster.call(0)


def test_a_quiet_tenant_asks_nothing_and_a_flood_asks_little() -> None:
    cluster = Cluster(Quota(requests_per_s=100, max_concurrency=50))
    flood(cluster, 10, 1000)
    assert cluster.num_asked < 1000  # of 10,000 calls

    cluster.pass_time(5)
    asked = cluster.num_asked
    cluster.pass_time(60)
    assert cluster.num_asked == asked


def test_ingresses_that_cannot_reach_the_account_go_on_within_their_shares() -> None:
    cluster = Cluster(Quota(requests_per_s=10, max_concurrency=10))
    flood(cluster, 60, 100, (3, 1))

    cluster.reachable = False
    alone = flood(cluster, 60, 100, (3, 1))
    cluster.reachable = True
    back = flood(cluster, 60, 100, (3, 1))

    assert alone == pytest.approx(600, rel=0.05)
    assert back == pytest.approx(600, rel=0.05)


def test_an_account_that_starts_again_gives_no_second_burst() -> None:
    cluster = Cluster(Quota(requests_per_s=1, burst_s=60))
    assert sum(cluster.call(number % 2) for number in range(200)) == 60

    cluster.account = None

    assert sum(cluster.call(number % 2) for number in range(200)) == 0


def test_calls_of_an_ingress_that_is_gone_make_room_after_a_while() -> None:
    cluster = Cluster(Quota(max_concurrency=2))
    assert cluster.call(0)
    assert cluster.call(0)
    assert not cluster.call(1)

    cluster.purses[0] = Purse(cluster.quota, 2, cluster.now)  # it was killed with its calls
    cluster.pass_time(10)

    assert cluster.call(1)


@pytest.mark.parametrize("name", ["requests_per_s", "tokens_per_s", "max_concurrency", "burst_s"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_quota_that_allows_nothing_is_none(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be positive"):
        Quota(**{name: value})


@settings(max_examples=200, deadline=None)
@given(
    quota=st.builds(
        Quota,
        requests_per_s=st.sampled_from([0.1, 1.0, 50.0, math.inf]),
        tokens_per_s=st.sampled_from([10.0, 1000.0, math.inf]),
        max_concurrency=st.sampled_from([1, 3, math.inf]),
        burst_s=st.sampled_from([0.1, 3.0, 60.0]),
    ),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["call", "end", "pass", "cut", "heal", "restart"]),
            st.integers(0, 2),
            st.floats(0.001, 5.0),
        ),
        max_size=120,
    ),
)
def test_whatever_happens_no_more_is_admitted_than_the_quota_and_its_shares_allow(
    quota: Quota, steps: list[tuple[str, int, float]]
) -> None:
    cluster = Cluster(quota, num_ingresses=3)
    admitted, cuts, num_most = 0, 0, 0
    for what, index, seconds in steps:
        if what == "call":
            admitted += cluster.call(index)
        elif what == "end" and cluster.live:
            cluster.end(int(seconds * 100))
        elif what == "pass":
            cluster.pass_time(seconds)
        elif what in ("cut", "heal"):
            cuts += cluster.reachable and what == "cut"
            cluster.reachable = what == "heal"
        elif what == "restart":
            cuts += 1
            cluster.account = None
        num_most = max(num_most, len(cluster.live))

    # Each cut may cost a lease, and each ingress at least one call.
    slack = cuts * (3 + quota.max_requests)
    if quota.requests_per_s < math.inf:
        refilled = quota.requests_per_s * cluster.now
        assert admitted <= quota.max_requests + refilled + slack + 1e-6
    if not cuts:
        assert num_most <= quota.max_concurrency
