"""What each job knows: the server, and what its small model answers for certain."""

import json
import os
from typing import Any

URL = os.environ["XYSERVE_URL"]
API = f"{URL}/v1"
MODEL = os.environ["XYSERVE_MODEL"]
MODEL_FOLDER = os.environ["XYSERVE_MODEL_FOLDER"]
"""The checkpoint on this machine, for clients that make tokens themselves."""

CAPITAL = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
"""What the model says at temperature 0."""
USAGE = (37, 8)
"""Tokens of the prompt and of the answer."""
USAGE_AGAIN = (62, 8)
"""The same when the question and its answer went before."""

LONG = "Write a very long story about the sea."
"""Asks for more tokens than a job waits for."""
TOO_LONG = "sea " * 9000
"""More tokens than the model's context has."""

WEATHER = "What is the weather in Paris in celsius?"
PARIS = {"city": "Paris", "unit": "celsius"}
CITIES = ["Paris", "Rome", "Oslo"]
UNITS = ["celsius", "fahrenheit"]
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": CITIES}, "unit": {"enum": UNITS}},
    "required": ["city", "unit"],
}
"""Parameters that a weak model can give: it chooses, and need not end a string."""
REPORT = "It is 31 degrees celsius in Paris."
"""What the tool gives, and what the model says then."""
EARLIER = {"Rome": "It is 22 degrees celsius in Rome.", "Oslo": "It is 7 degrees celsius in Oslo."}
"""What the tool gave before. After two such turns the model calls the tool by itself, which few
prompts bring it to."""


def question(city: str) -> str:
    return WEATHER.replace("Paris", city)


def earlier_messages() -> list[dict[str, Any]]:
    """The earlier turns in the form of the chat API."""
    messages: list[dict[str, Any]] = []
    for city, report in EARLIER.items():
        arguments = json.dumps({"city": city, "unit": "celsius"})
        call: dict[str, Any] = {"id": city, "type": "function"}
        call |= {"function": {"name": "get_weather", "arguments": arguments}}
        messages += [
            {"role": "user", "content": question(city)},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": city, "content": report},
            {"role": "assistant", "content": report},
        ]
    return messages
