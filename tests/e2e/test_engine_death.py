"""Engines that die, and workers that are gone or slow, while those that are not serve others."""

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from cluster.client import XYServe
from scheduler.placement import PlacementReason
from tests.e2e.conftest import (
    ANSWER_TIMEOUT_S,
    MODEL,
    RESTORED_TIMEOUT_S,
    Server,
    wait_for_calm,
    wait_for_load,
)
from tests.e2e.test_explain import only
from tests.plugins import faults

NUM_STREAMS = 8
MAX_TOKENS = 300
MARK = "a test ordered this step to fail"


def until(condition: Callable[[], bool], timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


def stream(client: openai.OpenAI, number: int) -> int:
    """The number of tokens of one streamed answer, for which it has asked for all it may have."""
    chunks = client.completions.create(
        model=MODEL,
        prompt=f"Story {number}:",
        max_tokens=MAX_TOKENS,
        temperature=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *_, last = chunks
    assert last.usage
    return last.usage.completion_tokens


def test_a_request_that_makes_steps_fail_fails_alone(
    server: Server, handle: XYServe, client: openai.OpenAI, http: httpx.Client
) -> None:
    """It ends no worker, streams in the same steps are whole, and an equal one is refused."""
    wait_for_calm()
    pids = {worker.pid for worker in handle.status().workers}
    once = client.with_options(timeout=600, max_retries=0).completions
    poison: dict[str, Any] = {
        "model": MODEL,
        "prompt": "Hello",
        "max_tokens": 40,
        "temperature": 0,
        "extra_body": faults.order("fail", num_tokens=5) | {"ignore_eos": True},
    }
    with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(stream, client, number) for number in range(NUM_STREAMS)]
        wait_for_load(handle, num_running=NUM_STREAMS)
        with pytest.raises(openai.APIStatusError, match=MARK) as failure:
            once.create(**poison, extra_headers={"x-request-id": "poison-1"})
        began_s = time.monotonic()
        with pytest.raises(openai.APIStatusError, match=MARK) as refusal:
            once.create(**poison, extra_headers={"x-request-id": "poison-2"})
        refused_s = time.monotonic() - began_s
        other = once.create(**poison | {"prompt": "Hi", "extra_body": {"ignore_eos": True}})
        assert [done.result() for done in streams] == [MAX_TOKENS] * NUM_STREAMS

    print(f"refused in {refused_s * 1e3:.0f} ms")
    assert (failure.value.status_code, refusal.value.status_code) == (500, 422)
    assert "a step with this request alone failed" in str(failure.value)
    assert "an equal request has made engines fail" in str(refusal.value)
    assert other.usage
    assert other.usage.completion_tokens == 40
    assert {worker.pid for worker in handle.status().workers} == pids
    assert http.get("/health").status_code == 200
    record = only(handle.explain("poison-1")).record
    assert [attempt.lost.partition(":")[0] for attempt in record.attempts] == ["PoisonFound"]
    # An engine logs why its steps failed; no call does.
    assert not [text for text in server.tracebacks() if MARK in text and "in generate" in text]


@pytest.mark.usefixtures("restored")
def test_a_request_that_ends_its_process_is_given_up(
    handle: XYServe, client: openai.OpenAI, http: httpx.Client
) -> None:
    """It is tried alone when a second one has ended, and streams beside it go on."""
    wait_for_calm()
    with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(stream, client, number) for number in range(NUM_STREAMS)]
        wait_for_load(handle, num_running=NUM_STREAMS)
        with pytest.raises(openai.APIStatusError, match="2 engines died") as failure:
            client.with_options(timeout=600).completions.create(
                model=MODEL,
                prompt="Hello",
                max_tokens=4,
                extra_body=faults.order("kill"),
                extra_headers={"x-request-id": "killing-request"},
            )
        assert [done.result() for done in streams] == [MAX_TOKENS] * NUM_STREAMS

    assert failure.value.status_code == 500
    until(lambda: http.get("/health").status_code == 200)
    explanation = only(handle.explain("killing-request"))
    placements = [trace.placement for trace in explanation.attempt_traces]
    assert len(placements) == 3
    assert placements[2]
    assert placements[2].reason is PlacementReason.TRIAL
    assert placements[2].chosen.num_requests == 0


@pytest.mark.usefixtures("restored")
def test_calls_wait_while_no_worker_can_serve_and_health_says_so(
    handle: XYServe, http: httpx.Client
) -> None:
    for worker in handle.status().workers:
        os.kill(worker.pid, signal.SIGKILL)

    until(lambda: http.get("/health").status_code == 503, timeout_s=25)
    assert not handle.status().is_serving
    answer = handle.generate("Hello", max_tokens=2)
    assert answer.usage
    assert answer.usage.completion_tokens == 2
    assert http.get("/health").status_code == 200
    until(lambda: handle.status().is_serving, RESTORED_TIMEOUT_S)


def test_a_worker_whose_steps_take_long_is_spared(handle: XYServe) -> None:
    wait_for_calm()
    slow_one = handle.stream("Once", max_tokens=2000, ignore_eos=True, **faults.order("0.4"))
    next(slow_one)
    [slow] = (worker for worker in handle.status().workers if worker.num_running)
    until(lambda: any(worker.slow for worker in handle.status().workers))
    answer = handle.generate("Hello", max_tokens=2, request_id="not-on-the-slow-one")
    slow_one.close()

    assert answer.usage
    [trace] = only(handle.explain("not-on-the-slow-one")).attempt_traces
    assert trace.placement
    assert trace.placement.reason is PlacementReason.OTHERS_SLOW
    assert trace.placement.chosen.worker_id != slow.worker_id
    wait_for_calm()  # without steps its pace is forgotten
