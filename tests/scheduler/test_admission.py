import dataclasses

import pytest

from scheduler.admission import Admission
from scheduler.placement import Placement, PlacementReason, RefusalReason, WorkerLoad
from scheduler.prefill_queue import Forecast
from scheduler.request import Request, Slo

REQUEST = Request("r", num_prompt_tokens=100, max_tokens=10, slo=Slo(ttft_s=10.0))


def forecast(prefill_s: float, ttft_s: float, *, is_late: bool = False) -> Forecast:
    wait_s = ttft_s - prefill_s
    return Forecast(
        prefill_s=prefill_s, ttft_s=ttft_s, is_late=is_late, is_measured=True, wait_s=wait_s
    )


def placement(forecast: Forecast | None) -> Placement:
    load = WorkerLoad("a", 0, 0, forecast=forecast)
    return Placement(load, None, PlacementReason.ONLY, num_closed=0)


@pytest.mark.parametrize(
    ("predicted", "reason"),
    [
        (forecast(prefill_s=1.0, ttft_s=7.7), None),
        (forecast(prefill_s=1.0, ttft_s=7.8), RefusalReason.OVERLOAD),
        (forecast(prefill_s=9.9, ttft_s=9.9), None),
        (forecast(prefill_s=1.0, ttft_s=5.0, is_late=True), RefusalReason.OVERLOAD),
        (forecast(prefill_s=10.1, ttft_s=10.1), RefusalReason.TOO_LONG),
        (Forecast(prefill_s=1.0, ttft_s=50.0), None),
        (None, None),
    ],
    ids=[
        "in time",
        "too near",
        "nothing waits",
        "late",
        "late when idle too",
        "a guess",
        "nothing is known",
    ],
)
def test_what_would_be_late_is_refused(
    predicted: Forecast | None, reason: RefusalReason | None
) -> None:
    refused = Admission(in_time=0.75).refusal(REQUEST, placement(predicted))

    assert (refused and refused.reason) == reason
    assert refused is None or (refused.is_final and refused.retry_after_s >= 1)


def test_it_may_come_back_when_the_queue_is_short_enough() -> None:
    late = placement(forecast(prefill_s=1.0, ttft_s=30.5))
    refused = Admission(in_time=0.75).refusal(REQUEST, late)

    assert refused
    assert refused.retry_after_s == 23


def test_who_does_not_ask_for_targets_is_served_late_rather_than_never() -> None:
    unnamed = dataclasses.replace(REQUEST, names_slo=False)
    late = placement(forecast(prefill_s=20.0, ttft_s=25.0, is_late=True))

    assert Admission().refusal(unnamed, late) is None
    assert Admission().refusal(unnamed, placement(forecast(prefill_s=1.0, ttft_s=350.0)))
    assert Admission(refuse_unnamed=True).refusal(unnamed, late)


def test_without_a_target_it_queues_up_to_a_bound() -> None:
    request = dataclasses.replace(REQUEST, slo=Slo())

    assert Admission().refusal(request, placement(forecast(prefill_s=1.0, ttft_s=250.0))) is None
    assert Admission().refusal(request, placement(forecast(prefill_s=1.0, ttft_s=350.0)))


def test_what_was_taken_in_is_not_refused() -> None:
    again = dataclasses.replace(REQUEST, num_attempts=1)

    assert Admission().refusal(again, placement(forecast(prefill_s=1.0, ttft_s=50.0))) is None


def test_one_key_switches_it_off() -> None:
    late = placement(forecast(prefill_s=1.0, ttft_s=1000.0, is_late=True))

    assert Admission(refuse_late=False).refusal(REQUEST, late) is None


@pytest.mark.parametrize("given", [{"in_time": 0.0}, {"in_time": 1.1}, {"max_queue_s": 0.0}])
def test_a_rule_that_refuses_all_is_an_error_that_names_the_key(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        Admission(**given)  # type: ignore[arg-type]
