"""A client that does not read its stream: it is held back and given up, and nobody else notices."""

import json
import socket
import urllib.parse

import openai

from cluster.client import XYServe
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL, Server, wait_for_load

CALL_ID = "a-client-that-does-not-read"
LARGE = {"logprobs": 5, "max_tokens": 7000, "ignore_eos": True, "stream": True}
"""Each of its tokens takes about 700 bytes in the stream."""


def send(server: Server, call_id: str, **params: object) -> socket.socket:
    """Send a request by a connection that keeps little of its answer in the kernel."""
    url = urllib.parse.urlsplit(server.url)
    body = json.dumps({"model": MODEL, "prompt": "Once upon a time"} | params).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(ANSWER_TIMEOUT_S)
    connection.connect((url.hostname, url.port))
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nX-Request-Id: {call_id}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


def test_a_client_that_does_not_read_is_given_up_with_a_reason_and_others_go_on(
    server: Server, client: openai.OpenAI, handle: XYServe
) -> None:
    with send(server, CALL_ID, **LARGE) as connection:
        wait_for_load(handle, num_running=1)
        other = client.completions.create(
            model=MODEL, prompt="The capital of France is", max_tokens=3, temperature=0
        )
        assert other.choices[0].text.startswith(" Paris")
        wait_for_load(handle, num_running=0)

        [explanation] = handle.explain(CALL_ID)
        record = explanation.record
        assert record.outcome == "unread"
        assert record.error.startswith("the client does not read its stream: ")
        assert record.num_output_tokens < 7000
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data

    *_, event, done = [line for line in answer.decode().splitlines() if line.startswith("data: ")]
    assert done == "data: [DONE]"
    error = json.loads(event.removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == (408, record.error)
    assert CALL_ID in log_of(server, "a stream that is not read was ended")


def log_of(server: Server, message: str) -> str:
    """The lines of the replicas' logs with a message."""
    logs = (server.ray_folder / "session_latest" / "logs").glob("worker-*.err")
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return "\n".join(line for line in lines if message in line)
