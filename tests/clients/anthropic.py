"""anthropic for Python, by `/v1/messages`."""

import asyncio
from typing import Any

import anthropic
import pytest

from tests.clients.job import (
    ANSWER,
    CAPITAL,
    EARLIER,
    LONG,
    MODEL,
    PARIS,
    REPORT,
    TOO_LONG,
    URL,
    USAGE,
    WEATHER,
    WEATHER_SCHEMA,
    question,
)

CLIENT = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "extra_body": {"temperature": 0}}
"""This SDK has no parameter `temperature`."""
TOOL: Any = {"name": "get_weather", "input_schema": WEATHER_SCHEMA}


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def text(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_is_answered_with_its_usage() -> None:
    message = CLIENT.messages.create(messages=user(CAPITAL), **GREEDY)

    assert (text(message), message.stop_reason) == (ANSWER, "end_turn")
    assert (message.usage.input_tokens, message.usage.output_tokens) == USAGE


def test_a_stream_is_the_same_answer_in_pieces() -> None:
    with CLIENT.messages.stream(messages=user(CAPITAL), **GREEDY) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()

    assert "".join(pieces) == text(final) == ANSWER
    assert len(pieces) > 2
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", USAGE[1])


def test_a_tool_is_used_streamed_or_not() -> None:
    params: dict[str, Any] = GREEDY | {"tools": [TOOL], "tool_choice": {"type": "any"}}

    whole = CLIENT.messages.create(messages=user(WEATHER), **params)
    with CLIENT.messages.stream(messages=user(WEATHER), **params) as stream:
        streamed = stream.get_final_message()

    for message in (whole, streamed):
        assert (use_of(message).input, message.stop_reason) == (PARIS, "tool_use")


def test_a_tool_is_left_to_the_model_which_reads_its_result() -> None:
    turns = earlier_turns() + user(WEATHER)
    asked = CLIENT.messages.create(messages=turns, tools=[TOOL], **GREEDY)
    turns += [{"role": "assistant", "content": asked.content}]
    turns += user([result_of(use_of(asked).id, REPORT)])

    answer = CLIENT.messages.create(messages=turns, tools=[TOOL], **GREEDY)

    assert use_of(asked).input == PARIS
    assert text(answer) == REPORT


def use_of(message: anthropic.types.Message) -> anthropic.types.ToolUseBlock:
    [use] = [block for block in message.content if block.type == "tool_use"]
    assert use.name == "get_weather"
    return use


def result_of(use_id: str, content: str) -> dict[str, str]:
    return {"type": "tool_result", "tool_use_id": use_id, "content": content}


def earlier_turns() -> list[Any]:
    turns = []
    for city, report in EARLIER.items():
        use = {"type": "tool_use", "id": city, "name": "get_weather"}
        turns += [
            *user(question(city)),
            {"role": "assistant", "content": [use | {"input": {"city": city, "unit": "celsius"}}]},
            *user([result_of(city, report)]),
            {"role": "assistant", "content": report},
        ]
    return turns


def test_tokens_are_counted() -> None:
    assert CLIENT.messages.count_tokens(model=MODEL, messages=user(CAPITAL)).input_tokens == 37


def test_a_system_prompt_and_a_stop_sequence_are_heeded() -> None:
    message = CLIENT.messages.create(
        system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        messages=user(CAPITAL),
        stop_sequences=[" is"],
        **GREEDY,
    )

    assert text(message) == "The capital of France"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " is")


def test_coroutines_ask_at_once_and_one_is_cancelled() -> None:
    async def ask() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=URL, api_key="none", max_retries=0) as client:
            long = asyncio.create_task(
                client.messages.create(messages=user(LONG), **GREEDY | {"max_tokens": 4000})
            )
            calls = [client.messages.create(messages=user(CAPITAL), **GREEDY) for _ in range(5)]
            answers = [text(message) for message in await asyncio.gather(*calls)]
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            return answers

    assert asyncio.run(ask()) == [ANSWER] * 5


def test_each_error_has_its_class() -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        CLIENT.messages.create(messages=user("Hi"), **GREEDY | {"model": "another"})
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        CLIENT.messages.create(messages=user("Hi"), **GREEDY | {"extra_body": {"temperature": 9}})
    with pytest.raises(anthropic.BadRequestError, match="context length"):
        CLIENT.messages.create(messages=user(TOO_LONG), **GREEDY)
    with pytest.raises(anthropic.APITimeoutError):
        CLIENT.with_options(timeout=0.5).messages.create(
            messages=user(LONG), **GREEDY | {"max_tokens": 4000}
        )


def test_the_model_is_listed() -> None:
    assert [model.id for model in CLIENT.models.list()] == [MODEL]
