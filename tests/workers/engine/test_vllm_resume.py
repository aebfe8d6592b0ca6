"""A request goes on in another engine, from any token, as if it had never left."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from scheduler.policy import StepPolicy
from tests.workers.drafted_engine import Answer, Call, Ran, Setting, run_calls
from tests.workers.engine_process import EngineProcesses
from tests.workers.sampling_parameters import (
    BATCH,
    CONFIG,
    NUM_TOKENS,
    Comparison,
    differences,
    make_prompts,
    one_by_one,
    random_batches,
)
from workers.config import WorkerConfig

NAMES = list(one_by_one(range(NUM_TOKENS)))


PIECE = 500
"""Calls of one run."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """A call that was broken off behind each of its tokens, with what came of it in all."""

    whole: Answer
    by_num_prior: dict[int, tuple[Answer, Answer]]
    """What came of the rest without drafts and with drafts, by the number of tokens before."""


def rest(whole: Answer, num_prior: int) -> Answer:
    """What remains of an answer behind its first tokens."""
    return replace(
        whole,
        tokens=whole.tokens[num_prior:],
        logprobs=whole.logprobs[num_prior:],
        prompt_logprobs=[],
    )


def resume_everywhere(
    processes: EngineProcesses, model: Path, calls: Sequence[Call], config: WorkerConfig = CONFIG
) -> list[Resumed]:
    """Run calls to their ends in one engine, then from each of their tokens in two others."""
    [unbroken] = processes.call(run_calls, str(model), CONFIG, (calls, Setting()))
    places = [
        (index, num_prior)
        for index, tokens in enumerate(unbroken.tokens)
        for num_prior in range(1, len(tokens))
    ]
    random.Random(0).shuffle(places)  # so that different ones stand in a batch
    broken = [
        replace(calls[index], prior=unbroken.tokens[index][:num_prior])
        for index, num_prior in places
    ]
    texts = [unbroken.tokens[index] for index, _ in places]
    plain = _run_in_pieces(processes, model, config, broken, None)
    has_drafts = config.step_policy.name != "vllm"
    drafted = _run_in_pieces(processes, model, config, broken, texts if has_drafts else None)
    resumed = [Resumed(answer, {}) for answer in unbroken.answers]
    for (index, num_prior), *answers in zip(places, plain, drafted, strict=True):
        resumed[index].by_num_prior[num_prior] = (answers[0], answers[1])
    return resumed


def _run_in_pieces(
    processes: EngineProcesses,
    model: Path,
    config: WorkerConfig,
    calls: Sequence[Call],
    texts: Sequence[Sequence[int]] | None,
) -> list[Answer]:
    """The answers to calls; with `texts`, their answers in whole, as drafts, some of them wrong."""
    runs: list[tuple[Sequence[Call], Setting]] = []
    for begin in range(0, len(calls), PIECE):
        piece = slice(begin, begin + PIECE)
        setting = Setting()
        if texts is not None:
            setting = Setting(texts[piece], error_rate=0.3, is_trusted=True)
        runs.append((calls[piece], setting))
    ran: list[Ran] = processes.call(run_calls, str(model), config, *runs)
    if texts is not None:
        assert all(one.counts and one.counts.accepted for one in ran)
    return [answer for one in ran for answer in one.answers]


@pytest.fixture(scope="module")
def by_name(processes: EngineProcesses, tiny_llama: Path) -> dict[str, Resumed]:
    [prompt] = make_prompts(random.Random(3), 1)
    [base] = Comparison(processes, tiny_llama).answers([prompt])
    calls = [Call(prompt, params) for params in one_by_one(base).values()]
    return dict(zip(NAMES, resume_everywhere(processes, tiny_llama, calls), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_from_every_token_the_rest_is_the_same(by_name: dict[str, Resumed], name: str) -> None:
    assert unequal(name, by_name[name]) == ""


@pytest.mark.parametrize("policy", ["hybrid", "vllm"])
def test_random_combinations_go_on_in_chunks(
    processes: EngineProcesses, tiny_llama: Path, policy: Literal["hybrid", "vllm"]
) -> None:
    comparison = Comparison(processes, tiny_llama)
    [calls] = random_batches(comparison, random.Random(8), BATCH)
    engine = replace(CONFIG.engine, max_num_batched_tokens=24, max_num_seqs=6)
    config = replace(CONFIG, engine=engine, step_policy=StepPolicy(name=policy))

    all_resumed = resume_everywhere(processes, tiny_llama, calls, config)

    for call, resumed in zip(calls, all_resumed, strict=True):
        assert unequal(str(call.params), resumed) == ""


def unequal(name: str, resumed: Resumed) -> str:
    """What differs behind any of the tokens of a call."""
    whole = resumed.whole
    assert sorted(resumed.by_num_prior) == [*range(1, len(whole.tokens))]
    lines = (
        differences([f"{name} behind {num_prior} tokens"], [answer], [rest(whole, num_prior)])
        for num_prior, answers in resumed.by_num_prior.items()
        for answer in answers
    )
    return "\n".join(filter(None, lines))
