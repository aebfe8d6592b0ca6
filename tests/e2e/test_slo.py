"""Targets of requests, by HTTP and by the client handle, on the running app."""

import json
from typing import Any

import httpx
import openai
import pytest

from cluster.client import XYServe
from cluster.errors import RequestFailed
from tests.e2e.conftest import MODEL, Server

HELLO: Any = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 16},
}
HEADERS = {"X-SLO-Class": "interactive", "x-slo-ttft-ms": "500", "x-slo-tpot-ms": "none"}
TARGETS: dict[str, Any] = {"slo_class": "batch", "slo_ttft_ms": 500, "slo_tpot_ms": "none"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_request_with_targets_is_answered_with_its_class(
    http: httpx.Client, path: str, stream: bool
) -> None:
    body = BODIES[path] | {"model": MODEL, "stream": stream}
    answer = http.post(path, headers=HEADERS, json=body)

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-slo-class"] == "interactive"
    assert http.post(path, json=body).headers["x-slo-class"] == "standard"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (
            {"x-slo-class": "fastest"},
            "x-slo-class: 'fastest' is no service class; known are batch, interactive, standard",
        ),
        ({"x-slo-ttft-ms": "soon"}, "x-slo-ttft-ms: 'soon' is no target; give a positive number"),
        ({"x-slo-tpot-ms": "-5"}, "x-slo-tpot-ms: '-5' is no target; give a positive number"),
    ],
)
def test_a_header_that_cannot_be_used_is_named(
    http: httpx.Client, path: str, stream: bool, headers: dict[str, str], message: str
) -> None:
    answer = http.post(path, headers=headers, json=BODIES[path] | {"stream": stream})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, 400)
    assert error["message"].startswith(message)


def test_a_header_of_any_bytes_is_refused(http: httpx.Client) -> None:
    for value in (b"\xff\xfe", b"\xe2\x88\x9e", b"x" * 10_000):
        for name in ("x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms"):
            answer = http.post("/v1/completions", headers=[(name.encode(), value)], json={})
            assert (answer.status_code, name in answer.text) == (400, True)


def test_a_large_body_after_a_bad_header_leaves_the_connection_usable(http: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x" * 1_000_000}).encode()

    for _ in range(3):
        answer = http.post("/v1/completions", headers={"x-slo-class": "fastest"}, content=body)
        assert (answer.status_code, "x-slo-class" in answer.text) == (400, True)
    assert http.get("/health").status_code == 200


def test_the_openai_client_sends_targets_and_reads_the_refusal(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=4, n=2, extra_headers=HEADERS
    )
    assert len(answer.choices) == 2

    with pytest.raises(openai.BadRequestError, match="x-slo-class: 'fastest'"):
        client.chat.completions.create(
            model=MODEL, messages=HELLO, extra_headers={"x-slo-class": "fastest"}
        )


async def test_calls_of_the_handle_take_targets(handle: XYServe) -> None:
    assert handle.chat(HELLO, max_tokens=4, **TARGETS).choices
    assert handle.generate("Hello", max_tokens=4, **TARGETS).choices
    assert list(handle.stream(HELLO, max_tokens=4, **TARGETS))
    assert (await handle.generate_async("Hello", max_tokens=4, **TARGETS)).choices
    assert [chunk async for chunk in handle.stream_async("Hello", max_tokens=4, **TARGETS)]


@pytest.mark.parametrize(
    ("name", "value"), [("slo_class", "fastest"), ("slo_ttft_ms", "soon"), ("slo_tpot_ms", -5)]
)
def test_a_target_that_cannot_be_used_fails_the_handles_call(
    server: Server, handle: XYServe, name: str, value: object
) -> None:
    crashes = server.tracebacks()
    params: dict[str, Any] = {name: value}
    for call in (
        lambda: handle.chat(HELLO, **params),
        lambda: handle.generate("Hello", **params),
        lambda: list(handle.stream(HELLO, **params)),
    ):
        with pytest.raises(RequestFailed, match=f"^{name}: '{value}' is no ") as refused:
            call()
        assert refused.value.status == 400

    assert server.tracebacks() == crashes
