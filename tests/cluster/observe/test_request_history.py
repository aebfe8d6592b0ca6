from math import inf

import pytest

from cluster.observe.request_history import Attempt, Refusal, RequestHistory, RequestRecord
from scheduler.request import Request, Slo

NO_TARGETS = Slo()


def record(request_id: str = "cmpl-1", slo: Slo = NO_TARGETS) -> RequestRecord:
    """A request that arrived at 100 s."""
    return RequestRecord(Request(request_id, 10, 5, slo=slo, slo_class="c"), 100.0)


def delivered(*times: float, outcome: str = "length", slo: Slo = NO_TARGETS) -> RequestRecord:
    """One whose tokens came at these times, one at each."""
    one = record(slo=slo)
    for time in times:
        one.deliver([7], time)
    one.outcome = outcome
    return one


def test_the_latencies_are_those_of_the_first_and_the_last_token() -> None:
    one = delivered(101.0, 101.5, 103.0)

    assert (one.ttft_s, one.tpot_s, one.e2e_s) == (1.0, 1.0, 3.0)


def test_an_output_without_tokens_sets_no_token_time() -> None:
    one = record()
    one.deliver([], 101.0)

    assert (one.ttft_s, one.tpot_s, one.e2e_s) == (inf, 0.0, inf)


def test_a_single_token_has_no_time_per_token() -> None:
    assert delivered(101.0).tpot_s == 0.0


@pytest.mark.parametrize(
    ("times", "slo", "met"),
    [
        ([101.0, 102.0], {"ttft_s": 1.0, "tpot_s": 1.0}, {"ttft": True, "tpot": True, "all": True}),
        ([101.1, 102.0], {"ttft_s": 1.0}, {"ttft": False, "all": False}),
        (
            [101.0, 102.1],
            {"ttft_s": 1.0, "tpot_s": 1.0},
            {"ttft": True, "tpot": False, "all": False},
        ),
        ([109.0], {}, {}),
        ([], {"ttft_s": 1.0}, {"ttft": False, "all": False}),
    ],
    ids=["met", "too late", "too slow", "no target", "no token"],
)
def test_each_target_is_judged_by_itself(
    times: list[float], slo: dict[str, float], met: dict[str, bool]
) -> None:
    assert delivered(*times, slo=Slo(**slo)).attainment() == met


def test_a_failed_request_met_no_target_and_an_aborted_one_is_not_judged() -> None:
    slo = Slo(ttft_s=10.0, tpot_s=10.0)

    failed = delivered(101.0, outcome="error", slo=slo).attainment()

    assert failed == {"ttft": False, "tpot": False, "all": False}
    assert delivered(101.0, outcome="abort", slo=slo).attainment() == {}


def test_requests_are_found_by_part_of_their_id_unless_it_is_too_short() -> None:
    history = RequestHistory()
    one, other = record("cmpl-abcd-0-11"), record("cmpl-abcd-1-22")
    refusal = Refusal("abcd-call", 100.0, 400, "no")
    for each in (one, other, refusal, record("chatcmpl-9999")):
        history.add(each)

    assert history.find("abcd") == [one, other, refusal]
    assert history.find("cmpl-abcd-1") == [other]
    assert history.find("abc") == []
    assert history.find("nothing") == []


def test_the_oldest_are_forgotten() -> None:
    history = RequestHistory(max_bytes=4000)
    for number in range(5):
        history.add(record(f"request-{number}"))

    assert ids(history) == ["request-2", "request-3", "request-4"]


def test_a_request_takes_more_room_once_it_has_ended() -> None:
    history = RequestHistory(max_bytes=5000)
    records = [record(f"request-{number}") for number in range(3)]
    for one in records:
        history.add(one)
    records[1].deliver([7] * 500, 101.0)
    history.settle(records[1])

    assert ids(history) == ["request-1", "request-2"]

    history.add(records[0])
    records[1].deliver([7] * 5000, 102.0)
    history.settle(records[1])

    assert ids(history) == ["request-2", "request-0"]  # more than there is room for


def ids(history: RequestHistory) -> list[str]:
    """All requests of a history, oldest first."""
    return [
        one.request.request_id for one in history.find("request") if isinstance(one, RequestRecord)
    ]


@pytest.mark.parametrize(
    ("status", "outcome"), [(400, "invalid"), (404, "invalid"), (503, "unavailable")]
)
def test_a_refusal_says_whose_fault_it_was(status: int, outcome: str) -> None:
    assert Refusal("call", 1.0, status, "no").outcome == outcome


def test_an_attempt_notes_its_own_first_token_and_what_was_cached_of_its_prompt() -> None:
    one = record()
    one.attempts.append(Attempt("r.0", 100.0, placed_s=100.5))
    one.deliver([], 101.0)
    one.deliver([7], 102.0, 8)
    one.deliver([7], 103.0)
    one.attempts.append(Attempt("r.1", 104.0, placed_s=104.5))
    assert one.attempts[1].ttft_s == inf
    one.deliver([7], 105.0, 9)

    assert [attempt.ttft_s for attempt in one.attempts] == [1.5, 0.5]
    assert [attempt.num_cached_tokens for attempt in one.attempts] == [8, 9]
    assert one.ttft_s == 2.0
