"""Parts other than workers that are lost while requests run, and what that costs.

The table "When parts die" in cluster/README.md says the same. An ingress of two: see tests/chaos.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

import httpx
import psutil
import pytest
from ray import serve

from cluster.client import XYServe
from tests.bench.answers import token_ids
from tests.chaos.census import name_of, processes_of
from tests.e2e.conftest import MODEL, Server
from tests.e2e.test_draft_worker import NUM_TOKENS, answers, wait_until
from tests.workload import questions

CONTROLLER = "ray::ServeController"
PROXY = "ray::ProxyActor"


async def answers_around(
    handle: XYServe, prompts: list[str], lose: Callable[[], None]
) -> list[list[int]]:
    """Greedy answers, half of them begun before a part is lost, half asked for just after it."""
    begun = asyncio.Event()

    async def one(prompt: str) -> list[int]:
        tokens = []
        async for chunk in handle.stream_async(
            prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, return_token_ids=True
        ):
            tokens += [t for c in chunk.choices for t in token_ids(c)]
            begun.set()
        return tokens

    running = [asyncio.create_task(one(prompt)) for prompt in prompts[::2]]
    await begun.wait()
    await asyncio.to_thread(lose)
    new = await asyncio.gather(*(one(prompt) for prompt in prompts[1::2]))
    old = await asyncio.gather(*running)
    return [answer for pair in zip(old, new, strict=True) for answer in pair]


def pids(server: Server, name: str) -> list[int]:
    """The processes of the server with this name."""
    found = []
    for process in processes_of(server):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name_of(process) == name:
                found.append(process.pid)
    return found


def kill(server: Server, name: str) -> int:
    (pid,) = pids(server, name)
    os.kill(pid, signal.SIGKILL)
    return pid


def is_back(server: Server, name: str, old: int) -> bool:
    return any(pid != old for pid in pids(server, name))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return questions(8)


@pytest.fixture(scope="module")
def expected(handle: XYServe, prompts: list[str]) -> list[list[int]]:
    return asyncio.run(answers(handle, prompts))


def test_requests_are_placed_without_the_global_scheduler_and_what_runs_goes_on(
    server: Server, handle: XYServe, prompts: list[str], expected: list[list[int]]
) -> None:
    lost: list[int] = []

    found = asyncio.run(
        answers_around(handle, prompts, lambda: lost.append(kill(server, "GlobalScheduler")))
    )

    assert found == expected
    wait_until(lambda: is_back(server, "GlobalScheduler", lost[0]))
    wait_until(lambda: len(workers_known()) == len(handle.status().workers))


def all_run() -> bool:
    """Whether Serve knows of no replica that does not run."""
    deployments = serve.status().applications["xyserve"].deployments.values()
    return all(list(deployment.replica_states) == ["RUNNING"] for deployment in deployments)


def workers_known() -> list[str]:
    """The workers of which the GlobalScheduler has heard."""
    scheduler = serve.get_deployment_handle("GlobalScheduler", "xyserve")
    return [load.worker_id for load in scheduler.loads.remote().result()]


def test_a_global_scheduler_that_hangs_is_replaced_and_requests_wait(
    server: Server, handle: XYServe, prompts: list[str], expected: list[list[int]]
) -> None:
    (pid,) = pids(server, "GlobalScheduler")
    wait_until(lambda: is_known_to_its_raylet(pid))

    found = asyncio.run(answers_around(handle, prompts, lambda: os.kill(pid, signal.SIGSTOP)))

    assert found == expected
    wait_until(lambda: pid not in pids(server, "GlobalScheduler"))


def is_known_to_its_raylet(pid: int) -> bool:
    """Whether the raylet has connected to a process that it started, as it does in some 15 s.

    One that hangs before is given up by Serve too, but Ray cannot end it until it goes on.
    """
    process = psutil.Process(pid)
    ports = {c.laddr.port for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    raylet = process.parent()
    assert raylet
    return any(c.raddr and c.raddr.port in ports for c in raylet.net_connections())


@pytest.mark.usefixtures("restored")
def test_without_serves_controller_requests_go_on_and_then_it_replaces_workers_again(
    server: Server,
    handle: XYServe,
    http: httpx.Client,
    prompts: list[str],
    expected: list[list[int]],
) -> None:
    lost: list[int] = []
    replicas = server.replicas()

    found = asyncio.run(
        answers_around(handle, prompts, lambda: lost.append(kill(server, CONTROLLER)))
    )
    by_http = http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi", "max_tokens": 2})

    assert found == expected
    assert by_http.status_code == httpx.codes.OK
    wait_until(lambda: is_back(server, CONTROLLER, lost[0]))
    wait_until(all_run)
    assert server.replicas() == replicas
    os.kill(handle.status().workers[0].pid, signal.SIGKILL)  # which `restored` waits for


def test_without_the_proxy_handles_go_on_and_http_comes_back(
    server: Server, handle: XYServe, prompts: list[str], expected: list[list[int]]
) -> None:
    lost: list[int] = []

    found = asyncio.run(answers_around(handle, prompts, lambda: lost.append(kill(server, PROXY))))

    assert found == expected
    wait_until(lambda: is_healthy(server))


def is_healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
