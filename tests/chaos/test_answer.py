"""Chaos sees each way in which an answer can suffer, and only those."""

import copy
import json
from typing import Any

import pytest

from tests.chaos.answer import Answer
from tests.chaos.kinds import KINDS, Kind

TEXT = Kind("text", "completion", {"max_tokens": 3, "ignore_eos": True, "n": 2, "stream": True})


def chunk(index: int, token: int, finish: str | None = None, **more: Any) -> dict[str, Any]:
    logprobs = {
        "tokens": [str(token)],
        "token_logprobs": [-0.5],
        "top_logprobs": [{str(token): -0.5}],
        "text_offset": [0],
    }
    choice = {
        "index": index,
        "text": f" {token}",
        "token_ids": [token],
        "logprobs": logprobs,
        "finish_reason": finish,
    }
    return {"id": f"call-{token}", "created": token, "choices": [choice | more]}


CHUNKS = [
    chunk(0, 5),
    chunk(1, 6),
    chunk(0, 7),
    chunk(1, 8),
    chunk(1, 9, "length"),
    chunk(0, 10, "length"),
    {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 6}},
]


def answer(chunks: list[dict[str, Any]], num_ends: int = 1) -> Answer:
    found = Answer(num_ends=num_ends)
    for one in chunks:
        found.take(one)
    return found


def test_a_whole_answer_has_no_fault_however_its_chunks_are_cut_and_ordered() -> None:
    first, _, second = copy.deepcopy((CHUNKS[0], CHUNKS[1], CHUNKS[2]))
    joined = first["choices"][0]
    for name in ("text", "token_ids"):
        joined[name] += second["choices"][0][name]
    for name in joined["logprobs"]:
        joined["logprobs"][name] += second["choices"][0]["logprobs"][name]
    other = answer([CHUNKS[1], first, *CHUNKS[3:]])

    assert answer(CHUNKS).fault(TEXT) == other.fault(TEXT) == ""
    assert answer(CHUNKS).difference(other) == ""


@pytest.mark.parametrize(
    ("chunks", "num_ends", "fault"),
    [
        (CHUNKS, 0, "lost: it has no end"),
        (CHUNKS, 2, "doubled: it ended 2 times"),
        (CHUNKS[:5] + CHUNKS[6:], 1, "lost: 1 of 2 choices ended"),
        ([*CHUNKS, chunk(0, 11, "length")], 1, "doubled: choice 0 ended 2 times"),
        ([CHUNKS[0], *CHUNKS], 1, "doubled: choice 0 has 4 tokens of at most 3"),
        (
            [*CHUNKS[:-1], {"usage": {"completion_tokens": 5}}],
            1,
            "lost: 5 tokens in place of 6",
        ),
        ([*CHUNKS[:2], {"error": {"code": 500}}], 0, 'failed: {"code": 500}'),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(
    chunks: list[dict[str, Any]], num_ends: int, fault: str
) -> None:
    assert answer(chunks, num_ends).fault(TEXT) == fault


@pytest.mark.parametrize("name", ["text", "token_ids", "logprobs", "finish_reason", "stop_reason"])
def test_an_answer_that_differs_in_one_thing_is_unequal(name: str) -> None:
    choice = CHUNKS[-2]["choices"][0]
    other = {
        "text": " 11",
        "token_ids": [11],
        "logprobs": choice["logprobs"] | {"token_logprobs": [-0.5000001]},
        "finish_reason": "stop",
        "stop_reason": "x",
    }[name]
    changed = [*CHUNKS[:-2], {"choices": [choice | {name: other}]}, CHUNKS[-1]]

    assert answer(CHUNKS).difference(answer(changed)).startswith("at ")


def test_a_tool_call_is_joined_from_its_pieces() -> None:
    def piece(**function: str) -> dict[str, Any]:
        call = {"index": 0, "id": "x", "function": function}
        return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}

    found = answer([piece(name="f", arguments='{"a"'), piece(arguments=": 1}")])

    assert found.choices[0].tools == {0: {"name": "f", "arguments": '{"a": 1}'}}


def test_a_response_ends_once() -> None:
    kind = next(kind for kind in KINDS if kind.name == "responses-stream")
    response = {"id": "r", "created_at": 1, "output": [{"id": "m", "text": "Hi"}]}
    events: list[dict[str, Any]] = [
        {"type": "response.output_text.delta", "item_id": "m", "delta": "Hi"},
        {"type": "response.completed", "response": response},
    ]

    assert answer(events, 0).fault(kind) == ""
    assert answer([*events, events[1]], 0).fault(kind) == "doubled: it ended 2 times"
    assert answer(events[:1], 0).fault(kind) == "lost: it has no end"
    assert json.loads(answer(events, 0).content())[2] == [{"output": [{"text": "Hi"}]}]
