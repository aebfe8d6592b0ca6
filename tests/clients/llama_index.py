"""LlamaIndex: OpenAILike as a chat model, an agent with its tool, and structured output."""

import asyncio
from typing import Any, Literal

import openai
import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
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
    earlier_messages,
)


class Place(BaseModel):
    """A place that the text names."""

    name: Literal["Paris", "Rome"]
    country: Literal["France", "Italy"]


def llm(**params: Any) -> OpenAILike:
    defaults: dict[str, Any] = {
        "model": MODEL,
        "api_base": API,
        "api_key": "none",
        "is_chat_model": True,
        "is_function_calling_model": True,
        "temperature": 0,
        "max_tokens": 100,
        "max_retries": 0,
    }
    return OpenAILike(**defaults | params)


def user(content: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=content)]


def get_weather(
    city: Literal["Paris", "Rome", "Oslo"], unit: Literal["celsius", "fahrenheit"]
) -> str:
    """The weather in a city."""
    return REPORT if (city, unit) == ("Paris", "celsius") else "unknown"


TOOL = FunctionTool.from_defaults(get_weather)


def test_a_chat_is_answered_and_streamed() -> None:
    whole = llm().chat(user(CAPITAL))
    pieces = [piece.delta or "" for piece in llm().stream_chat(user(CAPITAL))]

    assert whole.message.content == "".join(pieces) == ANSWER
    assert len(pieces) > 2
    usage = whole.additional_kwargs
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == USAGE


def test_a_text_is_continued() -> None:
    text = llm(is_chat_model=False, max_tokens=2).complete("The capital of France is")

    assert text.text == " Paris."


@pytest.mark.parametrize("by_schema", [False, True])
def test_structured_output_is_of_its_class(by_schema: bool) -> None:
    model = llm(should_use_structured_outputs=by_schema).as_structured_llm(Place)

    answer = model.chat(user("Paris is the capital of France."))

    assert isinstance(answer.raw, Place)


def test_a_required_tool_is_called_streamed_or_not() -> None:
    model = llm()

    whole = model.chat_with_tools([TOOL], user_msg=WEATHER, tool_required=True)
    *_, last = model.stream_chat_with_tools([TOOL], user_msg=WEATHER, tool_required=True)

    for answer in (whole, last):
        [call] = model.get_tool_calls_from_response(answer)
        assert (call.tool_name, call.tool_kwargs) == ("get_weather", PARIS)


def test_an_agent_uses_its_tool_and_reads_the_result() -> None:
    async def ask() -> Any:
        agent = FunctionAgent(tools=[TOOL], llm=llm(), streaming=False)
        return await agent.run(WEATHER, chat_history=earlier_turns())

    result = asyncio.run(ask())

    [call] = result.tool_calls
    assert (call.tool_kwargs, call.tool_output.content) == (PARIS, REPORT)
    assert result.response.content == REPORT


def earlier_turns() -> list[ChatMessage]:
    return [
        ChatMessage(
            role=message["role"],
            content=message["content"],
            additional_kwargs={key: message[key] for key in message if key.startswith("tool")},
        )
        for message in earlier_messages()
    ]


def test_coroutines_ask_at_once_and_one_is_cancelled() -> None:
    async def ask() -> list[str | None]:
        model = llm()
        long = asyncio.create_task(llm(max_tokens=4000).achat(user(LONG)))
        answers = await asyncio.gather(*(model.achat(user(CAPITAL)) for _ in range(5)))
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return [answer.message.content for answer in answers]

    assert asyncio.run(ask()) == [ANSWER] * 5


def test_each_error_has_its_class() -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        llm(model="another").chat(user(CAPITAL))
    with pytest.raises(openai.BadRequestError, match="context length"):
        llm().chat(user(TOO_LONG))
    with pytest.raises(openai.APITimeoutError):
        llm(timeout=0.5, max_tokens=4000).chat(user(LONG))
