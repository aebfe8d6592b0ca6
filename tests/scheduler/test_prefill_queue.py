import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.prefill_queue import PrefillCost, PrefillQueue, QueuedPrefill, QueueReport
from scheduler.request import Request, Slo

COST = PrefillCost(token_s=0.01)


def request(name: str = "r", num_tokens: int = 100, ttft_s: float = 10.0) -> Request:
    return Request(name, num_prompt_tokens=num_tokens, max_tokens=10, slo=Slo(ttft_s=ttft_s))


def queue(*prefills: QueuedPrefill, **report: float) -> PrefillQueue:
    """One that was reported at 0."""
    queue = PrefillQueue(0.0)
    by_id = {f"q{index}": prefill for index, prefill in enumerate(prefills)}
    queue.report(QueueReport(by_id, COST, **report), list(by_id), 0.0)  # type: ignore[arg-type]
    return queue


def test_the_first_token_comes_after_what_is_due_before_it() -> None:
    forecast = queue(QueuedPrefill(200, 200, 5.0), QueuedPrefill(100, 100, 50.0)).forecast(
        request(num_tokens=100), 0, 0.0
    )

    assert forecast.prefill_s == pytest.approx(1.0)
    assert forecast.ttft_s == pytest.approx(3.0)
    assert (forecast.num_late, forecast.is_late) == (0, False)


def test_cached_tokens_take_no_time_but_the_last_token_is_computed() -> None:
    assert queue().forecast(request(num_tokens=100), 75, 0.0).prefill_s == pytest.approx(0.25)
    assert queue().forecast(request(num_tokens=100), 100, 0.0).prefill_s == pytest.approx(0.01)


def test_work_that_is_over_since_the_report_is_not_waited_for() -> None:
    one = queue(QueuedPrefill(200, 200, 5.0))

    assert one.forecast(request(), 0, 1.5).ttft_s == pytest.approx(1.5)
    assert one.forecast(request(), 0, 9.0).ttft_s == pytest.approx(1.0)


def test_what_was_placed_on_an_idle_worker_begins_then_and_not_with_its_last_report() -> None:
    one = queue()
    one.add(request("first"), 0, 1.5)

    assert one.forecast(request("second"), 0, 1.5).ttft_s == pytest.approx(2.0)
    assert one.forecast(request("second"), 0, 2.0).ttft_s == pytest.approx(1.5)
    assert one.seconds == pytest.approx(1.0)


def test_the_longest_is_late_if_not_all_can_be_on_time() -> None:
    longer = queue(QueuedPrefill(900, 900, 10.0)).forecast(request(num_tokens=200), 0, 0.0)
    shorter = queue(QueuedPrefill(300, 300, 10.0)).forecast(request(num_tokens=800), 0, 0.0)

    assert (longer.num_late, longer.is_late) == (1, False)
    assert longer.ttft_s == pytest.approx(2.0)
    assert (shorter.num_late, shorter.is_late) == (1, True)


def test_one_that_cannot_be_on_time_does_not_delay_others() -> None:
    forecast = queue(QueuedPrefill(5000, 5000, 1.0)).forecast(request(), 0, 0.0)

    assert forecast.ttft_s == pytest.approx(1.0)


def test_decodes_slow_prefills_down() -> None:
    forecast = queue(num_decodes=4, decode_s=0.03, tpot_s=0.06).forecast(request(), 0, 0.0)

    assert forecast.ttft_s == pytest.approx(2.0 + 0.03)


def test_it_fits_only_beside_all_that_wait() -> None:
    one = queue(QueuedPrefill(200, 200, 5.0), num_free_kv_tokens=250)

    assert not one.forecast(request(num_tokens=100), 0, 0.0).fits
    assert one.forecast(request(num_tokens=100), 60, 0.0).fits


def test_a_placement_counts_until_it_is_reported() -> None:
    one = queue()
    one.add(request("new", 300), 0, 0.0)
    assert one.expects("new")
    assert one.forecast(request(), 0, 0.0).ttft_s == pytest.approx(4.0)

    one.report(QueueReport({}, COST), [], 0.1)
    assert one.forecast(request(), 0, 0.1).ttft_s == pytest.approx(4.0)

    one.report(QueueReport({"new": QueuedPrefill(100, 300, 9.0)}, COST), ["new"], 0.2)
    assert not one.expects("new")
    assert one.forecast(request(), 0, 0.2).ttft_s == pytest.approx(2.0)

    one.report(QueueReport({}, COST), ["new"], 0.3)
    assert one.forecast(request(), 0, 0.3).ttft_s == pytest.approx(1.0)


def test_what_a_request_will_find_cached_when_its_turn_comes_is_remembered() -> None:
    one = queue()
    one.add(request("follows", 300), 250, 0.0)
    one.report(QueueReport({"follows": QueuedPrefill(300, 300, 9.0)}, COST), ["follows"], 0.1)

    assert one.forecast(request(), 0, 0.1).ttft_s == pytest.approx(1.5)


def test_a_placement_that_never_arrives_is_forgotten() -> None:
    one = queue()
    one.add(request("lost", 300), 0, 0.0)
    one.report(QueueReport({}, COST), [], 60.0)

    assert one.num_new_tokens == 0


@given(
    st.lists(
        st.builds(
            QueuedPrefill,
            st.integers(1, 1000),
            st.integers(1000, 2000),
            st.floats(-5, 50),
            st.integers(-1, 1),
        ),
        max_size=6,
    ),
    st.integers(1, 1000),
    st.floats(0.1, 50),
)
def test_a_forecast_is_finite_and_no_shorter_than_the_work(
    prefills: list[QueuedPrefill], num_tokens: int, ttft_s: float
) -> None:
    forecast = queue(*prefills).forecast(request(num_tokens=num_tokens, ttft_s=ttft_s), 0, 0.0)

    assert math.isfinite(forecast.ttft_s)
    assert forecast.ttft_s >= forecast.prefill_s - 1e-9
    assert forecast.num_late >= forecast.is_late  # of a lower priority it may take two
