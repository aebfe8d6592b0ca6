"""The targets of a request on their way through vLLM's front end to the workers."""

import asyncio
import contextlib
import dataclasses
import json
import math
import pickle
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.serial_utils import CUSTOM_TYPE_CLOUDPICKLE, CUSTOM_TYPE_PICKLE

from cluster.config.app_config import AppConfig, parse_args
from cluster.errors import RequestFailed, RequestRefused
from cluster.ingress.auth import Doorkeeper
from cluster.ingress.calls import Calls
from cluster.ingress.engine_client import EngineClient
from cluster.ingress.protocol import Api
from cluster.ingress.vllm_frontend import Frontend, decode_outputs
from cluster.models.default_model import fetch_default_model
from cluster.observe.request_history import RequestRecord
from scheduler.placement import RefusalReason, Refused
from scheduler.request import Request, Slo
from tests.cluster.ingress.fake_cluster import FakeScheduler, FakeWorkers
from workers.engine_request import EngineRequest
from workers.token_stream import StreamReceiver

CONFIG = parse_args(
    {"slo": {"classes": {"fast": {"ttft_ms": 500, "tpot_ms": 50}}}, "worker": {"kernels": "vllm"}}
)
STANDARD = ("standard", Slo(ttft_s=10, tpot_s=0.25))
FAST = {"x-slo-class": "fast", "X-SLO-TTFT-ms": "200"}
OF_FAST = ("fast", Slo(ttft_s=0.2, tpot_s=0.05))

HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 4},
    "/v1/messages": {"model": CONFIG.model_name, "messages": HELLO, "max_tokens": 4},
}

BAD_REQUEST = ["BadRequestError", "invalid_request_error"]


class Workers:
    """Answers each request with one token, and remembers it."""

    prefix_format = ""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()

    def submit(self, request: EngineRequest, arrived_s: float) -> RequestRecord:
        self.requests.append(request.request)
        output = EngineCoreOutput(
            request.request.request_id, [28], finish_reason=FinishReason.LENGTH
        )
        self._outputs.put_nowait(EngineCoreOutputs(outputs=[output]))
        return RequestRecord(request.request, arrived_s)

    def abort(self, request_ids: list[str], error: str = "") -> None:
        """All have ended."""

    def finish(self, request_id: str, outcome: str, num_output_tokens: int) -> None:
        """It has ended."""

    async def next_outputs(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def has_workers(self) -> bool:
        return True

    def take_targets(self) -> list[tuple[str, Slo]]:
        """Class and targets of the requests since the last call."""
        requests, self.requests = self.requests, []
        return [(request.slo_class, request.slo) for request in requests]


class App:
    """A front end and its client."""

    def __init__(self, config: AppConfig, workers: Any) -> None:
        """`workers` is an EngineClient, or what stands for one."""
        self.workers = workers
        self.frontend = Frontend(
            config,
            str(fetch_default_model()),
            workers,
            Calls(config.slo),
            Doorkeeper(config.auth, config.all_tenants),
        )
        transport = httpx.ASGITransport(self.frontend.asgi_app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def post(
        self, path: str, headers: dict[str, str] | None = None, **params: Any
    ) -> httpx.Response:
        return await self.http.post(path, headers=headers, json=BODIES[path] | params)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app() -> AsyncIterator[App]:
    app = App(CONFIG, Workers())
    await app.frontend.start()
    async with app.http:
        yield app


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def refusing() -> AsyncIterator[tuple[App, FakeScheduler]]:
    """An app whose scheduler answers as a test has it answer."""
    workers: Any = FakeWorkers()
    scheduler: Any = FakeScheduler()
    receiver = StreamReceiver("127.0.0.1")
    client = EngineClient(workers, scheduler, scheduler, receiver, decode_outputs())
    app = App(CONFIG, client)
    await app.frontend.start()
    async with app.http:
        yield app, scheduler
    await client.close()
    workers.close()


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("code", [CUSTOM_TYPE_PICKLE, CUSTOM_TYPE_CLOUDPICKLE])
async def test_outputs_with_a_pickle_are_refused(code: int) -> None:
    bomb = {"any": msgspec.msgpack.Ext(code, pickle.dumps("harmless"))}
    output = EngineCoreOutput("r", [1], kv_transfer_params=bomb)
    frame = msgspec.msgpack.encode(EngineCoreOutputs(outputs=[output]))

    with pytest.raises(NotImplementedError, match=f"type code {code} is not supported"):
        decode_outputs()([frame])


async def test_outputs_that_name_a_class_to_be_made_are_refused() -> None:
    utility = (1, None, (("datetime", "date"), "2026-01-01"))
    frame = msgspec.msgpack.encode((0, [], None, 0.0, utility))

    with pytest.raises(msgspec.ValidationError, match="VLLM_ALLOW_INSECURE_SERIALIZATION must"):
        decode_outputs()([frame])


async def test_a_request_says_which_blocks_its_prompt_has(app: App) -> None:
    long = " ".join(["Hello"] * 400)
    prompts = (long, ""), (long, ""), (long, "x"), (long + "!", ""), ("Hello", "")
    for prompt, salt in prompts:
        await app.post("/v1/completions", prompt=prompt, cache_salt=salt or None)
    requests, app.workers.requests = app.workers.requests, []

    one, same, salted, longer, short = (request.block_hashes for request in requests)
    assert len(one) == (requests[0].num_prompt_tokens - 1) // 128 * 8 > 0
    assert (one == same, short) == (True, b"")
    assert longer[: len(one)] == one
    assert not any(part in one for part in (salted[:8], salted[8:16]))
    [found] = {request.prefix_format for request in requests}
    assert found.startswith("sha256/")
    assert "/128/" in found

    app.workers.prefix_format = found.replace("/128/", "/32/")
    await app.post("/v1/completions", prompt=long)
    [request] = app.workers.requests
    app.workers.prefix_format = found
    await app.post("/v1/completions", prompt=long)
    *_, again = app.workers.requests
    app.workers.requests, app.workers.prefix_format = [], ""

    assert request.prefix_format == found.replace("/128/", "/32/")
    assert len(request.block_hashes) == (request.num_prompt_tokens - 1) // 32 * 8
    assert again.block_hashes == one


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_targets_in_headers_reach_the_workers(app: App, path: str, stream: bool) -> None:
    answer = await app.post(path, FAST, stream=stream)

    assert answer.status_code == 200, answer.text
    assert app.workers.take_targets() == [OF_FAST]
    assert answer.headers["x-slo-class"] == "fast"


@pytest.mark.parametrize("path", BODIES)
async def test_a_request_without_headers_is_of_the_default_class(app: App, path: str) -> None:
    answer = await app.post(path)

    assert answer.status_code == 200, answer.text
    assert app.workers.take_targets() == [STANDARD]
    assert answer.headers["x-slo-class"] == "standard"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_every_sequence_of_a_request_has_its_targets(
    app: App, path: str, stream: bool
) -> None:
    answer = await app.post(path, FAST, n=3, temperature=1, stream=stream)

    assert answer.status_code == 200, answer.text
    assert app.workers.take_targets() == [OF_FAST] * 3


async def test_every_prompt_of_a_request_has_its_targets(app: App) -> None:
    await app.post("/v1/completions", FAST, prompt=["One", "Two"])

    assert app.workers.take_targets() == [OF_FAST] * 2


async def test_requests_at_the_same_time_have_each_their_own_targets(app: App) -> None:
    classes = ["fast", "batch", "interactive", "standard"] * 4
    answers = await asyncio.gather(
        *(app.post("/v1/chat/completions", {"x-slo-class": name}) for name in classes)
    )

    assert [answer.headers["x-slo-class"] for answer in answers] == classes
    assert sorted(name for name, _ in app.workers.take_targets()) == sorted(classes)


@pytest.mark.parametrize(
    ("params", "key"),
    [
        ({"prompt": ["One"] * 600, "n": 2, "temperature": 1}, "max_sequences"),
        ({"prompt": ["One"] * 10, "n": 128, "temperature": 1}, "max_sequences"),
        ({"max_tokens": 8000, "logprobs": 20, "n": 8, "temperature": 1}, "max_total_logprobs"),
    ],
)
async def test_a_call_that_would_take_too_much_memory_is_refused(
    app: App, params: dict[str, Any], key: str
) -> None:
    answer = await app.post("/v1/completions", **params)
    handle = app.frontend.complete("completion", BODIES["/v1/completions"] | params)
    with pytest.raises(RequestFailed, match=f"ingress.{key}") as failure:
        await handle

    assert (answer.status_code, failure.value.status) == (400, 400)
    assert f"ingress.{key}" in answer.json()["error"]["message"]
    assert not app.frontend._llm.output_processor.request_states
    app.workers.take_targets()


async def test_vllms_own_metrics_are_neither_counted_nor_shown(app: App) -> None:
    """They would be those of this process, which has no engine."""
    middlewares = [repr(middleware.cls) for middleware in app.frontend._app.user_middleware]

    assert (await app.http.get("/metrics")).status_code == 404
    assert middlewares
    assert not [name for name in middlewares if "Prometheus" in name]


async def test_priority_goes_with_the_targets(app: App) -> None:
    await app.post("/v1/completions", FAST, priority=-3)

    (request,) = app.workers.requests
    assert (request.priority, app.workers.take_targets()) == (-3, [OF_FAST])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"x-slo-class": "fastest"}, "x-slo-class: 'fastest' is no service class; known are "),
        ({"x-slo-ttft-ms": "soon"}, "x-slo-ttft-ms: 'soon' is no target; give a positive number"),
        ({"x-slo-tpot-ms": "-1"}, "x-slo-tpot-ms: '-1' is no target; give a positive number"),
    ],
)
async def test_headers_that_cannot_be_used_are_refused_before_anything_runs(
    app: App, path: str, stream: bool, headers: dict[str, str], message: str
) -> None:
    answer = await app.post(path, headers, stream=stream)

    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, BAD_REQUEST[path == "/v1/messages"])
    assert error["message"].startswith(message)
    assert app.workers.take_targets() == []


async def test_routes_that_take_no_body_have_no_targets(app: App) -> None:
    answer = await app.http.get("/v1/models", headers={"x-slo-class": "fastest"})

    assert (answer.status_code, answer.headers.get("x-slo-class")) == (200, None)


UNSENDABLE = [f'"seed": {2**70}', '"stop": "\\ud800"', '"vllm_xargs": {"a": "\\ud800"}']


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("field", UNSENDABLE)
async def test_what_cannot_be_sent_to_a_worker_is_refused_and_forgotten(
    app: App, field: str, n: int
) -> None:
    answer = await app.http.post(
        "/v1/completions",
        content=f'{{"prompt": "Hello", "n": {n}, "temperature": 1, {field}}}',
        headers={"content-type": "application/json"},
    )

    assert answer.status_code == 400, answer.text
    assert app.workers.take_targets() == []
    processor = app.frontend._llm.output_processor
    assert (processor.request_states, processor.parent_requests) == ({}, {})
    assert not processor.external_req_ids


# The client handle

PAYLOADS: dict[Api, dict[str, Any]] = {
    "chat": {"messages": HELLO},
    "completion": {"prompt": "Hello"},
}
PARAMETERS: dict[str, Any] = {"slo_class": "fast", "slo_ttft_ms": 200, "slo_tpot_ms": math.inf}


@pytest.mark.parametrize("api", PAYLOADS)
async def test_targets_of_a_handles_call_reach_the_workers(app: App, api: Api) -> None:
    answer = await app.frontend.complete(api, PAYLOADS[api] | PARAMETERS)
    chunks = [chunk async for chunk in app.frontend.stream(api, PAYLOADS[api] | PARAMETERS)]

    assert json.loads(answer)["choices"]
    assert chunks
    assert app.workers.take_targets() == [("fast", Slo(0.2, math.inf))] * 2


async def test_a_handles_call_without_targets_is_of_the_default_class(app: App) -> None:
    await app.frontend.complete("chat", PAYLOADS["chat"] | PARAMETERS)
    await app.frontend.complete("chat", PAYLOADS["chat"])

    assert app.workers.take_targets()[1:] == [STANDARD]


@pytest.mark.parametrize("api", PAYLOADS)
@pytest.mark.parametrize(
    ("name", "value"), [("slo_class", "fastest"), ("slo_ttft_ms", "soon"), ("slo_tpot_ms", 0)]
)
async def test_parameters_that_cannot_be_used_fail_the_handles_call(
    app: App, api: Api, name: str, value: Any
) -> None:
    payload = PAYLOADS[api] | {name: value}
    with pytest.raises(RequestFailed, match=f"^{name}: ") as refused:
        await app.frontend.complete(api, payload)
    assert refused.value.status == 400

    with pytest.raises(RequestFailed, match=f"^{name}: ") as refused:
        async with contextlib.aclosing(app.frontend.stream(api, payload)) as chunks:
            await anext(chunks)
    assert refused.value.status == 400
    assert app.workers.take_targets() == []


# Refusals

OVERLOAD, QUOTA = Refused(RefusalReason.OVERLOAD, 1.2), Refused(RefusalReason.QUOTA, 30)
REFUSALS = [
    (OVERLOAD, 503, "2", "the workers could not serve the request in time; retry after 1.2 s"),
    (QUOTA, 429, "30", "a quota of its tenant is used up; retry after 30 s"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("refused", "status", "retry_after", "message"), REFUSALS)
async def test_a_refused_request_is_answered_with_its_status_and_when_to_retry(
    refusing: tuple[App, FakeScheduler],
    path: str,
    stream: bool,
    refused: Refused,
    status: int,
    retry_after: str,
    message: str,
) -> None:
    app, scheduler = refusing
    scheduler.answers = [refused, refused]
    answer = await app.post(path, FAST, stream=stream, n=2, temperature=1)

    scheduler.answers = []
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)
    assert (answer.headers["retry-after"], answer.headers["x-slo-class"]) == (retry_after, "fast")
    assert app.frontend._llm.output_processor.request_states == {}


@pytest.mark.parametrize("api", PAYLOADS)
@pytest.mark.parametrize(("refused", "status", "retry_after", "message"), REFUSALS)
async def test_a_refused_call_of_the_handle_fails_with_the_same(
    refusing: tuple[App, FakeScheduler],
    api: Api,
    refused: Refused,
    status: int,
    retry_after: str,
    message: str,
) -> None:
    app, scheduler = refusing
    scheduler.answers = [refused, refused]
    with pytest.raises(RequestRefused) as complete:
        await app.frontend.complete(api, PAYLOADS[api])
    with pytest.raises(RequestRefused) as streamed:
        async with contextlib.aclosing(app.frontend.stream(api, PAYLOADS[api])) as chunks:
            await anext(chunks)

    for failure in (complete.value, pickle.loads(pickle.dumps(streamed.value))):
        assert (str(failure), failure.status) == (message, status)
        assert failure.retry_after_s == refused.retry_after_s


async def test_a_model_is_found_by_an_id_with_slashes() -> None:
    config = dataclasses.replace(CONFIG, served_model_name="org/family/model")
    app = App(config, Workers())
    await app.frontend.start()
    async with app.http:
        plain = await app.http.get("/v1/models/org/family/model")
        quoted = await app.http.get("/v1/models/org%2Ffamily%2Fmodel")
        part = await app.http.get("/v1/models/org/family")
        listed = await app.http.get("/v1/models/")

    assert plain.status_code == quoted.status_code == listed.status_code == 200
    assert plain.json()["id"] == quoted.json()["id"] == "org/family/model"
    assert [model["id"] for model in listed.json()["data"]] == ["org/family/model"]
    assert (part.status_code, part.json()["error"]["code"]) == (404, 404)
