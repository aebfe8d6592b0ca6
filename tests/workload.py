"""Prompts for tests and benchmarks: the full sets where they are at hand, else small copies."""

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from scheduler.trace import read_trace

_COPY = Path(__file__).parent / "data"
_FULL = Path(os.environ.get("XYSERVE_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""A checkout of the data sets; see README, "Development"."""


def questions(count: int) -> list[str]:
    """Grade-school maths problems (GSM8K, MIT), in a fixed order."""
    full = _FULL / "prompts" / "gsm8k_test.jsonl"
    path = full if full.exists() else _COPY / "gsm8k_questions.jsonl"
    with path.open() as lines:
        found = [json.loads(line)["question"] for line in lines]
    if count > len(found):
        raise ValueError(f"{path} has {len(found)} questions, not {count}")
    return found[:count]


def instructions() -> list[str]:
    """First turns of Spec-Bench's six kinds of work, in a fixed order; `questions` without it."""
    path = _FULL / "prompts" / "spec_bench.jsonl"
    if not path.exists():
        return questions(40)
    with path.open() as lines:
        return [json.loads(line)["turns"][0] for line in lines]


def prompts_of(tokenizer: Tokenizer, lengths: Iterable[int]) -> list[list[int]]:
    """Token ids of one prompt for each length, each beginning with a text of its own."""
    texts = instructions()
    Random(0).shuffle(texts)
    endless = itertools.cycle(texts)
    prompts = []
    for length in lengths:
        prompt: list[int] = []
        while len(prompt) < length:
            prompt += tokenizer.encode(next(endless) + "\n").ids
        prompts.append(prompt[:length])
    return prompts


def conversation_lengths() -> list[tuple[int, int]]:
    """Prompt and output tokens of requests to a chat service (Azure 2023), in order of arrival.

    Without the trace, its medians stand for all of it.
    """
    return trace_lengths("azure_2023_conv") if has_traces() else [(1024, 115)]


TRACES = ("azure_2023_code", "azure_2023_conv", "mooncake_conversation", "mooncake_synthetic")


@dataclass(frozen=True, slots=True)
class Span:
    """One request's query tokens in a step: the last `num_tokens` of `seq_len`."""

    num_tokens: int
    seq_len: int


def has_traces() -> bool:
    """Tell whether the full data sets are at hand."""
    return (_FULL / "traces").is_dir()


def find_trace(trace: str) -> Path:
    """The file of a trace; without the data sets there is none."""
    [path] = (_FULL / "traces").glob(f"{trace}.*")
    return path


def trace_lengths(trace: str) -> list[tuple[int, int]]:
    """Prompt and output tokens of each request of a trace, in order of arrival."""
    arrivals = read_trace(find_trace(trace))
    return [(a.request.num_prompt_tokens, a.num_output_tokens) for a in arrivals]


def mixed_step(
    lengths: list[tuple[int, int]],
    random: Random,
    max_num_batched_tokens: int,
    max_seq_len: int,
    max_kv_tokens: int,
) -> list[Span]:
    """Draw a step: decodes and verifies at a random token of their output, then prefill chunks.

    8 to 32 requests generate, about half of them with 2 to 8 drafts, while they fill at most half
    of the KV tokens. The chunks are cut where a prefill that has the whole budget would cut them.
    """
    spans: list[Span] = []
    for _ in range(random.randint(8, 32)):
        prompt, output = random.choice(lengths)
        num_tokens = 1 + random.choice([0, random.randint(2, 8)])
        seq_len = max(num_tokens, min(prompt + random.randint(1, max(1, output)), max_seq_len))
        if seq_len + sum(span.seq_len for span in spans) > max_kv_tokens // 2:
            break
        spans.append(Span(num_tokens, seq_len))
    while left := max_num_batched_tokens - sum(span.num_tokens for span in spans):
        prompt = min(random.choice(lengths)[0], max_seq_len)
        start = random.randrange(0, prompt, max_num_batched_tokens)
        num_tokens = min(left, prompt - start)
        if start + num_tokens + sum(span.seq_len for span in spans) > max_kv_tokens:
            break
        spans.append(Span(num_tokens, start + num_tokens))
    return spans
