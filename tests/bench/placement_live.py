"""Placement by prediction against placement by outstanding tokens, live: dialogues on two workers.

    python -m tests.bench.placement_live --json placement_live.json

Two CPU workers serve the default model through the whole cluster, over HTTP. Dialogues of
MT-Bench-101 begin as a Poisson process; each turn is a chat with all turns before it, answered
with `--max-tokens` tokens, and the next one comes `--think` seconds after its answer. What the
dialogue's own bot said is its history, so that all placements see the same prompts. The
contestants, `predicted` and `least_tokens` of `placement.policy`, take turns (A B B A ...), each
with a cluster of its own whose caches are empty, and see the same dialogues at the same times.

Reuse is the share of what one ideal cache would give: endless, for all workers, with each prompt
in it from its first token on. Keys of the summary: `NAME_reuse`; `live_reuse`, that of `predicted`;
`NAME_ttft_mean_ms`, `_p50_`, `_p90_` and `_p99_`; `live_ttft_ratio`, the mean TTFT of `predicted`
over that of `least_tokens`, from all rounds; `busy_share`, the part of their time that the workers
were in steps; `ttft_predicted_ratio`, the median of measured over predicted TTFT.
"""

import argparse
import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from cluster.client import XYServe
from cluster.observe.explanation import Explanation
from tests.bench.overhead import running_app
from tests.bench.report import make_parser, publish, say
from tests.workload import dialogues

BLOCK = 32
MODEL = "smollm2-135m-instruct"
POLICIES = ("predicted", "least_tokens")
Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a dialogue, as it was answered."""

    sent_s: float
    first_token_s: float
    prompt: list[int]
    num_cached_tokens: int
    call_id: str

    @property
    def ttft_s(self) -> float:
        """Time to the first token, as the client sees it."""
        return self.first_token_s - self.sent_s


@dataclass(slots=True)
class Round:
    """One contestant's turn."""

    turns: list[Turn]
    busy_share: float
    ratios: list[float] = field(default_factory=list)
    """Measured over predicted TTFT of its requests."""

    @property
    def num_found(self) -> int:
        """Tokens that were found cached."""
        return sum(turn.num_cached_tokens for turn in self.turns)

    @property
    def num_ideal(self) -> int:
        """Tokens that an ideal cache would have had."""
        cache: set[tuple[int, ...]] = set()
        events = sorted(
            [(turn.first_token_s, 0, turn) for turn in self.turns]
            + [(turn.sent_s, 1, turn) for turn in self.turns],
            key=lambda event: event[:2],
        )
        found = 0
        for _, is_sent, turn in events:
            if not is_sent:
                ends = range(BLOCK, len(turn.prompt) + 1, BLOCK)
                cache.update(tuple(turn.prompt[:end]) for end in ends)
                continue
            for end in range(BLOCK, len(turn.prompt), BLOCK):  # the last token is always computed
                prefix = tuple(turn.prompt[:end])
                if prefix not in cache:
                    break
                found += BLOCK
        return found


async def one_turn(
    client: openai.AsyncOpenAI, chat: Any, prompt: list[int], max_tokens: int
) -> Turn:
    """Ask for an answer."""
    sent_s, first_token_s, cached, call_id = time.perf_counter(), 0.0, 0, ""
    stream: Any = await client.chat.completions.create(
        model=MODEL,
        messages=chat,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        call_id = chunk.id
        if chunk.choices and chunk.choices[0].delta.content and not first_token_s:
            first_token_s = time.perf_counter()
        if chunk.usage:
            assert chunk.usage.prompt_tokens == len(prompt)
            details = chunk.usage.prompt_tokens_details
            cached = (details and details.cached_tokens) or 0
    return Turn(sent_s, first_token_s or time.perf_counter(), prompt, cached, call_id)


async def run(
    url: str, handle: XYServe, chats: list[list[Chat]], options: argparse.Namespace
) -> Round:
    """All dialogues, one contestant."""
    draw = random.Random(options.seed)
    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):

        async def tokens_of(chat: Chat) -> list[int]:
            answer = await http.post("/tokenize", json={"model": MODEL, "messages": chat})
            return list(answer.raise_for_status().json()["tokens"])

        prompts = [[await tokens_of(chat) for chat in dialogue] for dialogue in chats]
        # Each kind of step once, with texts of nobody.
        warm: list[Chat] = [[{"role": "user", "content": f"{one} " * 60}] for one in range(8)]
        of_warm = [await tokens_of(chat) for chat in warm]
        pairs = zip(warm, of_warm, strict=True)
        await asyncio.gather(*(one_turn(client, chat, prompt, 8) for chat, prompt in pairs))

        async def one_dialogue(number: int, at_s: float) -> list[Turn]:
            await asyncio.sleep(at_s - time.perf_counter())
            turns = []
            for chat, prompt in zip(chats[number], prompts[number], strict=True):
                turns.append(await one_turn(client, chat, prompt, options.max_tokens))
                await asyncio.sleep(options.think)
            return turns

        since_s, began_s = time.time(), time.perf_counter()
        at_s = began_s
        coming = []
        for number in range(len(chats)):
            at_s += draw.expovariate(options.dialogues_per_s)
            coming.append(one_dialogue(number, at_s))
        of_dialogues = await asyncio.gather(*coming)
        took_s = time.perf_counter() - began_s
        busy_s = await asyncio.to_thread(busy_seconds, handle, since_s)
    turns = [turn for dialogue in of_dialogues for turn in dialogue]
    return Round(turns, statistics.mean(busy_s) / took_s)


def busy_seconds(handle: XYServe, since_s: float) -> list[float]:
    """Seconds that each worker has spent in steps since a wall-clock time."""
    found = handle.steps(since_s, most=20_000)
    return [sum(step.measured_s for step in one.steps) for one in found]


def ratios(handle: XYServe, turns: list[Turn]) -> list[float]:
    """Measured over predicted TTFT."""
    found = []
    for turn in turns:
        for explanation in handle.explain(turn.call_id):
            if isinstance(explanation, Explanation):
                for attempt in explanation.record.attempts:
                    if attempt.forecast and attempt.forecast.ttft_s > 0:
                        found.append(attempt.ttft_s / attempt.forecast.ttft_s)
    return found


def row_of(policy: str, rounds: list[Round]) -> dict[str, Any]:
    """Figures of one contestant, over all its rounds."""
    ttft_s = sorted(turn.ttft_s for one in rounds for turn in one.turns)
    quantiles = statistics.quantiles(ttft_s, n=100)
    return {
        "policy": policy,
        "turns": len(ttft_s),
        "reuse": sum(one.num_found for one in rounds) / sum(one.num_ideal for one in rounds),
        "ideal share": sum(one.num_ideal for one in rounds)
        / sum(len(turn.prompt) for one in rounds for turn in one.turns),
        "ttft mean ms": 1e3 * statistics.mean(ttft_s),
        "ttft p50 ms": 1e3 * quantiles[49],
        "ttft p90 ms": 1e3 * quantiles[89],
        "ttft p99 ms": 1e3 * quantiles[98],
        "busy share": statistics.mean(one.busy_share for one in rounds),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `measure`."""
    parser.add_argument("--rounds", type=int, default=2, help="pairs of turns")
    parser.add_argument("--dialogues", type=int, default=100)
    parser.add_argument("--dialogues-per-s", type=float, default=2.0)
    parser.add_argument("--think", type=float, default=1.0, help="seconds before the next turn")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8125)


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of the contestants, and the summary."""
    chats = dialogues(options.dialogues)
    seen: dict[str, list[Round]] = {policy: [] for policy in POLICIES}
    for number in range(options.rounds):
        for policy in POLICIES if number % 2 == 0 else POLICIES[::-1]:
            args = {
                "num_workers": 2,
                "placement": {"policy": policy},
                "worker": {"engine": {"block_size": BLOCK, "max_num_seqs": 32}},
            }
            with running_app(args, options.port) as handle:
                url = f"http://127.0.0.1:{options.port}"
                one = asyncio.run(run(url, handle, chats, options))
                one.ratios = ratios(handle, one.turns) if policy == "predicted" else []
            seen[policy].append(one)
            say(str(row_of(policy, [one])))
    rows = [row_of(policy, rounds) for policy, rounds in seen.items()]
    predicted, least = rows
    summary = {"live_reuse": predicted["reuse"]}
    summary["live_ttft_ratio"] = predicted["ttft mean ms"] / least["ttft mean ms"]
    of_all = [ratio for one in seen["predicted"] for ratio in one.ratios]
    summary["ttft_predicted_ratio"] = statistics.median(of_all)
    for row in rows:
        for name in ("reuse", "ttft mean ms", "ttft p50 ms", "ttft p90 ms", "ttft p99 ms"):
            summary[f"{row['policy']}_{name.replace(' ', '_')}"] = row[name]
    summary["busy_share"] = statistics.mean(row["busy share"] for row in rows)
    return rows, summary


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    add_options(parser)
    options = parser.parse_args()
    publish("Placement of dialogues on two CPU workers", *measure(options), options.json)


if __name__ == "__main__":
    main()
