"""A client that does not read its stream: it is held back and given up, and nobody else notices."""

import json
import signal
import socket
import subprocess
import sys
import urllib.parse

import openai

from cluster.client import XYServe
from cluster.observe.explanation import Explanation
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL, Server, wait_for_load, wait_for_placed

CALL_ID = "a-client-that-does-not-read"
NUM_SEQUENCES, MAX_TOKENS = 4, 4000
LARGE = {
    **{"n": NUM_SEQUENCES, "max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 1},
    **{"logprobs": 20, "stream": True},
}
"""Each token takes more than 1 kB in the stream."""


def send(server: Server, call_id: str, **params: object) -> socket.socket:
    """Send a request by a connection that keeps little of its answer in the kernel."""
    url = urllib.parse.urlsplit(server.url)
    body = json.dumps({"model": MODEL, "prompt": "Once upon a time"} | params).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    # Of the segments of a network, not those of 64 kB on a loopback, the kernel keeps 140 kB.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
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
        wait_for_load(handle, num_running=NUM_SEQUENCES)
        other = client.completions.create(
            model=MODEL, prompt="The capital of France is", max_tokens=3, temperature=0
        )
        assert other.choices[0].text.startswith(" Paris")
        wait_for_load(handle, num_running=0)

        records = [one.record for one in handle.explain(CALL_ID) if isinstance(one, Explanation)]
        [error] = {record.error for record in records}
        assert [record.outcome for record in records] == ["unread"] * NUM_SEQUENCES
        assert error.startswith("the client does not read its stream: ")
        assert max(record.num_output_tokens for record in records) < MAX_TOKENS
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data

    *_, event, done = [line for line in answer.decode().splitlines() if line.startswith("data: ")]
    assert done == "data: [DONE]"
    told = json.loads(event.removeprefix("data: "))["error"]
    assert (told["code"], told["message"]) == (408, error)
    assert CALL_ID in log_of(server, "a stream that is not read was ended")


HANDLE = """
import sys
from cluster.client import XYServe

with XYServe.connect(sys.argv[1]) as xy:
    stream = xy.stream("Once", max_tokens=8000, ignore_eos=True, request_id=sys.argv[2])
    next(stream)
    print("begun", flush=True)
    for _ in stream:
        pass
"""
HANDLE_ID = "a-handle-that-does-not-read"


def test_a_handle_whose_process_stands_still_is_given_up(server: Server, handle: XYServe) -> None:
    wait_for_load(handle, num_running=0)
    command = [sys.executable, "-c", HANDLE, server.ray_address, HANDLE_ID]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGSTOP)
            wait_for_placed(0, 0)
        finally:
            process.kill()

    [explanation] = handle.explain(HANDLE_ID)
    assert isinstance(explanation, Explanation)
    assert explanation.record.outcome == "abort"
    assert log_of(server, "a client handle does not read its streams")


def log_of(server: Server, message: str) -> str:
    """The lines of the replicas' logs with a message."""
    logs = (server.ray_folder / "session_latest" / "logs").glob("worker-*.err")
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return "\n".join(line for line in lines if message in line)
