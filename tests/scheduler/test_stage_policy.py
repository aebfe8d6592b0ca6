"""The rules by which the share of prefills and the number of drafts are set for each worker."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.prefill_queue import PrefillCost, QueuedPrefill, QueueReport
from scheduler.stage_policy import (
    ALONE,
    HOLD_S,
    MIN_SHARE,
    SILENCE,
    SILENT_S,
    FollowedPolicy,
    PolicyReason,
    StagePolicy,
    StageReport,
    StageView,
    WorkerPolicy,
    late_prefills,
)

IDLE = StageView()
SLOW_DECODES = StageView(StageReport(num_decodes=8, work_s=1.0, late_decodes=3.0))
SLOW_PREFILLS = StageView(StageReport(num_decodes=1, work_s=9.0, late_prefills=5.0))
BUSY_DRAFTER = StageView(acceptance_rate=0.1, draft_worker="d", draft_worker_busy=1.0)


def shares(policies: dict[str, WorkerPolicy]) -> dict[str, float]:
    return {worker: policy.prefill_share for worker, policy in policies.items()}


def depths(policies: dict[str, WorkerPolicy]) -> dict[str, int | None]:
    return {worker: policy.max_drafts for worker, policy in policies.items()}


def decide(
    policy: StagePolicy, views: dict[str, StageView], *times: float
) -> dict[str, WorkerPolicy]:
    """The last of some decisions."""
    decided = {}
    for now in times:
        decided = policy.decide(views, now)
    return decided


def test_the_worker_with_most_decodes_gives_up_prefills_while_decodes_are_late() -> None:
    more = replace(SLOW_DECODES, report=replace(SLOW_DECODES.report, num_decodes=9))
    views = {"a": SLOW_DECODES, "b": more, "c": IDLE}

    decided = decide(StagePolicy(), views, 0.0, 2.0, 4.0)

    assert shares(decided) == {"a": 1.0, "b": 0.8, "c": 1.0}
    assert decided["b"] == WorkerPolicy(0.8, None, 2, PolicyReason.DECODES_LATE)
    assert decided["c"] is ALONE


def test_many_decodes_that_are_in_time_give_up_nothing() -> None:
    many = StageView(StageReport(num_decodes=100, work_s=2.0))

    assert shares(decide(StagePolicy(), {"a": SLOW_DECODES, "b": many}, 0.0, 2.0)) == {
        "a": 0.9,
        "b": 1.0,
    }


def test_the_worker_with_least_work_takes_prefills_back_while_decodes_are_late_elsewhere() -> None:
    policy = StagePolicy()
    decide(policy, {"a": SLOW_DECODES, "b": IDLE}, 0.0, 2.0, 4.0)

    decided = decide(policy, {"a": IDLE, "b": SLOW_DECODES}, 6.0)

    assert shares(decided) == {"a": 0.9, "b": 0.9}
    assert decided["a"].reason == PolicyReason.LEAST_WORK


@pytest.mark.parametrize(
    ("views", "reason"),
    [
        ({"a": SLOW_PREFILLS, "b": SLOW_DECODES}, PolicyReason.PREFILLS_LATE),
        ({"a": IDLE, "b": IDLE}, PolicyReason.FEW_LATE),
    ],
)
def test_a_share_comes_back_once_no_more_decodes_than_prefills_are_late(
    views: dict[str, StageView], reason: PolicyReason
) -> None:
    policy = StagePolicy()
    decide(policy, {"a": SLOW_DECODES, "b": IDLE}, 0.0, 2.0)

    decided = decide(policy, views, 4.0)

    assert decided["a"] == WorkerPolicy(1.0, None, 2, reason)


def test_an_urgent_prefill_weighs_more_than_two_late_decodes() -> None:
    prefill = QueuedPrefill(100, 100, due_in_s=0.001, priority=-2)
    queue = QueueReport({"r": prefill}, PrefillCost(1.0))
    views = {
        "a": StageView(StageReport(num_decodes=3, late_decodes=3.0)),
        "b": StageView(StageReport(late_prefills=late_prefills(queue))),
    }

    assert shares(decide(StagePolicy(), views, 0.0, 2.0)) == {"a": 1.0, "b": 1.0}


def test_the_drafts_that_are_accepted_least_make_room_on_a_saturated_draft_worker() -> None:
    others = replace(BUSY_DRAFTER, acceptance_rate=0.3)
    elsewhere = replace(BUSY_DRAFTER, draft_worker="e", draft_worker_busy=0.7, acceptance_rate=0.0)
    views = {"a": others, "b": BUSY_DRAFTER, "c": elsewhere}
    policy = StagePolicy()

    assert depths(decide(policy, views, 0.0, 2.0)) == {"a": None, "b": 4, "c": None}
    decided = decide(policy, views, 4.0, 6.0, 8.0)
    assert depths(decided) == {"a": None, "b": 1, "c": None}
    assert decided["b"].reason == PolicyReason.DRAFT_WORKER_FULL


def test_drafts_that_are_accepted_keep_their_depth_on_a_saturated_draft_worker() -> None:
    views = {"a": replace(BUSY_DRAFTER, acceptance_rate=0.8)}

    assert depths(decide(StagePolicy(), views, 0.0, 2.0, 4.0)) == {"a": None}


@pytest.mark.parametrize("draft_worker", ["d", ""])
def test_drafts_come_back_with_room_on_the_draft_worker(draft_worker: str) -> None:
    policy = StagePolicy()
    decide(policy, {"a": BUSY_DRAFTER}, 0.0, 2.0, 4.0)
    free = replace(BUSY_DRAFTER, draft_worker=draft_worker, draft_worker_busy=0.1)

    assert depths(decide(policy, {"a": free}, 6.0)) == {"a": 4}
    decided = decide(policy, {"a": free}, 8.0)
    assert decided["a"] == WorkerPolicy(1.0, None, 4, PolicyReason.DRAFT_WORKER_FREE)


views = st.builds(
    StageView,
    st.builds(
        StageReport,
        num_decodes=st.integers(0, 5),
        work_s=st.floats(0, 5),
        late_decodes=st.integers(0, 3).map(float),
        late_prefills=st.integers(0, 3).map(float),
    ),
    acceptance_rate=st.sampled_from([0.0, 0.3, 0.9]),
    draft_worker=st.sampled_from(["", "d", "e"]),
    draft_worker_busy=st.sampled_from([0.0, 0.7, 1.0]),
)
histories = st.lists(
    st.tuples(st.floats(0.01, 3.0), st.fixed_dictionaries(dict.fromkeys("abc", views))),
    max_size=40,
)


@given(history=histories)
@settings(deadline=None)
def test_a_policy_changes_seldom_within_bounds_and_says_why(
    history: list[tuple[float, dict[str, StageView]]],
) -> None:
    policy, now = StagePolicy(), 100.0
    last = dict.fromkeys("abc", ALONE)
    changed_s = dict.fromkeys("abc", now)
    policy.decide({worker: IDLE for worker in "abc"}, now)
    for after_s, seen in history:
        now += after_s
        for worker, decided in policy.decide(seen, now).items():
            assert MIN_SHARE <= decided.prefill_share <= 1
            assert decided.prefill_share == round(decided.prefill_share, 1)
            if decided != last[worker]:
                assert now - changed_s[worker] >= HOLD_S
                assert decided.version == last[worker].version + 1
                assert decided.reason not in (PolicyReason.ALONE, PolicyReason.SILENCE)
                assert (
                    abs(decided.prefill_share - last[worker].prefill_share) <= 0.1 + 1e-9
                    or decided.max_drafts != last[worker].max_drafts
                )
                last[worker], changed_s[worker] = decided, now


@given(history=histories, data=st.data())
@settings(deadline=None)
def test_equal_views_give_equal_decisions_in_any_order(
    history: list[tuple[float, dict[str, StageView]]], data: st.DataObject
) -> None:
    one, other, now = StagePolicy(), StagePolicy(), 0.0
    for after_s, seen in history:
        now += after_s
        order = data.draw(st.permutations(sorted(seen)))
        assert one.decide(seen, now) == other.decide({w: seen[w] for w in order}, now)


@given(history=histories)
@settings(deadline=None)
def test_in_quiet_all_policies_come_to_bound_nothing(
    history: list[tuple[float, dict[str, StageView]]],
) -> None:
    policy, now = StagePolicy(), 0.0
    for after_s, seen in history:
        now += after_s
        policy.decide(seen, now)
    for _ in range(200):
        now += 0.5
        decided = policy.decide({worker: IDLE for worker in "abc"}, now)

    assert all(one.is_free for one in decided.values())


def test_a_worker_that_was_silent_begins_anew() -> None:
    policy = StagePolicy()
    decide(policy, {"a": SLOW_DECODES, "b": IDLE}, 0.0, 2.0, 4.0)
    decide(policy, {"b": IDLE}, 6.0)

    assert decide(policy, {"a": SLOW_DECODES, "b": IDLE}, 6.25)["a"] is ALONE
    assert decide(policy, {"a": SLOW_DECODES, "b": IDLE}, 8.0)["a"] is ALONE
    assert decide(policy, {"a": SLOW_DECODES, "b": IDLE}, 8.25)["a"].prefill_share == 0.9


def test_a_worker_goes_on_alone_when_nothing_comes() -> None:
    followed, given_one = FollowedPolicy(), WorkerPolicy(0.3, 2, 5, PolicyReason.DECODES_LATE)
    assert followed.at(0.0) is ALONE
    followed.follow(given_one, 10.0)
    assert followed.at(10.0 + SILENT_S) == given_one
    assert followed.at(10.1 + SILENT_S) is SILENCE
    assert SILENCE.is_free

    followed.follow(given_one, 20.0)
    assert followed.at(20.0) == given_one
    followed.follow(None, 20.1)
    assert followed.at(20.1) is ALONE


@pytest.mark.parametrize(
    ("share", "max_drafts"), [(-0.1, None), (1.1, None), (math.nan, 1), (1, -1)]
)
def test_a_policy_refuses_what_makes_no_sense(share: float, max_drafts: int | None) -> None:
    with pytest.raises(ValueError, match="must"):
        WorkerPolicy(share, max_drafts)


@given(
    jobs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), max_size=6),
    decode_s=st.sampled_from([0.0, 0.5]),
)
@settings(deadline=None)
def test_no_order_makes_fewer_prefills_late(jobs: list[tuple[int, int]], decode_s: float) -> None:
    prefills = {
        str(index): QueuedPrefill(num_tokens, num_tokens, float(due_s))
        for index, (num_tokens, due_s) in enumerate(jobs)
    }
    queue = QueueReport(prefills, PrefillCost(1.0), decode_s=decode_s, tpot_s=1.0)
    stretch = 1 / (1 - decode_s)

    def num_late(order: tuple[tuple[int, int], ...]) -> int:
        ends = itertools.accumulate(num_tokens * stretch for num_tokens, _ in order)
        return sum(end_s > due_s for end_s, (_, due_s) in zip(ends, order, strict=True))

    assert late_prefills(queue) == min(map(num_late, itertools.permutations(jobs)))
