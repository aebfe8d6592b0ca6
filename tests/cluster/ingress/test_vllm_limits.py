"""What one call may have an ingress and a worker hold."""

from typing import Any

import pytest
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.config.app_config import IngressConfig
from cluster.ingress.calls import Call
from cluster.ingress.vllm_limits import check_limits
from cluster.observe.request_history import RequestRecord
from scheduler.request import Request

LIMITS = IngressConfig(max_sequences=8, max_total_logprobs=1000)
PROMPT = {"type": "token", "prompt_token_ids": [5] * 100}
MAX_MODEL_LEN = 1000


def check(call: Call, params: Any, prompt: Any = PROMPT) -> None:
    check_limits(LIMITS, call, prompt, params, MAX_MODEL_LEN)


@pytest.mark.parametrize(
    ("params", "num"),
    [
        ({"max_tokens": 50}, 0),
        ({"max_tokens": 50, "logprobs": 4}, 250),
        ({"max_tokens": 50, "logprobs": 0}, 50),
        ({"max_tokens": 50, "logprobs": 4, "output_kind": RequestOutputKind.DELTA}, 0),
        ({"max_tokens": 50, "prompt_logprobs": 4}, 500),
        ({"max_tokens": 50, "prompt_logprobs": 4, "output_kind": RequestOutputKind.DELTA}, 500),
        ({"max_tokens": 50, "prompt_logprobs": 0, "logprobs": 1, "n": 4}, 800),
        ({"max_tokens": None, "logprobs": 0}, 900),
    ],
)
def test_log_probabilities_count_unless_they_are_streamed(params: Any, num: int) -> None:
    call = Call("c")
    check(call, SamplingParams(**params))

    assert call.num_logprobs == num


def test_all_prompts_of_a_call_count_together() -> None:
    call, params = Call("c"), SamplingParams(max_tokens=50, prompt_logprobs=3)
    check(call, params)
    check(call, params)

    with pytest.raises(ValueError, match="1200 log probabilities, more than 1000") as error:
        check(call, params)
    assert "ingress.max_total_logprobs" in str(error.value)


def test_sequences_that_have_ended_make_room() -> None:
    """Beam search has many requests, one after another."""
    call = Call("c", records=[RequestRecord(Request("r", 1, 1), 0.0) for _ in range(6)])
    check(call, SamplingParams(n=2))
    with pytest.raises(ValueError, match="9 sequences at a time are more than 8"):
        check(call, SamplingParams(n=3))
    for record in call.records[:4]:
        record.outcome = "length"

    check(call, SamplingParams(n=3))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_tokens": 21}, r"max_tokens: 21 are more than 20 \(ingress.max_output_tokens\)"),
        ({"stop": ["a"] * 4}, r"stop: its length of 4 is more than 3 \(ingress.max_list_length\)"),
        ({"stop_token_ids": [1, 2, 3, 4]}, "stop_token_ids: its length of 4 is more than 3"),
        ({"bad_words": ["a", "b", "c", "d"]}, "bad_words: its length of 4 is more than 3"),
        ({"logit_bias": dict.fromkeys(range(4), 1.0)}, "logit_bias: its length of 4 is more than"),
    ],
)
def test_what_is_longer_than_the_config_allows_is_refused(params: Any, words: str) -> None:
    limits = IngressConfig(max_output_tokens=20, max_list_length=3)
    with pytest.raises(ValueError, match=words):
        check_limits(
            limits, Call("c"), PROMPT, SamplingParams(**{"max_tokens": 1} | params), MAX_MODEL_LEN
        )


def test_a_prompt_longer_than_the_config_allows_is_refused() -> None:
    params = SamplingParams()
    check_limits(IngressConfig(max_prompt_tokens=100), Call("c"), PROMPT, params, MAX_MODEL_LEN)
    with pytest.raises(ValueError, match="its 100 tokens are more than 99"):
        check_limits(IngressConfig(max_prompt_tokens=99), Call("c"), PROMPT, params, MAX_MODEL_LEN)


def test_a_call_that_names_no_length_gets_what_the_config_allows() -> None:
    params = SamplingParams(max_tokens=MAX_MODEL_LEN - 100)  # vLLM's default
    check_limits(IngressConfig(max_output_tokens=20), Call("c"), PROMPT, params, MAX_MODEL_LEN)

    assert params.max_tokens == 20


def test_pooling_is_left_to_vllm() -> None:
    check(Call("c"), PoolingParams())
