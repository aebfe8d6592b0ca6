"""Calls whose worker dies or hangs amid their answers: their clients see nothing of it."""

import concurrent.futures
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from cluster.client import XYServe
from tests.e2e.conftest import MODEL, wait_for_placed

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
LONG = "The quick brown fox jumps over the lazy dog. " * 40
TEXT = {"prompt": "Once upon a time", "max_tokens": 250, "temperature": 0, "ignore_eos": True}
CHAT = {
    "messages": [{"role": "user", "content": "Tell me a long story about a fox."}],
    "max_tokens": 250,
    "temperature": 0,
    "ignore_eos": True,
}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("completions", TEXT),
    "seeded": ("completions", TEXT | {"temperature": 0.8, "seed": 7}),
    "logprobs": ("completions", TEXT | {"logprobs": 3}),
    "two": ("completions", TEXT | {"n": 2, "temperature": 0.9, "seed": 3}),
    "penalties": (
        "completions",
        TEXT | {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.1},
    ),
    "min_tokens": ("completions", TEXT | {"ignore_eos": False, "min_tokens": 200}),
    "stop": ("completions", TEXT | {"stop": ["zzz never", "the end of"]}),
    "bad_words": ("completions", TEXT | {"bad_words": ["princess", "king and"]}),
    "long_prompt": ("completions", TEXT | {"prompt": LONG, "max_tokens": 150}),
    "echo": ("completions", TEXT | {"echo": True, "logprobs": 1}),
    "chat": ("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
    "json": (
        "chat/completions",
        CHAT
        | {
            "ignore_eos": False,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "people",
                    "schema": {"type": "array", "items": PERSON, "minItems": 12, "maxItems": 14},
                },
            },
        },
    ),
    "regex": (
        "completions",
        TEXT | {"ignore_eos": False, "structured_outputs": {"regex": "([a-z]{2,9} ){60}end"}},
    ),
    "tool": (
        "chat/completions",
        CHAT
        | {
            "ignore_eos": False,
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
        },
    ),
    "response": (
        "responses",
        {"input": "Tell me a story.", "max_output_tokens": 200, "temperature": 0},
    ),
}
UNSTREAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_logprobs": ("completions", TEXT | {"prompt_logprobs": 1}),
}
VOLATILE = {"id", "created", "created_at", "completed_at", "item_id", "request_id", "call_id"}
"""What differs between two answers to equal calls."""


def plain(value: Any) -> Any:
    """An answer without what is new in each."""
    match value:
        case dict():
            return {key: plain(item) for key, item in value.items() if key not in VOLATILE}
        case list():
            return [plain(item) for item in value]
        case _:
            return value


def whole(http: httpx.Client, name: str) -> Any:
    """The answer in one piece."""
    route, payload = (CALLS | UNSTREAMED)[name]
    answer = http.post(f"/v1/{route}", json={"model": MODEL, **payload}, timeout=300)
    assert answer.status_code == 200, answer.text
    document = plain(answer.json())
    document.pop("usage", None)  # it tells what was cached
    return document


def streamed(http: httpx.Client, name: str, began: Callable[[], None]) -> list[Any]:
    """The events of the answer, their tokens joined: how many come at once is chance."""
    route, payload = CALLS[name]
    events = []
    with http.stream(
        "POST", f"/v1/{route}", json={"model": MODEL, **payload, "stream": True}, timeout=300
    ) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 5:
                    began()
    return joined(events)


def joined(events: list[Any]) -> list[Any]:
    """Texts by choice, with the log probabilities and ends."""
    texts: dict[Any, Any] = {}

    def add(key: Any, piece: Any) -> None:
        if piece is not None:
            texts[key] = texts[key] + piece if key in texts else piece

    for event in events:
        assert "error" not in event, event
        if event.get("type", "").endswith(".delta"):
            add("response", event["delta"])
        for choice in event.get("choices", ()):
            index, delta = choice["index"], choice.get("delta", {})
            add((index, "text"), choice.get("text", delta.get("content")))
            for call in delta.get("tool_calls") or ():
                add((index, "arguments"), call["function"].get("arguments"))
            add((index, "end"), choice["finish_reason"])
            for key, part in (choice.get("logprobs") or {}).items():
                add((index, key), part)
    return sorted(map(str, texts.items()))


@contextmanager
def everything_running(http: httpx.Client) -> Iterator[dict[str, concurrent.futures.Future[Any]]]:
    """All calls, in one piece and streamed, in the middle of their answers."""
    num_begun = 0

    def began() -> None:
        nonlocal num_begun
        num_begun += 1

    with concurrent.futures.ThreadPoolExecutor(2 * len(CALLS) + len(UNSTREAMED)) as pool:
        running: dict[str, concurrent.futures.Future[Any]] = {
            f"{name}, streamed": pool.submit(streamed, http, name, began) for name in CALLS
        }
        running |= {name: pool.submit(whole, http, name) for name in CALLS | UNSTREAMED}
        give_up_s = time.monotonic() + 60
        while num_begun < len(CALLS) // 2:
            assert time.monotonic() < give_up_s
            time.sleep(0.02)
        yield running


@pytest.fixture(scope="module")
def unbroken(http: httpx.Client) -> dict[str, Any]:
    with everything_running(http) as running:
        return {name: call.result() for name, call in running.items()}


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.usefixtures("restored")
def test_answers_go_on_elsewhere_as_if_nothing_had_been(
    handle: XYServe, http: httpx.Client, unbroken: dict[str, Any], way: signal.Signals
) -> None:
    wait_for_placed(0, 0)
    with everything_running(http) as running:
        worker = max(handle.status().workers, key=lambda worker: worker.num_running)
        assert worker.num_running
        os.kill(worker.pid, way)
        answers = {name: call.result() for name, call in running.items()}
    if way is signal.SIGSTOP:
        os.kill(worker.pid, signal.SIGKILL)

    assert {name for name, answer in answers.items() if answer != unbroken[name]} == set()
