"""openai for Python."""

import asyncio
import json
import time
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.job import (
    ANSWER,
    API,
    CAPITAL,
    LONG,
    MODEL,
    PARIS,
    REPORT,
    TOO_LONG,
    USAGE,
    WEATHER,
    WEATHER_SCHEMA,
    earlier_messages,
)

CLIENT = openai.OpenAI(base_url=API, api_key="none", max_retries=0)
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 60}
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": WEATHER_SCHEMA},
}


class Place(BaseModel):
    name: Literal["Paris", "Rome"]
    country: Literal["France", "Italy"]
    is_capital: bool


class Trip(BaseModel):
    places: list[Place] = Field(min_length=1, max_length=2)


def user(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def test_a_chat_is_answered_with_its_usage() -> None:
    answer = CLIENT.chat.completions.create(messages=user(CAPITAL), **GREEDY)

    assert answer.usage
    assert answer.choices[0].message.content == ANSWER
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == USAGE


def test_a_stream_is_the_same_answer_in_pieces() -> None:
    with CLIENT.chat.completions.stream(
        messages=user(CAPITAL), stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()

    assert "".join(pieces) == final.choices[0].message.content == ANSWER
    assert len(pieces) > 2
    assert final.usage
    assert (final.usage.prompt_tokens, final.usage.completion_tokens) == USAGE


@pytest.mark.parametrize("tool_choice", ["required", "named"])
def test_a_tool_is_called_streamed_or_not(tool_choice: str) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    params: dict[str, Any] = GREEDY | {"messages": user(WEATHER), "tools": [TOOL]}
    params["tool_choice"] = choice if tool_choice == "named" else tool_choice

    [call] = CLIENT.chat.completions.create(**params).choices[0].message.tool_calls or []
    with CLIENT.chat.completions.stream(**params) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls or []

    for each in (call, streamed):
        assert each.type == "function"
        assert (each.function.name, json.loads(each.function.arguments)) == ("get_weather", PARIS)


def test_a_tool_is_left_to_the_model_which_reads_its_result() -> None:
    messages: list[Any] = [*earlier_messages(), *user(WEATHER)]
    asked = CLIENT.chat.completions.create(messages=messages, tools=[TOOL], **GREEDY)
    [choice] = asked.choices
    [call] = choice.message.tool_calls or []
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": REPORT}

    answer = CLIENT.chat.completions.create(
        messages=[*messages, choice.message, result], tools=[TOOL], **GREEDY
    )

    assert call.type == "function"
    assert (choice.finish_reason, json.loads(call.function.arguments)) == ("tool_calls", PARIS)
    assert answer.choices[0].message.content == REPORT


def test_answers_are_parsed_into_classes() -> None:
    answer = CLIENT.chat.completions.parse(
        messages=user("Name Paris as a place."),
        response_format=Trip,
        **GREEDY | {"max_tokens": 300},
    )
    called = CLIENT.chat.completions.parse(
        messages=user("Call Place for Paris."),
        tools=[openai.pydantic_function_tool(Place)],
        tool_choice="required",
        **GREEDY,
    )

    assert isinstance(answer.choices[0].message.parsed, Trip)
    [call] = called.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Place)


def test_responses_are_made_streamed_and_parsed() -> None:
    params: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 60}
    tool: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER_SCHEMA}

    whole = CLIENT.responses.create(input=CAPITAL, **params)
    with CLIENT.responses.stream(input=CAPITAL, **params) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    called = CLIENT.responses.create(input=WEATHER, tools=[tool], tool_choice="required", **params)
    parsed = CLIENT.responses.parse(input="Name Paris as a place.", text_format=Place, **params)

    assert whole.output_text == final.output_text == "".join(pieces) == ANSWER
    assert whole.usage
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == USAGE
    [call] = [item for item in called.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", PARIS)
    assert isinstance(parsed.output_parsed, Place)


def test_log_probabilities_belong_to_the_tokens() -> None:
    answer = CLIENT.chat.completions.create(
        messages=user(CAPITAL), logprobs=True, top_logprobs=3, **GREEDY
    )

    assert answer.choices[0].logprobs
    tokens = answer.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == ANSWER + "<|im_end|>"
    for token in tokens:
        assert token.token == token.top_logprobs[0].token
        assert 0 >= token.logprob >= token.top_logprobs[1].logprob


def test_twenty_coroutines_ask_at_once() -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=API, api_key="none", max_retries=0) as client:
            calls = [
                client.chat.completions.create(messages=user(CAPITAL), **GREEDY) for _ in range(20)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    assert asyncio.run(ask()) == [ANSWER] * 20


def test_a_call_ends_by_timeout_or_by_cancel() -> None:
    params = GREEDY | {"messages": user(LONG), "max_tokens": 4000}

    async def cancel() -> None:
        async with openai.AsyncOpenAI(base_url=API, api_key="none") as client:
            call = asyncio.create_task(client.chat.completions.create(**params))
            await asyncio.sleep(0.5)
            call.cancel()
            await call

    begin_s = time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        CLIENT.with_options(timeout=0.5).chat.completions.create(**params)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
    with CLIENT.chat.completions.create(stream=True, **params) as stream:
        next(iter(stream))
    assert time.monotonic() - begin_s < 60, "it waited for an answer that nobody wants"


def test_each_error_has_its_class() -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        CLIENT.chat.completions.create(messages=user("Hi"), model="another")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        CLIENT.models.retrieve("another")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        CLIENT.chat.completions.create(messages=user("Hi"), **GREEDY | {"temperature": 9})
    with pytest.raises(openai.BadRequestError, match="context length"):
        CLIENT.chat.completions.create(messages=user(TOO_LONG), **GREEDY)
    with pytest.raises(openai.APIStatusError) as raised:
        CLIENT.embeddings.create(model=MODEL, input="Hi")
    assert 400 <= raised.value.status_code < 500


def test_the_id_of_a_call_comes_back_in_its_headers() -> None:
    answer = CLIENT.chat.completions.with_raw_response.create(
        messages=user("Hi"), extra_headers={"x-request-id": "job-7"}, **GREEDY | {"max_tokens": 1}
    )

    assert answer.headers["x-request-id"] == "job-7"
    assert answer.parse().id == "chatcmpl-job-7"


def test_a_text_is_continued_token_ids_included() -> None:
    params: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 2}
    prompt = "The capital of France is"

    whole = CLIENT.completions.create(prompt=prompt, echo=True, logprobs=1, **params)
    pieces = [
        chunk.choices[0].text
        for chunk in CLIENT.completions.create(prompt=prompt, stream=True, **params)
    ]

    assert whole.choices[0].text == prompt + " Paris." == prompt + "".join(pieces)
    assert whole.choices[0].logprobs
    assert "".join(whole.choices[0].logprobs.tokens or []) == prompt + " Paris."


def test_the_model_is_listed_and_found() -> None:
    assert [model.id for model in CLIENT.models.list()] == [MODEL]
    assert CLIENT.models.retrieve(MODEL).id == MODEL
