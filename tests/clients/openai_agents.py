"""openai-agents, by the chat and by the responses API."""

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel

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

set_tracing_disabled(True)

GREEDY = ModelSettings(temperature=0, max_tokens=100, include_usage=True)
each_api = pytest.mark.parametrize("api", ["chat", "responses"])


class Place(BaseModel):
    """A place that the text names."""

    name: Literal["Paris", "Rome"]
    country: Literal["France", "Italy"]


def model(api: str = "chat", name: str = MODEL) -> Model:
    client = openai.AsyncOpenAI(base_url=API, api_key="none", max_retries=0)
    kind = OpenAIChatCompletionsModel if api == "chat" else OpenAIResponsesModel
    return kind(model=name, openai_client=client)


def agent(api: str = "chat", **params: Any) -> Agent[Any]:
    return Agent(**{"name": "Guide", "model": model(api), "model_settings": GREEDY} | params)


@each_api
def test_an_agent_answers_with_its_usage(api: str) -> None:
    result = Runner.run_sync(agent(api), CAPITAL)

    assert result.final_output == ANSWER
    usage = result.context_wrapper.usage
    assert (usage.input_tokens, usage.output_tokens) == USAGE


@each_api
def test_an_agent_streams_the_same_answer(api: str) -> None:
    async def pieces() -> list[str]:
        events = Runner.run_streamed(agent(api), CAPITAL).stream_events()
        raw = [event.data async for event in events if event.type == "raw_response_event"]
        return [data.delta for data in raw if data.type == "response.output_text.delta"]

    found = asyncio.run(pieces())
    assert "".join(found) == ANSWER
    assert len(found) > 2


@each_api
def test_output_is_of_its_class(api: str) -> None:
    result = Runner.run_sync(agent(api, output_type=Place), "Paris is the capital of France.")

    assert isinstance(result.final_output, Place)


@each_api
def test_an_agent_calls_its_tool_and_reads_the_result(api: str) -> None:
    asked = []

    @function_tool
    def get_weather(city: Literal["Paris", "Rome"], unit: Literal["celsius", "fahrenheit"]) -> str:
        """The weather in a city."""
        asked.append((city, unit))
        return REPORT

    result = Runner.run_sync(agent(api, tools=[get_weather]), earlier_turns() + user(WEATHER))

    assert asked == [("Paris", "celsius")]
    assert result.final_output == REPORT


def user(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def earlier_turns() -> list[Any]:
    turns: list[Any] = []
    for city, report in EARLIER.items():
        arguments = json.dumps({"city": city, "unit": "celsius"})
        call = {"type": "function_call", "call_id": city, "name": "get_weather"}
        turns += [
            *user(question(city)),
            call | {"arguments": arguments},
            {"type": "function_call_output", "call_id": city, "output": report},
            {"role": "assistant", "content": report},
        ]
    return turns


def test_one_agent_hands_over_to_another() -> None:
    settings = GREEDY.resolve(ModelSettings(tool_choice="required"))
    other = agent(name="Historian")
    first = agent(name="Desk", handoffs=[other], model_settings=settings)

    result = Runner.run_sync(first, CAPITAL)

    assert result.last_agent is other


def test_a_session_takes_earlier_turns_along() -> None:
    session = SQLiteSession("one")
    Runner.run_sync(agent(), CAPITAL, session=session)

    result = Runner.run_sync(agent(), CAPITAL, session=session)

    usage = result.context_wrapper.usage
    assert (usage.input_tokens, usage.output_tokens) == USAGE_AGAIN


def test_coroutines_ask_at_once_and_one_is_cancelled() -> None:
    async def ask() -> list[str]:
        settings = GREEDY.resolve(ModelSettings(max_tokens=4000))
        long = asyncio.create_task(Runner.run(agent(model_settings=settings), LONG))
        answers = await asyncio.gather(*(Runner.run(agent(), CAPITAL) for _ in range(5)))
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return [answer.final_output for answer in answers]

    assert asyncio.run(ask()) == [ANSWER] * 5


@each_api
def test_each_error_has_its_class(api: str) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        Runner.run_sync(agent(model=model(api, "another")), CAPITAL)
    with pytest.raises(openai.BadRequestError, match="context length"):
        Runner.run_sync(agent(api), TOO_LONG)
