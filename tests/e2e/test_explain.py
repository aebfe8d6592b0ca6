"""What became of a request, and what steps were made of: asked as a user asks."""

import asyncio
import itertools
import os
import pty
import secrets
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.client import XYServe
from cluster.errors import RequestFailed
from cluster.observe.explanation import Explanation
from cluster.observe.explanation_text import describe
from cluster.observe.request_history import Refusal
from scheduler.task import Stage
from tests.collector import Collector
from tests.e2e.conftest import MODEL, Server, wait_for_calm, wait_for_placed

PROMPT = "one two three four " * 8
FAST = {"x-slo-class": "interactive"}


def run(server: Server, *args: str) -> str:
    """What a command prints; it uses the connection of this process."""
    result = CliRunner().invoke(app, [*args, "--address", server.ray_address])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def only(found: list[Explanation | Refusal]) -> Explanation:
    [one] = found
    assert isinstance(one, Explanation)
    return one


def test_a_request_is_explained_by_the_id_of_its_answer(
    server: Server, handle: XYServe, client: openai.OpenAI
) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, extra_headers=FAST
    )

    one = only(handle.explain(answer.id))
    [trail] = one.attempt_traces
    [(worker, steps)] = trail.steps.items()
    usage = answer.usage
    assert usage is not None
    assert one.record.outcome == answer.choices[0].finish_reason
    assert one.record.num_output_tokens == usage.completion_tokens
    assert one.record.request.num_prompt_tokens == usage.prompt_tokens
    assert one.record.request.slo_class == "interactive"
    assert trail.placement is not None
    assert trail.placement.chosen.worker_id == worker
    assert trail.placement.runner_up is not None
    assert sum(step.num_new_tokens for step in steps) == usage.completion_tokens
    computed = sum(step.task.num_tokens for step in steps if step.task)
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    assert computed >= usage.prompt_tokens - (cached or 0)
    stages = [step.task.stage for step in steps if step.task]
    assert stages[0] is Stage.PREFILL
    assert Stage.VERIFY in stages  # the prompt repeats itself

    text = run(server, "explain", answer.id)
    assert "ended by length after 40 tokens" in text
    assert "class interactive: TTFT" in text
    assert f"placed on {worker}" in text
    assert "drafts accepted" in text


def test_each_of_several_answers_is_explained_by_the_calls_name(
    handle: XYServe, client: openai.OpenAI
) -> None:
    client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, n=3, extra_headers={"x-request-id": "threefold"}
    )

    found = handle.explain("threefold")

    assert len(found) == 3
    assert all(isinstance(one, Explanation) for one in found)


def test_a_call_of_the_handle_is_explained_by_its_request_id(handle: XYServe) -> None:
    handle.generate(PROMPT, max_tokens=3, request_id="by-handle-1")
    for _ in handle.stream(PROMPT, max_tokens=3, request_id="by-handle-2"):
        pass

    assert only(handle.explain("by-handle-1")).record.num_output_tokens == 3
    assert only(handle.explain("by-handle-2")).record.num_output_tokens == 3


def test_a_refused_call_is_explained(server: Server, handle: XYServe, http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": -1}
    http.post("/v1/completions", json=body, headers={"x-request-id": "refused-by-http"})
    with pytest.raises(RequestFailed):
        handle.generate("x", max_tokens=-1, request_id="refused-by-handle")

    for name in ("refused-by-http", "refused-by-handle"):
        [refusal] = handle.explain(name)
        assert isinstance(refusal, Refusal)
        assert refusal.status == 400
        assert "max_tokens" in refusal.message
        assert "400 (the client's error); no worker was asked" in run(server, "explain", name)


def test_a_request_whose_client_leaves_is_explained(handle: XYServe, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=900, stream=True,
        extra_headers={"x-request-id": "left-early"},
    )  # fmt: skip
    next(iter(stream))
    stream.close()

    give_up_s = time.monotonic() + 30
    while not (one := only(handle.explain("left-early"))).record.outcome:
        assert time.monotonic() < give_up_s
        time.sleep(0.1)
    assert one.record.outcome == "abort"
    assert 0 < one.record.num_output_tokens < 900


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_at_a_stop_string_is_explained_as_such(
    server: Server, handle: XYServe, http: httpx.Client, stream: bool
) -> None:
    name = f"stops-{stream}"
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "logprobs": 1}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["tokens"]
    body |= {"stop": [whole[9]], "request_id": name, "stream": stream}
    http.post("/v1/completions", json=body)

    record = only(handle.explain(name)).record
    assert record.outcome == "stop"
    before_it = itertools.takewhile(lambda text: whole[9] not in text, itertools.accumulate(whole))
    assert record.num_output_tokens == len(list(before_it)) + 1
    assert record.attainment()["all"] in (True, False)
    assert f"ended by stop after {record.num_output_tokens} tokens" in run(server, "explain", name)


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 3}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}),
    ],
)
def test_every_api_is_explained_by_what_the_client_sent_and_got(
    handle: XYServe, http: httpx.Client, path: str, params: dict[str, Any]
) -> None:
    name = f"by-{path[4:]}"
    headers = {"x-request-id": name}
    answer = http.post(path, json={"model": MODEL} | params, headers=headers)

    assert answer.headers["x-request-id"] == name
    for query in (name, answer.json()["id"]):
        assert only(handle.explain(query)).record.num_output_tokens == 3


def test_nothing_is_known_of_another_id(server: Server) -> None:
    result = CliRunner().invoke(app, ["explain", "never-heard-of", "--address", server.ray_address])

    assert result.exit_code == 1
    assert "no ingress remembers a request 'never-heard-of'" in result.output


def test_the_latest_steps_are_shown(server: Server, handle: XYServe, client: openai.OpenAI) -> None:
    began_s = time.time()
    client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0)

    found = handle.steps(began_s, 100)

    assert len(found) == 2
    steps = [step for of_worker in found for step in of_worker.steps]
    assert sum(step.num_new_tokens for step in steps) >= 20
    assert all(step.began_s > began_s - 1 for step in steps)
    assert all(of_worker.peaks for of_worker in found)
    assert all(step.num_flops > 0 and step.num_bytes > 0 for step in steps)
    text = run(server, "steps", "--last", "3")
    assert "prefill" in text
    assert "measured" in text


def test_steps_are_followed_until_one_has_seen_enough(
    server: Server, client: openai.OpenAI
) -> None:
    client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5)
    command = [sys.executable, "-m", "cluster.cli.main", "steps", "--follow"]
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        [*command, "--address", server.ray_address],
        stdout=terminal,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(terminal)
    with os.fdopen(ours, "rb", buffering=0) as screen:
        shown = b""
        while b"measured" not in shown:
            shown += screen.read(4096)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # the terminal is gone with the process
            while True:
                # As a user does: one that comes while Python ends a thread or an object is lost.
                if not select.select([screen], [], [], 5)[0]:
                    process.send_signal(signal.SIGINT)
                elif more := screen.read(4096):
                    shown += more
                else:
                    break

    assert process.wait(timeout=30) == 0
    assert shown.count(b"worker ") >= 2


@pytest.mark.usefixtures("restored")
def test_a_retried_request_is_explained_with_its_lost_worker(
    handle: XYServe, collector: Collector
) -> None:
    """Its worker is killed while it computes the long prompt."""
    wait_for_calm()
    pids = {worker.worker_id: worker.pid for worker in handle.status().workers}
    trace_id = secrets.token_hex(16)

    async def answer_of_the_kept() -> tuple[str, Completion]:
        call = asyncio.create_task(
            handle.generate_async(
                PROMPT * 220,
                max_tokens=5,
                request_id="retried",
                traceparent=f"00-{trace_id}-00f067aa0ba902b7-01",
                timeout_s=120,
            )
        )
        loads = await asyncio.to_thread(wait_for_placed, 0, 1)
        [killed] = (load.worker_id for load in loads if load.num_requests)
        os.kill(pids[killed], signal.SIGKILL)
        return killed, await call

    killed, answer = asyncio.run(answer_of_the_kept())
    [kept] = pids.keys() - {killed}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5

    retried = only(handle.explain("retried"))
    assert len(retried.record.attempts) == 2
    text = "\n".join(describe(retried))
    assert f"placed on {killed}" in text.partition("Attempt 2 of 2")[0]
    assert "it lost this worker: " in text.partition("Attempt 2 of 2")[0]
    assert f"on {kept}, prefill" in text.partition("Attempt 2 of 2")[2]
    assert retried.record.num_output_tokens == 5
    spans = collector.trace(trace_id, lambda found: any(s.name == "retry" for s in found))
    [retry] = (span for span in spans if span.name == "retry")
    assert retry.attributes["xyserve.attempt_id"].endswith(".1")
    assert retry.attributes["xyserve.lost"] == retried.record.attempts[0].lost
