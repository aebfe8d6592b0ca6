"""The kinds of requests that chaos sends: one of each promise that an answer survives a death."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.workload import questions

Api = Literal["chat", "completion", "responses"]

PATHS: dict[Api, str] = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "responses": "/v1/responses",
}
NUM_TOKENS = 90
LONG_PROMPT_TOKENS = 1800
"""More than a step takes of one prompt beside others, so that it is cut into chunks."""

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "people": {"type": "integer"},
        "sights": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 6},
    },
    "required": ["city", "people", "sights"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "describe_city",
        "description": "Describe a city.",
        "parameters": CITY,
    },
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
SENTENCES = r"([A-Z][a-z]{2,9}( [a-z]{1,9}){4,12}\. ){4}"

Params = dict[str, Any]
GREEDY: Params = {"temperature": 0}
SEEDED: Params = {"temperature": 0.9, "seed": 11}
WHOLE: Params = {"ignore_eos": True, "max_tokens": NUM_TOKENS}
"""An answer of a known length."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request; its prompt varies."""

    name: str
    api: Api
    params: Params
    by_handle: bool = False
    """Whether the Python handle sends it, not HTTP."""
    exact: bool = True
    """Whether every answer to it is equal: it is greedy or has a seed."""
    long_prompt: bool = False
    prompts: tuple[str, ...] = field(default=())
    """Prompts in place of questions."""

    @property
    def streams(self) -> bool:
        return bool(self.params.get("stream"))

    @property
    def num_choices(self) -> int:
        """Choices that an answer to it has."""
        return int(self.params.get("n", 1))


@dataclass(frozen=True, slots=True)
class Call:
    """A request of one kind with one prompt."""

    kind: Kind
    variant: int

    @property
    def name(self) -> str:
        return f"{self.kind.name}-{self.variant}"

    def body(self, model: str) -> Params:
        """What the API takes."""
        prompt = _prompt(self.kind, self.variant)
        match self.kind.api:
            case "chat":
                given: Params = {"messages": [{"role": "user", "content": prompt}]}
            case "completion":
                given = {"prompt": prompt}
            case "responses":
                given = {"input": prompt}
        return {"model": model} | given | self.kind.params


def _prompt(kind: Kind, variant: int) -> str:
    if kind.prompts:
        return kind.prompts[variant % len(kind.prompts)]
    texts = questions(40)
    if kind.long_prompt:
        # About four characters a token.
        return f"Text {variant}. {' '.join(texts[20:])}"[: 4 * LONG_PROMPT_TOKENS]
    return texts[variant]


def _kinds() -> Iterator[Kind]:
    chat, text = GREEDY | WHOLE, GREEDY | WHOLE | {"return_token_ids": True}
    stream: Params = {"stream": True}
    usage: Params = stream | {"stream_options": {"include_usage": True}}
    city = ("Describe Paris.", "Describe Cairo.")
    repeats = ("one two three four five six seven eight nine ten " * 6, "ab cd ef gh " * 12)

    yield Kind("chat", "chat", chat)
    yield Kind("chat-stream", "chat", chat | usage)
    yield Kind("chat-logprobs", "chat", chat | {"logprobs": True, "top_logprobs": 3})
    yield Kind("chat-logprobs-stream", "chat", chat | stream | {"logprobs": True})
    yield Kind("text", "completion", text)
    yield Kind("text-stream", "completion", text | usage)
    yield Kind("text-logprobs-stream", "completion", text | stream | {"logprobs": 3})
    yield Kind("text-echo", "completion", GREEDY | WHOLE | {"echo": True, "logprobs": 1})
    yield Kind("prompt-logprobs", "completion", text | {"prompt_logprobs": 2})
    yield Kind("n-seeded", "completion", SEEDED | WHOLE | {"n": 3})
    yield Kind("n-seeded-stream", "chat", SEEDED | WHOLE | stream | {"n": 3})
    yield Kind("seeded-stream", "completion", SEEDED | WHOLE | usage | {"top_p": 0.9})
    yield Kind("seeded-logprobs", "chat", SEEDED | WHOLE | {"logprobs": True, "top_k": 20})
    stop = {"stop": ["\n\n", " the "], "max_tokens": NUM_TOKENS, "include_stop_str_in_output": True}
    yield Kind("stop-stream", "chat", GREEDY | stop | stream)
    yield Kind(
        "min-tokens",
        "completion",
        GREEDY | {"min_tokens": 60, "max_tokens": NUM_TOKENS, "stop": [".", ","]},
    )
    yield Kind("eos-stream", "chat", GREEDY | usage | {"max_tokens": 150})
    yield Kind(
        "penalties-stream",
        "completion",
        text
        | stream
        | {"frequency_penalty": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    )
    yield Kind("penalties-seeded", "chat", SEEDED | WHOLE | {"frequency_penalty": 0.9})
    yield Kind(
        "bad-words-stream",
        "completion",
        text | stream | {"bad_words": ["the", "dollars", "of the number"]},
    )
    yield Kind("logit-bias", "completion", text | {"logit_bias": {"260": -5, "28": 2.5}})
    yield Kind(
        "json-stream",
        "chat",
        GREEDY | stream | {"response_format": JSON_SCHEMA, "max_tokens": 200},
        prompts=city,
    )
    yield Kind(
        "json-seeded",
        "chat",
        SEEDED | {"response_format": JSON_SCHEMA, "max_tokens": 200},
        prompts=city,
    )
    yield Kind(
        "regex-stream",
        "completion",
        GREEDY | stream | {"structured_outputs": {"regex": SENTENCES}, "max_tokens": 160},
    )
    tools: Params = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
    yield Kind("tools-stream", "chat", GREEDY | tools | stream, prompts=city)
    yield Kind("tools", "chat", SEEDED | tools, prompts=city)
    yield Kind("repeats-stream", "completion", text | stream, prompts=repeats)
    yield Kind("long-stream", "completion", text | stream, long_prompt=True)
    yield Kind(
        "long-logprobs",
        "completion",
        text | {"prompt_logprobs": 0, "max_tokens": 40},
        long_prompt=True,
    )
    yield Kind("unseeded", "chat", WHOLE | {"temperature": 1.0}, exact=False)
    yield Kind("unseeded-stream", "completion", WHOLE | usage | {"temperature": 1.0}, exact=False)
    yield Kind(
        "n-unseeded-stream",
        "completion",
        WHOLE | stream | {"temperature": 1.0, "n": 2},
        exact=False,
    )
    responses: Params = {"temperature": 0, "max_output_tokens": NUM_TOKENS}
    yield Kind("responses", "responses", responses)
    yield Kind("responses-stream", "responses", responses | stream)
    yield Kind("handle-chat", "chat", chat, by_handle=True)
    yield Kind("handle-stream", "completion", text | stream, by_handle=True)
    yield Kind("handle-seeded-stream", "chat", SEEDED | WHOLE | stream, by_handle=True)


KINDS = tuple(_kinds())
