"""An engine whose model is split over two processes, which meet by gloo and shared memory."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.workers.drafted_engine import Call, Setting, run_calls
from tests.workers.engine_process import EngineProcesses
from tests.workers.planned_engine import Job, add_job, play_scripts
from tests.workers.sampling_parameters import CONFIG, make_prompts
from workers.config import WorkerConfig

SPLIT = replace(CONFIG, cpus=2, tensor_parallel_size=2)
DRAW = random.Random(5)
PROMPTS = make_prompts(DRAW, 6)
PARAMS: list[dict[str, Any]] = [
    {},
    {"seed": 7, "temperature": 1.0},
    {"seed": 8, "temperature": 1.0, "presence_penalty": 0.5, "top_p": 0.9},
    {"repetition_penalty": 1.3},
    {"min_tokens": 5},
    {"logit_bias": {7: 5.0}},
]
CALLS = [Call(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.fixture(scope="module")
def whole(processes: EngineProcesses, tiny_llama: Path) -> list[list[int]]:
    """The tokens of one process."""
    [ran] = processes.call(run_calls, str(tiny_llama), CONFIG, (CALLS, Setting()))
    tokens: list[list[int]] = ran.tokens
    return tokens


def test_two_ranks_give_the_tokens_of_one(
    processes: EngineProcesses, tiny_llama: Path, whole: list[list[int]]
) -> None:
    drafts = Setting(whole, error_rate=0.3)

    plain, drafted = processes.call(
        run_calls, str(tiny_llama), SPLIT, (CALLS, Setting()), (CALLS, drafts)
    )

    assert plain.tokens == whole
    assert drafted.tokens == whole
    assert drafted.counts.accepted > 0


def test_a_request_goes_on_in_an_engine_of_two_ranks(
    processes: EngineProcesses, tiny_llama: Path, whole: list[list[int]]
) -> None:
    places = [(index, prior) for index in range(len(CALLS)) for prior in (1, 3, 5)]
    broken = [replace(CALLS[index], prior=whole[index][:prior]) for index, prior in places]

    [ran] = processes.call(run_calls, str(tiny_llama), SPLIT, (broken, Setting()))

    assert [whole[index][:prior] for index, prior in places] != [[]] * len(places)
    assert ran.tokens == [whole[index][prior:] for index, prior in places]


def lose_a_rank(model: str, config: WorkerConfig) -> tuple[str, list[int]]:
    """What a step says when a rank has died, and which ranks are left 5 s after the shutdown."""
    from workers.engine.vllm_engine import VllmEngine

    engine = VllmEngine(model, config)
    ranks = [p for p in psutil.Process().children(recursive=True) if "VLLM::" in p.name()]
    assert len(ranks) == 2
    add_job(engine, "job", Job(PROMPTS[0], max_tokens=50))
    engine.step()
    os.kill(ranks[1].pid, signal.SIGKILL)
    said = ""
    give_up_s = time.monotonic() + 60
    while not said and time.monotonic() < give_up_s:
        try:
            engine.step()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    engine.shutdown()
    _, left = psutil.wait_procs(ranks, 5)
    return said, [process.pid for process in left]


def test_a_rank_that_dies_ends_the_engine_and_leaves_nobody(
    processes: EngineProcesses, tiny_llama: Path
) -> None:
    said, left = processes.call(lose_a_rank, str(tiny_llama), SPLIT)

    assert said
    assert left == []


def test_ranks_play_a_script_as_planned(processes: EngineProcesses, tiny_llama: Path) -> None:
    jobs = [Job(prompt, max_tokens=6, begin=index) for index, prompt in enumerate(PROMPTS)]

    [one], [two] = (
        processes.call(play_scripts, str(tiny_llama), config, jobs) for config in (CONFIG, SPLIT)
    )

    assert two.tokens == one.tokens
    assert two.is_as_planned
