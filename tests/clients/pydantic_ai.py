"""pydantic-ai: agents with tools and typed output, by the chat and by the responses API."""

import asyncio
from typing import Literal

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.clients.job import (
    ANSWER,
    API,
    CAPITAL,
    EARLIER,
    LONG,
    MODEL,
    REPORT,
    TOO_LONG,
    USAGE,
    USAGE_AGAIN,
    WEATHER,
    question,
)

GREEDY = ModelSettings(temperature=0, max_tokens=100)


class Place(BaseModel):
    """A place that the text names."""

    name: Literal["Paris", "Rome"]
    country: Literal["France", "Italy"]


def model(api: str = "chat", name: str = MODEL) -> Model:
    provider = OpenAIProvider(base_url=API, api_key="none")
    kind = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
    return kind(name, provider=provider, settings=GREEDY)


each_api = pytest.mark.parametrize("api", ["chat", "responses"])


@each_api
def test_an_agent_answers_with_its_usage(api: str) -> None:
    result = Agent(model(api)).run_sync(CAPITAL)

    assert result.output == ANSWER
    assert (result.usage.input_tokens, result.usage.output_tokens) == USAGE


@each_api
def test_an_agent_streams_the_same_answer(api: str) -> None:
    async def pieces() -> list[str]:
        async with Agent(model(api)).run_stream(CAPITAL) as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    found = asyncio.run(pieces())
    assert "".join(found) == ANSWER
    assert len(found) > 2


@each_api
@pytest.mark.parametrize("kind", ["default", "tool", "native"])
def test_output_is_of_its_class(api: str, kind: str) -> None:
    output = {"default": Place, "tool": ToolOutput(Place), "native": NativeOutput(Place)}[kind]

    result = Agent(model(api), output_type=output).run_sync("Paris is the capital of France.")

    assert isinstance(result.output, Place)


@each_api
def test_an_agent_calls_its_tool_and_reads_the_result(api: str) -> None:
    agent = Agent(model(api))

    @agent.tool_plain
    def get_weather(city: Literal["Paris", "Rome"], unit: Literal["celsius", "fahrenheit"]) -> str:
        """The weather in a city."""
        return REPORT if (city, unit) == ("Paris", "celsius") else "unknown"

    result = agent.run_sync(WEATHER, message_history=earlier_turns())

    assert result.output == REPORT
    assert result.usage.tool_calls == 1


def earlier_turns() -> list[ModelMessage]:
    turns: list[ModelMessage] = []
    for city, report in EARLIER.items():
        arguments = {"city": city, "unit": "celsius"}
        turns += [
            ModelRequest([UserPromptPart(question(city))]),
            ModelResponse([ToolCallPart("get_weather", arguments, tool_call_id=city)]),
            ModelRequest([ToolReturnPart("get_weather", report, tool_call_id=city)]),
            ModelResponse([TextPart(report)]),
        ]
    return turns


def test_earlier_turns_go_along() -> None:
    agent = Agent(model())
    first = agent.run_sync(CAPITAL)

    second = agent.run_sync(CAPITAL, message_history=first.all_messages())

    assert (second.usage.input_tokens, second.usage.output_tokens) == USAGE_AGAIN


def test_coroutines_ask_at_once_and_one_is_cancelled() -> None:
    async def ask() -> list[str]:
        agent = Agent(model())
        settings = ModelSettings(max_tokens=4000)
        long = asyncio.create_task(agent.run(LONG, model_settings=settings))
        answers = await asyncio.gather(*(agent.run(CAPITAL) for _ in range(5)))
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return [answer.output for answer in answers]

    assert asyncio.run(ask()) == [ANSWER] * 5


def test_errors_carry_the_status() -> None:
    with pytest.raises(ModelHTTPError, match="does not exist") as missing:
        Agent(model(name="another")).run_sync(CAPITAL)
    with pytest.raises(ModelHTTPError, match="context length") as too_long:
        Agent(model()).run_sync(TOO_LONG)

    assert (missing.value.status_code, too_long.value.status_code) == (404, 400)
