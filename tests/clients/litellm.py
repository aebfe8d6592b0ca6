"""litellm by both of its providers, and its bridge to the Anthropic API."""

import asyncio
import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

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

SERVER: dict[str, Any] = {"api_base": API, "api_key": "none", "temperature": 0, "num_retries": 0}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER_SCHEMA}}


class Place(BaseModel):
    name: Literal["Paris", "Rome"]
    country: Literal["France", "Italy"]


def user(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def complete(messages: Any, provider: str = "openai", **params: Any) -> Any:
    params = SERVER | {"max_tokens": 60} | params
    return litellm.completion(model=f"{provider}/{MODEL}", messages=messages, **params)


each_provider = pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])


@each_provider
def test_a_chat_is_answered_and_streamed_with_its_usage(provider: str) -> None:
    whole = complete(user(CAPITAL), provider)
    chunks = list(
        complete(user(CAPITAL), provider, stream=True, stream_options={"include_usage": True})
    )
    built = litellm.stream_chunk_builder(chunks)

    for answer in (whole, built):
        assert answer.choices[0].message.content == ANSWER
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == USAGE
    assert len(chunks) > 3


@each_provider
def test_a_tool_is_called_and_its_result_read(provider: str) -> None:
    required = complete(user(WEATHER), provider, tools=[TOOL], tool_choice="required")
    messages = [*earlier_messages(), *user(WEATHER)]
    asked = complete(messages, provider, tools=[TOOL])
    for answer in (required, asked):
        [call] = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", PARIS)
    result = {"role": "tool", "tool_call_id": call.id, "content": REPORT}

    answer = complete([*messages, asked.choices[0].message, result], provider, tools=[TOOL])

    assert answer.choices[0].message.content == REPORT


@each_provider
def test_structured_output_is_of_its_class(provider: str) -> None:
    answer = complete(user("Paris is the capital of France."), provider, response_format=Place)

    Place.model_validate_json(answer.choices[0].message.content)


def test_a_text_is_continued_and_a_response_made() -> None:
    text = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        prompt="The capital of France is",
        **SERVER | {"max_tokens": 2},
    )
    response = litellm.responses(
        model=f"openai/{MODEL}", input=CAPITAL, **SERVER | {"max_output_tokens": 60}
    )

    assert text.choices[0].text == " Paris."
    assert response.output[0].content[0].text == ANSWER


def test_the_anthropic_form_is_bridged() -> None:
    message = asyncio.run(
        litellm.anthropic.messages.acreate(
            model=f"openai/{MODEL}", messages=user(CAPITAL), **SERVER | {"max_tokens": 60}
        )
    )

    assert message["content"][0]["text"] == ANSWER
    assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == USAGE


def test_coroutines_ask_at_once_and_one_is_cancelled() -> None:
    async def ask() -> list[str]:
        def call(content: str, max_tokens: int) -> Any:
            params = SERVER | {"max_tokens": max_tokens}
            return litellm.acompletion(model=f"openai/{MODEL}", messages=user(content), **params)

        long = asyncio.create_task(call(LONG, 4000))
        answers = await asyncio.gather(*(call(CAPITAL, 60) for _ in range(5)))
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == [ANSWER] * 5


@each_provider
def test_each_error_has_its_class(provider: str) -> None:
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        litellm.completion(model=f"{provider}/another", messages=user(CAPITAL), **SERVER)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        complete(user(CAPITAL), provider, temperature=9)
    with pytest.raises(litellm.ContextWindowExceededError, match="context length"):
        complete(user(TOO_LONG), provider)
    with pytest.raises(litellm.Timeout):
        complete(user(LONG), provider, max_tokens=4000, timeout=0.5)
