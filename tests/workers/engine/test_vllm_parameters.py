"""Every sampling parameter means the same with drafts, alone and next to all others."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.workers.drafted_engine import Call, Ran
from tests.workers.engine_process import EngineProcesses
from tests.workers.sampling_parameters import (
    BATCH,
    NUM_TOKENS,
    Comparison,
    differences,
    make_prompts,
    one_by_one,
    random_batches,
)

NAMES = list(one_by_one(range(NUM_TOKENS)))
DRAFTLESS = ("max_tokens-0", "max_tokens-1", "logprob_token_ids-3", "extra_args")
"""Answers too short for drafts, and what gets none."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Calls that each have one parameter of their own, with what came of them."""

    base: list[int]
    """Answer without parameters."""
    alone: dict[str, tuple[Ran, Ran]]
    """Of each call by itself, without drafts and with drafts."""
    together: tuple[Ran, Ran]
    """Of all calls in one batch."""


@pytest.fixture(scope="module")
def comparison(processes: EngineProcesses, tiny_llama: Path) -> Comparison:
    return Comparison(processes, tiny_llama)


@pytest.fixture(scope="module")
def matrix(comparison: Comparison) -> Matrix:
    [prompt] = make_prompts(random.Random(3), 1)
    [base] = comparison.answers([prompt])
    calls = [Call(prompt, params) for params in one_by_one(base).values()]
    *alone, together = comparison.run(*([call] for call in calls), calls)
    return Matrix(base, dict(zip(NAMES, alone, strict=True)), together)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_alone_means_the_same_with_drafts(matrix: Matrix, name: str) -> None:
    plain, drafted = matrix.alone[name]

    assert differences([name], drafted.answers, plain.answers) == ""
    assert plain.answers[0].end
    assert drafted.counts is not None
    is_drafted = not name.removeprefix("random-").startswith(DRAFTLESS)
    assert (drafted.counts.verified > 0) == is_drafted


def test_parameters_in_one_batch_mean_the_same_with_drafts(matrix: Matrix) -> None:
    plain, drafted = matrix.together

    assert differences(NAMES, drafted.answers, plain.answers) == ""
    assert drafted.counts is not None
    assert 0 < drafted.counts.accepted < drafted.counts.verified


def test_what_others_ask_for_changes_no_answer(matrix: Matrix) -> None:
    alone = [plain.answers[0] for plain, _ in matrix.alone.values()]

    assert differences(NAMES, matrix.together[0].answers, alone) == ""


def test_parameters_change_answers(matrix: Matrix) -> None:
    same = [name for name, (ran, _) in matrix.alone.items() if ran.tokens[0] == matrix.base]

    kinds = {name.rpartition("-")[0] for name in same}
    assert kinds == {
        "extra_args",
        "flat_logprobs",
        "logprob_token_ids",
        "logprobs",
        "prompt_logprobs",
        "seed",
        "thinking_token_budget",
    }


@pytest.mark.parametrize("neighbours", [{}, {"logprobs": 3}, {"temperature": 0.7, "seed": 1}])
def test_scoring_next_to_drafts_ends_no_engine(
    comparison: Comparison, neighbours: dict[str, float]
) -> None:
    draw = random.Random(4)
    score = {"logprob_token_ids": [5, 9, 200], "max_tokens": 1}
    calls = [
        Call(prompt, score if index % 4 == 3 else neighbours)
        for index, prompt in enumerate(make_prompts(draw, 40))
    ]

    [(plain, drafted)] = comparison.run(calls)

    assert differences(names(calls), drafted.answers, plain.answers) == ""
    assert drafted.counts is not None
    assert drafted.counts.accepted > 0
    for call, answer in zip(calls, drafted.answers, strict=True):
        if call.params is score:
            [(_, by_token)] = answer.logprobs
            assert set(by_token) == {5, 9, 200, *answer.tokens}


def test_random_combinations_mean_the_same_with_drafts(comparison: Comparison) -> None:
    batches = random_batches(comparison, random.Random(5), 3 * BATCH)

    for calls, (plain, drafted) in zip(batches, comparison.run(*batches), strict=True):
        assert differences(names(calls), drafted.answers, plain.answers) == ""


def compare_counts() -> None:
    import torch
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    from workers.engine.vllm_sampling import count_at_least

    for rows, columns in ((1, 7), (5, 1000), (33, 64)):
        x = torch.randint(-9, 9, (rows, columns)).float()
        x[:, 3], x[0, 4] = -float("inf"), float("nan")
        for column in (0, 3):
            values = x[:, column : column + 1]
            ours, theirs = count_at_least(x, values), batched_count_greater_than(x, values)
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype


def test_ranks_are_counted_as_vllm_counts_them(processes: EngineProcesses) -> None:
    processes.call(compare_counts)


def names(calls: Sequence[Call]) -> list[str]:
    return [str(call.params) for call in calls]
