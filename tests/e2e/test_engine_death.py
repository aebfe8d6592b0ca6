"""Engines that die, and workers that are gone or slow, while those that are not serve others."""

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable

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
    wait_for_placed,
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


@pytest.mark.usefixtures("restored")
def test_a_request_that_ends_its_engine_fails_alone(
    server: Server, handle: XYServe, client: openai.OpenAI, http: httpx.Client
) -> None:
    """It is never placed beside others again, and given up after the second engine."""
    wait_for_calm()
    blocker = handle.stream("Once", max_tokens=8000, ignore_eos=True)
    next(blocker)  # the streams go to the other worker
    with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(stream, client, number) for number in range(NUM_STREAMS)]
        wait_for_load(handle, num_running=1 + NUM_STREAMS)
        blocker.close()
        wait_for_placed(0, NUM_STREAMS)
        with pytest.raises(openai.APIStatusError, match="2 engines died") as failure:
            client.with_options(timeout=600).completions.create(
                model=MODEL,
                prompt="Hello",
                max_tokens=4,
                extra_body=faults.order("fail"),
                extra_headers={"x-request-id": "killing-request"},
            )
        assert [done.result() for done in streams] == [MAX_TOKENS] * NUM_STREAMS

    assert failure.value.status_code == 500
    until(lambda: http.get("/health").status_code == 200)
    explanation = only(handle.explain("killing-request"))
    placements = [trace.placement for trace in explanation.attempt_traces]
    lost = [attempt.lost.partition(":")[0] for attempt in explanation.record.attempts]
    # On a busy machine a process may end before its last answer has left it.
    assert lost in (["StepFailed", "StepFailed"], ["StepFailed", "ActorDiedError"])
    assert placements[1]
    assert placements[1].reason is PlacementReason.TRIAL
    assert placements[1].chosen.num_requests == 0
    # Each engine logs why it failed, and perhaps a health check of it does; no call does.
    assert not [text for text in server.tracebacks() if MARK in text and "in generate" in text]


@pytest.mark.usefixtures("restored")
def test_calls_wait_while_no_worker_can_serve_and_health_says_so(
    handle: XYServe, http: httpx.Client
) -> None:
    for worker in handle.status().workers:
        os.kill(worker.pid, signal.SIGKILL)

    until(lambda: http.get("/health").status_code == 503, timeout_s=25)  # silence takes 30 s
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
