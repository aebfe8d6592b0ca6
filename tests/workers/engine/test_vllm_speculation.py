"""Drafts of a draft worker, verified by a real engine on a tiny checkpoint: nothing changes."""

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workers.drafted_engine import (
    BLOCK,
    NUM_DRAFTS,
    Call,
    Ran,
    Setting,
    run_calls,
    tiny_config,
)
from tests.workers.engine_process import EngineProcesses
from tests.workers.tiny_models import MAX_MODEL_LEN, VOCAB_SIZE

DRAW = random.Random(1)


def make_prompt(length: int) -> list[int]:
    return [DRAW.randrange(3, VOCAB_SIZE) for _ in range(length)]


SHARED = make_prompt(64)
LOGPROBS = {"logprobs": 0}
GREEDY = [
    Call([*SHARED[: 32 * (i % 3)], *make_prompt(5 + 31 * i % 90)], LOGPROBS) for i in range(12)
]
PARAMS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.2},
    {"min_tokens": 10, "ignore_eos": False},
    {"stop_token_ids": list(range(3, 60)), "ignore_eos": False},
    {"bad_words": []},
    {"allowed_token_ids": list(range(20, 90))},
    {"regex": "[a-f]{6}(gh|xy){3}", "ignore_eos": False},
    {"max_tokens": 1},
    {"max_tokens": 2},
    {"max_tokens": 5},
    {"logprobs": 5},
    {"prompt_logprobs": 2},
    {"logit_bias": {7: 50.0}},
    {"min_p": 0.9, "temperature": 1.0, "seed": 5},
    {"temperature": 1.0, "seed": 6},
]
SPECIAL = [Call(make_prompt(20 + 3 * i), params) for i, params in enumerate(PARAMS)]
LONG = [Call(make_prompt(MAX_MODEL_LEN - 20), {"max_tokens": 20})]
"""Up to the longest that the model can."""
CROWD = [Call(make_prompt(100), {"max_tokens": 60}) for _ in range(8)]
"""Each needs 5 blocks in the end, and 4 in the beginning."""
SETS: dict[str, list[Call]] = {
    "greedy": GREEDY,
    "special": SPECIAL,
    "long": LONG,
    "crowd": CROWD,
}


class Engines:
    """Runs calls on new engines of the tiny model."""

    def __init__(self, processes: EngineProcesses, folder: Path) -> None:
        self._processes = processes
        self._folder = folder
        self.plain = cache(self._plain)
        self.drafted = cache(self._drafted)

    def run(
        self, *runs: tuple[Sequence[Call], Setting], num_blocks: int = 600, max_num_seqs: int = 8
    ) -> list[Ran]:
        config = tiny_config(num_blocks, max_num_seqs)
        ran: list[Ran] = self._processes.call(run_calls, str(self._folder), config, *runs)
        return ran

    def _plain(self) -> dict[str, Ran]:
        runs = [(calls, Setting()) for calls in SETS.values()]
        return dict(zip(SETS, self.run(*runs), strict=True))

    def _drafted(self) -> dict[str, Ran]:
        """A third of the drafts are wrong."""
        plain = self.plain()
        runs = [
            (calls, Setting(plain[name].tokens, error_rate=0.3)) for name, calls in SETS.items()
        ]
        return dict(zip(SETS, self.run(*runs), strict=True))


@pytest.fixture(scope="module")
def engines(processes: EngineProcesses, tiny_llama: Path) -> Engines:
    return Engines(processes, tiny_llama)


@pytest.mark.parametrize("name", SETS)
def test_drafts_change_no_token(engines: Engines, name: str) -> None:
    plain, drafted = engines.plain()[name], engines.drafted()[name]

    assert drafted.tokens == plain.tokens
    assert drafted.counts is not None
    assert 0 < drafted.counts.accepted < drafted.counts.verified
    assert drafted.num_steps < plain.num_steps


def test_drafts_change_no_bit_of_a_log_probability(engines: Engines) -> None:
    assert engines.drafted()["greedy"].logprobs == engines.plain()["greedy"].logprobs
    assert all(len(of_call) == 24 for of_call in engines.plain()["greedy"].logprobs)


def test_a_request_for_a_custom_logits_processor_gets_no_drafts(engines: Engines) -> None:
    calls = [Call(make_prompt(30), {"extra_args": {"mine": 1}})]
    [plain] = engines.run((calls, Setting()))

    [drafted] = engines.run((calls, Setting(plain.tokens)))

    assert drafted.tokens == plain.tokens
    assert drafted.counts is not None
    assert drafted.counts.proposed == 0


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {7: 5.0}},
        {"min_p": 0.9, "temperature": 1.0},
        {"seed": 6, "temperature": 1.0},
        {"min_tokens": 10},
    ],
)
def test_what_vllms_own_verification_does_wrong_gets_no_drafts(
    engines: Engines, params: dict[str, Any]
) -> None:
    calls = [Call(make_prompt(30), params)]
    drafts = [make_prompt(24)]

    with_vllms, with_ours = engines.run(
        (calls, Setting(drafts, verifies_all=False)), (calls, Setting(drafts))
    )

    assert with_vllms.counts is not None
    assert with_ours.counts is not None
    assert with_vllms.counts.proposed == 0
    assert with_ours.counts.proposed > 0


def test_vllms_own_verification_meets_no_chosen_log_probabilities(engines: Engines) -> None:
    scoring = Call(make_prompt(30), {"logprob_token_ids": [5, 6], "max_tokens": 60})
    calls = [*GREEDY[:4], scoring]
    [plain] = engines.run((calls, Setting()))

    [alone, together] = engines.run(
        (calls[:4], Setting(plain.tokens[:4], verifies_all=False)),
        (calls, Setting(plain.tokens, verifies_all=False)),
    )

    assert alone.counts is not None
    assert together.counts is not None
    assert alone.counts.verified > 0
    assert together.counts.verified == 0
    assert together.tokens == plain.tokens


def test_drafts_that_come_when_they_like_change_no_token(engines: Engines) -> None:
    plain = engines.plain()["greedy"]

    [drafted] = engines.run((GREEDY, Setting(plain.tokens, error_rate=0.3, is_patient=False)))

    assert drafted.tokens == plain.tokens
    assert drafted.counts is not None
    assert drafted.counts.proposed > 0


def test_preempted_requests_keep_their_drafts_apart(engines: Engines) -> None:
    plain = engines.plain()["crowd"]

    [drafted] = engines.run((CROWD, Setting(plain.tokens, error_rate=0.3)), num_blocks=24)

    assert drafted.tokens == plain.tokens


def test_a_dead_draft_worker_changes_nothing(engines: Engines) -> None:
    plain = engines.plain()["greedy"]

    dead, alone = engines.run((GREEDY, Setting(plain.tokens, is_dead=True)), (GREEDY, Setting()))

    assert dead.tokens == alone.tokens == plain.tokens
    assert dead.counts is not None
    assert dead.counts.verified == 0


def test_the_drafter_gets_the_state_of_each_token_before_the_last(engines: Engines) -> None:
    calls = [Call(make_prompt(40), {"max_tokens": 12}), Call(make_prompt(90), {"max_tokens": 12})]

    [plain] = engines.run((calls, Setting()))
    right, wrong = engines.run(
        (calls, Setting(plain.tokens)), (calls, Setting([[3] * 12, [4] * 12]))
    )

    assert right.tokens == wrong.tokens == plain.tokens
    for index, call in enumerate(calls):
        # A prefix hit of the second run leaves out what was not computed again.
        states = right.hidden_states[index]
        again = wrong.hidden_states[index]
        begin = (len(call.prompt) - 1) // BLOCK * BLOCK
        num_both = min(len(states) - begin, len(again))
        assert num_both > len(call.prompt) - begin
        assert states[begin:][:num_both] == again[:num_both]
        assert len(call.prompt) <= len(states) < len(call.prompt) + 12
        assert len(set(states)) == len(states)


@pytest.mark.parametrize("first", [False, True], ids=["unlikely drafts", "likely drafts"])
def test_sampling_keeps_its_distribution(engines: Engines, first: bool) -> None:
    prompt, num_draws = make_prompt(12), 2500
    likely, unlikely = (
        engines.run(([Call(prompt, {"max_tokens": 4})], Setting()))[0].tokens[0],
        [5, 9, 11, 6],
    )
    calls = [Call(prompt, {"temperature": 0.7, "max_tokens": 4}) for _ in range(num_draws)]
    drafts = [likely if first else unlikely] * num_draws

    [plain] = engines.run((calls, Setting()), max_num_seqs=128)
    [drafted] = engines.run((calls, Setting(drafts, is_trusted=True)), max_num_seqs=128)

    assert drafted.counts is not None
    assert drafted.counts.verified > num_draws / 4
    if first:
        assert drafted.counts.accepted > 20
    for place in range(4):
        plainly = Counter(tokens[place] for tokens in plain.tokens)
        with_drafts = Counter(tokens[place] for tokens in drafted.tokens)
        assert chi_square_z(plainly, with_drafts) < 4


def test_a_wrong_distribution_would_be_seen() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.2] * 300)
    shifted = np.where(np.arange(300) == probs.argmax(), probs + 0.1, probs)
    draw = [Counter(rng.choice(300, 2500, p=p / p.sum()).tolist()) for p in (probs, probs, shifted)]

    assert chi_square_z(draw[0], draw[1]) < 3
    assert chi_square_z(draw[0], draw[2]) > 4


def chi_square_z(one: Counter[int], other: Counter[int]) -> float:
    """How far two samples of the same size differ, in standard deviations of their chi-square.

    Rare values are counted together.
    """
    common = [value for value in one | other if one[value] + other[value] >= 10]
    pairs = [(one[value], other[value]) for value in common]
    pairs.append((one.total() - sum(a for a, _ in pairs), other.total() - sum(b for _, b in pairs)))
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b)
    freedom = max(len(pairs) - 1, 1)
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def test_no_more_drafts_than_are_allowed_are_verified(engines: Engines) -> None:
    counts = engines.drafted()["greedy"].counts

    assert counts is not None
    assert len(counts.verified_at) <= NUM_DRAFTS
    assert counts.verified == sum(counts.verified_at)
    assert counts.accepted == sum(counts.accepted_at)


def test_the_stage_policy_limits_the_drafts_and_changes_no_token(engines: Engines) -> None:
    plain = engines.plain()["greedy"]
    limited = Setting(plain.tokens, is_trusted=True, max_drafts=2)

    [ran] = engines.run((SETS["greedy"], limited))

    assert ran.tokens == plain.tokens
    assert ran.counts is not None
    assert len(ran.counts.verified_at) == 2
