"""What a request that ends its engine costs everybody else: a program, the long form of a test.

    python -m tests.e2e.killing [fail | hang]

Eight streams run on one worker of a server of its own, and one request ends the engine of the
other, until it is given up.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai

from cluster.client import XYServe
from tests.e2e.conftest import (
    MODEL,
    WORKER,
    Server,
    serving,
    wait_for_calm,
    wait_for_load,
    wait_for_placed,
)
from tests.plugins import faults

NUM_STREAMS = 8
MAX_TOKENS = 1500
STEP_TIMEOUT_S = 15.0
"""Time after which a step hangs, so that nobody has to wait long for it."""
QUIET_S = 8.0
"""Time of the streams before the fault."""


@dataclass
class Stream:
    """One stream as its client sees it."""

    times: list[float] = field(default_factory=list)
    broken: str = ""

    def gap_s(self, since: float, until: float) -> float:
        """Mean time between its chunks from `since` to `until`."""
        times = [t for t in self.times if since <= t <= until]
        return (times[-1] - times[0]) / (len(times) - 1)


async def run(stream: Stream, client: openai.AsyncOpenAI, number: int) -> None:
    try:
        async for _ in await client.completions.create(
            model=MODEL,
            prompt=f"Story {number}:",
            max_tokens=MAX_TOKENS,
            temperature=1,
            seed=number,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            stream.times.append(time.monotonic())
    except openai.OpenAIError as error:
        stream.broken = str(error)


async def kill(client: openai.AsyncOpenAI, fault: str) -> str:
    """The answer to the request that ends its engine."""
    try:
        await client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=4, extra_body=faults.order(fault)
        )
    except openai.APIStatusError as error:
        return f"{error.status_code} {error}"
    return "an answer"


class Clock:
    """Prints what happens, with the time since the fault."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()

    def print(self, text: str) -> None:
        print(f"{time.monotonic() - self.began_s:6.1f} s: {text}", flush=True)


async def watch(server: Server, clock: Clock) -> None:
    """Print each change of what `/health` says."""
    last = 0
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        while True:
            if (status := (await http.get("/health")).status_code) != last:
                clock.print(f"/health {status}")
            last = status
            await asyncio.sleep(0.2)


async def watch_workers(server: Server, clock: Clock) -> None:
    """Print each change of the workers' processes."""
    last = pids(server)
    while True:
        await asyncio.sleep(0.2)
        if (now := pids(server)) != last:
            clock.print(f"processes of workers: {sorted(now)}")
        last = now


def pids(server: Server) -> set[int]:
    return {pid for pid, name in server.replicas().items() if name == "Worker"}


async def measure(server: Server, handle: XYServe, fault: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        await asyncio.to_thread(wait_for_calm)
        # It has more outstanding than all streams together, which so go to the other worker.
        blocker = asyncio.create_task(
            client.completions.create(
                model=MODEL, prompt="Once", max_tokens=8000, extra_body={"ignore_eos": True}
            )
        )
        await asyncio.to_thread(wait_for_load, handle, 1)
        streams = [Stream() for _ in range(NUM_STREAMS)]
        running = [
            asyncio.create_task(run(stream, client, number))
            for number, stream in enumerate(streams)
        ]
        await asyncio.to_thread(wait_for_load, handle, 1 + NUM_STREAMS)
        blocker.cancel()
        await asyncio.to_thread(wait_for_placed, 0, NUM_STREAMS)
        began_s = time.monotonic()
        for worker in handle.status().workers:
            print(f"worker {worker.worker_id} runs {worker.num_running} streams")
        await asyncio.sleep(QUIET_S)
        clock = Clock()
        watching = [
            asyncio.create_task(watch(server, clock)),
            asyncio.create_task(watch_workers(server, clock)),
        ]
        killing = asyncio.create_task(kill(client, fault))
        killing.add_done_callback(lambda done: clock.print(f"the request got: {done.result()}"))
        await asyncio.gather(*running)
        clock.print("the streams have ended")
        ended_s = time.monotonic()
        await killing
        while len((await asyncio.to_thread(handle.status)).workers) < 2:
            await asyncio.sleep(0.2)
        clock.print("both workers answer")
        for task in watching:
            task.cancel()
    broken = [stream.broken for stream in streams if stream.broken]
    print(f"streams broken: {len(broken)} of {NUM_STREAMS} {sorted(set(broken))}")
    if whole := [stream for stream in streams if not stream.broken]:
        gaps = [
            (stream.gap_s(began_s, clock.began_s), stream.gap_s(clock.began_s, ended_s))
            for stream in whole
        ]
        before_s, after_s = (statistics.mean(column) for column in zip(*gaps, strict=True))
        print(
            f"time between chunks: {before_s * 1e3:.1f} ms before, {after_s * 1e3:.1f} ms after "
            f"({after_s / before_s - 1:+.0%})"
        )


def main() -> None:
    fault = sys.argv[1] if len(sys.argv) > 1 else "fail"
    worker = WORKER | {"step_timeout_s": STEP_TIMEOUT_S}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), worker=worker) as server:
        with XYServe.connect(server.ray_address) as handle:
            asyncio.run(measure(server, handle, fault))
        tracebacks = server.tracebacks()
        print(f"tracebacks in the logs: {len(tracebacks)}")
        for traceback in tracebacks:
            print(traceback[:1200])


if __name__ == "__main__":
    main()
