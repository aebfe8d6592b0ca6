"""What a request that ends its engine costs everybody else: a program, the long form of a test.

    python -m tests.e2e.killing [fail | hang | kill]

Eight streams run on the two workers of a server of its own, and one request's step fails, or
hangs, or ends its process, each time it is tried, until it is given up. Rounds without that request
are the measure.
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
from tests.e2e.conftest import MODEL, WORKER, Server, serving, wait_for_calm, wait_for_load
from tests.plugins import faults

NUM_STREAMS = 8
MAX_TOKENS = 1500
STEP_TIMEOUT_S = 15.0
"""Time after which a step hangs, so that nobody has to wait long for it."""
QUIET_S = 4.0
"""Time of the streams before the fault."""
NUM_ROUNDS = 4
"""Rounds of eight streams; the request comes in every second one."""


@dataclass
class Stream:
    """One stream as its client sees it."""

    times: list[float] = field(default_factory=list)
    broken: str = ""

    def gap_s(self, since_s: float) -> float:
        """Mean time between its chunks from `since_s` to its end."""
        times = [time_s for time_s in self.times if time_s >= since_s]
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


async def kill(client: openai.AsyncOpenAI, number: int, fault: str) -> str:
    """The answer to the request that ends its engine; an equal one would be refused unheard."""
    try:
        await client.completions.create(
            model=MODEL, prompt=f"Hello {number}", max_tokens=4, extra_body=faults.order(fault)
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


async def play(server: Server, handle: XYServe, number: int, fault: str) -> list[float]:
    """Mean time between chunks of each stream of a round, from its quiet time's end.

    A request orders the `fault` then, if one is named.
    """
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        await asyncio.to_thread(wait_for_calm)
        streams = [Stream() for _ in range(NUM_STREAMS)]
        running = [
            asyncio.create_task(run(stream, client, number * NUM_STREAMS + index))
            for index, stream in enumerate(streams)
        ]
        await asyncio.to_thread(wait_for_load, handle, NUM_STREAMS)
        await asyncio.sleep(QUIET_S)
        clock = Clock()
        watching = [
            asyncio.create_task(watch(server, clock)),
            asyncio.create_task(watch_workers(server, clock)),
        ]
        if fault:
            killing = asyncio.create_task(kill(client, number, fault))
            killing.add_done_callback(lambda done: clock.print(f"the request got: {done.result()}"))
        await asyncio.gather(*running)
        clock.print("the streams have ended")
        if fault:
            await killing
            while len((await asyncio.to_thread(handle.status)).workers) < 2:
                await asyncio.sleep(0.2)
            clock.print("both workers answer")
        for task in watching:
            task.cancel()
    broken = [stream.broken for stream in streams if stream.broken]
    print(f"streams broken: {len(broken)} of {NUM_STREAMS} {sorted(set(broken))}")
    return [stream.gap_s(clock.began_s) for stream in streams if not stream.broken]


async def measure(server: Server, handle: XYServe, fault: str) -> None:
    gaps: dict[bool, list[float]] = {False: [], True: []}
    for number in range(NUM_ROUNDS):
        faulty = number % 2 == 1
        print(f"round {number + 1} of {NUM_ROUNDS}: " + (fault if faulty else "nothing happens"))
        gaps[faulty] += await play(server, handle, number, fault if faulty else "")
    for name, summary in (("mean", statistics.mean), ("worst", max)):
        without_s, with_s = summary(gaps[False]), summary(gaps[True])
        print(
            f"{name} time between a stream's chunks: {without_s * 1e3:.1f} ms without, "
            f"{with_s * 1e3:.1f} ms with ({with_s / without_s - 1:+.0%})"
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
