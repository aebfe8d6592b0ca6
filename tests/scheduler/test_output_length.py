import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scheduler import output_length
from scheduler.output_length import (
    HIGH,
    KIND_HALF_LIFE,
    MAX_TENANTS,
    OutputLength,
    OutputLengths,
)
from scheduler.request import Request
from tests.bench.output_length import TRACES, evaluate, read
from tests.workload import has_traces

REQUEST = Request("r", num_prompt_tokens=100, max_tokens=4096, tenant="acme", slo_class="chat")
BUCKET = 2**0.25
"""Ratio of the ends of a bucket."""

lengths_seen = st.lists(st.integers(1, 5000), max_size=60)


def learned(*seen: int, request: Request = REQUEST) -> OutputLengths:
    lengths = OutputLengths()
    for num_tokens in seen:
        lengths.observe(request, min(num_tokens, request.max_tokens))
    return lengths


def test_before_anything_is_seen_the_limit_is_the_prediction() -> None:
    assert OutputLengths().predict(REQUEST) == OutputLength(4096, 4096, 4096)
    assert OutputLengths().remaining(REQUEST, 96) == 4000


@pytest.mark.parametrize("num_tokens", [1, 7, 40, 1000])
def test_equal_lengths_are_learned_as_they_are(num_tokens: int) -> None:
    length = learned(*[num_tokens] * 200).predict(REQUEST)

    for predicted in (length.mean, length.median):
        assert num_tokens / BUCKET <= predicted <= num_tokens * BUCKET + 0.5
    assert length.high <= num_tokens * BUCKET + 0.5


def test_a_few_requests_are_enough_to_leave_the_limit() -> None:
    before = [learned(*[50] * count).predict(REQUEST).mean for count in range(6)]

    assert before == sorted(before, reverse=True)
    assert before[5] < 200


@settings(deadline=None)
@given(lengths_seen, st.integers(1, 6000), st.integers(0, 6000))
def test_a_prediction_lies_between_what_came_and_the_limit(
    seen: list[int], max_tokens: int, num_prior: int
) -> None:
    assume(num_prior < max_tokens)
    request = replace(REQUEST, max_tokens=max_tokens, num_prior_tokens=num_prior)

    length = learned(*seen).predict(request)

    assert num_prior + 1 <= length.mean <= max_tokens
    assert num_prior + 1 <= length.median <= length.high <= max_tokens
    assert length.mean - num_prior == pytest.approx(learned(*seen).remaining(request, num_prior))


@settings(deadline=None)
@given(lengths_seen, st.lists(st.integers(0, 4095), min_size=2, max_size=8))
def test_what_a_request_has_given_only_raises_its_length(
    seen: list[int], given_tokens: list[int]
) -> None:
    lengths = learned(*seen)

    totals = [k + lengths.remaining(REQUEST, k) for k in sorted(given_tokens)]

    assert totals == sorted(totals) or totals == pytest.approx(sorted(totals))


def test_a_request_that_outlived_the_short_ones_is_a_long_one() -> None:
    lengths = learned(*[20, 2000] * 100)

    assert 700 < lengths.predict(REQUEST).mean < 1300
    assert 1600 < 30 + lengths.remaining(REQUEST, 30) < 2400


def test_at_its_limit_nothing_remains() -> None:
    assert learned(50).remaining(REQUEST, 4096) == 0


def test_a_limit_is_no_length() -> None:
    short = replace(REQUEST, max_tokens=16)
    lengths = learned(*[16] * 100, request=short)

    assert lengths.predict(short).mean == pytest.approx(16, abs=0.5)
    assert lengths.predict(REQUEST).mean == 4096  # none has ended by itself


def test_what_is_seldom_seen_is_completed_by_what_is_like_it() -> None:
    lengths = learned(*[30] * 100)
    others = replace(REQUEST, num_prompt_tokens=5000), replace(REQUEST, slo_class="batch")
    for unseen in (*others, replace(REQUEST, tenant="new")):
        assert lengths.predict(unseen).mean == pytest.approx(30, rel=0.5)

    for _ in range(60):
        lengths.observe(others[0], 600)

    assert lengths.predict(others[0]).median == pytest.approx(600, rel=0.3)
    assert lengths.predict(REQUEST).median == pytest.approx(30, rel=0.3)


def test_what_was_long_ago_is_forgotten() -> None:
    lengths = learned(*[30] * 3000)

    for _ in range(round(2 * KIND_HALF_LIFE)):
        lengths.observe(REQUEST, 900)

    assert lengths.predict(REQUEST).median == pytest.approx(900, rel=0.2)


def test_requests_that_gave_nothing_teach_nothing() -> None:
    lengths = learned(0)

    assert (len(lengths), dict(lengths.accuracies)) == (0, {})


def test_kinds_and_tenants_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = OutputLengths(max_kinds=50)
    for number in range(2 * MAX_TENANTS):
        lengths.observe(replace(REQUEST, tenant=str(number % 1500)), 50)

    assert len(lengths) == 50
    assert len(lengths.accuracies) == MAX_TENANTS
    assert lengths.predict(replace(REQUEST, tenant="unseen")).median < 60  # everybody's stay


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 4096), min_size=1, max_size=80))
def test_the_accuracy_is_that_of_the_predictions_before_learning(seen: list[int]) -> None:
    lengths = OutputLengths()
    predicted = []
    for num_tokens in seen:
        predicted.append(lengths.predict(REQUEST))
        lengths.observe(REQUEST, num_tokens)

    accuracy = lengths.accuracies["acme"]
    kept: float = 0.5 ** (1 / output_length.ACCURACY_HALF_LIFE)
    weights: list[float] = [kept ** (len(seen) - 1 - at) for at in range(len(seen))]

    def mean(values: list[float]) -> float:
        weighted: list[float] = [w * v for w, v in zip(weights, values, strict=True)]
        return math.fsum(weighted) / math.fsum(weights)

    pairs = [*zip(predicted, seen, strict=True)]
    assert accuracy.num_requests == pytest.approx(sum(weights))
    assert accuracy.log_error == pytest.approx(
        mean([abs(math.log(p.median / n)) for p, n in pairs])
    )
    assert accuracy.coverage == pytest.approx(mean([n <= math.ceil(p.high) for p, n in pairs]))
    assert accuracy.bias + 1 == pytest.approx(mean([p.mean for p in predicted]) / mean([*seen]))


@pytest.mark.skipif(not has_traces(), reason="needs the full data sets")
@pytest.mark.parametrize("trace", TRACES)
def test_real_lengths_are_predicted_better_than_by_limits_or_by_one_mean(trace: str) -> None:
    found = evaluate(read(trace, 2000), 0.03, {})

    assert found["median"] < 0.6 * found["max_tokens"]
    assert found["median"] < 1.02 * found["global mean"]
    assert HIGH - 0.06 < found["coverage"] < HIGH + 0.04
