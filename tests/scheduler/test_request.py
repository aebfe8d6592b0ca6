import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.request import Request, Slo
from tests.scheduler.scenes import decoding, waiting


@pytest.mark.parametrize(
    ("num_output_tokens", "outstanding"), [(0, 110), (1, 9), (2, 8), (9, 1), (10, 0)]
)
def test_the_prompt_counts_until_the_first_output_token(
    num_output_tokens: int, outstanding: int
) -> None:
    request = Request("r", num_prompt_tokens=100, max_tokens=10)

    assert request.num_outstanding_tokens(num_output_tokens) == outstanding


@given(prompt=st.integers(0, 10**6), max_tokens=st.integers(1, 10**6), data=st.data())
@settings(deadline=None)
def test_every_output_token_leaves_less_to_do(
    prompt: int, max_tokens: int, data: st.DataObject
) -> None:
    request = Request("r", prompt, max_tokens)
    done = data.draw(st.integers(0, max_tokens - 1))

    assert request.num_outstanding_tokens(done) > request.num_outstanding_tokens(done + 1) >= 0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("name", ["ttft_s", "tpot_s"])
def test_a_target_is_a_positive_time(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be positive"):
        Slo(**{name: value})


def test_the_first_token_is_due_within_the_time_to_first_token() -> None:
    assert waiting("r", slo=Slo(2.0, 0.1), arrival_s=3.0).due_s == 5.0


def test_a_token_is_due_by_the_mean_of_all_and_by_the_one_before() -> None:
    fast = decoding("r", num_output_tokens=5, first_token_s=0.0, last_token_s=0.1, slo=Slo(1, 0.1))
    late = decoding("r", num_output_tokens=5, first_token_s=0.0, last_token_s=0.7, slo=Slo(1, 0.1))

    assert fast.due_s == pytest.approx(0.2)
    assert late.due_s == pytest.approx(0.5)


def test_without_targets_nothing_is_due() -> None:
    assert waiting("r").due_s == decoding("r").due_s == math.inf


def test_a_request_decodes_when_only_its_newest_token_is_missing() -> None:
    preempted = decoding("r")
    preempted.num_computed_tokens = 0

    assert decoding("r").is_decoding
    assert not waiting("r", 1).is_decoding
    assert not preempted.is_decoding
    assert preempted.num_new_tokens == 105
