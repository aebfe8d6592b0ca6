"""What cannot be served is answered with a clear error, and nothing breaks."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st

from cluster.client import XYServe
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL, Server

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
JSON = {"Content-Type": "application/json"}
MAX_BYTES = 200_000
VOCABULARY = 49_152


@pytest.fixture(scope="module", autouse=True)
def before(server: Server, handle: XYServe) -> tuple[dict[int, str], list[str]]:
    """The replicas, and what they had logged, before any bad input."""
    handle.status()
    return server.replicas(), server.tracebacks()


def assert_error(answer: httpx.Response, status: int, *words: str) -> None:
    """The answer is an error in the form of the OpenAI API, and its message says these words."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert error["code"] == status
    assert error["type"]
    for word in words:
        assert word in error["message"]


def post(http: httpx.Client, path: str, params: dict[str, Any]) -> httpx.Response:
    prompt = {CHAT: {"messages": HELLO}, COMPLETION: {"prompt": "Hello"}}.get(
        path, {"input": "Hello"}
    )
    body = {"model": MODEL, "max_tokens": 4, **prompt} | params
    return http.post(path, json={key: value for key, value in body.items() if value is not MISSING})


MISSING = object()


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_tokens": -1}, ["max_tokens must be at least 1, got -1"]),
        ({"max_tokens": 0}, ["max_tokens must be at least 1, got 0"]),
        ({"max_tokens": 10**9}, ["max_tokens=1000000000", "max_model_len=8192"]),
        ({"max_tokens": 2**80}, ["max_model_len=8192"]),
        ({"max_tokens": "many"}, ["max_tokens", "valid integer"]),
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"temperature": 99}, ["temperature must be in [0, 2]"]),
        ({"n": 0}, ["n must be at least 1"]),
        ({"n": -3}, ["n must be at least 1"]),
        ({"n": 10_000, "temperature": 1}, ["n must be at most 128, got 10000"]),
        ({"top_p": 0}, ["top_p must be in (0, 1]"]),
        ({"top_p": 1.5}, ["top_p must be in (0, 1]"]),
        ({"top_k": -5}, ["top_k"]),
        ({"top_k": 2**70}, ["can't serialize ints"]),
        ({"presence_penalty": 3}, ["presence_penalty must be in [-2, 2]"]),
        ({"repetition_penalty": 0}, ["repetition_penalty must be greater than zero"]),
        ({"seed": 2**70}, ["seed"]),
        ({"stop": [""]}, ["stop cannot contain an empty string"]),
        ({"stop": 5}, ["stop"]),
        ({"stream": "perhaps"}, ["stream"]),
        ({"min_tokens": 100}, ["min_tokens must be less than or equal to max_tokens=4"]),
        ({"logit_bias": {str(VOCABULARY): 1}}, ["out-of-vocab", str(VOCABULARY)]),
        ({"logit_bias": {"-1": 1}}, ["out-of-vocab"]),
        ({"logit_bias": {"Paris": 1}}, ["cannot be converted to integer token IDs"]),
        ({"logit_bias": {"5": "x"}}, ["logit_bias.5"]),
        ({"stop_token_ids": [10**9]}, ["out-of-vocab"]),
        ({"allowed_token_ids": [10**9]}, ["out-of-vocab"]),
        ({"priority": "high"}, ["priority"]),
        ({"stream_options": {"include_usage": True}}, ["only be defined when `stream=True`"]),
        ({"response_format": {"type": "yaml"}}, ["response_format"]),
        ({"response_format": {"type": "json_schema"}}, ["'json_schema' field must be provided"]),
        ({"structured_outputs": {"regex": "(("}}, ["unclosed group"]),
        ({"structured_outputs": {"grammar": "root ::= (("}}, ["Invalid grammar specification"]),
        ({"structured_outputs": {"choice": []}}, ["cannot be an empty list"]),
        ({"structured_outputs": {"json": "{"}}, ["Invalid JSON grammar"]),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, ["only use one kind"]),
    ],
)
def test_a_parameter_that_makes_no_sense_is_named(
    http: httpx.Client, path: str, params: dict[str, Any], words: list[str]
) -> None:
    assert_error(post(http, path, params), 400, *words)
    if "stream" not in params and "stream_options" not in params:
        assert_error(post(http, path, params | {"stream": True}), 400, *words)


def schema(content: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": content}}


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}}
    return inner


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no object", ["schema", "valid dictionary"]),
        ({"type": "nonsense"}, ["Invalid type: nonsense"]),
        ({"$ref": "#/nowhere"}, ["'/nowhere' does not exist"]),
        ({"type": "string", "pattern": "(("}, ["unclosed group"]),
        (nested(200), ["nested too deeply"]),
    ],
)
def test_a_broken_json_schema_is_refused(
    http: httpx.Client, content: Any, words: list[str]
) -> None:
    assert_error(post(http, CHAT, {"response_format": schema(content)}), 400, *words)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"messages": []}, ["Provide at least one message"]),
        ({"messages": MISSING}, ["messages", "Field required"]),
        ({"messages": "Hello"}, ["messages", "valid list"]),
        ({"messages": [5]}, ["messages"]),
        ({"messages": [{"content": "Hello"}]}, ["role", "Field required"]),
        ({"messages": [{"role": "user", "content": 5}]}, ["content", "valid string"]),
        ({"messages": [{"role": 5, "content": "Hello"}]}, ["role"]),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, ["smell"]),
        ({"top_logprobs": 1000, "logprobs": True}, ["greater than max allowed: 20"]),
        ({"tool_choice": "required"}, ["`tools` must be set"]),
        ({"tools": [{"type": "function"}]}, ["tools.0.function", "Field required"]),
        ({"chat_template": "{{ 1 }}"}, ["untrusted chat template"]),
        ({"structured_outputs": False}, ["a field of the request has the wrong type"]),
    ],
)
def test_a_chat_that_makes_no_sense_is_refused(
    http: httpx.Client, params: dict[str, Any], words: list[str]
) -> None:
    assert_error(post(http, CHAT, params), 400, *words)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (MISSING, ["prompt"]),
        ("", ["non-empty"]),
        ([], ["at least one prompt"]),
        ([[]], ["cannot be empty"]),
        (5, ["prompt"]),
        ({"text": "Hello"}, ["prompt"]),
        ([1.5], ["prompt"]),
        (["Hello", 5], ["prompt"]),
        ([-1], ["greater than or equal to 0"]),
        ([VOCABULARY], [f"Token id {VOCABULARY} is out of vocabulary"]),
        ([2**70], ["out of vocabulary"]),
        ([[5], [10**12]], ["out of vocabulary"]),
    ],
)
def test_a_prompt_that_makes_no_sense_is_refused(
    http: httpx.Client, prompt: Any, words: list[str]
) -> None:
    assert_error(post(http, COMPLETION, {"prompt": prompt}), 400, *words)


@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/tokenize", "/v1/responses"])
def test_an_unknown_model_is_not_found(http: httpx.Client, path: str) -> None:
    prompt = {"prompt": "Hello"} if path == "/tokenize" else {}

    answer = post(http, path, {"model": "gpt-17"} | prompt)

    assert_error(answer, 404, "The model `gpt-17` does not exist")


@pytest.mark.parametrize(
    ("path", "params"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a b " * 9000}]}),
        (COMPLETION, {"prompt": "a b " * 9000}),
        (COMPLETION, {"prompt": [5] * 8193}),
    ],
)
def test_a_prompt_over_the_context_is_refused(
    http: httpx.Client, path: str, params: dict[str, Any]
) -> None:
    assert_error(post(http, path, params), 400, "maximum context length is 8192 tokens")


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(http: httpx.Client) -> None:
    answer = post(http, COMPLETION, {"prompt": [5] * 8192, "max_tokens": MISSING})

    assert_error(answer, 400, "max_tokens must be at least 1, got 0")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/image.png"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ],
)
def test_a_text_model_says_that_it_takes_no_images(
    http: httpx.Client, part: dict[str, Any]
) -> None:
    answer = post(http, CHAT, {"messages": [{"role": "user", "content": [part]}]})

    assert_error(answer, 400, f"{MODEL} is not a multimodal model")


# Bodies


BROKEN = {
    "empty": b"",
    "cut off": b'{"model": ',
    "a list": b"[1, 2]",
    "null": b"null",
    "a string": b'"Hello"',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "deep lists": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "a huge number": b'{"seed": ' + b"9" * 5000 + b"}",
    "not a number": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    "half a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_a_body_that_is_no_request_is_refused(http: httpx.Client, body: bytes) -> None:
    for path in (CHAT, COMPLETION):
        assert_error(http.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}])
def test_a_body_of_another_type_is_refused(http: httpx.Client, headers: dict[str, str]) -> None:
    body = json.dumps({"model": MODEL, "messages": HELLO})

    assert_error(http.post(CHAT, content=body, headers=headers), 400, "Unsupported Media Type")


def in_chunks(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


def test_a_body_over_the_limit_is_refused(http: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x" * MAX_BYTES}).encode()

    for content in (body, in_chunks(body)):
        answer = http.post(COMPLETION, content=content, headers=JSON)
        assert_error(answer, 413, "over the limit of 200000 bytes", "ingress.max_request_bytes")


def test_a_body_within_the_limit_is_taken_in_chunks_too(http: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 2, "x": " " * 150_000})

    for content in (body.encode(), in_chunks(body.encode())):
        assert http.post(COMPLETION, content=content, headers=JSON).status_code == 200


ODD = {
    "null": "\0",
    "null inside": "a\0b",
    "invisible": "\u202e\u200b\ufeff",
    "no character": "\uffff",
    "many accents": "e" + "\u0301" * 50,
    "emoji": "\U0001f600" * 20,
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD.keys())
def test_odd_text_is_answered(http: httpx.Client, content: str) -> None:
    chat = post(http, CHAT, {"messages": [{"role": "user", "content": content}]})

    assert (chat.status_code, post(http, COMPLETION, {"prompt": content}).status_code) == (200, 200)


# Routes


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nowhere", "/v2/chat/completions"])
def test_an_unknown_route_is_not_found(http: httpx.Client, method: str, path: str) -> None:
    assert_error(http.request(method, path), 404, f"Not Found: {method} {path}")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", CHAT), ("PUT", COMPLETION), ("DELETE", "/v1/models")]
)
def test_a_wrong_method_is_refused(http: httpx.Client, method: str, path: str) -> None:
    answer = http.request(method, path)

    assert_error(answer, 405, f"Method Not Allowed: {method} {path}")
    assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("/v1/embeddings", "embeddings"),
        ("/v1/rerank", "reranking"),
        ("/rerank", "reranking"),
        ("/pooling", "pooling"),
        ("/classify", "classification"),
        ("/v1/score", "scoring"),
        ("/v1/moderations", "moderation"),
        ("/v1/images/generations", "image generation"),
        ("/v1/audio/speech", "speech synthesis"),
        ("/v1/audio/transcriptions", "transcription"),
        ("/v1/audio/translations", "speech translation"),
    ],
)
def test_a_task_that_the_model_cannot_do_is_refused(
    http: httpx.Client, path: str, task: str
) -> None:
    answer = post(http, path, {})

    assert_error(answer, 400, f"`{MODEL}` generates text and does not support {task}")


@pytest.mark.parametrize("path", ["/scale_elastic_ep", "/is_scaling_elastic_ep"])
def test_a_route_that_would_rebuild_the_engine_is_not_there(http: httpx.Client, path: str) -> None:
    assert_error(post(http, path, {}), 404, f"Not Found: POST {path}")


# Anything


def valid(path: str) -> dict[str, Any]:
    return {
        CHAT: {"messages": HELLO},
        COMPLETION: {"prompt": "Hello"},
        "/tokenize": {"prompt": "Hello"},
        "/detokenize": {"tokens": [5]},
    }[path] | {"model": MODEL}


def bounded(body: dict[str, Any]) -> dict[str, Any]:
    """Of few tokens, where it would be many: that is legal, but takes its time."""
    limits = {"max_tokens": 2, "max_completion_tokens": 2, "n": 2}
    return {"max_tokens": 2, "max_completion_tokens": 2} | {
        key: min(value, limits[key]) if key in limits and isinstance(value, int) else value
        for key, value in body.items()
        if not (key in limits and value is None)
    }


@pytest.fixture(scope="module")
def api(server: Server) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/tokenize", "/detokenize"])
def test_no_body_breaks_the_server(
    api: schemathesis.schemas.BaseSchema, path: str, mode: schemathesis.GenerationMode
) -> None:
    """Some fields that the API's own schema allows, or does not, in place of valid ones."""

    @hypothesis.given(case=api[path]["POST"].as_strategy(generation_mode=mode), data=st.data())
    @hypothesis.settings(
        max_examples=25,
        phases=[hypothesis.Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case: schemathesis.Case, data: st.DataObject) -> None:
        if isinstance(case.body, dict) and case.body:
            keys = data.draw(st.sets(st.sampled_from(sorted(case.body)), min_size=1, max_size=3))
            case.body = bounded(valid(path) | {key: case.body[key] for key in keys})

        answer = case.call(timeout=ANSWER_TIMEOUT_S)

        assert answer.status_code < 500, (case.body, answer.text)

    check()


# After all of it


def test_nothing_has_broken(
    server: Server,
    handle: XYServe,
    http: httpx.Client,
    before: tuple[dict[int, str], list[str]],
) -> None:
    answer = post(http, COMPLETION, {"prompt": "The capital of France is", "temperature": 0})

    assert answer.json()["choices"][0]["text"].startswith(" Paris")
    assert http.get("/health").status_code == 200
    assert (server.replicas(), server.tracebacks()) == before
    assert handle.status().num_live_requests == 0
