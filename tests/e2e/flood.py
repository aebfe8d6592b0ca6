"""What a flood of one tenant costs another, on a server of its own.

    python -m tests.e2e.flood

One tenant streams short answers at a steady pace, first alone and then while another one has many
calls open all the time, each with its own prompt and a long answer. Prints the first one's time to
first token in both cases, their ratio, and what the flood was answered.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai

from tests.bench.report import say
from tests.e2e.conftest import MODEL
from tests.e2e.locked import LockedServer, serving_with_keys

EVERY_S = 1.0
"""Pace of the steady tenant."""
NUM_TOKENS = 8
NUM_FLOOD_TOKENS = 100
NUMBERS = itertools.count()


def prompt(num_words: int) -> str:
    """A prompt that no cache has."""
    return f"Story number {next(NUMBERS)}." + " Once upon a time there was a fox." * (
        num_words // 8
    )


async def times_s(
    client: openai.AsyncOpenAI, num_words: int, num_tokens: int, headers: Mapping[str, str]
) -> tuple[float, float]:
    """Times to the first token of an answer and to its end."""
    began_s, first_s = time.monotonic(), 0.0
    async for _ in await client.completions.create(
        model=MODEL,
        prompt=prompt(num_words),
        max_tokens=num_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers=headers,
    ):
        first_s = first_s or time.monotonic() - began_s
    return first_s, time.monotonic() - began_s


async def ttft_s(client: openai.AsyncOpenAI, num_words: int, num_tokens: int) -> float:
    """Time to the first token of an answer, of which all is read."""
    return (await times_s(client, num_words, num_tokens, {}))[0]


async def stream(client: openai.AsyncOpenAI, num_words: int, seconds: float) -> list[float]:
    """Times to first tokens of answers that are asked for at a steady pace."""
    began_s, asked = time.monotonic(), []
    while time.monotonic() - began_s < seconds:
        asked.append(asyncio.create_task(ttft_s(client, num_words, NUM_TOKENS)))
        await asyncio.sleep(EVERY_S)
    return await asyncio.gather(*asked)


async def flood(
    client: openai.AsyncOpenAI, num_calls: int, num_words: int, until: asyncio.Event
) -> Counter[str]:
    """What many callers get who call again at once, until an event."""
    answers: Counter[str] = Counter()

    async def call_again() -> None:
        while not until.is_set():
            try:
                await ttft_s(client, num_words, NUM_FLOOD_TOKENS)
                answers["200"] += 1
            except openai.APIStatusError as error:
                answers[str(error.status_code)] += 1
                await asyncio.sleep(1.0)
            except openai.APIError as error:  # a stream that ended by an error
                answers[str(error)[:80]] += 1
                await asyncio.sleep(1.0)

    await asyncio.gather(*(call_again() for _ in range(num_calls)))
    return answers


async def measure(locked: LockedServer, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a round."""
    flooding, steady = locked.add("private"), locked.add("acme")
    for key in (flooding, steady):
        await asyncio.to_thread(locked.wait_for_status, key, 200)
    url, words = f"{locked.server.url}/v1", options.words
    async with (
        openai.AsyncOpenAI(base_url=url, api_key=flooding, max_retries=0, timeout=600) as first,
        openai.AsyncOpenAI(base_url=url, api_key=steady, max_retries=0, timeout=600) as second,
    ):
        await stream(second, words, 5)
        say(f"{options.seconds:.0f} s with the steady tenant alone")
        quiet = await stream(second, words, options.seconds)
        say(f"{options.seconds:.0f} s beside {options.calls} calls of another")
        until = asyncio.Event()
        flooded = asyncio.create_task(flood(first, options.calls, words, until))
        await asyncio.sleep(5)
        beside = await stream(second, words, options.seconds)
        until.set()
        answers = await flooded
    quiet_s, beside_s = (statistics.quantiles(times, n=10)[8] for times in (quiet, beside))
    return {
        "p50_ttft_quiet_ms": statistics.median(quiet) * 1e3,
        "p50_ttft_flooded_ms": statistics.median(beside) * 1e3,
        "p90_ttft_quiet_ms": quiet_s * 1e3,
        "p90_ttft_flooded_ms": beside_s * 1e3,
        "p90_ttft_ratio": beside_s / quiet_s,
        "answers_of_the_flood": dict(answers),
    }


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--calls", type=int, default=30, help="open calls of the flood")
    parser.add_argument("--words", type=int, default=160, help="length of each prompt")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving_with_keys(Path(folder), num_workers=options.workers) as locked,
    ):
        figures = asyncio.run(measure(locked, options))
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
