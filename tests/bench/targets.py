"""Long prompts arriving into running decodes, live: our step scheduler against vLLM's.

    python -m tests.bench.targets --json targets.json

Two CPU workers serve through the whole cluster, all contestants with our kernels, so that only the
scheduler differs: `hybrid`, and `vllm`, vLLM's own with its default budget of 2048 tokens. They
take turns, each with a cluster of its own, and see the same requests at the same times.

Chats: streams that never pause, `--chats` at a time, GSM8K questions answered with 100 tokens, with
a target for the time per token, `--tpot-ms`. Documents: texts of `--document` tokens of which 16
tokens are asked for, arriving as a Poisson process, with a target of `--document-ttft-s`.

Time per token is measured at the client: gaps between the tokens of a chat (`gap`), and their mean
for each chat (`tpot`). Keys of the summary: `NAME_gap_p99_ms`, `NAME_tpot_p99_ms`,
`NAME_chat_ttft_p99_ms`, `NAME_document_ttft_p99_s`, `NAME_tokens_per_s` (output), and
`NAME_attainment`, the share of all requests that met their targets; medians over the rounds.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cluster.client import XYServe
from cluster.config import parse_args
from cluster.model import resolve_model
from tests.bench.overhead import running_app
from tests.bench.report import publish
from tests.workload import prompts_of, questions

CHAT_TOKENS, DOCUMENT_TOKENS = 100, 16
CHAT_TTFT_S = 2.0


@dataclass(slots=True)
class Answer:
    """When the tokens of one request came."""

    is_chat: bool
    sent_s: float
    token_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


async def ask(handle: XYServe, prompt: Any, answer: Answer, **params: Any) -> Answer:
    """Stream one answer, noting the time of each token."""
    stream = handle.stream_async(
        prompt, temperature=0, ignore_eos=True, return_token_ids=True, **params
    )
    async for chunk in stream:
        count = sum(len(choice.token_ids or ()) for choice in chunk.choices)
        answer.token_s += [time.perf_counter()] * count
    return answer


async def workload(
    handle: XYServe, documents: list[list[int]], options: argparse.Namespace
) -> list[Answer]:
    """Chats without pause and documents at their times, for `--seconds`; all finish."""
    draw = random.Random(options.seed)
    prompts = itertools.cycle(questions(100))
    began_s = time.perf_counter()
    ends_s = began_s + options.seconds
    answers: list[Answer] = []

    async def chat() -> None:
        while time.perf_counter() < ends_s:
            answer = Answer(True, time.perf_counter())
            answers.append(answer)
            await ask(
                handle,
                next(prompts),
                answer,
                max_tokens=CHAT_TOKENS,
                slo_ttft_ms=1000 * CHAT_TTFT_S,
                slo_tpot_ms=options.tpot_ms,
            )

    async def document(prompt: list[int], at_s: float) -> None:
        await asyncio.sleep(at_s - time.perf_counter())
        answer = Answer(False, time.perf_counter())
        answers.append(answer)
        await ask(
            handle,
            prompt,
            answer,
            max_tokens=DOCUMENT_TOKENS,
            slo_ttft_ms=1000 * options.document_ttft_s,
            slo_tpot_ms=options.tpot_ms,
        )

    work = [chat() for _ in range(options.chats)]
    at_s = began_s
    for prompt in documents:
        at_s += draw.expovariate(options.documents_per_s)
        if at_s > ends_s:
            break
        work.append(document(prompt, at_s))
    await asyncio.gather(*work)
    return answers


async def warm_up(handle: XYServe) -> None:
    """Requests that let both workers run each kind of step once."""
    answers = [Answer(True, time.perf_counter()) for _ in range(8)]
    await asyncio.gather(
        *(
            ask(handle, prompt, answer, max_tokens=8)
            for prompt, answer in zip(questions(8), answers, strict=True)
        )
    )


def figures(answers: list[Answer], options: argparse.Namespace) -> dict[str, float]:
    """What a user would have seen."""
    chats = [answer for answer in answers if answer.is_chat]
    documents = [answer for answer in answers if not answer.is_chat]
    gaps = np.concatenate([np.diff(answer.token_s) for answer in chats])
    met = [
        answer.ttft_s <= (CHAT_TTFT_S if answer.is_chat else options.document_ttft_s)
        and answer.tpot_s <= options.tpot_ms / 1000
        for answer in answers
    ]
    began_s = min(answer.sent_s for answer in answers)
    took_s = max(answer.token_s[-1] for answer in answers) - began_s
    return {
        "gap_p50_ms": 1000 * float(np.percentile(gaps, 50)),
        "gap_p99_ms": 1000 * float(np.percentile(gaps, 99)),
        "tpot_p99_ms": 1000 * float(np.percentile([a.tpot_s for a in chats], 99)),
        "chat_ttft_p99_ms": 1000 * float(np.percentile([a.ttft_s for a in chats], 99)),
        "document_ttft_p50_s": float(np.percentile([a.ttft_s for a in documents], 50)),
        "document_ttft_p99_s": float(np.percentile([a.ttft_s for a in documents], 99)),
        "tokens_per_s": sum(len(answer.token_s) for answer in answers) / took_s,
        "attainment": statistics.mean(met),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=50)
    parser.add_argument("--chats", type=int, default=6)
    parser.add_argument("--tpot-ms", type=float, default=100)
    parser.add_argument("--document", type=int, default=1500, help="tokens of a document")
    parser.add_argument("--documents-per-s", type=float, default=0.1)
    parser.add_argument("--document-ttft-s", type=float, default=20)
    parser.add_argument("--policies", nargs="+", default=["hybrid", "vllm"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8124)
    options = parser.parse_args()
    model = resolve_model(parse_args({}).model)
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    documents = prompts_of(tokenizer, [options.document] * int(options.seconds))
    seen: dict[str, list[dict[str, float]]] = {policy: [] for policy in options.policies}
    for _ in range(options.rounds):
        for policy in options.policies:
            args = {
                "num_workers": 2,
                "worker": {
                    "step_policy": {"name": policy},
                    "engine": {"dtype": "float32", "max_num_seqs": 32},
                },
            }
            with running_app(args, options.port) as handle:
                asyncio.run(warm_up(handle))
                answers = asyncio.run(workload(handle, documents, options))
            seen[policy].append(figures(answers, options))
            print(policy, {k: round(v, 2) for k, v in seen[policy][-1].items()}, flush=True)
    medians = {
        policy: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for policy, runs in seen.items()
    }
    rows = [{"policy": policy} | median for policy, median in medians.items()]
    summary = {
        f"{p}_{key}": value for p, median in medians.items() for key, value in median.items()
    }
    publish("Long prompts into running decodes, two CPU workers", rows, summary, options.json)


if __name__ == "__main__":
    main()
