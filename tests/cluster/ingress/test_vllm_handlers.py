"""The routes of the API over scripted workers: ids, ends and errors, streamed and not."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
import pytest_asyncio
from vllm.v1.engine import FinishReason

from cluster.config.app_config import parse_args
from cluster.config.routes import EXTRA_PATHS, EXTRA_ROUTES, ROUTES
from cluster.errors import RequestFailed
from cluster.ingress.protocol import Api
from cluster.ingress.vllm_handlers import is_news
from cluster.observe.request_history import RequestHistory
from scheduler.placement import RefusalReason, Refused
from tests.cluster.ingress.answering_workers import Server, Step, serving
from workers.errors import EngineDead

CONFIG = parse_args({"worker": {"kernels": "vllm"}})
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETION: {"prompt": "Hello", "max_tokens": 50},
    RESPONSES: {"input": "Hello"},
    MESSAGES: {"model": CONFIG.model_name, "messages": HELLO, "max_tokens": 50},
}
STOP, LENGTH, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Server]:
    async with serving(CONFIG) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.workers.play([(running.tokens("Paris is nice"), LENGTH)])
    running.scheduler.answers = []
    running.records.take()
    running.records.refusals.clear()
    return running


async def post(
    server: Server, path: str, headers: dict[str, str] | None = None, **params: Any
) -> httpx.Response:
    return await server.http.post(path, headers=headers, json=BODIES[path] | params)


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What has been logged with a traceback, and is not left out where vLLM's log is written."""
    assert any(is_news in handler.filters for handler in logging.getLogger("vllm").handlers)
    return [one.getMessage() for one in caplog.records if one.exc_info and is_news(one)]


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, without OpenAI's last mark."""
    found = re.findall(r"^data: (.*)$", answer.text, re.MULTILINE)
    return [json.loads(data) for data in found if data != "[DONE]"]


# Ends


def num_answered(path: str, answer: httpx.Response) -> int:
    """Output tokens by the usage in an answer, streamed or not."""
    streamed = answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer) if streamed else [answer.json()]
    usages = [one.get("response", one).get("usage") for one in found]
    usage = [usage for usage in usages if usage][-1]
    return int(usage.get("output_tokens", usage.get("completion_tokens")))


def stop_at(path: str, text: str) -> dict[str, Any]:
    return {"stop_sequences" if path == MESSAGES else "stop": [text]}


WITH_USAGE: dict[str, dict[str, Any]] = {CHAT: {"stream_options": {"include_usage": True}}}
WITH_USAGE[COMPLETION] = WITH_USAGE[CHAT]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("cuts", "reason", "outcome", "kept"),
    [
        ([1, 2, 3], None, "stop", 2),  # the engine goes on: it does not know of stop strings
        ([4], None, "stop", 2),  # drafts: the string and what follows in one step
        ([1, 4], LENGTH, "stop", 2),  # the engine ends in the same step
        ([2], LENGTH, "stop", 2),  # with its last token
    ],
    ids=["token by token", "in one step", "beside an end", "at the last token"],
)
async def test_a_stop_string_ends_a_request_as_stop(
    server: Server,
    path: str,
    stream: bool,
    cuts: list[int],
    reason: FinishReason | None,
    outcome: str,
    kept: int,
) -> None:
    token_ids = server.tokens("Paris is nice and")
    steps: list[Step] = [
        (token_ids[start:end], reason if end == cuts[-1] else None)
        for start, end in zip([0, *cuts], cuts, strict=False)
    ]
    server.workers.play(steps)
    params = (WITH_USAGE.get(path, {}) if stream else {}) | stop_at(path, " is")

    answer = await post(server, path, stream=stream, **params)

    assert answer.status_code == 200, answer.text
    assert num_answered(path, answer) == kept
    assert server.records.take() == [(outcome, kept)]
    [call] = server.workers.calls
    assert call.response.was_cancelled == (reason is None)
    assert server.client.num_live == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("reason", "outcome"),
    [(STOP, "stop"), (LENGTH, "length"), (FinishReason.REPETITION, "repetition")],
)
async def test_an_end_of_the_engine_is_the_requests(
    server: Server, path: str, stream: bool, reason: FinishReason, outcome: str
) -> None:
    server.workers.play([([28], None), ([29, 30], reason)])
    params = WITH_USAGE.get(path, {}) if stream else {}

    answer = await post(server, path, stream=stream, **params)

    assert answer.status_code == 200, answer.text
    assert num_answered(path, answer) == 3
    assert server.records.take() == [(outcome, 3)]


async def test_each_sequence_ends_by_itself(server: Server) -> None:
    stops, goes_on = server.tokens("Paris is"), server.tokens("Paris was nice")
    server.workers.play([(stops, None)], [(goes_on, LENGTH)])

    answer = await post(server, COMPLETION, n=2, temperature=1, stop=[" is"])

    assert sorted(one["finish_reason"] for one in answer.json()["choices"]) == ["length", "stop"]
    assert sorted(server.records.take()) == [("length", 3), ("stop", 2)]
    assert answer.json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_a_failed_sequence_fails_its_siblings(server: Server, path: str) -> None:
    server.workers.play([([28], None)], [([], ERROR)])

    answer = await post(server, path, n=2, temperature=1)

    assert answer.status_code == 500
    assert [outcome for outcome, _ in server.records.take()] == ["error", "error"]
    assert server.client.num_live == 0


async def test_a_client_that_leaves_is_an_abort(server: Server) -> None:
    server.workers.play([([28], None)])
    chunks = server.frontend.stream("completion", {"prompt": "Hello"})
    await anext(chunks)

    await chunks.aclose()
    async with asyncio.timeout(10):
        while server.client.num_live:
            await asyncio.sleep(0.01)

    assert server.records.take() == [("abort", 1)]


# Errors


REFUSED = Refused(RefusalReason.OVERLOAD, 1.2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_a_request_that_fails_at_once_has_a_status(
    server: Server, path: str, stream: bool
) -> None:
    server.workers.play([([], ERROR)])

    answer = await post(server, path, {"x-request-id": "failing"}, stream=stream)

    message = answer.json()["error"]["message"]
    assert answer.status_code == 500
    assert re.fullmatch(
        r"The request failed on its worker; `xyserve explain \S*failing\S*` says why.", message
    )
    assert server.records.take() == [("error", 0)]


@pytest.mark.parametrize("failure", [EngineDead("gone"), None])
@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_that_fails_ends_with_an_error_event(
    server: Server, path: str, failure: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    server.workers.play([(server.tokens("Paris"), None), failure or ([], ERROR)], waits=True)

    answer = await post(server, path, stream=True)

    assert answer.status_code == 200
    last = events(answer)[-1]
    assert last["error"]["message"].startswith("The request failed on its worker")
    if path == RESPONSES:
        numbers = [event["sequence_number"] for event in events(answer)]
        assert (last["type"], numbers) == ("error", list(range(len(numbers))))
    elif path == MESSAGES:
        assert answer.text.rpartition("event: ")[2].startswith("error\n")
        assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    else:
        assert answer.text.endswith("data: [DONE]\n\n")
    assert tracebacks(caplog) == []


GONE: list[Step] = [([28], None), EngineDead("gone")]


def http_client(server: Server) -> httpx2.AsyncClient:
    """For the official clients, which have an httpx of their own."""
    transport = httpx2.ASGITransport(server.asgi_app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport)


def openai_client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://localhost/v1",
        api_key="none",
        max_retries=0,
        http_client=http_client(server),
    )


@pytest.mark.parametrize("path", [CHAT, COMPLETION, RESPONSES])
async def test_openais_client_raises_the_error_of_a_stream(server: Server, path: str) -> None:
    server.workers.play(GONE, waits=True)
    async with openai_client(server) as client:
        create: Any = {
            CHAT: client.chat.completions.create,
            COMPLETION: client.completions.create,
            RESPONSES: client.responses.create,
        }[path]
        stream = await create(model=CONFIG.model_name, stream=True, **BODIES[path])
        with pytest.raises(openai.APIError, match="failed on its worker"):
            [event async for event in stream]


async def test_anthropics_client_raises_the_error_of_a_stream(server: Server) -> None:
    server.workers.play(GONE, waits=True)
    async with anthropic.AsyncAnthropic(
        base_url="http://localhost", api_key="none", max_retries=0, http_client=http_client(server)
    ) as client:
        stream = await client.messages.create(stream=True, **BODIES[MESSAGES])
        with pytest.raises(anthropic.APIError, match="failed on its worker"):
            [event async for event in stream]


WRONG: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"max_tokens": 1.5},
    {"max_output_tokens": 0},
    {"max_output_tokens": -1},
    {"max_output_tokens": "many"},
    {"max_completion_tokens": 0},
    {"temperature": -1},
    {"temperature": "hot"},
    {"temperature": []},
    {"top_p": 0},
    {"top_p": 7},
    {"top_k": -5},
    {"top_k": "x"},
    {"min_p": 2},
    {"n": 0},
    {"n": 1000},
    {"seed": "x"},
    {"seed": 2**70},
    {"stop": 5},
    {"stop": [""]},
    {"stop_sequences": [""]},
    {"stop_sequences": 5},
    {"stop_token_ids": ["x"]},
    {"stop_token_ids": [10**9]},
    {"logit_bias": {"49152": 1}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"Paris": 1}},
    {"logit_bias": 5},
    {"presence_penalty": 3},
    {"frequency_penalty": -3},
    {"repetition_penalty": 0},
    {"logprobs": 50},
    {"top_logprobs": 50},
    {"top_logprobs": -5},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 50},
    {"prompt_logprobs": 50},
    {"min_tokens": 100},
    {"allowed_token_ids": [10**9]},
    {"bad_words": 5},
    {"priority": "high"},
    {"response_format": {"type": "yaml"}},
    {"response_format": {"type": "json_schema"}},
    {"text": {"format": {"type": "yaml"}}},
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}},
    {"text": 5},
    {"structured_outputs": {"regex": "(("}},
    {"structured_outputs": {"regex": "(?i)yes"}},
    {"structured_outputs": {"json": "{"}},
    {"structured_outputs": {"grammar": "root ::= (("}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": 5},
    {"tools": 5},
    {"tools": [{"type": "function"}]},
    {"tool_choice": "required"},
    {"tool_choice": 5},
    {"messages": 5},
    {"messages": []},
    {"messages": [{"role": "user", "content": 5}]},
    {"prompt": 5},
    {"prompt": ""},
    {"prompt": [10**9]},
    {"prompt": ["Hello", [10**9]]},
    {"input": 5},
    {"input": []},
    {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
    {"model": "gpt-17"},
    {"model": 5},
    {"request_id": 5},
    {"request_id": "i" * 513},
    {"request_id": "\u20ac"},
    {"reasoning": 5},
    {"metadata": 5},
    {"system": 5},
    {"thinking": 5},
    {"truncation": "yes"},
    {"include": ["nothing"]},
    {"vllm_xargs": 5},
    {"chat_template": "{{ 1 }}"},
    {"echo": "x"},
    {"suffix": "x"},
    {"best_of": 3},
]


def keys(params: dict[str, Any]) -> str:
    return json.dumps(params)[:60]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("params", WRONG, ids=keys)
async def test_a_wrong_request_is_answered_alike_streamed_or_not(
    server: Server, path: str, params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    whole = await post(server, path, **params)
    streamed = await post(server, path, stream=True, **params)

    assert whole.status_code == streamed.status_code, (whole.text, streamed.text)
    assert whole.status_code < 500, whole.text
    if whole.status_code != 200:
        error = whole.json()["error"]
        assert streamed.json()["error"]["type"] == error["type"]
        types = {"invalid_request_error", "not_found_error", "BadRequestError", "NotFoundError"}
        assert error["type"] in types
        assert "{'" not in error["message"]
    assert tracebacks(caplog) == []
    assert server.client.num_live == 0


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
async def test_no_tokens_are_refused_as_such(server: Server, path: str) -> None:
    answer = await post(server, path, max_tokens=0)

    assert answer.json()["error"]["message"].startswith("max_tokens must be at least 1, got 0")


REFUSED_ON_RESPONSES = [
    ("background", True),
    ("previous_response_id", "resp_1"),
    ("conversation", "conv_1"),
    ("conversation", {"id": "conv_1"}),
    ("context_management", [{"type": "compaction"}]),
    ("moderation", {"model": "omni"}),
    ("prompt", {"id": "pmpt_1"}),
    ("include", ["file_search_call.results"]),
    ("include", ["code_interpreter_call.outputs"]),
    *(
        ("tools", [tool])
        for tool in (
            {"type": "web_search"},
            {"type": "web_search_preview"},
            {"type": "file_search", "vector_store_ids": ["v"]},
            {"type": "code_interpreter", "container": {"type": "auto"}},
            {"type": "image_generation"},
            {"type": "local_shell"},
            {"type": "computer_use_preview", "display_height": 1, "display_width": 1}
            | {"environment": "linux"},
            {"type": "mcp", "server_label": "m", "server_url": "http://x"},
        )
    ),
    ("input", [{"type": "item_reference", "id": "msg_1"}]),
    ("input", [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]),
    ("input", [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]),
    ("top_logprobs", 50),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "value"), REFUSED_ON_RESPONSES, ids=str)
async def test_what_the_responses_api_does_not_do_is_refused_by_name(
    server: Server, name: str, value: Any, stream: bool
) -> None:
    answer = await post(server, RESPONSES, stream=stream, **{name: value})

    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "BadRequestError")
    assert name in f"{error['param']} {error['message']}"
    assert "environment" not in error["message"]
    assert server.records.take() == []


@pytest.mark.parametrize(
    "params",
    [
        {"store": True},
        {"store": False},
        {"include": ["reasoning.encrypted_content"], "store": False},
        {"background": False, "previous_response_id": None, "conversation": None},
        {"metadata": {"a": "b"}, "user": "me", "service_tier": "auto", "truncation": "auto"},
        {"prompt_cache_key": "k", "safety_identifier": "s", "max_tool_calls": 3},
    ],
    ids=keys,
)
async def test_what_clients_send_by_default_is_accepted_and_nothing_is_kept(
    server: Server, params: dict[str, Any]
) -> None:
    whole = (await post(server, RESPONSES, **params)).json()
    streamed = events(await post(server, RESPONSES, stream=True, **params))

    assert whole["store"] is False
    assert [event["response"]["store"] for event in streamed if "response" in event] == [False] * 3


async def test_a_response_that_is_cut_off_ends_as_incomplete(server: Server) -> None:
    whole = (await post(server, RESPONSES, max_output_tokens=3)).json()
    streamed = events(await post(server, RESPONSES, max_output_tokens=3, stream=True))

    last = streamed[-1]
    assert last["type"] == "response.incomplete"
    assert [event["sequence_number"] for event in streamed] == list(range(len(streamed)))
    for response in (whole, last["response"]):
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_openais_client_reads_both_ends_of_a_response(server: Server) -> None:
    ends = []
    async with openai_client(server) as client:
        for reason in (LENGTH, STOP):
            server.workers.play([(server.tokens("Paris is nice"), reason)])
            async with client.responses.stream(model=CONFIG.model_name, input="Hello") as stream:
                ends.append([event.type async for event in stream][-1])

    assert ends == ["response.incomplete", "response.completed"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_fills_the_context_is_told_so(
    server: Server, path: str, stream: bool
) -> None:
    words = " a" * 8192
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": words}]},
        COMPLETION: {"prompt": [28] * 8192, "max_tokens": 1},
        RESPONSES: {"input": words},
        MESSAGES: {"messages": [{"role": "user", "content": words}]},
    }

    answer = await post(server, path, stream=stream, **bodies[path])

    assert answer.status_code == 400
    assert "got 0" not in answer.text
    assert re.search("context length (of|is) 8192 tokens", answer.json()["error"]["message"])


# Tool calls

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLS = "".join(
    f'<tool_call>\n{{"name": "f", "arguments": {{"number": {n}}}}}\n</tool_call>' for n in (1, 2)
)


async def test_the_schema_of_a_tool_may_not_nest_without_end(server: Server) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    deep = {"type": "function", "function": {"name": "f", "parameters": schema}}

    answer = await post(server, CHAT, tools=[deep])

    assert answer.status_code == 400, answer.text
    assert "nested too deeply" in answer.json()["error"]["message"]


@pytest.mark.parametrize("tokens_per_step", [1, 4, 1000])
async def test_an_event_has_a_part_of_one_tool_call(server: Server, tokens_per_step: int) -> None:
    tokens = server.tokens(CALLS)
    cuts = range(0, len(tokens), tokens_per_step)
    steps = [tokens[cut : cut + tokens_per_step] for cut in cuts]
    server.workers.play([*((step, None) for step in steps[:-1]), (steps[-1], STOP)])

    answer = await post(server, CHAT, stream=True, tools=[TOOL])

    found: dict[int, list[str]] = {}
    for event in events(answer):
        for choice in event["choices"]:
            calls = choice["delta"].get("tool_calls") or []
            assert len(calls) <= 1
            for call in calls:
                parts = found.setdefault(call["index"], ["", ""])
                parts[0] += call["function"].get("name") or ""
                parts[1] += call["function"].get("arguments") or ""
    assert [(name, json.loads(text)) for name, text in found.values()] == [
        ("f", {"number": 1}),
        ("f", {"number": 2}),
    ]


# Ids


def id_of(answer: httpx.Response) -> str:
    """The id of an answer, streamed or not."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return str(answer.json()["id"])
    first = events(answer)[0]
    return str(first.get("response", first.get("message", first))["id"])


PREFIXES = {CHAT: "chatcmpl", COMPLETION: "cmpl", RESPONSES: "resp", MESSAGES: "chatcmpl"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("header", "body", "named"),
    [("by-header", None, "by-header"), (None, "by-body", "by-body"), ("one", "other", "other")],
)
async def test_an_answer_is_named_by_the_header_or_by_the_body(
    server: Server, path: str, stream: bool, header: str | None, body: str | None, named: str
) -> None:
    headers = {"x-request-id": header} if header else {}
    params = {"request_id": body} if body else {}
    server.records.ended_ones.clear()

    answer = await post(server, path, headers, stream=stream, **params)

    answer_id = id_of(answer)
    separator = "_" if path == RESPONSES else "-"
    assert answer_id == f"{PREFIXES[path]}{separator}{named}"
    [record] = server.records.ended_ones
    history = RequestHistory()
    history.add(record)
    for query in filter(None, [answer_id, header, body]):
        assert len(history.find(query)) == (1 if len(query) > 3 else 0)


async def test_equal_ids_at_the_same_time_are_calls_of_their_own(server: Server) -> None:
    answers = await asyncio.gather(
        *(post(server, path, {"x-request-id": "twice"}) for path in BODIES for _ in range(3))
    )

    assert {answer.status_code for answer in answers} == {200}
    ids = [record.request.request_id for record in server.records.ended_ones]
    assert len(set(ids)) == 12
    assert all("twice" in one for one in ids)


@pytest.mark.parametrize("api", ["chat", "completion"])
async def test_the_handles_id_has_the_same_rules(server: Server, api: Api) -> None:
    payload: dict[str, Any] = BODIES[CHAT if api == "chat" else COMPLETION]
    answer = json.loads(await server.frontend.complete(api, payload | {"request_id": "mine"}))
    assert answer["id"].endswith("cmpl-mine")

    for wrong in ("i" * 513, "\u20ac", 5):
        with pytest.raises(RequestFailed, match="request_id: an id has at most 512"):
            await server.frontend.complete(api, payload | {"request_id": wrong})


# Routes


def served(server: Server) -> set[tuple[str, str]]:
    """Methods and paths that the app documents, and those of the documents themselves."""
    return {
        (method, path)
        for path, item in server.frontend._app.openapi()["paths"].items()
        for method in map(str.upper, item)
    }


def promised(*routes: Any) -> set[tuple[str, str]]:
    documents = {"/docs", "/redoc", "/openapi.json"}
    return {
        (method, route.path)
        for route in routes
        for method in route.methods.split(", ")
        if route.path not in documents
    }


async def test_the_routes_are_those_in_the_table(server: Server) -> None:
    assert served(server) == promised(*ROUTES)
    page = await server.http.get("/docs")
    schema = (await server.http.get("/openapi.json")).json()
    assert "XY-Serve" in page.text
    assert (schema["info"]["title"], schema["info"]["version"]) != ("FastAPI", "0.1.0")


EXTRA_BODIES: dict[str, dict[str, Any]] = {
    "/generative_scoring": {"query": "Is it?", "items": ["a"], "label_token_ids": [28, 29]},
    "/v1/chat/completions/batch": {"messages": [HELLO, HELLO], "max_tokens": 3},
    "/inference/v1/generate": {"token_ids": [28, 29], "sampling_params": {"max_tokens": 3}},
    "/v1/chat/completions/render": {"messages": HELLO},
    "/v1/completions/render": {"prompt": "Hello"},
    "/invocations": {"prompt": "Hello"},
}


async def test_extra_routes_are_off_and_say_how_to_switch_them_on(server: Server) -> None:
    for route in EXTRA_ROUTES:
        method = route.methods.partition(",")[0]
        answer = await server.http.request(method, route.path, json={})
        assert answer.status_code == 404, route.path
        hint = f"this route is off; to switch it on, add {route.path} to `ingress.routes`"
        assert hint in answer.json()["error"]["message"]


async def test_extra_routes_are_there_if_the_config_names_them() -> None:
    config = parse_args({"worker": {"kernels": "vllm"}, "ingress": {"routes": EXTRA_PATHS}})
    async with serving(config) as server:
        server.workers.play([([28], LENGTH)])
        assert served(server) == promised(*ROUTES, *EXTRA_ROUTES)
        for path, body in EXTRA_BODIES.items():
            answer = await server.http.post(path, json={"model": config.model_name} | body)
            # The workers here give no logprobs, without which there is no score.
            expected = 400 if path == "/generative_scoring" else 200
            assert answer.status_code == expected, (path, answer.text)
        assert (await server.http.get("/load")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/v1/responses/resp_1/input_items"),
        ("POST", "/v1/conversations"),
        ("GET", "/v1/files"),
    ],
)
async def test_what_is_kept_nowhere_is_not_found_with_the_reason(
    server: Server, method: str, path: str
) -> None:
    answer = await server.http.request(method, path)

    assert answer.status_code == 404
    assert "keeps no responses" in answer.json()["error"]["message"]


# Logs


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_refused_a_worker_leaves_no_traceback(
    server: Server, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for path in BODIES:
        server.scheduler.answers = [REFUSED]
        answer = await post(server, path, stream=stream)
        assert answer.status_code == 503
        assert server.records.take() == [("error", 0)]

    with contextlib.suppress(RequestFailed):
        server.scheduler.answers = [REFUSED]
        await server.frontend.complete("completion", BODIES[COMPLETION])
    assert tracebacks(caplog) == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
