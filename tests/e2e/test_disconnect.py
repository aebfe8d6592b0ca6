"""A client that goes away frees its slots, within two steps."""

import contextlib
import json
import socket
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest

from cluster.client import XYServe
from tests.e2e.conftest import (
    ANSWER_TIMEOUT_S,
    MODEL,
    Load,
    Server,
    wait_for_load,
    wait_for_placed,
)

STEPS_TO_FREE = 2
STEPS_TO_MEASURE = 1
"""The status before and the one after are each taken between two steps."""
TRIES = 6
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
    wait_for_placed(0, 0)
    slots, sequences = 32, 96  # two workers of max_num_seqs 16, full however they are spread
    long = LONG | {"max_tokens": 500}  # so that none is preempted for lack of KV blocks
    with contextlib.ExitStack() as open_calls:
        busy = request(server, "/v1/completions", **long | {"n": sequences, "temperature": 1})
        open_calls.callback(busy.close)
        wait_for_load(handle, num_running=slots, num_waiting=sequences - slots)
        waiting = request(server, "/v1/completions", **LONG)
        open_calls.callback(waiting.close)
        wait_for_load(handle, num_running=slots, num_waiting=sequences - slots + 1)

        waiting.close()

        wait_for_load(handle, num_running=slots, num_waiting=sequences - slots)
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
