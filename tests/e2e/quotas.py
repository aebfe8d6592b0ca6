"""What a tenant's quota is worth: the long form of a test, against a server of its own.

    python -m tests.e2e.quotas

One tenant calls ten times as often as it may, over two ingresses, for a minute in which the
GlobalScheduler is killed; another streams short answers all the time, and before alone for a
minute. Prints how much of its quota the first one got, and the other's time to first token.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai

from tests.bench.report import say
from tests.e2e.conftest import MODEL
from tests.e2e.locked import LockedServer, serving_with_keys

PER_MINUTE = 60
OVER = 10
"""How many times its quota the first tenant asks for."""
OTHER_EVERY_S = 0.5
NUM_TOKENS = 8


async def ttft_s(client: openai.AsyncOpenAI) -> float:
    """Time to the first token of a short answer."""
    began_s = time.monotonic()
    first_s = 0.0
    async for _ in await client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=NUM_TOKENS, stream=True
    ):
        first_s = first_s or time.monotonic() - began_s
    return first_s


async def stream(client: openai.AsyncOpenAI, seconds: float) -> list[float]:
    """Times to first tokens of answers that are asked for at a steady pace."""
    began_s, asked = time.monotonic(), []
    while time.monotonic() - began_s < seconds:
        asked.append(asyncio.create_task(ttft_s(client)))
        await asyncio.sleep(OTHER_EVERY_S)
    return await asyncio.gather(*asked)


async def flood(client: openai.AsyncOpenAI, seconds: float) -> Counter[int]:
    """Statuses of the answers to a flood."""
    statuses: Counter[int] = Counter()

    async def call() -> None:
        try:
            await client.completions.create(model=MODEL, prompt="Hello", max_tokens=1)
            statuses[200] += 1
        except openai.APIStatusError as error:
            statuses[error.status_code] += 1

    began_s, calls = time.monotonic(), []
    while time.monotonic() - began_s < seconds:
        calls.append(asyncio.create_task(call()))
        await asyncio.sleep(60 / PER_MINUTE / OVER)
    await asyncio.gather(*calls)
    return statuses


def kill_scheduler(locked: LockedServer) -> None:
    """Kill the process of the GlobalScheduler."""
    replicas = locked.server.replicas().items()
    [pid] = (pid for pid, name in replicas if name == "GlobalScheduler")
    os.kill(pid, signal.SIGKILL)


async def measure(locked: LockedServer, seconds: float) -> dict[str, Any]:
    """The figures of a round."""
    bounded, other = locked.add("bounded"), locked.add("acme")
    for key in (bounded, other):
        await asyncio.to_thread(locked.wait_for_status, key, 200)
    url = f"{locked.server.url}/v1"
    async with (
        openai.AsyncOpenAI(base_url=url, api_key=bounded, max_retries=0) as first,
        openai.AsyncOpenAI(base_url=url, api_key=other, max_retries=0) as second,
    ):
        await stream(second, 5)
        say(f"{seconds:.0f} s with the other tenant alone")
        quiet = await stream(second, seconds)
        say(f"{seconds:.0f} s with the flood; the GlobalScheduler is killed after half of it")
        loop = asyncio.get_running_loop()
        loop.call_later(seconds / 2, kill_scheduler, locked)
        statuses, busy = await asyncio.gather(flood(first, seconds), stream(second, seconds))
    quiet_s, busy_s = (statistics.quantiles(times, n=10)[8] for times in (quiet, busy))
    return {
        "share_of_quota": statuses[200] / (PER_MINUTE * seconds / 60),
        "statuses": dict(statuses),
        "p90_ttft_quiet_ms": quiet_s * 1e3,
        "p90_ttft_flooded_ms": busy_s * 1e3,
        "p90_ttft_ratio": busy_s / quiet_s,
    }


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving_with_keys(Path(folder), num_workers=2) as locked,
    ):
        figures = asyncio.run(measure(locked, options.seconds))
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
