"""Draft workers that are stopped, killed and started again while requests run: nobody notices."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from cluster.client import XYServe
from tests.bench.answers import token_ids
from tests.e2e.conftest import ANSWER_TIMEOUT_S
from tests.workload import questions
from workers.drafts.draft_client import DraftCounts
from workers.reports import DraftWorkerStatus

NUM_TOKENS = 150
REPEATING = "one two three four five six seven eight nine ten " * 6


async def answers(handle: XYServe, prompts: list[str]) -> list[list[int]]:
    """Greedy answers of NUM_TOKENS tokens, all at once."""

    async def one(prompt: str) -> list[int]:
        stream = handle.stream_async(
            prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, return_token_ids=True
        )
        return [t async for chunk in stream for c in chunk.choices for t in token_ids(c)]

    return await asyncio.gather(*(one(prompt) for prompt in prompts))


def draft_counts(handle: XYServe) -> list[DraftCounts]:
    return [worker.drafts.counts for worker in handle.status().workers if worker.drafts]


def num_accepted(handle: XYServe) -> int:
    return sum(counts.accepted for counts in draft_counts(handle))


def draft_worker(handle: XYServe) -> DraftWorkerStatus:
    """The one that runs, once Serve has one."""
    give_up_s = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < give_up_s:
        found = [
            worker
            for worker in handle.status().draft_workers
            if not worker.silent and psutil.pid_exists(worker.pid)
        ]
        if found:
            return found[0]
        time.sleep(0.2)
    pytest.fail("no draft worker came up")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + ANSWER_TIMEOUT_S
    while not is_so():
        assert time.monotonic() < give_up_s
        time.sleep(0.2)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [REPEATING, *questions(5)]


@pytest.fixture(scope="module")
def expected(handle: XYServe, prompts: list[str]) -> list[list[int]]:
    """The answers while drafts are at hand."""
    return asyncio.run(answers(handle, prompts))


def test_drafts_are_made_and_accepted(handle: XYServe) -> None:
    before = num_accepted(handle)

    asyncio.run(answers(handle, [REPEATING]))

    assert num_accepted(handle) > before
    assert draft_worker(handle).num_drafts > 0


def test_a_stopped_draft_worker_delays_no_request(
    handle: XYServe, prompts: list[str], expected: list[list[int]]
) -> None:
    pid = draft_worker(handle).pid

    with stopped(pid):
        assert asyncio.run(answers(handle, prompts)) == expected


def test_a_draft_worker_that_goes_on_is_used_again(handle: XYServe) -> None:
    with stopped(draft_worker(handle).pid):
        asyncio.run(answers(handle, [REPEATING]))
    before = num_accepted(handle)

    def is_used() -> bool:
        asyncio.run(answers(handle, [REPEATING]))
        return num_accepted(handle) > before

    wait_until(is_used)


@pytest.mark.usefixtures("restored")
def test_a_draft_worker_may_die_under_load(
    handle: XYServe, prompts: list[str], expected: list[list[int]]
) -> None:
    old = draft_worker(handle)

    async def kill_meanwhile() -> list[list[int]]:
        running = asyncio.create_task(answers(handle, prompts))
        await asyncio.sleep(1.0)
        os.kill(old.pid, signal.SIGKILL)
        return await running

    assert asyncio.run(kill_meanwhile()) == expected

    wait_until(lambda: draft_worker(handle).pid != old.pid)
    before = num_accepted(handle)

    def is_used() -> bool:
        asyncio.run(answers(handle, [REPEATING]))
        return num_accepted(handle) > before

    wait_until(is_used)
    assert asyncio.run(answers(handle, prompts)) == expected
