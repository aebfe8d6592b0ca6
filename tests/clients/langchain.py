"""LangChain: a chat model, an agent with its tool, and structured output."""

import asyncio
from typing import Any, Literal

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
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

CHAT = ChatOpenAI(
    base_url=API,
    api_key="none",
    model=MODEL,
    temperature=0,
    max_tokens=100,
    max_retries=0,
    stream_usage=True,
)


class Place(BaseModel):
    """A place that the text names."""

    name: Literal["Paris", "Rome"]
    country: Literal["France", "Italy"]


@tool
def get_weather(
    city: Literal["Paris", "Rome", "Oslo"], unit: Literal["celsius", "fahrenheit"]
) -> str:
    """The weather in a city."""
    return REPORT if (city, unit) == ("Paris", "celsius") else "unknown"


def usage(message: AIMessage) -> tuple[int, int]:
    assert message.usage_metadata
    return message.usage_metadata["input_tokens"], message.usage_metadata["output_tokens"]


def test_a_chain_is_invoked_streamed_and_batched() -> None:
    chain = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")]) | CHAT
    france = {"country": "France"}

    whole = chain.invoke(france)
    pieces = list(chain.stream(france))
    batch = chain.batch([france] * 3)

    assert [message.content for message in (whole, *batch)] == [ANSWER] * 4
    assert "".join(str(piece.content) for piece in pieces) == ANSWER
    assert len([piece for piece in pieces if piece.content]) > 2
    assert usage(whole) == USAGE
    assert usage(sum(pieces[1:], pieces[0])) == USAGE


@pytest.mark.parametrize("tool_choice", ["any", "get_weather"])
def test_bound_tools_are_called(tool_choice: str) -> None:
    bound = CHAT.bind_tools([get_weather], tool_choice=tool_choice)

    whole = bound.invoke(WEATHER)
    first, *others = bound.stream(WEATHER)

    for message in (whole, sum(others, first)):
        [call] = message.tool_calls
        assert (call["name"], call["args"], message.invalid_tool_calls) == (
            "get_weather",
            PARIS,
            [],
        )


@pytest.mark.parametrize("method", ["default", "function_calling", "json_schema"])
def test_structured_output_is_of_its_class(method: str) -> None:
    chosen = {} if method == "default" else {"method": method}
    model = CHAT.with_structured_output(Place, include_raw=True, **chosen)

    result = model.invoke("Paris is the capital of France.")

    assert result["parsing_error"] is None
    assert isinstance(result["parsed"], Place)


def test_an_agent_uses_its_tool_and_reads_the_result() -> None:
    agent = create_agent(CHAT, [get_weather])

    state = agent.invoke({"messages": [*earlier_messages(), ("user", WEATHER)]})

    call, result, answer = state["messages"][-3:]
    assert [each["args"] for each in call.tool_calls] == [PARIS]
    assert isinstance(result, ToolMessage)
    assert (result.content, answer.content) == (REPORT, REPORT)


def test_the_responses_api_serves_it_too() -> None:
    chat = CHAT.model_copy(update={"use_responses_api": True})

    message = chat.invoke(CAPITAL)

    assert message.text == ANSWER
    assert usage(message) == USAGE
    assert "".join(piece.text for piece in chat.stream(CAPITAL)) == ANSWER


def test_coroutines_ask_at_once_and_one_is_cancelled() -> None:
    async def ask() -> list[Any]:
        long = asyncio.create_task(CHAT.bind(max_tokens=4000).ainvoke(LONG))
        answers = await asyncio.gather(*(CHAT.ainvoke(CAPITAL) for _ in range(5)))
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return [answer.content for answer in answers]

    assert asyncio.run(ask()) == [ANSWER] * 5


def test_each_error_has_its_class() -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        CHAT.model_copy(update={"model_name": "another"}).invoke(CAPITAL)
    with pytest.raises(openai.BadRequestError, match="context length"):
        CHAT.invoke(TOO_LONG)
    with pytest.raises(openai.APITimeoutError):
        CHAT.bind(timeout=0.5, max_tokens=4000).invoke(LONG)


def test_log_probabilities_come_along() -> None:
    tokens = CHAT.bind(logprobs=True).invoke(CAPITAL).response_metadata["logprobs"]["content"]

    assert "".join(token["token"] for token in tokens).startswith(ANSWER)
