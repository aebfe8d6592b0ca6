"""instructor, in its default mode (tools) and in the other modes that the API enforces."""

import asyncio
import json
from typing import Any, Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.job import API, MODEL

CLIENT = openai.OpenAI(base_url=API, api_key="none", max_retries=0)
ASK: Any = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Paris is the capital of France."}],
    "temperature": 0,
    "max_tokens": 150,
    "max_retries": 0,
}


class Place(BaseModel):
    """A place that the text names."""

    name: Literal["Paris", "Rome"]
    country: Literal["France", "Italy"]
    size: int = Field(ge=1, le=9)


def test_the_default_mode_gives_the_class() -> None:
    client = instructor.from_openai(CLIENT)

    place, answer = client.create_with_completion(response_model=Place, **ASK)

    assert client.mode == instructor.Mode.TOOLS
    assert isinstance(place, Place)
    [call] = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == place.model_dump()
    assert answer.usage.completion_tokens > 5


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_other_modes_give_it_too(mode: str) -> None:
    client = instructor.from_openai(CLIENT, mode=instructor.Mode[mode])
    ask = dict(ASK)
    if mode == "RESPONSES_TOOLS":
        ask["max_output_tokens"] = ask.pop("max_tokens")

    assert isinstance(client.create(response_model=Place, **ask), Place)


def test_a_partial_object_grows_to_the_whole_one() -> None:
    client = instructor.from_openai(CLIENT)

    states = list(client.create_partial(response_model=Place, **ASK))

    assert len(states) > 2
    whole = client.create(response_model=Place, **ASK)
    assert states[-1].model_dump() == whole.model_dump()


def test_coroutines_ask_at_once() -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=API, api_key="none", max_retries=0) as own:
            client = instructor.from_openai(own)
            return await asyncio.gather(
                *(client.create(response_model=Place, **ASK) for _ in range(4))
            )

    first, *others = [place.model_dump() for place in asyncio.run(ask())]
    assert others == [first] * 3


def test_an_error_of_the_api_is_not_retried_away() -> None:
    client = instructor.from_openai(CLIENT)

    with pytest.raises(Exception, match="does not exist") as raised:
        client.create(response_model=Place, **ASK | {"model": "another"})
    assert "404" in str(raised.value)
