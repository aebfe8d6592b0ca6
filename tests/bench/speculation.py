"""Drafts of draft workers, live: against no speculation, and against vLLM's own n-gram drafting.

    python -m tests.bench.speculation --json speculation.json --timeline trace.json

Contestants take turns, each with a cluster of its own, two CPU workers of one core with our
kernels: `none`; `drafts`, with draft workers on the same cores; `ngram`, vLLM's n-gram drafting in
the worker's own process, under vLLM's scheduler. All answer the same chats, of nine kinds of work,
from C clients that each send one after another. No chat is sent twice to one cluster: draft workers
remember what was written, and would know the answer. Answers are greedy and end where the model
ends them, so that they must be identical; then as many clients as the last C send chats once more
with temperature 1, where drafts hardly help, for exactly `--max-tokens` tokens.

Time per token is measured by the client, from the first to the last token of an answer. Keys of
the summary, each figure over all rounds: `speedup_c1`, `speedup_c1_repetitive`: ratio of the mean
time per token without and with drafts, geometric mean over all kinds or over those that repeat much
(summarization, rag, code_edit, agent); `speedup_cN`: ratio of output tokens/s from the first
request to the last token, N clients; `min_ratio`: the lowest such ratio at any C and with
temperature 1; `vs_ngram_c1`: as `speedup_c1`, against `ngram`; `drafting_hidden`: share of the
drafting time in which a worker computed a step; `identical`: whether all contestants produced the
same token ids.
"""

import argparse
import asyncio
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

from cluster.client import XYServe
from cluster.config.app_config import parse_args
from cluster.models.model import resolve_model
from cluster.observe.chrome_trace import chrome_trace, hidden_share, split
from tests.bench.answers import Answer, ask, makespan_s
from tests.bench.overhead import running_app
from tests.bench.report import make_parser, publish, say
from tests.workload import chats
from workers.timeline import Span

REPETITIVE = {"summarization", "rag", "code_edit", "agent"}
CONTESTANTS = ("none", "drafts", "ngram")
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
READY_TIMEOUT_S = 60.0
"""Time for the workers to be assigned their draft workers."""
Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Cell:
    """Chats that `concurrency` clients send, each with its kind of work."""

    concurrency: int
    is_sampled: bool
    chats: tuple[tuple[str, Chat], ...]


@dataclass(slots=True)
class Seen:
    """A contestant's answers in a cell and their cost, over the rounds."""

    answers: list[tuple[str, Answer]] = field(default_factory=list)
    makespan_s: float = 0.0
    num_verified: int = 0
    num_accepted: int = 0
    draft_cpu_s: float = 0.0

    def tokens_per_s(self) -> float:
        """Output tokens/s from the first request to the last token."""
        return sum(len(answer.token_ids) for _, answer in self.answers) / self.makespan_s

    def time_per_token_s(self, kind: str | None = None) -> float:
        """Mean over all tokens after an answer's first chunk; NaN if there are none."""
        answers = [a for k, a in self.answers if kind in (None, k) and a.token_s]
        num_tokens = sum(sum(at_s > a.token_s[0] for at_s in a.token_s) for a in answers)
        decoding_s = sum(a.token_s[-1] - a.token_s[0] for a in answers)
        return decoding_s / num_tokens if num_tokens else math.nan

    def token_ids(self) -> list[list[int]]:
        """Token ids of each answer, in order."""
        return [answer.token_ids for _, answer in self.answers]


def args_of(contestant: str, drafters: list[str]) -> dict[str, Any]:
    """The app of a contestant."""
    engine: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 32}
    args: dict[str, Any] = {"num_workers": 2, "worker": {"cpus": 1, "engine": engine}}
    if contestant == "drafts":
        args["draft"] = {"drafters": drafters}
    elif contestant == "ngram":
        engine["extra_args"] = {"speculative_config": NGRAM}
        args["worker"]["step_policy"] = {"name": "vllm"}
    return args


def cells_of(options: argparse.Namespace, tokenizer: Tokenizer) -> list[Cell]:
    """The cells, each with chats of its own, their kinds in turn."""
    loads = [(c, False) for c in options.concurrency] + [(options.concurrency[-1], True)]
    of_kinds = chats(tokenizer, options.max_context)
    cells = []
    for index, (concurrency, is_sampled) in enumerate(loads):
        begin, end = index * options.prompts, (index + 1) * options.prompts
        for kind, own in of_kinds.items():
            if end > len(own):
                raise SystemExit(
                    f"--prompts ({options.prompts}): {kind} has {len(own)} chats for {len(loads)} "
                    f"cells, so at most {len(own) // len(loads)}"
                )
        mixed = [(kind, own[i]) for i in range(begin, end) for kind, own in of_kinds.items()]
        cells.append(Cell(concurrency, is_sampled, tuple(mixed)))
    return cells


async def warm_up(handle: XYServe) -> None:
    """Wait until both workers have run each kind of step and have a draft worker."""
    prompts = (f"Tell me of the number {number}." for number in range(8))
    await asyncio.gather(*(ask(handle, prompt, 16) for prompt in prompts))
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while any(w.drafts and w.drafts.draft_worker is None for w in handle.status().workers):
        if time.monotonic() > deadline_s:
            raise SystemExit("a worker has no draft worker")
        await asyncio.sleep(0.2)


async def ask_all(handle: XYServe, cell: Cell, max_tokens: int) -> list[tuple[str, Answer]]:
    """The answers to a cell's chats, in their order."""
    answers: list[tuple[str, Answer]] = [("", Answer())] * len(cell.chats)
    work = iter(enumerate(cell.chats))

    async def client() -> None:
        for index, (kind, chat) in work:
            params = {"temperature": float(cell.is_sampled), "ignore_eos": cell.is_sampled}
            answers[index] = kind, await ask(handle, chat, max_tokens, **params)

    await asyncio.gather(*(client() for _ in range(cell.concurrency)))
    return answers


def totals(handle: XYServe) -> tuple[int, int, float]:
    """Drafts verified and accepted so far, and CPU seconds of the draft workers."""
    state = handle.status()
    counts = [worker.drafts.counts for worker in state.workers if worker.drafts]
    times = [psutil.Process(worker.pid).cpu_times() for worker in state.draft_workers]
    return (
        sum(count.verified for count in counts),
        sum(count.accepted for count in counts),
        sum(cpu.user + cpu.system for cpu in times),
    )


def run(handle: XYServe, cell: Cell, seen: Seen, max_tokens: int) -> dict[str, list[Span]]:
    """Send a cell's chats and add the figures to `seen`; returns the timelines of all processes."""
    verified, accepted, cpu_s = totals(handle)
    began_s = time.time()
    answers = asyncio.run(ask_all(handle, cell, max_tokens))
    timelines = handle.spans(began_s)
    verified_now, accepted_now, cpu_now_s = totals(handle)
    seen.answers += answers
    seen.makespan_s += makespan_s([answer for _, answer in answers])
    seen.num_verified += verified_now - verified
    seen.num_accepted += accepted_now - accepted
    seen.draft_cpu_s += cpu_now_s - cpu_s
    return timelines


def speedup(base: Seen, other: Seen, kinds: Iterable[str]) -> float:
    """How many times faster tokens are, geometric mean over kinds of work; NaN if unknown."""
    ratios = [base.time_per_token_s(kind) / other.time_per_token_s(kind) for kind in kinds]
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return statistics.geometric_mean(known) if known else math.nan


def rows_of(cell: Cell, seen: dict[str, Seen]) -> list[dict[str, Any]]:
    """A cell's rows: one for each kind of work, and one for all together.

    Under a contestant's name are the tokens/s of one answer after its first; `accepted` is the
    share of the verified drafts, `CPU s` the time of the draft workers' processes.
    """
    clients = f"{cell.concurrency}{' T=1' if cell.is_sampled else ''}"
    rows: list[dict[str, Any]] = []
    for kind in [*dict.fromkeys(kind for kind, _ in cell.chats), None]:
        per_s = {c: 1 / own.time_per_token_s(kind) for c, own in seen.items()}
        whole = seen if kind is None else {}
        rows.append(
            {"clients": clients, "work": kind or "all"}
            | per_s
            | {f"{c} / none": value / per_s.get("none", math.nan) for c, value in per_s.items()}
            | {f"{c} tok/s": whole[c].tokens_per_s() if c in whole else "" for c in seen}
        )
    for row in rows:
        row.pop("none / none", None)
        drafts = seen.get("drafts", Seen()) if row["work"] == "all" else Seen()
        row["accepted"] = drafts.num_accepted / drafts.num_verified if drafts.num_verified else ""
        row["CPU s"] = drafts.draft_cpu_s or ""
    return rows


def summarize(
    cells: list[Cell], seen: dict[str, list[Seen]], hidden: float | None
) -> dict[str, float | bool]:
    """The summary, without the figures of contestants that did not run."""
    summary: dict[str, float | bool] = {}
    kinds = list(dict.fromkeys(kind for kind, _ in cells[0].chats))
    alone = next((i for i, c in enumerate(cells) if c.concurrency == 1 and not c.is_sampled), None)
    if {"none", "drafts"} <= set(seen):
        ratios = []
        for cell, none, drafts in zip(cells, seen["none"], seen["drafts"], strict=True):
            ratios.append(drafts.tokens_per_s() / none.tokens_per_s())
            if cell.concurrency > 1 and not cell.is_sampled:
                summary[f"speedup_c{cell.concurrency}"] = ratios[-1]
        if alone is not None:
            pair = seen["none"][alone], seen["drafts"][alone]
            summary["speedup_c1"] = speedup(*pair, kinds)
            summary["speedup_c1_repetitive"] = speedup(*pair, REPETITIVE.intersection(kinds))
        summary["min_ratio"] = min(ratios)
    if {"ngram", "drafts"} <= set(seen) and alone is not None:
        summary["vs_ngram_c1"] = speedup(seen["ngram"][alone], seen["drafts"][alone], kinds)
    if hidden is not None:
        summary["drafting_hidden"] = hidden
    summary["identical"] = all(
        len({str(own[i].token_ids()) for own in seen.values()}) == 1
        for i, cell in enumerate(cells)
        if not cell.is_sampled
    )
    return summary


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--timeline", type=Path, help="write the drafts' last greedy cell here")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=6, help="of each kind of work, in each cell")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--max-context", type=int, default=1500, help="tokens, of agents' chats")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--drafters", nargs="+", default=["suffix"])
    parser.add_argument("--port", type=int, default=8140)
    options = parser.parse_args()
    model = resolve_model(parse_args({}).model)
    cells = cells_of(options, Tokenizer.from_file(str(Path(model) / "tokenizer.json")))
    seen = {c: [Seen() for _ in cells] for c in options.contestants}
    steps: list[Span] = []
    draftings: list[Span] = []
    for index in range(options.rounds):
        first = index % len(options.contestants)
        for contestant in [*options.contestants[first:], *options.contestants[:first]]:
            with running_app(args_of(contestant, options.drafters), options.port) as handle:
                asyncio.run(warm_up(handle))
                for cell, own in zip(cells, seen[contestant], strict=True):
                    timelines = run(handle, cell, own, options.max_tokens)
                    say(f"{contestant} {cell.concurrency} {own.tokens_per_s():.1f} tok/s")
                    if contestant != "drafts":
                        continue
                    of_workers, of_draft_workers = split(timelines)
                    steps += of_workers
                    draftings += of_draft_workers
                    if options.timeline and not cell.is_sampled:
                        options.timeline.write_text(chrome_trace(timelines))
    rows = [
        row
        for i, cell in enumerate(cells)
        for row in rows_of(cell, {c: own[i] for c, own in seen.items()})
    ]
    hidden = hidden_share(draftings, steps) if "drafts" in seen else None
    title = f"Speculation, drafters {' and '.join(options.drafters)}, two CPU workers"
    publish(title, rows, summarize(cells, seen, hidden), options.json)


if __name__ == "__main__":
    main()
