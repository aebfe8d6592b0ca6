"""A draft model on a real engine: a tiny random checkpoint that guesses its own continuations."""

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.workers.engine_process import (
    Batch,
    EngineFailed,
    EngineProcesses,
    Output,
    Run,
    run_engine,
)
from tests.workers.tiny_models import VOCAB_SIZE
from workers.config import EngineConfig, WorkerConfig
from workers.drafters.drafter import ContextKey, Draft

A = ContextKey("worker", "a")
NUM_SPECULATIVE = 4
MAX_MODEL_LEN = 96
BLOCK_BYTES = 2 * 2 * 2 * 32 * 32 * 4
"""Layers, keys and values, heads, size of a head, tokens, bytes."""
DRAW = random.Random(0)
PROMPT = [DRAW.randrange(3, VOCAB_SIZE) for _ in range(40)]
PROMPTS = [[DRAW.randrange(3, VOCAB_SIZE) for _ in range(5 + 9 * i % 50)] for i in range(12)]
CONFIG = WorkerConfig(
    kv_cache_format="float32",  # as many blocks on every CPU
    engine=EngineConfig(
        kv_cache_gib=0.01, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=MAX_MODEL_LEN
    ),
)


class Tiny:
    """A tiny checkpoint, what follows each prompt in it, and processes to draft with it."""

    def __init__(self, processes: EngineProcesses, folder: Path) -> None:
        self._processes = processes
        self.folder = folder
        self.continuation, *self.continuations = self.continue_greedily(PROMPT, *PROMPTS)

    def draft(
        self,
        play: Callable[..., Any],
        *args: Any,
        target: Path | None = None,
        num_blocks: int = 300,
    ) -> Any:
        """`play(drafter, *args)` with a new drafter."""
        engine = dataclasses.replace(CONFIG.engine, kv_cache_gib=num_blocks * BLOCK_BYTES / 2**30)
        config = dataclasses.replace(CONFIG, engine=engine)
        return self._processes.call(_draft, self.folder, config, target or self.folder, play, *args)

    def continue_greedily(self, *prompts: Sequence[int]) -> list[Output]:
        """What the target says."""
        batch = Batch(prompts, max_tokens=4 * NUM_SPECULATIVE, prompt_logprobs=False)
        run: Run = self._processes.call(run_engine, str(self.folder), CONFIG, [batch])
        [outputs] = run.outputs
        return outputs


def _draft(
    model: Path, config: WorkerConfig, target: Path, play: Callable[..., Any], *args: Any
) -> Any:
    from workers.drafters.vllm_model_drafter import ModelDrafter

    return play(ModelDrafter(str(model), config, str(target), NUM_SPECULATIVE), *args)


@pytest.fixture(scope="module")
def tiny(processes: EngineProcesses, tiny_llama: Path) -> Tiny:
    return Tiny(processes, tiny_llama)


def run_dry(drafter: Any) -> dict[ContextKey, Draft]:
    """Step until nothing is left to do: the last draft of each context."""
    drafts: dict[ContextKey, Draft] = {}
    while drafter.has_work():
        drafts |= drafter.step()
    return drafts


def draft_once(drafter: Any) -> list[Draft]:
    drafter.extend(A, 0, PROMPT)
    drafts = []
    while drafter.has_work():
        drafts += drafter.step().values()
    return drafts


def test_the_target_guesses_its_own_greedy_continuation(tiny: Tiny) -> None:
    drafts = tiny.draft(draft_once)

    assert drafts == [
        Draft(
            len(PROMPT),
            tuple(tiny.continuation.tokens[:length]),
            tuple(range(-1, length - 1)),
            drafts[-1].probs[:length],
        )
        for length in range(1, 2 * NUM_SPECULATIVE + 1)
    ]


def test_probs_are_those_of_the_model(tiny: Tiny) -> None:
    *_, draft = tiny.draft(draft_once)

    likeliest = tiny.continuation.likeliest[: len(draft.probs)]
    assert draft.probs == pytest.approx([math.exp(max(each.values())) for each in likeliest])


class CountedSchedule:
    """Stands in for a scheduler's `schedule`, and counts the tokens that it has computed."""

    def __init__(self, drafter: Any) -> None:
        self._schedule = drafter._scheduler.schedule
        drafter._scheduler.schedule = self
        self.num_tokens = 0

    def __call__(self, *args: Any) -> Any:
        output = self._schedule(*args)
        self.num_tokens += output.total_num_scheduled_tokens
        return output


def draft_after(drafter: Any, extensions: list[list[int]]) -> tuple[Draft, int]:
    """The last draft, and the number of tokens that were computed after the first one."""
    drafter.extend(A, 0, PROMPT)
    drafts = run_dry(drafter)
    counted = CountedSchedule(drafter)
    position = len(PROMPT)
    for extension in extensions:
        drafter.extend(A, position, extension)
        position += len(extension)
    return (drafts | run_dry(drafter))[A], counted.num_tokens


def test_a_wrong_guess_is_corrected(tiny: Tiny) -> None:
    right, wrong = tiny.continuation.tokens[0], (tiny.continuation.tokens[1] + 1) % VOCAB_SIZE

    draft, num_computed = tiny.draft(draft_after, [[right, wrong]])

    assert num_computed == 2 * NUM_SPECULATIVE
    assert draft.position == len(PROMPT) + 2
    [output] = tiny.continue_greedily([*PROMPT, right, wrong])
    assert list(draft.token_ids) == output.tokens[: 2 * NUM_SPECULATIVE]


def test_what_was_guessed_is_not_computed_again(tiny: Tiny) -> None:
    tokens = tiny.continuation.tokens

    draft, num_computed = tiny.draft(draft_after, [tokens[:1], tokens[1:NUM_SPECULATIVE]])

    assert num_computed == 0
    assert draft.position == len(PROMPT) + NUM_SPECULATIVE
    assert list(draft.token_ids) == tokens[NUM_SPECULATIVE : 2 * NUM_SPECULATIVE]


def test_few_right_guesses_are_added_to(tiny: Tiny) -> None:
    tokens = tiny.continuation.tokens
    num_right = NUM_SPECULATIVE + 1

    draft, num_computed = tiny.draft(draft_after, [tokens[:num_right]])

    assert num_computed == num_right
    assert draft.position == len(PROMPT) + num_right
    assert list(draft.token_ids) == tokens[num_right : num_right + 2 * NUM_SPECULATIVE]


def follow_closely(drafter: Any, tokens: list[int]) -> tuple[list[int], str]:
    """Say each token once it was guessed; gives the lengths of drafts and the next request id."""
    drafter.extend(A, 0, PROMPT)
    lengths = []
    for position, token in enumerate(tokens, len(PROMPT)):
        draft = drafter.step()[A]
        assert draft.position == position
        lengths.append(len(draft.token_ids))
        drafter.extend(A, position, [token])
        while drafter._changed:
            drafter.step()
    return lengths, next(drafter._request_ids)


def test_an_engine_request_goes_on_while_the_target_agrees(tiny: Tiny) -> None:
    lengths, next_request_id = tiny.draft(follow_closely, tiny.continuation.tokens)

    assert lengths == [1] * len(tiny.continuation.tokens)
    assert next_request_id == "2"  # the first was to warm up


def overtake(drafter: Any, tokens: list[int]) -> tuple[ContextKey, Draft]:
    drafter.extend(A, 0, PROMPT)
    drafter.step()
    drafter.extend(A, len(PROMPT), tokens)
    [draft] = run_dry(drafter).items()
    return draft


def test_a_target_that_is_ahead_is_caught_up_with(tiny: Tiny) -> None:
    tokens = tiny.continuation.tokens

    key, draft = tiny.draft(overtake, tokens[:3])

    assert key == A
    assert draft.position == len(PROMPT) + 3
    assert list(draft.token_ids) == tokens[3 : 3 + 2 * NUM_SPECULATIVE]


def draft_both(drafter: Any) -> tuple[Draft, Draft]:
    drafter.extend(A, 0, PROMPTS[-1])
    drafter.step()
    drafter.extend(A, 0, PROMPT)
    [first] = run_dry(drafter).values()
    drafter.extend(A, 0, PROMPTS[-1])
    [second] = run_dry(drafter).values()
    return first, second


def test_position_0_starts_again(tiny: Tiny) -> None:
    first, second = tiny.draft(draft_both)

    assert (first.position, second.position) == (len(PROMPT), len(PROMPTS[-1]))
    assert list(first.token_ids) == tiny.continuation.tokens[: 2 * NUM_SPECULATIVE]
    assert list(second.token_ids) == tiny.continuations[-1].tokens[: 2 * NUM_SPECULATIVE]


def forget_midway(drafter: Any) -> tuple[bool, dict[ContextKey, Draft], float]:
    drafter.extend(A, 0, PROMPT)
    drafter.step()
    drafter.forget(A)
    drafter.forget(A)
    had_work = drafter._engine.stats().num_running > 0
    drafts = run_dry(drafter)
    return had_work, drafts, drafter._engine.stats().kv_cache_usage


def test_what_is_forgotten_leaves_nothing(tiny: Tiny) -> None:
    assert tiny.draft(forget_midway) == (False, {}, 0.0)


def draft_all(drafter: Any) -> tuple[dict[ContextKey, Draft], int]:
    """More contexts than fit a step, and the number of steps."""
    for index, prompt in enumerate(PROMPTS):
        drafter.extend(ContextKey("worker", str(index)), 0, prompt)
    drafts: dict[ContextKey, Draft] = {}
    num_steps = 0
    while drafter.has_work():
        drafts |= drafter.step()
        num_steps += 1
    return drafts, num_steps


def test_many_contexts_share_the_steps(tiny: Tiny) -> None:
    drafts, num_steps = tiny.draft(draft_all)

    assert {int(key.request_id): list(draft.token_ids) for key, draft in drafts.items()} == {
        index: output.tokens[: 2 * NUM_SPECULATIVE]
        for index, output in enumerate(tiny.continuations)
    }
    assert num_steps < 4 * 2 * NUM_SPECULATIVE  # one by one it would be twelve times as many


def wander(drafter: Any, seed: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Contexts come, agree, disagree, and go: their tokens and guesses.

    A prompt may be what was once guessed elsewhere, right or not.
    """
    draw = random.Random(seed)
    prompts = [PROMPT, PROMPT[:33]]
    contexts: dict[ContextKey, list[int]] = {}
    for _ in range(250):
        key = ContextKey("worker", str(draw.randrange(12)))
        tokens = contexts.setdefault(key, [])
        if not tokens or len(tokens) > MAX_MODEL_LEN - 20 or draw.random() < 0.1:
            tokens[:] = draw.choice(prompts[-20:])
            drafter.extend(key, 0, tokens[:])
        else:
            guesses = drafter._contexts[key].guesses
            prompts.append((tokens + guesses)[: MAX_MODEL_LEN - 20])
            new = guesses[: draw.randrange(NUM_SPECULATIVE + 2)]
            if not new or draw.random() < 0.7:
                new.append(draw.randrange(3, VOCAB_SIZE))
            drafter.extend(key, len(tokens), new)
            tokens += new
        if draw.random() < 0.03:
            drafter.forget(key)
            del contexts[key]
        for _ in range(draw.randrange(3)):
            drafter.step()
    run_dry(drafter)
    return (
        {key.request_id: tokens for key, tokens in contexts.items()},
        {key.request_id: drafter._contexts[key].guesses for key in contexts},
    )


@pytest.mark.parametrize("num_blocks", [8, 300])
def test_no_guess_depends_on_what_was_before(tiny: Tiny, num_blocks: int) -> None:
    tokens, guesses = tiny.draft(wander, num_blocks, num_blocks=num_blocks)

    outputs = tiny.continue_greedily(*tokens.values())
    right = {key: output.tokens for key, output in zip(tokens, outputs, strict=True)}
    assert {key: len(each) >= NUM_SPECULATIVE for key, each in guesses.items()} == dict.fromkeys(
        tokens, True
    )
    assert guesses == {key: right[key][: len(each)] for key, each in guesses.items()}


def correct_beside(drafter: Any, is_first: bool) -> list[tuple[list[int], list[int]]]:
    """One context believes a wrong guess of another, before that is corrected or after."""
    b = ContextKey("worker", "b")
    tokens = (PROMPT * 2)[:60]
    drafter.extend(A, 0, tokens)
    guesses = list(run_dry(drafter)[A].token_ids)
    believed = tokens + guesses
    right, wrong = guesses[0], (guesses[1] + 1) % VOCAB_SIZE
    if is_first:
        drafter.extend(b, 0, believed)
        run_dry(drafter)
    drafter.extend(A, len(tokens), [right, wrong])
    run_dry(drafter)
    if is_first:
        drafter.extend(b, len(believed), drafter._contexts[b].guesses[: NUM_SPECULATIVE + 1])
    else:
        drafter.extend(b, 0, believed)
    run_dry(drafter)
    return [(context.tokens, context.guesses) for context in drafter._contexts.values()]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_correction_is_not_seen_by_others(tiny: Tiny, is_first: bool) -> None:
    contexts = tiny.draft(correct_beside, is_first)

    outputs = tiny.continue_greedily(*[tokens for tokens, _ in contexts])
    assert [guesses for _, guesses in contexts] == [
        output.tokens[: 2 * NUM_SPECULATIVE] for output in outputs
    ]


def draft_at_the_limit(drafter: Any) -> list[dict[ContextKey, Draft]]:
    """The drafts with three tokens left, with none, and one token beyond."""
    prompt = (PROMPT * 3)[:MAX_MODEL_LEN]
    drafter.extend(A, 0, prompt[:-3])
    drafts = [run_dry(drafter)]
    drafter.extend(A, len(prompt) - 3, prompt[-3:])
    drafts.append(run_dry(drafter))
    drafter.extend(A, len(prompt), [5])
    return [*drafts, run_dry(drafter)]


def test_a_context_is_drafted_up_to_the_models_limit(tiny: Tiny) -> None:
    last, *beyond = tiny.draft(draft_at_the_limit)

    assert len(last[A].token_ids) == 3
    assert beyond == [{}, {}]


def test_another_vocabulary_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE + 1}))

    message = rf"\({VOCAB_SIZE} tokens\) .*\({VOCAB_SIZE + 1} tokens\); choose a draft model"
    with pytest.raises(EngineFailed, match=f"ValueError: .*{message}"):
        tiny.draft(draft_once, target=tmp_path)


def test_another_numbering_of_tokens_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    tokenizer = (tiny.folder / "tokenizer.json").read_text()
    swapped = tokenizer.replace('"a": 3', '"b": 3').replace('"b": 4', '"a": 4')
    assert swapped != tokenizer
    (tmp_path / "tokenizer.json").write_text(swapped)

    with pytest.raises(EngineFailed, match=r"ValueError: token 'a' has the id 3 .* and 4 in its"):
        tiny.draft(draft_once, target=tmp_path)
