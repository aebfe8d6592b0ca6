"""Prompts for tests and benchmarks, from the full data sets where they exist, or small copies."""

import gzip
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer

from scheduler.simulation.traces import read_trace

DATA = Path(os.environ.get("XYSERVE_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Folder of the full data sets; see tests/README.md, "Data"."""
_COPY = Path(__file__).parent / "data"


def questions(count: int) -> list[str]:
    """Grade-school maths problems (GSM8K, MIT), in a fixed order."""
    full = DATA / "prompts" / "gsm8k_test.jsonl"
    path = full if full.exists() else _COPY / "gsm8k_questions.jsonl"
    with path.open() as lines:
        found = [json.loads(line)["question"] for line in lines]
    if count > len(found):
        raise ValueError(f"{path} has {len(found)} questions, not {count}")
    return found[:count]


def instructions() -> list[str]:
    """First turns of Spec-Bench's six kinds of work, in a fixed order; or else `questions`."""
    path = DATA / "prompts" / "spec_bench.jsonl"
    if not path.exists():
        return questions(40)
    with path.open() as lines:
        return [json.loads(line)["turns"][0] for line in lines]


def functions() -> list[tuple[str, str]]:
    """Python functions (HumanEval, MIT) as signature with docstring, and body; or else none."""
    path = DATA / "prompts" / "humaneval.jsonl"
    if not path.exists():
        return []
    with path.open() as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["prompt"], row["canonical_solution"]) for row in rows]


def chats(tokenizer: Tokenizer, max_context: int) -> dict[str, list[list[dict[str, str]]]]:
    """Chats to be answered, by kind of work, each in a fixed order and all distinct.

    Spec-Bench's six kinds, and `code`, `code_edit` and `agent`: recorded calls of agents, in order
    within a session, of which the last `max_context` tokens are kept. Without the data sets there
    is only `math_reasoning`, from GSM8K.
    """
    path = DATA / "prompts" / "spec_bench.jsonl"
    if not path.exists():
        return {"math_reasoning": [_chat(question) for question in questions(40)]}
    found: dict[str, list[list[dict[str, str]]]] = {}
    with path.open() as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        # MT-Bench has eight categories of its own.
        kind = row["category"] if row["category"] in _SPEC_BENCH else "mt_bench"
        found.setdefault(kind, []).append(_chat(row["turns"][0]))
    Random(0).shuffle(found["mt_bench"])  # its file is sorted by category
    # No function is in both: drafts for one would profit from the other.
    half = len(functions()) // 2
    found["code"] = [_chat(f"Complete this function:\n\n{head}") for head, _ in functions()[:half]]
    found["code_edit"] = [
        _chat(f"{edit} Return the whole function.\n\n{head}{body}")
        for (head, body), edit in zip(functions()[half:], itertools.cycle(_EDITS), strict=False)
    ]
    found["agent"] = [_newest(call, tokenizer, max_context) for call in _agent_calls()]
    return {kind: _distinct(chats) for kind, chats in found.items()}


def dialogues(count: int) -> list[list[list[dict[str, str]]]]:
    """The turns of dialogues (MT-Bench-101) in a fixed order, each with all turns before it; or
    else chats about `questions` that only share a beginning."""
    path = DATA / "conversations" / "mt_bench_101.jsonl.gz"
    if not path.exists():
        return [
            [_chat(question[: len(question) * part // 3]) for part in (1, 2, 3)]
            for question in questions(min(count, 40))
        ]
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    Random(0).shuffle(rows)  # its file is sorted by task
    found = []
    for row in rows[:count]:
        so_far: list[dict[str, str]] = []
        turns = []
        for turn in row["history"]:
            so_far = [*so_far, {"role": "user", "content": turn["user"]}]
            turns.append(so_far)
            so_far = [*so_far, {"role": "assistant", "content": turn["bot"]}]
        found.append(turns)
    return found


_SPEC_BENCH = ("translation", "summarization", "qa", "math_reasoning", "rag")
_EDITS = (
    "Add type hints to all arguments and variables of this function.",
    "Rename the first argument of this function to `values`, wherever it is used.",
    "Add a comment above each statement of this function.",
    "Have this function raise a ValueError if an argument is None.",
)


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _distinct(chats: list[list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    return list({json.dumps(chat): chat for chat in chats}.values())


def _agent_calls() -> Iterator[list[dict[str, str]]]:
    """Contexts of the calls of coding agents and of airline agents, in turn."""

    def rows(name: str) -> list[dict[str, Any]]:
        with gzip.open(DATA / "conversations" / f"{name}.jsonl.gz", "rt") as lines:
            return [json.loads(line) for line in lines]

    coding = (_chat(row["input"]) for row in rows("agent_mini_swe"))
    airline = (
        [
            {"role": turn["role"], "content": turn["content"] or json.dumps(turn.get("tool_calls"))}
            for turn in row["traj"][:call]
        ]
        for row in rows("tau_bench_airline_gpt4o")
        if row["trial"] == 0  # other trials repeat the tasks
        for call in range(2, len(row["traj"]))
        if row["traj"][call]["role"] == "assistant"
    )
    return itertools.chain.from_iterable(zip(coding, airline, strict=False))


def _newest(
    chat: list[dict[str, str]], tokenizer: Tokenizer, num_tokens: int
) -> list[dict[str, str]]:
    """The last tokens of a chat, whose first message may be cut."""
    kept: list[dict[str, str]] = []
    for message in reversed(chat):
        offsets = tokenizer.encode(message["content"]).offsets
        if len(offsets) > num_tokens:
            start = offsets[-num_tokens][0]
            return [message | {"content": message["content"][start:]}, *kept]
        num_tokens -= len(offsets)
        kept = [message, *kept]
    return kept


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

    Without the data sets, one request with the medians of the trace.
    """
    return trace_lengths("azure_2023_conv") if has_traces() else [(1024, 115)]


TRACES = ("azure_2023_code", "azure_2023_conv", "mooncake_conversation", "mooncake_synthetic")


@dataclass(frozen=True, slots=True)
class Span:
    """One request's query tokens in a step: the last `num_tokens` of `seq_len`."""

    num_tokens: int
    seq_len: int


def has_traces() -> bool:
    """Whether the full data sets are there."""
    return (DATA / "traces").is_dir()


def find_trace(trace: str) -> Path:
    """The file of a trace of the full data sets."""
    [path] = (DATA / "traces").glob(f"{trace}.*")
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

    8 to 32 requests generate, about half of them with 2 to 8 drafts, as long as they fill at most
    half of the KV tokens. Chunks begin where a prefill with the whole budget would cut them.
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
