"""What becomes of calls with targets when there are too many, on a server of its own.

    python -m tests.e2e.overload

First calls one after the other, then as many as the workers take, which is their capacity; then
calls at a multiple of that pace, each with a target that it names; and again one after the other.
Prints which part of the admitted calls met both targets, how soon the refused ones were answered,
and the time to first token before and after.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import Any

import openai

from tests.bench.report import say
from tests.e2e.conftest import serving
from tests.e2e.flood import times_s

NUM_TOKENS = 16
NUM_ALONE = 10
NUM_BUSY = 16
"""Open calls that keep two workers busy."""
NO_TARGETS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Outcome:
    """One call, as its client saw it."""

    status: int
    first_s: float
    """Time to the first token, or to the refusal."""
    tpot_s: float = 0.0


async def call(
    client: openai.AsyncOpenAI, num_words: int, targets: Mapping[str, str] = NO_TARGETS
) -> Outcome:
    """Stream one answer."""
    began_s = time.monotonic()
    try:
        first_s, end_s = await times_s(client, num_words, NUM_TOKENS, targets)
    except openai.APIStatusError as error:
        return Outcome(error.status_code, time.monotonic() - began_s)
    return Outcome(HTTPStatus.OK, first_s, (end_s - first_s) / (NUM_TOKENS - 1))


async def alone(client: openai.AsyncOpenAI, num_words: int) -> list[Outcome]:
    """Calls one after the other."""
    return [await call(client, num_words) for _ in range(NUM_ALONE)]


async def capacity(client: openai.AsyncOpenAI, num_words: int, seconds: float) -> float:
    """Calls per second that the workers answer when there are always some waiting."""
    until_s, num_done = time.monotonic() + seconds, 0

    async def call_again() -> None:
        nonlocal num_done
        while time.monotonic() < until_s:
            await call(client, num_words)
            num_done += 1

    began_s = time.monotonic()
    await asyncio.gather(*(call_again() for _ in range(NUM_BUSY)))
    return num_done / (time.monotonic() - began_s)


async def offer(
    client: openai.AsyncOpenAI,
    num_words: int,
    per_s: float,
    seconds: float,
    targets: Mapping[str, str],
) -> list[Outcome]:
    """Calls at a steady pace, whatever becomes of them."""
    began_s, calls = time.monotonic(), []
    for number in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, began_s + number / per_s - time.monotonic()))
        calls.append(asyncio.create_task(call(client, num_words, targets)))
    return await asyncio.gather(*calls)


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    words = options.words
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        await alone(client, words)
        before = await alone(client, words)
        per_s = await capacity(client, words, options.seconds)
        say(
            f"capacity {per_s:.1f} calls/s; {options.seconds:.0f} s at {options.times:.1f} times it"
        )
        targets = {"x-slo-ttft-ms": f"{options.ttft_ms}", "x-slo-tpot-ms": f"{options.tpot_ms}"}
        outcomes = await offer(client, words, options.times * per_s, options.seconds, targets)
        after = await alone(client, words)
    admitted = [one for one in outcomes if one.status == HTTPStatus.OK]
    refused = [one.first_s * 1e3 for one in outcomes if one.status != HTTPStatus.OK]
    met = [
        one.first_s * 1e3 <= options.ttft_ms and one.tpot_s * 1e3 <= options.tpot_ms
        for one in admitted
    ]
    deciles = statistics.quantiles(refused, n=10) if len(refused) > 1 else [0.0] * 9
    return {
        "capacity_per_s": per_s,
        "offered_per_s": options.times * per_s,
        "admitted_per_s": len(admitted) / options.seconds,
        "admitted_met": statistics.mean(met),
        "longest_ttft_ms": max(one.first_s for one in admitted) * 1e3,
        "refusals": len(refused),
        "statuses": sorted({one.status for one in outcomes}),
        "p50_refusal_ms": deciles[4],
        "p90_refusal_ms": deciles[8],
        "p50_ttft_before_ms": statistics.median(one.first_s for one in before) * 1e3,
        "p50_ttft_after_ms": statistics.median(one.first_s for one in after) * 1e3,
    }


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each phase")
    parser.add_argument("--times", type=float, default=3.0, help="the pace, in capacities")
    parser.add_argument("--words", type=int, default=160, help="length of each prompt")
    parser.add_argument("--ttft-ms", type=float, default=2000.0)
    parser.add_argument("--tpot-ms", type=float, default=500.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), num_workers=options.workers, draft=None) as server,
    ):
        figures = asyncio.run(measure(server.url, options))
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
