"""A step that fails costs its request, and nobody else a token."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.plugins import faults
from tests.workers.drafted_engine import Call, Setting, run_calls
from tests.workers.engine_process import EngineProcesses
from tests.workers.sampling_parameters import (
    CONFIG,
    Comparison,
    differences,
    make_prompts,
    random_batches,
)

EXTRA = CONFIG.engine.extra_args | {"logits_processors": ["tests.plugins.faults:Faults"]}
FAULTY = replace(CONFIG, engine=replace(CONFIG.engine, extra_args=EXTRA))


def poison(prompt: Sequence[int], num_tokens: int = 0, fault: str = "fail") -> Call:
    """A call that makes the step fail that follows its first `num_tokens` tokens."""
    return Call(prompt, {"extra_args": faults.order(fault, num_tokens)["vllm_xargs"]})


def compare(
    processes: EngineProcesses, model: Path, calls: Sequence[Call], poisons: dict[int, Call]
) -> None:
    """Run calls with `poisons` in some places: they fail, and the others are as without them."""
    alone = list(calls)
    for place in sorted(poisons):
        alone.insert(place, Call(calls[0].prompt))
    mixed = list(alone)
    for place, call in poisons.items():
        mixed[place] = call
    texts = processes.call(run_calls, str(model), FAULTY, (alone, Setting()))[0].tokens
    drafted = Setting(texts, error_rate=0.3, is_trusted=True)
    plain_ran, *ran = processes.call(
        run_calls, str(model), FAULTY, (alone, Setting()), (mixed, Setting()), (mixed, drafted)
    )
    for one in ran:
        for place in poisons:
            assert one.answers[place].end == ["cause"]
        good = [place for place in range(len(mixed)) if place not in poisons]
        names = [str(mixed[place].params) for place in good]
        answers, expected = (
            [answers[place] for place in good] for answers in (one.answers, plain_ran.answers)
        )
        assert differences(names, answers, expected) == ""


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_the_request_that_makes_steps_fail_is_found_and_the_others_lose_no_token(
    processes: EngineProcesses, tiny_llama: Path, num_tokens: int
) -> None:
    draw = random.Random(num_tokens)
    [calls] = random_batches(Comparison(processes, tiny_llama), draw, 24)
    [prompt] = make_prompts(draw, 1)

    compare(processes, tiny_llama, calls, {11: poison(prompt, num_tokens)})


def test_several_that_make_steps_fail_are_all_found(
    processes: EngineProcesses, tiny_llama: Path
) -> None:
    draw = random.Random(5)
    prompts = make_prompts(draw, 12)
    poisons = {3: poison(prompts[0]), 4: poison(prompts[1], 3), 9: poison(prompts[2], 10)}

    compare(processes, tiny_llama, [Call(prompt) for prompt in prompts], poisons)


def fail_without_cause(model: str, config: Any, calls: Sequence[Call]) -> tuple[int, str]:
    """Let each step of several requests fail, and those of one succeed.

    Gives how many failures more than it may the engine has survived, and the error that ended it.
    """
    from tests.workers.drafted_engine import _add
    from workers.engine.vllm_engine import VllmEngine
    from workers.engine.vllm_recovery import MAX_IN_VAIN
    from workers.engine.vllm_sampling import runner_of

    engine: Any = VllmEngine(model, config)
    runner = runner_of(engine.core)
    execute = runner.execute_model

    def execute_or_fail(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if len(scheduler_output.num_scheduled_tokens) > 1:
            raise RuntimeError("two are too many")
        return execute(scheduler_output, *args, **kwargs)

    runner.execute_model = execute_or_fail
    for index, call in enumerate(calls):
        _add(engine, str(index), call)
    num_survived = 0
    while engine.has_requests():
        try:
            engine.step()
        except RuntimeError as error:
            try:
                causes = engine.recover(error)
            except RuntimeError as last:
                return num_survived - MAX_IN_VAIN, str(last)
            num_survived += not causes
    return 0, ""


def test_an_engine_that_fails_again_and_again_without_a_cause_is_given_up(
    processes: EngineProcesses, tiny_llama: Path
) -> None:
    calls = [Call(prompt) for prompt in make_prompts(random.Random(1), 4)]

    ended = processes.call(fail_without_cause, str(tiny_llama), CONFIG, calls)

    assert ended == (0, "two are too many")


def fail_always(model: str, config: Any, calls: Sequence[Call]) -> bool:
    """Whether few requests are taken for the cause when every step fails."""
    from tests.workers.drafted_engine import _add
    from workers.engine.vllm_engine import VllmEngine
    from workers.engine.vllm_recovery import MAX_IN_A_ROW
    from workers.engine.vllm_sampling import runner_of

    engine: Any = VllmEngine(model, config)

    def fail(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.num_scheduled_tokens:
            raise RuntimeError("the device is broken")
        return runner_of(engine.core)._update_states(scheduler_output)

    runner_of(engine.core).execute_model = fail
    causes = 0
    for index, call in enumerate(calls):
        _add(engine, str(index), call)
    while engine.has_requests():
        try:
            engine.step()
        except RuntimeError as error:
            try:
                causes += len(engine.recover(error))
            except RuntimeError:
                return causes < MAX_IN_A_ROW
    return False


def test_an_engine_whose_every_step_fails_is_given_up(
    processes: EngineProcesses, tiny_llama: Path
) -> None:
    calls = [Call(prompt) for prompt in make_prompts(random.Random(1), 20)]

    assert processes.call(fail_always, str(tiny_llama), CONFIG, calls)
