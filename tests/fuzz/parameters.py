"""Requests with all sampling parameters at once, and bodies and headers that are none."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import strategies as st

MOST = 3
"""Tokens of an answer, and sequences of a call: more is legal, but takes its time."""
HELLO = [{"role": "user", "content": "Hello"}]
VOCABULARY = 49_152
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": MOST},
    "/v1/completions": {"prompt": "Hello", "max_tokens": MOST},
    "/v1/messages": {"messages": HELLO, "max_tokens": MOST},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/v1/responses": {"input": "Hello", "max_output_tokens": MOST},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5]},
}
"""Bodies, without the model."""
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")

_token_ids = st.lists(st.integers(-1, VOCABULARY), max_size=5)
_texts = st.one_of(st.text(max_size=8), st.sampled_from(["", "\x00", "\ud800", "é" * 300, "</s>"]))
_schemas = st.sampled_from(
    [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        {"type": "string", "pattern": "[ab]{1,4}"},
        {"enum": ["a", 1, None]},
        {"$ref": "#/$defs/no"},
        {"type": "nonsense"},
        {},
    ]
)
_tool = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["f", "get_weather", "", "a b", "x" * 100])},
            optional={"parameters": _schemas, "strict": st.booleans(), "description": _texts},
        ),
    }
)

PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(-1, MOST),
    "best_of": st.integers(0, MOST),
    "max_tokens": st.integers(-1, MOST),
    "max_completion_tokens": st.integers(0, MOST),
    "max_output_tokens": st.integers(0, MOST),
    "min_tokens": st.integers(-1, MOST),
    "temperature": st.floats(-0.5, 3.0) | st.sampled_from([0, 1e-9, 1e9]),
    "top_p": st.floats(-0.1, 1.1),
    "top_k": st.integers(-2, VOCABULARY + 1),
    "min_p": st.floats(-0.1, 1.1),
    "presence_penalty": st.floats(-2.5, 2.5),
    "frequency_penalty": st.floats(-2.5, 2.5),
    "repetition_penalty": st.floats(-0.5, 3.0),
    "length_penalty": st.floats(-2.0, 2.0),
    "seed": st.integers(-(2**64), 2**64),
    "stop": _texts | st.lists(_texts, max_size=5),
    "stop_sequences": st.lists(_texts, max_size=5),
    "stop_token_ids": _token_ids,
    "bad_words": st.lists(_texts, max_size=5),
    "allowed_token_ids": _token_ids,
    "logit_bias": st.dictionaries(
        st.integers(-1, VOCABULARY).map(str), st.floats(-101, 101), max_size=4
    ),
    "logprobs": st.booleans() | st.integers(-2, 21),
    "top_logprobs": st.integers(-1, 21),
    "prompt_logprobs": st.integers(-2, 21),
    "logprob_token_ids": _token_ids,
    "return_tokens_as_token_ids": st.booleans(),
    "return_token_ids": st.booleans(),
    "echo": st.booleans(),
    "suffix": _texts,
    "ignore_eos": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "spaces_between_special_tokens": st.booleans(),
    "truncate_prompt_tokens": st.integers(-2, 20),
    "use_beam_search": st.booleans(),
    "add_special_tokens": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "continue_final_message": st.booleans(),
    "thinking_token_budget": st.integers(-1, 5),
    "repetition_detection": st.fixed_dictionaries(
        {"max_pattern_size": st.integers(-1, 5), "min_count": st.integers(-1, 5)}
    ),
    "priority": st.integers(-(2**33), 2**33),
    "request_id": _texts,
    "user": _texts,
    "metadata": st.dictionaries(st.text(max_size=4), _texts, max_size=3),
    "stream": st.booleans(),
    "stream_options": st.dictionaries(
        st.sampled_from(["include_usage", "continuous_usage_stats"]), st.booleans()
    ),
    "response_format": st.sampled_from(
        [{"type": "json_object"}, {"type": "text"}, {"type": "json_schema"}, {}]
    )
    | _schemas.map(
        lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ),
    "structured_outputs": st.one_of(
        _schemas.map(lambda schema: {"json": schema}),
        st.sampled_from(
            [{"regex": "[ab]{1,3}"}, {"regex": "(("}, {"choice": ["a", "b"]}, {"choice": []}, {}]
        ),
        st.just({"grammar": 'root ::= "a" | "b"'}),
        st.just({"regex": "a", "choice": ["b"]}),
    ),
    "tools": st.lists(_tool, max_size=2),
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", "any", {"type": "function", "function": {"name": "f"}}]
    ),
    "parallel_tool_calls": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.text(max_size=4), _texts, max_size=2),
    "extra_args": st.dictionaries(st.text(max_size=4), _texts, max_size=2),
    "vllm_xargs": st.dictionaries(st.text(max_size=4), _texts, max_size=2),
    "kv_transfer_params": st.dictionaries(st.text(max_size=4), _texts, max_size=2),
    "text": _schemas.map(
        lambda schema: {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    ),
    "reasoning": st.fixed_dictionaries({"effort": st.sampled_from(["low", "high", "none", "x"])}),
    "ec_transfer_params": st.dictionaries(st.text(max_size=4), _texts, max_size=2),
    "include_reasoning": st.booleans(),
    "reasoning_effort": st.sampled_from(["low", "high", "none", "x"]),
    "return_prompt_text": st.booleans(),
    "return_token_offsets": st.booleans(),
    "routed_experts_prompt_start": st.integers(-1, 5),
    "session_id": _texts,
    "stream_interval": st.integers(-1, 5),
    "truncation_side": st.sampled_from(["left", "right", "x"]),
    "watermarking": st.booleans() | st.dictionaries(st.text(max_size=4), _texts, max_size=2),
    "data_parallel_rank": st.integers(-1, 3),
    "include": st.lists(st.sampled_from(["message.output_text.logprobs", "x"]), max_size=2),
    "instructions": _texts,
    "truncation": st.sampled_from(["auto", "disabled", "x"]),
    "service_tier": st.sampled_from(["auto", "default", "x"]),
    "store": st.booleans(),
    "background": st.just(False),
}
"""Values of each parameter, on both sides of its limits, of any of the APIs."""


def _deep(levels: int) -> Any:
    found: Any = {"type": "object"}
    for _ in range(levels):
        found = {"type": "object", "properties": {"a": found}, "items": [0]}
    return found


WILD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [[], {}, [[]], [None], {"": None}, "x" * 5000, [0] * 3000, _deep(30), _deep(300), [{}] * 50]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=8,
    ),
)
"""What no parameter means."""

BOUNDED = {"n", "best_of", "min_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens"}


def bounded(body: dict[str, Any]) -> dict[str, Any]:
    """Of few tokens, where it would be many: that is legal, but takes its time."""
    body = {key: body[key] for key in body if key not in BOUNDED or body[key] is not None}
    few = {key: body[key] for key in BOUNDED & body.keys() if isinstance(body[key], int)}
    return body | {key: min(value, MOST) for key, value in few.items()}


@st.composite
def bodies(draw: st.DrawFn, path: str, model: str) -> dict[str, Any]:
    """A body with many parameters, of which a few may be anything."""
    body = {"model": model} | VALID[path]
    names = draw(st.sets(st.sampled_from(sorted(PARAMETERS)), max_size=len(PARAMETERS)))
    for name in sorted(names):
        body[name] = draw(PARAMETERS[name])
    wild = st.sets(st.sampled_from(sorted({*PARAMETERS, *body})), max_size=2)
    for name in sorted(draw(st.just(set()) | wild)):
        body[name] = draw(WILD)
    return bounded(body)


HEADERS: dict[str, st.SearchStrategy[str | bytes]] = {
    "x-request-id": _texts | st.just("i" * 600) | st.binary(max_size=20),
    "x-slo-class": st.sampled_from(["interactive", "standard", "batch", "", "no such class"]),
    "x-slo-ttft-ms": st.sampled_from(["1", "0", "-5", "1e400", "nan", "none", "", "x", "9" * 400]),
    "x-slo-tpot-ms": st.sampled_from(["1", "0", "inf", "none", "0.0001", "0x10"]),
    "traceparent": st.sampled_from(
        ["00-" + "1" * 32 + "-" + "2" * 16 + "-01", "00-0-0-0", "x", "", "ff" * 500]
    ),
    "tracestate": _texts,
    "authorization": _texts,
    "content-type": st.sampled_from(
        [
            *("application/json", "application/json; charset=utf-16", "text/plain", ""),
            *("application/x-www-form-urlencoded", "multipart/form-data", "multipart/form-data;"),
        ]
    ),
    "accept": st.sampled_from(["text/event-stream", "application/json", "image/png", ""]),
    "accept-encoding": st.sampled_from(["gzip", "br", "identity;q=0, *;q=0", "\xff"]),
    "content-encoding": st.sampled_from(["gzip", "deflate"]),
    "expect": st.just("100-continue"),
    "x-data-parallel-rank": st.sampled_from(["0", "1", "-1", "x", "9" * 30]),
    "x-session-id": _texts | st.binary(max_size=9),
    "serve_multiplexed_model_id": _texts | st.binary(max_size=9),
    "x-request-timeout-seconds": st.sampled_from(["0", "-1", "nan", "x"]) | st.binary(max_size=9),
    "x-request-disconnect-disabled": st.sampled_from(["?1", "?0", "x"]) | st.binary(max_size=9),
    "anthropic-version": _texts,
    "anthropic-beta": _texts,
    "x-forwarded-for": _texts,
    "cookie": _texts,
}
"""Headers that something on the way may read."""


def _clean(value: str | bytes) -> bytes:
    """A value that can be sent as a header at all."""
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return data.translate(None, b"\r\n\x00").strip(b" \t\x0b\x0c")


def headers() -> st.SearchStrategy[dict[str, bytes]]:
    """Some of them."""
    names = st.sets(st.sampled_from(sorted(HEADERS)), max_size=5)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries(
            {name: HEADERS[name].map(_clean) for name in sorted(chosen)}
        )
    )


@dataclass(frozen=True)
class Input:
    """A request as it is sent."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, bytes] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.path} {dict(self.headers)} {self.body[:1500]!r}"


def encode(body: Any) -> bytes:
    """JSON, halves of characters included."""
    return json.dumps(body).encode()


@st.composite
def broken(draw: st.DrawFn, path: str, model: str) -> bytes:
    """Bytes that are nearly, or not at all, the JSON of a request."""
    whole = encode({"model": model} | VALID.get(path, {}))
    kind = draw(st.sampled_from(["cut", "flipped", "inserted", "bytes", "special"]))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    place = draw(st.integers(0, len(whole) - 1))
    if kind == "flipped":
        return whole[:place] + bytes([draw(st.integers(0, 255))]) + whole[place + 1 :]
    if kind == "inserted":
        return whole[:place] + draw(st.binary(min_size=1, max_size=9)) + whole[place:]
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    return draw(
        st.sampled_from(
            [
                *(b"", b"null", b"[]", b"0", b'""', b"\xef\xbb\xbf" + whole, whole * 2),
                *(b"[" * 5000, b'{"a":' * 5000, b'{"model":' + b"9" * 5000 + b"}"),
                b'{"temperature":1e999999,' + whole[1:],
                b'{"seed":-0,"seed":NaN,"top_p":Infinity,' + whole[1:],
                whole.decode().encode("utf-16"),
            ]
        )
    )


@st.composite
def inputs(draw: st.DrawFn, path: str, model: str) -> Input:
    """A request to a route that takes a body."""
    if draw(st.integers(0, 4)) == 0:
        body = draw(broken(path, model))
    else:
        body = encode(draw(bodies(path, model)))
    return Input("POST", path, body, {"content-type": b"application/json"} | draw(headers()))


def generated(number: int, seed: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Have a function of hypothesis called with `number` values that `seed` makes, and no more."""
    settings = hypothesis.settings(
        max_examples=number,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda function: hypothesis.seed(seed)(settings(function))
