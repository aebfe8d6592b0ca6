"""What an engine reports of its queue, against what it then computes: real engines, tiny model."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scheduler.policy import StepPolicy
from scheduler.prefill_queue import QueuedPrefill, QueueReport
from scheduler.request import Slo
from scheduler.task import Stage, StageTask, StepReport
from tests.workers.engine_process import EngineProcesses
from tests.workers.planned_engine import Job, KeptSteps, add_job
from tests.workers.tiny_models import MAX_MODEL_LEN, VOCAB_SIZE
from workers.config import EngineConfig, WorkerConfig

BLOCK = 32
DRAW = random.Random(1)


def make_prompt(length: int) -> list[int]:
    return [DRAW.randrange(3, VOCAB_SIZE) for _ in range(length)]


SHARED = make_prompt(3 * BLOCK)
FIRST = {"first": Job(SHARED, max_tokens=2)}
"""What the later ones find in the cache."""
CROWD = {
    "decodes": Job(make_prompt(10), max_tokens=30, slo=Slo(tpot_s=10.0)),
    "hit": Job([*SHARED, *make_prompt(150)], max_tokens=6, slo=Slo(ttft_s=60.0), priority=1),
    **{f"new {number}": Job(make_prompt(40 + 30 * number), max_tokens=4) for number in range(6)},
}
TOO_MANY = {str(number): Job(make_prompt(100), max_tokens=60) for number in range(6)}
"""Each needs 5 blocks in the end, and 4 in the beginning."""


@dataclass(frozen=True, slots=True)
class Told:
    """A report between two steps."""

    step: int
    """Steps before it."""
    queue: QueueReport


@dataclass(frozen=True, slots=True)
class Played:
    """Reports, and the steps between them."""

    told: list[Told]
    steps: list[StepReport]


def _play(folder: str, policy: Any, num_blocks: int, scripts: list[dict[str, Job]]) -> list[Played]:
    """Play scripts on one engine, with a report after each step."""
    from workers.engine.vllm_engine import VllmEngine

    kept = KeptSteps()
    engine = VllmEngine(folder, _config(policy, num_blocks), kept)
    played = []
    for script in scripts:
        kept.reports, told = [], []
        for name, job in script.items():
            add_job(engine, name, job)
        while engine.has_requests():
            engine.step()
            told.append(Told(len(kept.reports), engine.queue()))
        played.append(Played(told, kept.reports))
    return played


def _config(policy: Any, num_blocks: int) -> WorkerConfig:
    block_bytes = 2 * 2 * 2 * 32 * BLOCK * 4  # layers, keys and values, heads, size of one
    return WorkerConfig(
        calibrate_at_start=False,
        kv_cache_format="float32",  # as many blocks on every CPU
        step_policy=StepPolicy(name=policy),
        engine=EngineConfig(
            dtype="float32",
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=MAX_MODEL_LEN,
            kv_cache_gib=num_blocks * block_bytes / 2**30,
            block_size=BLOCK,
        ),
    )


def played(processes: EngineProcesses, folder: Path, *args: Any) -> list[Played]:
    """Play scripts in a process of their own."""
    found: list[Played] = processes.call(_play, str(folder), *args)
    return found


@pytest.fixture(scope="module")
def crowd(processes: EngineProcesses, tiny_llama: Path) -> Played:
    scripts = [FIRST, CROWD]
    _, of_crowd = played(processes, tiny_llama, "hybrid", 600, scripts)
    return of_crowd


def test_what_is_reported_is_what_is_computed_next(crowd: Played) -> None:
    seen = 0
    for told in crowd.told:
        for request_id, prefill in told.queue.prefills.items():
            assert prefill.num_new_tokens == prefilled(request_id, crowd.steps[told.step :])
            assert prefill.num_tokens == len(CROWD[request_id].prompt)
            seen += 1

    assert seen > 20
    assert prefilled("hit", crowd.steps) == 150  # its beginning was cached


def test_what_decodes_is_reported(crowd: Played) -> None:
    for told, step in zip(crowd.told, crowd.steps[1:], strict=False):
        decodes = [task for task in step.tasks if task.stage is Stage.DECODE]
        assert told.queue.num_decodes == len(decodes)
        assert (told.queue.tpot_s == 10.0) == any(t.request_id == "decodes" for t in decodes)

    assert crowd.told[-1].queue.num_tokens == 0


def test_targets_and_priorities_are_reported(crowd: Played) -> None:
    prefills = crowd.told[0].queue.prefills

    assert 0 < prefills["hit"].due_in_s < 60
    assert prefills["hit"].priority == 1
    assert prefills["new 5"].due_in_s == math.inf


def test_a_report_changes_nothing_and_equal_states_give_equal_reports(
    processes: EngineProcesses, tiny_llama: Path
) -> None:
    before, told, after = processes.call(_ask_twice, str(tiny_llama))

    assert before == after
    assert len(set(told)) == 1


def _ask_twice(folder: str) -> tuple[str, list[str], str]:
    from workers.engine.vllm_engine import VllmEngine

    engine = VllmEngine(folder, _config("hybrid", 600))
    for name, job in CROWD.items():
        add_job(engine, name, job)
    engine.step()
    scheduler: Any = engine.core.scheduler
    before = repr(list(scheduler._live._notes.values()))
    told = []
    for _ in range(3):
        queue = engine.queue()
        lasting = {name: one._replace(due_in_s=0.0) for name, one in queue.prefills.items()}
        told.append(repr((lasting, queue.cost, queue.num_decodes, queue.num_free_kv_tokens)))
    return before, told, repr(list(scheduler._live._notes.values()))


def test_a_request_that_was_preempted_prefills_again(
    processes: EngineProcesses, tiny_llama: Path
) -> None:
    [crowded] = played(processes, tiny_llama, "hybrid", 24, [TOO_MANY])

    again: list[QueuedPrefill] = [
        prefill
        for told in crowded.told
        for prefill in told.queue.prefills.values()
        if prefill.num_tokens > 100
    ]
    assert any(step.preempted for step in crowded.steps)
    assert again


@pytest.fixture(scope="module")
def of_stock(processes: EngineProcesses, tiny_llama: Path) -> list[Played]:
    return played(processes, tiny_llama, "vllm", 600, [FIRST, CROWD])


def test_of_vllms_own_scheduler_whole_prompts_are_reported(of_stock: list[Played]) -> None:
    first, *_, last = (told.queue for told in of_stock[1].told)

    # Two prompts of the first step had no room in it.
    waiting = {name: one for name, one in first.prefills.items() if one.num_new_tokens > 100}
    assert waiting
    assert all(one.num_new_tokens == one.num_tokens for one in waiting.values())
    assert first.num_decodes + len(first.prefills) == len(CROWD)
    assert first.num_tokens >= sum(one.num_tokens for one in first.prefills.values())
    assert (last.num_decodes, last.prefills, last.num_tokens) == (0, {}, 0)


def test_of_vllms_own_scheduler_the_cost_of_prompts_is_measured(of_stock: list[Played]) -> None:
    costs = [told.queue.cost.token_s for each in of_stock for told in each.told]

    assert len(set(costs)) > 3
    assert all(0 < token_s < 0.1 for token_s in costs)


def prefilled(request_id: str, steps: list[StepReport]) -> int:
    """Tokens computed of a request until its next output token."""
    num_tokens = 0
    for step in steps:
        task: StageTask | None
        if task := next((t for t in step.tasks if t.request_id == request_id), None):
            num_tokens += task.num_tokens
            if task.samples:
                break
    return num_tokens
