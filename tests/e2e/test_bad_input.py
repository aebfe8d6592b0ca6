"""What cannot be served is answered with a clear error, and nothing breaks."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster.client import XYServe
from tests.e2e.conftest import MODEL, Server

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
JSON = {"Content-Type": "application/json"}
MAX_BYTES = 200_000
VOCABULARY = 49_152


@pytest.fixture(scope="module", autouse=True)
def _nothing_breaks(server: Server, handle: XYServe, http: httpx.Client) -> Iterator[None]:
    """After the tests of this file the same replicas answer, and none has logged a crash."""
    before = server.replicas(), server.tracebacks()
    yield
    answer = post(http, COMPLETION, {"prompt": "The capital of France is", "temperature": 0})
    assert answer.json()["choices"][0]["text"].startswith(" Paris")
    assert http.get("/health").status_code == 200
    assert (server.replicas(), server.tracebacks()) == before
    assert handle.status().num_live_requests == 0


def assert_error(answer: httpx.Response, status: int, *words: str) -> None:
    """The answer is an error in the form of the OpenAI API, and says these words.

    The sentences are vLLM's, so that no more than the field or value that they name is asserted.
    """
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert error["code"] == status
    assert error["type"]
    for word in words:
        assert word in f"{error['param']}: {error['message']}"


PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETION: {"prompt": "Hello"},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5]},
}


def post(http: httpx.Client, path: str, params: dict[str, Any]) -> httpx.Response:
    prompt = PROMPTS.get(path, {"input": "Hello"})
    body = {"model": MODEL, "max_tokens": 4, **prompt} | params
    return http.post(path, json={key: value for key, value in body.items() if value is not MISSING})


MISSING = object()


def schema(content: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": content}}


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": 10**9},
        {"max_tokens": 2**80},
        {"max_tokens": "many"},
        {"temperature": -1},
        {"temperature": 99},
        {"n": 0},
        {"n": -3},
        {"n": 10_000, "temperature": 1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -5},
        {"presence_penalty": 3},
        {"repetition_penalty": 0},
        {"seed": 2**70},
        {"stop": [""]},
        {"stop": 5},
        {"stream": "perhaps"},
        {"min_tokens": 100},
        {"logit_bias": {str(VOCABULARY): 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"Paris": 1}},
        {"logit_bias": {"5": "x"}},
        {"stop_token_ids": [10**9]},
        {"allowed_token_ids": [10**9]},
        {"priority": "high"},
        {"stream_options": {"include_usage": True}},
        {"guided_regex": "a"},
        {"guided_json": {"type": "integer"}},
        {"response_format": {"type": "yaml"}},
        {"response_format": {"type": "json_schema"}},
    ],
)
def test_a_parameter_that_makes_no_sense_is_named(
    http: httpx.Client, path: str, params: dict[str, Any]
) -> None:
    assert_refused(http, path, params, next(iter(params)))


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 2**70},
        {"structured_outputs": {"regex": "(("}},
        {"structured_outputs": {"grammar": "root ::= (("}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {"regex": "(?i)yes|no"}},
        {"structured_outputs": {"regex": r"\p{L}{3}"}},
        {"structured_outputs": {"regex": r"[^\s\S]"}},
        {"structured_outputs": {"json": {"$ref": "#"}}},
        {"structured_outputs": {"json": {"type": "integer", "multipleOf": 3}}},
        {"structured_outputs": {"grammar": "root ::= foo"}},
        {"structured_outputs": {"structural_tag": "{}"}},
        {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
        {"structured_outputs": {"choice": ["a" * 150_000]}},
        {"response_format": schema({"type": "string", "format": "idn-email"})},
    ],
)
def test_a_parameter_that_cannot_be_used_is_refused(
    http: httpx.Client, path: str, params: dict[str, Any]
) -> None:
    assert_refused(http, path, params)


def assert_refused(http: httpx.Client, path: str, params: dict[str, Any], *words: str) -> None:
    """Whether the answer would be streamed or not."""
    assert_error(post(http, path, params), 400, *words)
    if "stream" not in params and "stream_options" not in params:
        assert_error(post(http, path, params | {"stream": True}), 400, *words)


RESPONSES = "/v1/responses"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}},
        {"logit_bias": {str(VOCABULARY): 1}},
        {"structured_outputs": {"regex": "(("}},
        {"top_logprobs": 50},
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"tools": [{"type": "web_search"}]},
    ],
)
def test_a_wrong_response_is_refused_streamed_or_not(
    http: httpx.Client, params: dict[str, Any], stream: bool
) -> None:
    assert_error(post(http, RESPONSES, params | {"stream": stream}), 400)


@pytest.mark.parametrize("value", [b"\xff\xfe", b"\xe2\x82\xac", b"i" * 513, b"i" * 40_000])
def test_a_header_that_cannot_be_an_id_is_refused(http: httpx.Client, value: bytes) -> None:
    answer = http.get("/v1/models", headers=[(b"x-request-id", value)])

    assert_error(answer, 400, "x-request-id: an id has at most 512 printable ASCII characters")


def test_a_failed_call_is_no_traceback_in_the_log(server: Server, http: httpx.Client) -> None:
    before = server.tracebacks()
    for stream in (False, True):
        for path in (CHAT, COMPLETION, RESPONSES, "/v1/messages"):
            for params in ({"temperature": -1}, {"model": "gpt-17"}, {"top_p": 7}, {"stop": [""]}):
                body = PROMPTS.get(path, {"input": "Hello", "messages": HELLO}) | {"stream": stream}
                body = {"model": MODEL, "max_tokens": 2} | body | params
                assert http.post(path, json=body).status_code in (200, 400, 404)
    assert server.tracebacks() == before


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}}
    return inner


@pytest.mark.parametrize(
    "content",
    [
        "no object",
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "(("},
        nested(200),
    ],
)
def test_a_broken_json_schema_is_refused(http: httpx.Client, content: Any) -> None:
    assert_error(post(http, CHAT, {"response_format": schema(content)}), 400)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"messages": []}, ""),
        ({"messages": MISSING}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [5]}, "messages"),
        ({"messages": [{"content": "Hello"}]}, "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": 5, "content": "Hello"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "smell"),
        ({"top_logprobs": 1000, "logprobs": True}, "logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"chat_template": "{{ 1 }}"}, ""),
        ({"structured_outputs": False}, "a field of the request has the wrong type"),
    ],
)
def test_a_chat_that_makes_no_sense_is_refused(
    http: httpx.Client, params: dict[str, Any], named: str
) -> None:
    assert_error(post(http, CHAT, params), 400, named)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (MISSING, "prompt"),
        ("", ""),
        ([], "prompt"),
        ([[]], ""),
        (5, "prompt"),
        ({"text": "Hello"}, "prompt"),
        ([1.5], "prompt"),
        (["Hello", 5], "prompt"),
        ([-1], ""),
        ([VOCABULARY], str(VOCABULARY)),
        ([2**70], ""),
        ([[5], [10**12]], ""),
    ],
)
def test_a_prompt_that_makes_no_sense_is_refused(
    http: httpx.Client, prompt: Any, named: str
) -> None:
    assert_error(post(http, COMPLETION, {"prompt": prompt}), 400, named)


@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/tokenize", "/v1/responses"])
def test_an_unknown_model_is_not_found(http: httpx.Client, path: str) -> None:
    answer = post(http, path, {"model": "gpt-17"})

    assert_error(answer, 404, "gpt-17")


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
    assert_error(post(http, path, params), 400, "8192")


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(http: httpx.Client) -> None:
    answer = post(http, COMPLETION, {"prompt": [5] * 8192, "max_tokens": MISSING})

    assert_error(answer, 400, "max_tokens")


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

    assert_error(answer, 400, MODEL)


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

    assert_error(http.post(CHAT, content=body, headers=headers), 400)


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


# Structured output


def test_a_grammar_that_leaves_no_token_is_refused_where_it_does(http: httpx.Client) -> None:
    params = {"structured_outputs": {"regex": "a[^\\s\\S]"}, "max_tokens": 5}

    assert_error(post(http, COMPLETION, params), 400, "left no token")


def test_a_grammar_beyond_its_bounds_is_refused_and_a_stranger_served(http: httpx.Client) -> None:
    params = {"structured_outputs": {"regex": "(abc|def)?" * 2000}}

    assert_error(post(http, COMPLETION, params), 400, "worker.grammars.max_compile_s")


def test_a_tool_that_asks_for_what_would_be_ignored_is_refused_only_if_strict(
    http: httpx.Client,
) -> None:
    parameters = {
        "type": "object",
        "properties": {"n": {"type": "integer", "multipleOf": 3}},
        "required": ["n"],
    }
    function = {"name": "f", "parameters": parameters}
    lenient = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    strict = {
        "tools": [{"type": "function", "function": function | {"strict": True}}],
        "tool_choice": "required",
    }

    assert post(http, CHAT, lenient | {"max_tokens": 60}).status_code == 200
    assert_error(post(http, CHAT, strict), 400, "multipleOf")
