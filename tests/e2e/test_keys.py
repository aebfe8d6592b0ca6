"""An app with keys and tenants behind two ingresses: who gets in, how much, and what leaks."""

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.locked import PER_MINUTE, LockedServer, serving_with_keys
from tests.fuzz.strangers import faults_of


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LockedServer]:
    with serving_with_keys(tmp_path_factory.mktemp("locked")) as locked:
        yield locked


def test_up_shows_an_answer_without_a_key(locked: LockedServer) -> None:
    log = locked.server.config.with_name("up.log").read_text()

    assert "What is the capital of France?" in log
    assert "Paris" in log
    assert "may call it" not in log


def test_only_a_key_opens_the_doors(locked: LockedServer) -> None:
    key = locked.add("acme")
    locked.wait_for_status(key, 200)

    for path in ("/v1/models", "/metrics", "/docs", "/nope", "/version"):
        assert (locked.status("", path), locked.status("none", path)) == (401, 401)
    assert (locked.status("", "/health"), locked.status("", "/-/healthz")) == (200, 200)
    assert locked.status(key, "/metrics") == 403
    reader = locked.add("acme", "--right", "metrics")
    locked.wait_for_status(reader, 403)
    assert locked.status(reader, "/metrics") == 200
    with pytest.raises(openai.AuthenticationError, match="this is no API key of this app"):
        locked.client("sk-none").models.list()


def test_whatever_strangers_send_they_are_refused(locked: LockedServer) -> None:
    key = locked.add("acme")
    locked.wait_for_status(key, 200)

    assert [*faults_of(locked.server.url, key, 300, seed=0)] == []


def test_keys_change_under_load_and_no_call_fails(locked: LockedServer) -> None:
    old = locked.add("acme")
    locked.wait_for_status(old, 200)
    faults: list[str] = []
    current = [old]
    stop = threading.Event()
    num_calls = Counter[str]()

    def call() -> None:
        while not stop.is_set():
            key = current[0]
            try:
                locked.client(key).completions.create(
                    model=MODEL, prompt="Once upon", max_tokens=4, temperature=0
                )
                num_calls[key] += 1
            except openai.OpenAIError as error:
                faults.append(repr(error))

    stream = locked.client(old).completions.create(
        model=MODEL, prompt="Story:", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    new = locked.add("acme", "--expires", "1h")
    locked.wait_for_status(new, 200)
    current[0] = new
    while not num_calls[new]:
        time.sleep(0.1)
    time.sleep(2)  # calls with the old one are over
    locked.keys("revoke", re.split("-", old)[1])
    locked.wait_for_status(old, 401)
    num_left = sum(1 for chunk in stream if chunk.choices)
    stop.set()
    for thread in threads:
        thread.join()

    assert faults == []
    assert num_left >= 300  # the stream of the revoked key went on to its end
    assert min(num_calls[old], num_calls[new]) > 0
    assert "never" in locked.keys("list")


def test_requests_of_another_tenant_pass_those_of_a_flood(locked: LockedServer) -> None:
    flooding, other = locked.add("private"), locked.add("acme")
    for key in (flooding, other):
        locked.wait_for_status(key, 200)
    flood = asyncio.run(pass_flood(locked, flooding, other))

    assert flood.num_failed == 0
    for num_begun in flood.num_begun:  # when each of the others had its first token
        assert num_begun <= NUM_FLOOD - 10
    explained = subprocess.run(
        [*EXPLAIN, flood.last_id, "--address", locked.server.ray_address],
        capture_output=True,
        text=True,
    )
    assert "for its turn: the workers were busy" in explained.stdout, explained


def test_a_tenant_at_ten_times_its_rate_gets_its_quota_while_the_scheduler_dies(
    locked: LockedServer,
) -> None:
    """Calls of the tokeniser, so that a minute's quota is not the workers' to keep."""
    key = locked.add("bounded")
    other = locked.add("acme")
    locked.wait_for_status(other, 200)
    seconds = 20.0
    counts = asyncio.run(flood(locked, key, other, seconds, kill_after_s=seconds / 2))

    burst = 3 * PER_MINUTE / 60
    assert counts["other failed"] == 0
    assert counts[200] + counts[429] == counts["sent"]
    assert 0.85 * seconds * PER_MINUTE / 60 <= counts[200] <= seconds * PER_MINUTE / 60 + 2 * burst
    assert counts["without retry-after"] == 0


async def flood(
    locked: LockedServer, key: str, other: str, seconds: float, kill_after_s: float
) -> Counter[str | int]:
    """Answers to calls at ten times the rate; the GlobalScheduler is killed on the way."""
    counts: Counter[str | int] = Counter()
    began_s = time.monotonic()

    async def call(http: httpx.AsyncClient, key: str) -> httpx.Response:
        return await http.post(
            "/tokenize",
            headers={"authorization": f"Bearer {key}"},
            json={"model": MODEL, "prompt": "Hello"},
        )

    async def of_the_tenant(http: httpx.AsyncClient) -> None:
        answer = await call(http, key)
        counts["sent"] += 1
        counts[answer.status_code] += 1
        if answer.status_code == 429:
            counts["without retry-after"] += int(answer.headers.get("retry-after", 0)) < 1

    async def of_the_other(http: httpx.AsyncClient) -> None:
        counts["other failed"] += (await call(http, other)).status_code != 200

    async with httpx.AsyncClient(base_url=locked.server.url, timeout=60) as http:
        calls, killed = [], False
        while (now := time.monotonic() - began_s) < seconds:
            calls.append(asyncio.create_task(of_the_tenant(http)))
            if len(calls) % 10 == 0:
                calls.append(asyncio.create_task(of_the_other(http)))
            if now > kill_after_s and not killed:
                killed = True
                [pid] = (
                    pid
                    for pid, name in locked.server.replicas().items()
                    if name == "GlobalScheduler"
                )
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(60 / PER_MINUTE / 10)
        await asyncio.gather(*calls)
    return counts


def test_one_call_at_a_time_is_one_over_all_ingresses(locked: LockedServer) -> None:
    key = locked.add("single")
    locked.wait_for_status(key, 200)
    client = locked.client(key)

    for _ in range(4):  # one after another they are all let in
        client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    stream = client.completions.create(
        model=MODEL, prompt="b", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    for _ in range(4):
        with pytest.raises(openai.RateLimitError, match=r"tenants\.single.max_concurrency is 1"):
            client.completions.create(model=MODEL, prompt="c", max_tokens=1)
    stream.close()
    give_up_s = time.monotonic() + 30
    while True:  # the place is free soon
        try:
            client.completions.create(model=MODEL, prompt="d", max_tokens=1)
            break
        except openai.RateLimitError:
            assert time.monotonic() < give_up_s
            time.sleep(0.1)


def test_a_private_cache_is_shared_with_no_other_tenant(locked: LockedServer) -> None:
    shared, private = locked.add("acme"), locked.add("private")
    locked.wait_for_status(private, 200)

    def num_cached(key: str, **salt: str) -> int:
        usage = locked.client(key).completions.create(
            model=MODEL, prompt="a secret plan " * 150, max_tokens=1, extra_body=salt
        ).usage  # fmt: skip
        assert usage is not None
        details = usage.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0

    assert num_cached(shared) == 0
    assert num_cached(shared) > 0
    assert num_cached(private) == 0
    assert num_cached(private) > 0
    assert num_cached(shared, cache_salt="private ") == 0  # nor with the salt of the other


OF_A_HANDLE = """
import sys
from cluster.client import XYServe
from cluster.errors import RequestFailed
with XYServe.connect(sys.argv[1]) as handle:
    answer = handle.generate("a", max_tokens=1, tenant="acme")
    print(handle.explain(answer.id)[0].record.request.tenant)
    try:
        handle.generate("a", max_tokens=1, tenant="nobody")
    except RequestFailed as failure:
        print(failure.status, failure)
"""


def test_a_handle_names_a_tenant(locked: LockedServer) -> None:
    """In a process of its own: this one may be connected to another Ray."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", OF_A_HANDLE, locked.server.ray_address],
        capture_output=True,
        text=True,
    )

    assert done.stdout.splitlines() == [
        "acme",
        "400 tenant: 'nobody' is no tenant; known are acme, bounded, default, private, single",
    ], done.stderr


def test_no_key_is_in_what_the_app_says_or_leaves_behind(locked: LockedServer) -> None:
    """The last of this file: it looks for all keys of the others, and for one in odd places."""
    planted = f"xy-{secrets.token_hex(5)}-{secrets.token_urlsafe(32)}"
    texts = [*locked.texts, planted, secret := f"planted-{secrets.token_hex(16)}"]
    said = []
    with httpx.Client(base_url=locked.server.url) as http:
        for shown in (planted, locked.texts[0], secret, f"{secret}\xe9", f"{secret} {secret}"):
            for name in ("authorization", "x-api-key", "api-key", "cookie"):
                header = {name.encode(): f"Bearer {shown}".encode("latin-1")}
                for method, path in (
                    ("POST", "/v1/completions"),
                    ("POST", "/v1/messages"),
                    ("GET", "/metrics"),
                    ("DELETE", "/v1/models"),
                ):
                    answer = http.request(method, path, headers=header, content=b"{")
                    said.append(answer.text + str(answer.headers))
    said.append(locked.keys("list"))
    for command in (["config"], ["status"]):
        done = subprocess.run(
            [Path(sys.executable).parent / "serve", *command, "--address", locked.server.dashboard],
            capture_output=True,
            text=True,
            env=os.environ | {"RAY_AUTH_MODE": "token"},
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    parts = [text[-32:].encode() for text in texts]
    left = [path for root in (locked.server.ray_folder, locked.server.folder)
            for path in root.rglob("*") if path.is_file() and not path.is_symlink()]  # fmt: skip

    text = "".join(said)
    assert "bounded" in text  # serve config shows the tenants
    assert [part for part in parts if part.decode() in text] == []
    assert [path for path in left if any(part in path.read_bytes() for part in parts)] == []


NUM_FLOOD = 45
"""Calls of a flood, on a worker with 16 seats."""
EXPLAIN = (sys.executable, "-P", "-m", "cluster.cli.main", "explain")


@dataclass
class Flood:
    """What came of a flood and of another tenant's calls beside it."""

    num_failed: int = 0
    num_begun: list[int] = field(default_factory=list)
    """Calls of the flood that had their first token when one of the others got its own."""
    last_id: str = ""
    """Id of the call of the flood that began last."""


async def pass_flood(locked: LockedServer, flooding: str, other: str) -> Flood:
    """A flood of one tenant; while most of it waits, another calls."""
    flood, num_begun = Flood(), 0
    is_full = asyncio.Event()

    async def call(key: str, max_tokens: int) -> str:
        """Wait for the first token, then for the rest; returns the answer's id."""
        nonlocal num_begun
        chunks = await clients[key].completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=max_tokens,
            stream=True,
            extra_headers={"x-slo-class": "batch"},
            extra_body={"ignore_eos": True},
        )
        is_first, answer_id = True, ""
        async for chunk in chunks:
            answer_id = chunk.id
            if is_first and key == flooding:
                num_begun += 1
                flood.last_id = chunk.id
                if num_begun == 8:
                    is_full.set()
            elif is_first:
                flood.num_begun.append(num_begun)
            is_first = False
        return answer_id

    url = f"{locked.server.url}/v1"
    async with (
        openai.AsyncOpenAI(base_url=url, api_key=flooding, max_retries=0, timeout=300) as first,
        openai.AsyncOpenAI(base_url=url, api_key=other, max_retries=0, timeout=300) as second,
    ):
        clients = {flooding: first, other: second}
        calls = [asyncio.create_task(call(flooding, 60)) for _ in range(NUM_FLOOD)]
        await is_full.wait()
        calls += [asyncio.create_task(call(other, 4)) for _ in range(3)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    flood.num_failed = sum(isinstance(answer, BaseException) for answer in answers)
    return flood
