"""`serve deploy` on the running cluster: redeploy, scale, refuse."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from cluster.client import XYServe
from tests.bench.answers import token_ids
from tests.e2e.conftest import MODEL, Server, wait_for_calm
from tests.e2e.test_explain import only

SERVE = str(Path(sys.executable).with_name("serve"))
DEPLOY_TIMEOUT_S = 200
NUM_LONG, NUM_LONGEST = 1000, 2000
"""Tokens of an answer that takes some seconds, and of one that takes longer than a worker waits for
it when it is to leave, also with drafts on a fast machine."""


def deploy(server: Server, document: dict[str, Any], path: Path) -> None:
    path.write_text(yaml.safe_dump(document))
    command = [SERVE, "deploy", str(path), "--address", server.dashboard]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def app_status(server: Server) -> dict[str, Any]:
    details = ServeSubmissionClient(server.dashboard).get_serve_details()
    return dict(details["applications"]["xyserve"])


def wait_until(server: Server, status: str, num_workers: int | None = None) -> dict[str, Any]:
    for _ in range(DEPLOY_TIMEOUT_S * 2):
        app = app_status(server)
        workers = app["deployments"].get("Worker", {}).get("replicas", [])
        running = [replica for replica in workers if replica["state"] == "RUNNING"]
        if app["status"] == status and num_workers in (None, len(running)):
            return app
        time.sleep(0.5)
    pytest.fail(f"not {status} with {num_workers} workers: {app['status']} {app['message']}")


@pytest.fixture
def original(server: Server) -> Iterator[dict[str, Any]]:
    """The session's config, to be changed; it is deployed again after the test."""
    num_replicas = len(server.replicas())
    yield yaml.safe_load(server.config.read_text())
    deploy(server, yaml.safe_load(server.config.read_text()), server.folder / "restored.yaml")
    wait_until(server, "RUNNING", num_workers=2)
    for _ in range(DEPLOY_TIMEOUT_S * 2):  # until those that it replaced have ended
        if len(server.replicas()) == num_replicas:
            return
        time.sleep(0.5)
    pytest.fail(f"not {num_replicas} replicas but {server.replicas()}")


class Streams:
    """Long seeded streams in threads, each reading to its end."""

    def __init__(self, client: openai.OpenAI, name: str, count: int, max_tokens: int) -> None:
        self.call_ids = [f"{name}-{index}" for index in range(count)]
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.errors: list[BaseException] = []
        self._client = client
        self._threads = [
            threading.Thread(target=self._read, args=(index, max_tokens)) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, index: int, max_tokens: int) -> None:
        try:
            for chunk in self._client.completions.create(
                model=MODEL,
                prompt=f"Story {index}: once upon a time",
                max_tokens=max_tokens,
                temperature=0.9,
                seed=index,
                stream=True,
                extra_headers={"x-request-id": self.call_ids[index]},
                extra_body={"ignore_eos": True, "return_token_ids": True},
            ):
                self.tokens[index] += [t for c in chunk.choices for t in token_ids(c)]
        except Exception as error:
            self.errors.append(error)

    def wait_until_flowing(self) -> None:
        while not all(self.tokens) and not self.errors:
            time.sleep(0.05)

    def join(self) -> "Streams":
        for thread in self._threads:
            thread.join(timeout=DEPLOY_TIMEOUT_S)
        return self


def test_scaling_down_and_up_breaks_no_stream(
    server: Server, client: openai.OpenAI, handle: XYServe, original: dict[str, Any]
) -> None:
    """What does not end in time on the worker that leaves goes on, equal, on the other one."""
    scaled = original["applications"][0]
    unbroken = Streams(client, "unbroken", 6, NUM_LONGEST).join()
    wait_for_calm()
    streams = Streams(client, "scaled", 6, NUM_LONGEST)
    streams.wait_until_flowing()
    busy_before = [worker.num_running for worker in handle.status().workers]

    scaled["deployments"] = [{"name": "Worker", "num_replicas": 1}]
    deploy(server, original, server.folder / "one.yaml")
    wait_until(server, "RUNNING", num_workers=1)
    late = Streams(client, "late", 2, 20)
    late.wait_until_flowing()
    streams.join()
    scaled["deployments"] = [{"name": "Worker", "num_replicas": 2}]
    deploy(server, original, server.folder / "two.yaml")
    wait_until(server, "RUNNING", num_workers=2)
    late.join()

    assert min(busy_before) > 0  # both workers had streams when one was told to go
    assert unbroken.errors + streams.errors + late.errors == []
    assert streams.tokens == unbroken.tokens
    assert [len(tokens) for tokens in late.tokens] == [20] * 2
    lost = [
        attempt.lost.partition(":")[0]
        for call_id in streams.call_ids
        for attempt in only(handle.explain(call_id)).record.attempts
        if attempt.lost
    ]
    assert set(lost) == {"WorkerDraining"}


def test_a_changed_config_is_applied_with_streams_in_flight(
    server: Server, client: openai.OpenAI, original: dict[str, Any]
) -> None:
    original["applications"][0]["args"]["ingress"]["max_n"] = 3
    unbroken = Streams(client, "unbroken", 2, NUM_LONG).join()
    streams = Streams(client, "updated", 2, NUM_LONG)
    streams.wait_until_flowing()

    deploy(server, original, server.folder / "changed.yaml")
    wait_until(server, "RUNNING", num_workers=2)
    streams.join()

    with pytest.raises(openai.BadRequestError, match=r"\b3\b"):
        client.completions.create(model=MODEL, prompt="Hello", n=4)
    assert unbroken.errors + streams.errors == []
    assert streams.tokens == unbroken.tokens


def test_a_device_that_no_node_has_is_refused_in_one_sentence(
    server: Server, client: openai.OpenAI, original: dict[str, Any]
) -> None:
    original["applications"][0]["args"]["worker"] = {"device": "npu"}
    deploy(server, original, server.folder / "npu.yaml")

    message = wait_until(server, "DEPLOY_FAILED")["message"]

    assert "worker.device is npu and needs 1 NPU on one node" in message
    assert httpx.get(f"{server.url}/health").status_code == 200  # the old app serves on


def test_a_misspelt_key_is_refused_and_named(server: Server, original: dict[str, Any]) -> None:
    original["applications"][0]["args"]["num_worker"] = 3
    deploy(server, original, server.folder / "misspelt.yaml")

    message = wait_until(server, "DEPLOY_FAILED")["message"]

    assert "num_worker: unknown key; did you mean num_workers?" in message
