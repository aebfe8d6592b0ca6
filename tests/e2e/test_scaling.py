"""The number of workers follows the load, live, and no request notices."""

import asyncio
import re
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.answers import token_ids
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL, Server, serving

NUM_TOKENS, NUM_LONG = 16, 200
NUM_CLIENTS = 6
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "downscale_delay_s": 5,
    "metrics_interval_s": 1,
}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An app of its own, of one worker or two; this process is in the Ray cluster of another."""
    with serving(tmp_path_factory.mktemp("scaled"), autoscaling=AUTOSCALING, draft=None) as server:
        yield server


async def gauge(server: Server, name: str) -> float:
    """The value on the page, some seconds old; 0 if there is none yet."""
    async with httpx.AsyncClient(base_url=server.url, timeout=ANSWER_TIMEOUT_S) as http:
        page = (await http.get("/metrics")).raise_for_status().text
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    )


async def num_workers(server: Server) -> int:
    return int(await gauge(server, "xyserve_workers_ready"))


def changes(server: Server) -> list[str]:
    """The changes that Serve has made, in order."""
    [log] = (server.ray_folder / "session_latest" / "logs" / "serve").glob("controller_[0-9]*.log")
    return re.findall(r"(Up|Down)scaling Deployment\(name='Worker'", log.read_text())


async def wait_for(server: Server, number: int) -> None:
    give_up_s = time.monotonic() + 2 * ANSWER_TIMEOUT_S
    while (found := await num_workers(server)) != number:
        assert time.monotonic() < give_up_s, found
        await asyncio.sleep(0.5)


async def ask(client: openai.AsyncOpenAI, prompt: str, num_tokens: int) -> int:
    """The tokens of an answer."""
    stream = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return sum([len(token_ids(choice)) async for chunk in stream for choice in chunk.choices])


async def test_a_worker_comes_with_the_load_and_goes_with_it_and_no_request_fails(
    scaled: Server,
) -> None:
    client = openai.AsyncOpenAI(
        base_url=f"{scaled.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S
    )
    await wait_for(scaled, 1)
    is_heavy, is_over = True, False
    answers: list[int] = []
    long_answers: list[int] = []

    async def ask_much(number: int) -> None:
        while is_heavy:
            # No prompt begins like another, which the prefix cache would know.
            prompt = f"{number} {len(answers)}: " + "Tell me of the sea. " * 100
            answers.append(await ask(client, prompt, NUM_TOKENS))

    async def ask_long() -> None:
        """One is under way when a worker goes."""
        while not is_over:
            long_answers.append(await ask(client, "Once upon a time", NUM_LONG))

    async with asyncio.TaskGroup() as group:
        for number in range(NUM_CLIENTS):
            group.create_task(ask_much(number))
        await wait_for(scaled, 2)
        most = await gauge(scaled, "xyserve_workers_wanted")
        before = len(answers)
        while len(answers) < before + NUM_CLIENTS:
            await asyncio.sleep(0.1)
        is_heavy = False
        group.create_task(ask_long())
        await wait_for(scaled, 1)
        is_over = True
    await asyncio.sleep(3)  # in which Serve would take it back

    assert most == 2
    assert set(answers) == {NUM_TOKENS}
    assert set(long_answers) == {NUM_LONG}
    assert changes(scaled) == ["Up", "Down"]
    assert await num_workers(scaled) == 1
