"""Parameters of a handle's call: vLLM's request takes them, or the one at fault is named."""

import math
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParameters
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParameters

from cluster.errors import RequestFailed
from cluster.ingress.protocol import PARAMETERS, Api
from cluster.ingress.vllm_request import REQUESTS, WITHOUT_EFFECT, read_request

BASE: dict[Api, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "Hello"}]},
    "completion": {"prompt": "Hello"},
}
APIS: tuple[Api, ...] = ("chat", "completion")

NOT_SERVED = {
    "audio", "best_of", "function_call", "functions", "modalities", "moderation", "prediction",
    "verbosity", "web_search_options",
}  # fmt: skip
"""Parameters of the OpenAI API that vLLM has not, and that would change an answer."""


def read(api: Api, **params: Any) -> Any:
    return read_request(api, BASE[api] | params, "id", streamed=False)


def fault(api: Api, **params: Any) -> str:
    with pytest.raises(RequestFailed) as raised:
        read(api, **params)
    assert raised.value.status == 400
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_is_a_request_of_vllm_with_an_id(api: Api, streamed: bool) -> None:
    request = read_request(api, BASE[api] | {"top_k": 3}, "an id", streamed=streamed)

    assert isinstance(request, REQUESTS[api])
    assert (request.request_id, request.top_k, request.stream) == ("an id", 3, streamed)


@pytest.mark.parametrize(("given", "used"), [("my own", "my own"), (None, "id")])
def test_a_calls_own_id_wins(given: str | None, used: str) -> None:
    assert read("chat", request_id=given).request_id == used


@pytest.mark.parametrize("api", APIS)
def test_a_misspelt_parameter_is_refused_with_the_nearest_that_there_is(api: Api) -> None:
    for given, meant in {
        "max_tokenz": "max_tokens",
        "temprature": "temperature",
        "topk": "top_k",
        "slo_clas": "slo_class",
        "timeout": "timeout_s",
        "structured_output": "structured_outputs",
    }.items():
        assert fault(api, **{given: 3}) == f"there is no parameter {given}; did you mean {meant}?"
    assert (
        fault(api, extra_body={})
        == "there is no parameter extra_body; /docs of the HTTP API has all"
    )


@pytest.mark.parametrize(
    ("api", "of_openai"),
    [("chat", ChatParameters.__annotations__), ("completion", TextParameters.__annotations__)],
)
def test_every_parameter_of_openai_is_vllms_or_without_effect_or_refused(
    api: Api, of_openai: dict[str, Any]
) -> None:
    assert set(of_openai) - set(REQUESTS[api].model_fields) <= WITHOUT_EFFECT | NOT_SERVED
    assert not set(REQUESTS[api].model_fields) & (WITHOUT_EFFECT | NOT_SERVED)
    for name in NOT_SERVED:
        assert fault(api, **{name: "x"}).startswith(f"there is no parameter {name};")


@pytest.mark.parametrize("api", APIS)
def test_our_parameters_and_those_without_effect_do_not_reach_vllm(api: Api) -> None:
    ours = {"slo_class": "fast", "slo_ttft_ms": math.inf, "slo_tpot_ms": 5, "traceparent": ""}
    assert ours.keys() == set(PARAMETERS) - {"request_id"}

    request = read(api, **ours, **dict.fromkeys(WITHOUT_EFFECT, "x"))

    assert request == read(api)


@pytest.mark.parametrize("api", APIS)
def test_whether_an_answer_is_streamed_is_the_methods(api: Api) -> None:
    assert fault(api, stream=True).startswith("stream: use the method `stream`")
    assert read(api, stream=False) == read(api, stream=None) == read(api)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_tokens", "x", "max_tokens: Input should be a valid integer, unable to parse string"),
        (
            "max_tokens",
            1.5,
            "max_tokens: Input should be a valid integer, got a number with a frac",
        ),
        ("temperature", [], "temperature: Input should be a valid number (given: [])"),
        ("seed", 10**40, "seed: Input should be less than or equal to 9223372036854775807"),
        (
            "stop",
            5,
            "stop: Input should be a valid string (given: 5), or Input should be a valid l",
        ),
        ("logit_bias", {"1": "a"}, "logit_bias.1: Input should be a valid number"),
        ("response_format", "json", "response_format: Input should be a valid dictionary"),
        ("response_format", {"type": "json_schema"}, "When response_format type is 'json_schema',"),
        ("stream_options", {"include_usage": True}, "Stream options can only be defined when"),
        ("structured_outputs", 5, "a parameter has a wrong type: 'int' object has no attribute"),
        ("structured_outputs", {}, "You must use one kind of structured outputs constraint"),
        ("request_id", 5, "request_id: Input should be a valid string (given: 5)"),
        ("traceparent", 5, "traceparent: 5 is no text"),
        ("user", {}, "user: Input should be a valid string (given: {})"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(api: Api, name: str, value: Any, said: str) -> None:
    assert fault(api, **{name: value}).startswith(said)


@pytest.mark.parametrize(
    "messages", [None, "text", 5, {}, [5], [None], [{}], [{"role": "user", "content": 5}]]
)
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    assert fault("chat", messages=messages).startswith("messages")


@pytest.mark.parametrize(
    ("name", "value"), [("tools", []), ("tools", "x"), ("tools", [{}]), ("tool_choice", "x")]
)
def test_tools_that_are_none_are_refused(name: str, value: Any) -> None:
    assert "tool" in fault("chat", **{name: value})
