"""The number of workers follows the load, live, and no request notices."""

import asyncio
import re
import time
from collections.abc import Iterator

import pytest
import ray

from cluster.client import XYServe
from scheduler.scaling import ScalingDecision
from tests.bench.answers import token_ids
from tests.e2e.conftest import ANSWER_TIMEOUT_S, Server, serving

NUM_TOKENS, NUM_LONG = 16, 200
NUM_CLIENTS = 6
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "downscale_delay_s": 5,
    "metrics_interval_s": 1,
}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, XYServe]]:
    """An app of its own, of one worker or two."""
    folder = tmp_path_factory.mktemp("scaled")
    with (
        serving(folder, autoscaling=AUTOSCALING, draft=None) as server,
        XYServe.connect(server.ray_address) as handle,
    ):
        yield server, handle
    ray.shutdown()


def num_workers(handle: XYServe) -> int:
    return len(handle.status().workers)


def decision(handle: XYServe) -> ScalingDecision | None:
    return handle.status().scaling


def changes(server: Server) -> list[str]:
    """The changes that Serve has made, in order."""
    [log] = (server.ray_folder / "session_latest" / "logs" / "serve").glob("controller_[0-9]*.log")
    return re.findall(r"(Up|Down)scaling Deployment\(name='Worker'", log.read_text())


async def wait_for(handle: XYServe, number: int) -> None:
    give_up_s = time.monotonic() + 2 * ANSWER_TIMEOUT_S
    while (found := await asyncio.to_thread(num_workers, handle)) != number:
        assert time.monotonic() < give_up_s, (found, decision(handle))
        await asyncio.sleep(0.5)


async def ask(handle: XYServe, prompt: str, num_tokens: int) -> int:
    """The tokens of an answer."""
    stream = handle.stream_async(
        prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True, return_token_ids=True
    )
    return sum([len(token_ids(c)) async for chunk in stream for c in chunk.choices])


async def test_a_worker_comes_with_the_load_and_goes_with_it_and_no_request_fails(
    scaled: tuple[Server, XYServe],
) -> None:
    server, handle = scaled
    assert num_workers(handle) == 1
    is_heavy, is_over = True, False
    answers: list[int] = []
    long_answers: list[int] = []

    async def ask_much(client: int) -> None:
        while is_heavy:
            # No prompt begins like another, which the prefix cache would know.
            prompt = f"{client} {len(answers)}: " + "Tell me of the sea. " * 100
            answers.append(await ask(handle, prompt, NUM_TOKENS))

    async def ask_long() -> None:
        """One is under way when a worker goes."""
        while not is_over:
            long_answers.append(await ask(handle, "Once upon a time", NUM_LONG))

    async with asyncio.TaskGroup() as group:
        for client in range(NUM_CLIENTS):
            group.create_task(ask_much(client))
        await wait_for(handle, 2)
        most = await asyncio.to_thread(decision, handle)
        before = len(answers)
        while len(answers) < before + NUM_CLIENTS:
            await asyncio.sleep(0.1)
        is_heavy = False
        group.create_task(ask_long())
        await wait_for(handle, 1)
        is_over = True
    await asyncio.sleep(3)  # in which Serve would take it back

    assert most is not None
    assert most.num_wanted == 2
    assert set(answers) == {NUM_TOKENS}
    assert set(long_answers) == {NUM_LONG}
    assert changes(server) == ["Up", "Down"]
    assert num_workers(handle) == 1
