"""Speculation is lossless: the same token ids and the same logprobs, bit for bit, with drafts.

    python -m tests.bench.lossless --json lossless.json

First turns of Spec-Bench, HumanEval and 200 questions of GSM8K are answered greedily by a cluster
of two CPU workers with draft workers and by one without, many at once, so that the batches differ
too. The exit code is 1 if any answer differs. Keys of the summary: `num_prompts`, `num_tokens`,
`mismatches` (answers whose token ids differ), `logprob_mismatches` (answers with equal token ids
whose logprobs differ), and `acceptance`, the share of the verified drafts that were accepted.
"""

import argparse
import asyncio
import math
from dataclasses import dataclass
from typing import Any

from cluster.client import XYServe
from tests.bench.overhead import running_app
from tests.bench.report import make_parser, publish
from tests.bench.speculation import args_of, totals, warm_up
from tests.workload import functions, instructions, questions


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer's token ids, each with its logprob and the logprob of the likeliest token."""

    token_ids: list[int]
    logprobs: list[tuple[float, ...]]


def prompts_by_set() -> dict[str, list[str]]:
    """The prompts by data set; without the data sets, the repository's copy of GSM8K."""
    heads = [head for head, _ in functions()]
    if not heads:
        return {"gsm8k": questions(40)}
    return {"spec_bench": instructions(), "humaneval": heads, "gsm8k": questions(200)}


async def answer(handle: XYServe, prompts: list[str], options: argparse.Namespace) -> list[Outcome]:
    """Answers in the order of the prompts."""
    places = asyncio.Semaphore(options.concurrency)

    async def one(prompt: str) -> Outcome:
        async with places:
            completion = await handle.chat_async(
                [{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=options.max_tokens,
                logprobs=True,
                top_logprobs=1,
                return_token_ids=True,
            )
        choice: Any = completion.choices[0]
        return Outcome(
            list(choice.token_ids),
            [
                (token.logprob, *(top.logprob for top in token.top_logprobs))
                for token in choice.logprobs.content
            ],
        )

    return await asyncio.gather(*(one(prompt) for prompt in prompts))


def main() -> None:
    """Run the comparison."""
    parser = make_parser(__doc__)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompts", type=int, help="only the first N of each set")
    parser.add_argument("--drafters", nargs="+", default=["suffix"])
    parser.add_argument("--port", type=int, default=8141)
    options = parser.parse_args()
    sets = {name: prompts[: options.prompts] for name, prompts in prompts_by_set().items()}
    seen: dict[str, dict[str, list[Outcome]]] = {}
    verified = accepted = 0
    for contestant in ("none", "drafts"):
        with running_app(args_of(contestant, options.drafters), options.port) as handle:
            asyncio.run(warm_up(handle))
            verified_before, accepted_before, _ = totals(handle)
            seen[contestant] = {
                name: asyncio.run(answer(handle, prompts, options))
                for name, prompts in sets.items()
            }
            verified, accepted, _ = totals(handle)
            verified, accepted = verified - verified_before, accepted - accepted_before
    rows: list[dict[str, Any]] = []
    for name in sets:
        pairs = list(zip(seen["none"][name], seen["drafts"][name], strict=True))
        same = [(one, other) for one, other in pairs if one.token_ids == other.token_ids]
        rows.append(
            {
                "prompts": name,
                "num_prompts": len(pairs),
                "num_tokens": sum(len(one.token_ids) for one, _ in pairs),
                "mismatches": len(pairs) - len(same),
                "logprob_mismatches": sum(a.logprobs != b.logprobs for a, b in same),
            }
        )
    summary: dict[str, float] = {
        key: sum(row[key] for row in rows) for key in rows[0] if key != "prompts"
    }
    summary["acceptance"] = accepted / verified if verified else math.nan
    publish("Answers with drafts against answers without", rows, summary, options.json)
    if summary["mismatches"] or summary["logprob_mismatches"] or not verified:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
