import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.request import Request


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
