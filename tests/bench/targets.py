"""Long prompts arriving into running decodes, live: our step scheduler against vLLM's.

    python -m tests.bench.targets --json targets.json

Two CPU workers serve through the whole cluster, all contestants with our kernels, so that only the
scheduler differs: `hybrid`, and `vllm`, vLLM's own with its default budget of 2048 tokens. They
take turns, each with a cluster of its own, and see the same requests at the same times.

Chats: `--chats` streams without pause, GSM8K questions answered with 100 tokens each, with a target
for the time per token, `--tpot-ms`. Documents: texts of `--document` tokens, answered with 16
tokens each, arriving as a Poisson process, with a target of `--document-ttft-s`.

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
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cluster.client import XYServe
from cluster.config.app_config import parse_args
from cluster.models.model import resolve_model
from tests.bench.answers import Answer, ask, makespan_s
from tests.bench.overhead import running_app
from tests.bench.report import make_parser, publish, say
from tests.workload import prompts_of, questions

CHAT_TOKENS, DOCUMENT_TOKENS = 100, 16
CHAT_TTFT_S = 2.0


async def workload(
    handle: XYServe, documents: list[list[int]], options: argparse.Namespace
) -> tuple[list[Answer], list[Answer]]:
    """Answers to chats without pause and to documents at their times, for `--seconds`."""
    draw = random.Random(options.seed)
    prompts = itertools.cycle(questions(100))
    ends_s = time.perf_counter() + options.seconds

    async def chats() -> list[Answer]:
        answers = []
        while time.perf_counter() < ends_s:
            targets = {"slo_ttft_ms": 1000 * CHAT_TTFT_S, "slo_tpot_ms": options.tpot_ms}
            answers.append(await ask(handle, next(prompts), CHAT_TOKENS, **targets))
        return answers

    async def document(prompt: list[int], at_s: float) -> Answer:
        await asyncio.sleep(at_s - time.perf_counter())
        ttft_ms = 1000 * options.document_ttft_s
        targets = {"slo_ttft_ms": ttft_ms, "slo_tpot_ms": options.tpot_ms}
        return await ask(handle, prompt, DOCUMENT_TOKENS, **targets)

    coming = []
    at_s = time.perf_counter()
    for prompt in documents:
        at_s += draw.expovariate(options.documents_per_s)
        if at_s > ends_s:
            break
        coming.append(document(prompt, at_s))
    chatting = asyncio.gather(*(chats() for _ in range(options.chats)))
    of_documents = await asyncio.gather(*coming)
    return list(itertools.chain.from_iterable(await chatting)), of_documents


async def warm_up(handle: XYServe) -> None:
    """Let both workers run each kind of step once."""
    await asyncio.gather(*(ask(handle, prompt, 8) for prompt in questions(8)))


def figures(
    chats: list[Answer], documents: list[Answer], options: argparse.Namespace
) -> dict[str, float]:
    """What a user would have seen."""
    gaps = np.concatenate([np.diff(answer.token_s) for answer in chats])
    answers = [*chats, *documents]
    ttft_s = [CHAT_TTFT_S] * len(chats) + [options.document_ttft_s] * len(documents)
    met = [
        answer.ttft_s <= limit_s and answer.tpot_s <= options.tpot_ms / 1000
        for answer, limit_s in zip(answers, ttft_s, strict=True)
    ]
    return {
        "gap_p50_ms": 1000 * float(np.percentile(gaps, 50)),
        "gap_p99_ms": 1000 * float(np.percentile(gaps, 99)),
        "tpot_p99_ms": 1000 * float(np.percentile([a.tpot_s for a in chats], 99)),
        "chat_ttft_p99_ms": 1000 * float(np.percentile([a.ttft_s for a in chats], 99)),
        "document_ttft_p50_s": float(np.percentile([a.ttft_s for a in documents], 50)),
        "document_ttft_p99_s": float(np.percentile([a.ttft_s for a in documents], 99)),
        "tokens_per_s": sum(len(answer.token_s) for answer in answers) / makespan_s(answers),
        "attainment": statistics.mean(met),
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
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
            seen[policy].append(figures(*answers, options))
            say(f"{policy} { ({k: round(v, 2) for k, v in seen[policy][-1].items()}) }")
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
