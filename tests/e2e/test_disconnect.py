"""A client that goes away frees its slots, within two steps."""

import json
import socket
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest
from ray import serve

from cluster.client import XYServe
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL, Load, Server, wait_for_load

STEPS_TO_FREE = 2
STEPS_TO_MEASURE = 1
"""The status before and the one after are each taken between two steps."""
TRIES = 3
"""Other processes of the machine can delay a try, but not speed it up."""

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True}
LONG_CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell a story."}],
    "max_tokens": 2000,
    "ignore_eos": True,
}

Leave = Callable[[], None]


def request(server: Server, path: str, **params: Any) -> socket.socket:
    """Send a request and leave its answer unread."""
    url = urllib.parse.urlsplit(server.url)
    body = json.dumps({"model": MODEL} | params).encode()
    connection = socket.create_connection((url.hostname, url.port), timeout=ANSWER_TIMEOUT_S)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


def steps_to_free(handle: XYServe, start: Callable[[], Leave], num_running: int) -> int:
    """Steps between a client's leaving and the first status without its requests."""
    leave = start()
    wait_for_load(handle, num_running)
    before = Load(handle)
    leave()
    return wait_for_load(handle, num_running=0).steps_since(before)


def wait_until_forgotten() -> None:
    """Until the GlobalScheduler has heard of the end of all requests, and so places evenly."""
    scheduler = serve.get_deployment_handle("GlobalScheduler", "xyserve")
    give_up_s = time.monotonic() + ANSWER_TIMEOUT_S
    while any(load.num_requests for load in scheduler.loads.remote().result()):
        assert time.monotonic() < give_up_s
        time.sleep(0.05)


def assert_frees_at_once(handle: XYServe, start: Callable[[], Leave], num_running: int) -> None:
    wait_for_load(handle, num_running=0)
    assert (
        min(steps_to_free(handle, start, num_running) for _ in range(TRIES))
        <= STEPS_TO_FREE + STEPS_TO_MEASURE
    )


@pytest.mark.parametrize(
    ("path", "params", "num_running"),
    [
        ("/v1/completions", LONG, 1),
        ("/v1/completions", LONG | {"stream": True}, 1),
        ("/v1/completions", LONG | {"n": 2, "temperature": 1}, 2),
        ("/v1/completions", LONG | {"n": 2, "temperature": 1, "stream": True}, 2),
        ("/v1/completions", LONG | {"prompt": ["One", "Two", "Three"]}, 3),
        ("/v1/chat/completions", LONG_CHAT, 1),
        ("/v1/chat/completions", LONG_CHAT | {"stream": True}, 1),
    ],
)
def test_closing_an_http_connection_frees_its_slots(
    server: Server, handle: XYServe, path: str, params: dict[str, Any], num_running: int
) -> None:
    assert_frees_at_once(handle, lambda: request(server, path, **params).close, num_running)


def test_leaving_a_stream_of_the_handle_frees_its_slot(handle: XYServe) -> None:
    def start() -> Leave:
        stream = handle.stream(**_for_handle())
        next(stream)
        return stream.close

    assert_frees_at_once(handle, start, num_running=1)


def _for_handle() -> dict[str, Any]:
    return {"input" if name == "prompt" else name: value for name, value in LONG.items()}


def test_a_request_that_waits_for_a_slot_is_forgotten(server: Server, handle: XYServe) -> None:
    wait_for_load(handle, num_running=0)
    wait_until_forgotten()
    slots = 32  # two workers of max_num_seqs 16
    busy = request(server, "/v1/completions", **LONG | {"n": slots, "temperature": 1})
    wait_for_load(handle, num_running=slots)
    waiting = request(server, "/v1/completions", **LONG)
    wait_for_load(handle, num_running=slots, num_waiting=1)

    waiting.close()

    wait_for_load(handle, num_running=slots, num_waiting=0)
    busy.close()
    wait_for_load(handle, num_running=0)
    assert handle.status().num_live_requests == 0


def test_a_client_that_leaves_before_its_first_token_is_forgotten(
    server: Server, handle: XYServe
) -> None:
    for _ in range(10):
        request(server, "/v1/completions", **LONG).close()

    wait_for_load(handle, num_running=0)
    answer = handle.generate("Hello", max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    wait_for_load(handle, num_running=0)
    assert handle.status().num_live_requests == 0
