"""vLLM led by our plans: real engines on a tiny random checkpoint."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from scheduler.policy import StepPolicy
from scheduler.record import arrivals
from scheduler.replay import replay
from scheduler.request import Slo
from scheduler.step_planner import StepPlanner
from scheduler.task import Stage
from tests.workers.engine_process import EngineProcesses
from tests.workers.planned_engine import (
    Job,
    KeptSteps,
    play_ahead,
    play_scripts,
    steps,
)
from tests.workers.tiny_models import MAX_MODEL_LEN, VOCAB_SIZE
from workers.config import EngineConfig, WorkerConfig

POLICIES = ("hybrid", "static", "decode_first", "prefill_first")
BLOCK = 32
BLOCK_BYTES = 2 * 2 * 2 * 32 * BLOCK * 4
"""Layers, keys and values, heads, size of a head, tokens, bytes."""
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
SMALL = EngineConfig(kv_cache_gib=0.02, max_model_len=MAX_MODEL_LEN)
DRAW = random.Random(0)
SLOS = [Slo(), Slo(ttft_s=30.0, tpot_s=10.0), Slo(ttft_s=0.05, tpot_s=0.005), Slo(ttft_s=1e-6)]


def make_prompt(length: int) -> list[int]:
    return [DRAW.randrange(3, VOCAB_SIZE) for _ in range(length)]


SHARED = make_prompt(96)
REPEATING = make_prompt(9) * 5
CROWD = [
    Job(
        [*SHARED[: 32 * (index % 4)], *make_prompt(5 + index * 37 % 180)],
        max_tokens=4 + index % 13,
        priority=index % 3 - 1,
        slo=SLOS[index % 4],
        begin=index * 2,
    )
    for index in range(20)
]
"""Long and short ones, with and without targets, at any time."""
TOO_MANY = [Job(make_prompt(100), max_tokens=60, slo=SLOS[index % 2]) for index in range(8)]
"""Each needs 5 blocks in the end, and 4 in the beginning."""


UNTARGETED = [Job(job.prompt, job.max_tokens, slo=None) for job in CROWD]
ABORTED = [Job(make_prompt(90), max_tokens=40, abort=abort) for abort in (1, 3, None, 6, None) * 4]
GRAMMARS = [
    Job(make_prompt(40), max_tokens=12, regex="[a-f]{4}(gh|xy){2}"),
    Job(make_prompt(100), max_tokens=30),
    Job(make_prompt(20), max_tokens=12, regex="(", begin=2),  # is no regular expression
]


class Engines:
    """Plays scripts on new engines of the tiny model."""

    def __init__(self, processes: EngineProcesses, folder: Path) -> None:
        self._processes = processes
        self._folder = folder
        self.stock = cache(self._stock)
        self.mixed = cache(self._mixed)
        self.cached = cache(self._cached)

    def play(
        self,
        *scripts: Sequence[Job],
        policy: Any = "hybrid",
        num_blocks: int = 600,
        extra_args: dict[str, Any] | None = None,
        player: Callable[..., Any] = play_scripts,
        **engine: Any,
    ) -> Any:
        """Play scripts on one new engine."""
        limits: dict[str, Any] = {
            "dtype": "float32",
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": MAX_MODEL_LEN,
            "kv_cache_gib": num_blocks * BLOCK_BYTES / 2**30,
            "block_size": BLOCK,
            "extra_args": extra_args or {},
        }
        config = WorkerConfig(
            calibrate_at_start=False,
            kv_cache_format="float32",  # as many blocks on every CPU
            step_policy=StepPolicy(name=policy),
            engine=EngineConfig(**limits | engine),
        )
        return self._processes.call(player, str(self._folder), config, *scripts)

    def _stock(self) -> Any:
        """vLLM's own scheduler."""
        return self.play(CROWD, TOO_MANY, UNTARGETED, policy="vllm", enable_prefix_caching=False)

    def _mixed(self, policy: str) -> Any:
        """Each step has what it needs and no more."""
        return self.play(CROWD, ABORTED, GRAMMARS, policy=policy, enable_prefix_caching=False)

    def _cached(self, policy: str) -> Any:
        """Prefix hits in a KV cache that is too small."""
        order = "fcfs" if policy in ("static", "decode_first") else "priority"
        return self.play(
            CROWD, TOO_MANY, CROWD, policy=policy, num_blocks=24, scheduling_policy=order
        )


@pytest.fixture(scope="module")
def engines(processes: EngineProcesses, tiny_llama: Path) -> Engines:
    return Engines(processes, tiny_llama)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_token_depends_on_who_decides_the_steps(engines: Engines, policy: str) -> None:
    [played, *_] = engines.mixed(policy)

    assert played.class_name == "PlannedScheduler"
    assert played.tokens == engines.stock()[0].tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_each_step_is_what_was_planned(engines: Engines, policy: str) -> None:
    for played in engines.mixed(policy):
        assert played.is_as_planned
        assert played.num_steps == len(played.steps)

    crowd, aborted, _ = engines.mixed(policy)
    assert crowd.longest_wait <= 1  # the step that only cleans up
    assert aborted.longest_wait <= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_aborted_requests_leave_nothing_behind(engines: Engines, policy: str) -> None:
    _, played, _ = engines.mixed(policy)

    assert played.num_kept == 0
    for job, tokens in zip(ABORTED, played.tokens, strict=True):
        assert len(tokens) < 40 if job.abort else len(tokens) == 40


@pytest.mark.parametrize("policy", POLICIES)
def test_a_grammar_holds_nobody_up(engines: Engines, policy: str) -> None:
    *_, played = engines.mixed(policy)

    letters, others, _ = played.tokens
    assert len(others) == 30
    assert played.finish_reasons == ["stop", "length", "error"]
    assert all(3 <= token <= 8 for token in letters[:4])
    assert played.num_kept == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_kv_cache_preempts_and_loses_nothing(engines: Engines, policy: str) -> None:
    [played] = engines.play(TOO_MANY, policy=policy, num_blocks=24, enable_prefix_caching=False)

    assert played.tokens == engines.stock()[1].tokens
    assert played.num_preemptions > 0
    assert sum(len(step["preempted"]) for step in played.steps) == played.num_preemptions
    assert played.is_as_planned
    assert played.longest_wait <= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_the_history_has_all_that_a_request_saw(engines: Engines, policy: str) -> None:
    for jobs, played in zip((CROWD, TOO_MANY, CROWD), engines.cached(policy), strict=True):
        # In the step in which it ends a request has its last token.
        assert [sum(s.num_new_tokens for s in seen) for seen in played.seen] == [
            len(tokens) for tokens in played.tokens
        ]
        assert sum(s.preempted for seen in played.seen for s in seen) == played.num_preemptions
        for job, seen in zip(jobs, played.seen, strict=True):
            numbers = [s.step for s in seen]
            first = next(index for index, s in enumerate(seen) if s.task)
            # It has a part or a reason in each step from its arrival to its end.
            assert numbers == list(range(numbers[0], numbers[-1] + 1)), job
            assert all(s.reason for s in seen[:first])
        assert len(played.queued_s) == len(jobs)
        assert all(seconds >= 0 for _, seconds in played.queued_s)
    assert sum(each.num_preemptions for each in engines.cached(policy)) > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_prefix_hits_and_preemption_in_one_engine(engines: Engines, policy: str) -> None:
    played = engines.cached(policy)

    crowd, too_many, _ = (each.tokens for each in engines.stock())
    assert [each.tokens for each in played] == [crowd, too_many, crowd]
    assert sum(played[2].num_cached) > 0
    assert played[2].longest_wait <= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_recorded_is_planned_again(engines: Engines, policy: str) -> None:
    for played in engines.cached(policy):
        replayed = played.replayed()

        assert len(replayed) == played.num_steps
        assert len(list(arrivals(played.record))) == len(played.tokens)
        assert all(report.plan == plan for report, plan in replayed)
        assert len({report.plan.predicted_s for report, _ in replayed}) > 1


def test_without_targets_the_steps_are_as_many_as_vllms(engines: Engines) -> None:
    [ours] = engines.play(UNTARGETED, enable_prefix_caching=False)

    *_, theirs = engines.stock()
    assert theirs.class_name == "Scheduler"
    assert ours.tokens == theirs.tokens
    assert ours.num_steps == theirs.num_steps


def test_the_first_by_priority_comes_first(engines: Engines) -> None:
    last, *_, first = jobs = [
        Job(make_prompt(60), priority=priority) for priority in (3, 2, 2, 1, 0)
    ]

    [played] = engines.play(jobs, max_num_seqs=1)

    prefills = [
        jobs[int(task.request_id.partition("-")[2])]
        for report, _ in played.replayed()
        for task in report.plan.tasks
        if task.stage is Stage.PREFILL
    ]
    assert [job.priority for job in prefills] == sorted(job.priority for job in jobs)
    assert prefills[0] is first
    assert prefills[-1] is last


@pytest.mark.parametrize("policy", ["hybrid", "static"])
def test_speculation_changes_no_token(engines: Engines, policy: str) -> None:
    alone = [Job(REPEATING, max_tokens=40)]

    alone_played, played = engines.play(
        alone, CROWD, policy=policy, extra_args={"speculative_config": NGRAM}
    )

    assert played.tokens == engines.stock()[0].tokens
    stages = [task[1] for step in played.steps for task in step["tasks"]]
    assert "verify" in stages
    rates = {row[5][0] for step in played.steps for row in step["running"] if row[5]}
    assert len(rates) > 5
    assert alone_played.num_steps < 40


@pytest.mark.parametrize("budget", [2, 64])
def test_a_prompt_with_one_token_left_is_not_padded(engines: Engines, budget: int) -> None:
    prompt = make_prompt(2 * BLOCK + 1)
    script = [Job(prompt, max_tokens=5)]

    first, second = engines.play(
        script,
        script,
        extra_args={"speculative_config": NGRAM},
        max_num_seqs=2,
        max_num_batched_tokens=budget,
    )

    assert second.num_cached == [2 * BLOCK]
    assert second.tokens == first.tokens
    assert second.steps[0]["tasks"][0][1:] == ["prefill", 1, 2 * BLOCK + 1, True]
    assert second.is_as_planned
    assert second.longest_wait <= 1


@pytest.mark.parametrize("num_blocks", [24, 600])
@pytest.mark.parametrize("extra_args", [{}, {"speculative_config": NGRAM}], ids=["plain", "drafts"])
@pytest.mark.parametrize("policy", ["hybrid", "prefill_first"])
def test_steps_are_planned_while_others_run(
    engines: Engines, policy: str, extra_args: dict[str, Any], num_blocks: int
) -> None:
    jobs = [*CROWD, *TOO_MANY]

    num_tokens, record = engines.play(
        jobs, policy=policy, extra_args=extra_args, num_blocks=num_blocks, player=play_ahead
    )

    assert num_tokens == [job.max_tokens for job in jobs]
    replayed = list(replay(record))
    assert all(report.plan == plan for report, plan in replayed)
    assert any(step["num_observed"] < number for number, step in enumerate(steps(record)))


@pytest.mark.parametrize("policy", ["hybrid", "static"])
def test_adapters_take_turns(engines: Engines, policy: str) -> None:
    # vLLM fails if a step has more of them than fit.
    jobs = [dataclasses.replace(job, lora=index % 3) for index, job in enumerate(CROWD)]

    num_tokens, _ = engines.play(jobs, policy=policy, player=play_ahead)

    assert num_tokens == [job.max_tokens for job in jobs]


def test_a_worker_records_its_engine(engines: Engines, tmp_path: Path) -> None:
    # The engine writes to the file that the worker names.
    played = engines._processes.call(_record, str(engines._folder), tmp_path / "runs" / "a.jsonl")

    assert played == (3, 3)


def _record(folder: str, path: Path) -> tuple[int, int]:
    engine = _recording_engine(folder, path)
    while engine.has_requests():
        engine.step()
    steps = list(replay(path.read_text().splitlines()))
    return len(steps), sum(report.plan == plan for report, plan in steps)


def test_a_request_that_becomes_ready_after_the_view_is_recorded(
    engines: Engines, tmp_path: Path
) -> None:
    played = engines._processes.call(_record_late, str(engines._folder), tmp_path / "a.jsonl")

    assert played == [(0, 1, True), (1, 1, True), (1, 1, True)]


def _record_late(folder: str, path: Path) -> list[tuple[int, int, bool]]:
    engine = _recording_engine(folder, path)
    scheduler = engine.core.scheduler
    scheduler._ready = lambda: []  # as if its grammar were compiled right after
    engine.step()
    del scheduler._ready
    while engine.has_requests():
        engine.step()
    return [
        (len(report.plan.tasks), len(report.tasks), report.plan == plan)
        for report, plan in replay(path.read_text().splitlines())
    ]


def _recording_engine(folder: str, path: Path) -> Any:
    """An engine that records to `path`, with one request of three tokens."""
    from tests.workers.planned_engine import add_job
    from workers.engine.vllm_engine import VllmEngine

    engine = VllmEngine(folder, WorkerConfig(calibrate_at_start=False, engine=SMALL))
    engine.record(path)
    add_job(engine, "a", Job([5, 6, 7], max_tokens=3))
    return engine


def test_prompt_logprobs_are_computed_in_bounded_pieces_and_are_the_same(engines: Engines) -> None:
    call = engines._processes.call
    (one, at_once), (most, in_pieces) = (
        call(_prompt_logprobs, str(engines._folder), max_rows) for max_rows in (1000, 48)
    )

    assert (one, most) == (100, 48)
    assert in_pieces == at_once
    assert len(at_once) == 100 - 1


def _prompt_logprobs(folder: str, max_rows: int) -> tuple[int, list[list[float]]]:
    """The most tokens in a step of a prompt of 100, and the log probabilities."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder

    from tests.workers.planned_engine import add_job
    from workers.engine.vllm_engine import VllmEngine

    engine = VllmEngine(folder, WorkerConfig(calibrate_at_start=False, engine=SMALL))
    scheduler: Any = engine.core.scheduler
    scheduler._max_rows = max_rows
    prompt = [3 + number * 7 % (VOCAB_SIZE - 3) for number in range(100)]
    add_job(engine, "a", Job(prompt, max_tokens=2, prompt_logprobs=2))
    kept = KeptSteps()
    scheduler.planner = StepPlanner(scheduler.limits, StepPolicy(), on_step=kept.took_step)
    decoder = MsgpackDecoder(EngineCoreOutputs)
    found: list[list[float]] = []
    while engine.has_requests():
        for output in engine.step()[0].values():
            for of_request in decoder.decode(output.frames).outputs:
                if tensors := of_request.new_prompt_logprobs_tensors:
                    found += tensors.logprobs.tolist()
    return max(task.num_tokens for report in kept.reports for task in report.tasks), found
