"""Policies that reach the steps of real engines, on a tiny random checkpoint."""

import asyncio
import time
from pathlib import Path
from typing import Any

from scheduler.policy import StepPolicy
from scheduler.record import read_record
from scheduler.replay import replay
from scheduler.request import Slo
from scheduler.stage_policy import SILENT_S, PolicyReason, StageReport, WorkerPolicy
from scheduler.task import Stage
from tests.workers.engine_process import EngineProcesses
from tests.workers.planned_engine import Job, add_job, engine_request
from tests.workers.tiny_models import MAX_MODEL_LEN
from workers.config import EngineConfig, WorkerConfig
from workers.reports import WorkerObserver, WorkerReport, WorkerStatus

SMALL = EngineConfig(
    kv_cache_gib=0.02,
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    dtype="float32",
)
NO_PREFILLS = WorkerPolicy(0.0, version=7, reason=PolicyReason.DECODES_LATE)
RELAXED = Slo(ttft_s=60.0, tpot_s=30.0)
HURRIED = Slo(tpot_s=1e-6)
"""A target that every decode misses."""
TIMES_FASTER = 20
"""Pace of the GlobalScheduler's clock."""


def test_prefills_keep_to_the_share_until_the_global_scheduler_is_silent(
    processes: EngineProcesses, tiny_llama: Path, tmp_path: Path
) -> None:
    record = tmp_path / "record.jsonl"

    bounded, free, reports = processes.call(_bounded, str(tiny_llama), record)

    assert sum(bounded) == 0
    assert sum(free) == 150
    assert [report.num_decodes for report in reports] == [1, 1]
    lines = record.read_text().splitlines()
    policies = [step.view.policy for step in read_record(lines).steps]
    assert policies.count(NO_PREFILLS) == len(bounded)
    assert policies[-1].reason == PolicyReason.SILENCE
    steps = list(replay(lines))
    assert all(report.plan == plan for report, plan in steps)
    reasons = {reason for report, _ in steps for _, reason in report.plan.deferred}
    assert reasons == {"share"}


def _bounded(folder: str, path: Path) -> tuple[list[int], list[int], list[StageReport]]:
    """Prefilled tokens of each step with a policy, and then without; what was told in each."""
    from workers.engine.vllm_engine import VllmEngine

    engine = VllmEngine(folder, WorkerConfig(calibrate_at_start=False, engine=SMALL))
    engine.record(path)
    add_job(engine, "decodes", Job([5, 6, 7], max_tokens=60, slo=RELAXED))
    while not engine.stages(engine.queue()).num_decodes:
        engine.step()
    engine.follow_policy(NO_PREFILLS)
    add_job(engine, "prefills", Job(list(range(3, 153)), max_tokens=2, slo=RELAXED))
    reports = [engine.stages(engine.queue())]
    assert engine.stats().policy == NO_PREFILLS
    bounded = [_num_prefilled(engine) for _ in range(15)]
    engine._planned.followed._heard_s -= 2 * SILENT_S  # type: ignore[union-attr]
    reports.append(engine.stages(engine.queue()))
    return bounded, [_num_prefilled(engine) for _ in range(10)], reports


def _num_prefilled(engine: Any) -> int:
    """Prefilled tokens of a step."""
    tasks: list[Any] = []
    engine._planned.planner._on_step = lambda step: tasks.extend(step.tasks)
    engine.step()
    return sum(task.num_tokens for task in tasks if task.stage is Stage.PREFILL)


def test_what_a_worker_reports_comes_back_as_a_policy_of_its_steps(
    processes: EngineProcesses, tiny_llama: Path, tmp_path: Path
) -> None:
    status = processes.call(_governed, str(tiny_llama), tmp_path / "record")

    assert status.policy.prefill_share < 1
    assert status.policy.reason == PolicyReason.DECODES_LATE
    lines = (tmp_path / "record.w.jsonl").read_text().splitlines()
    versions = [step.view.policy.version for step in read_record(lines).steps]
    assert versions == sorted(versions)
    assert versions[0] == 0
    assert versions[-1] >= status.policy.version >= 1
    assert all(report.plan == plan for report, plan in replay(lines))


def _governed(folder: str, path: Path) -> WorkerStatus:
    """A worker that reports to a GlobalScheduler and follows its answers."""
    return asyncio.run(_serve(folder, path))


async def _serve(folder: str, path: Path) -> WorkerStatus:
    from cluster.placement.global_scheduler import GlobalScheduler
    from workers.engine.vllm_engine import VllmEngine
    from workers.token_stream import StreamReceiver
    from workers.worker import Worker

    config = WorkerConfig(
        calibrate_at_start=False,
        engine=SMALL,
        step_policy=StepPolicy(),
        record=str(path),
        report_interval_s=0.01,
    )
    scheduler = GlobalScheduler(lambda: TIMES_FASTER * time.monotonic(), sets_stages=True)
    event_loop = asyncio.get_running_loop()

    class Answered(WorkerObserver):
        def reported(self, report: WorkerReport) -> None:
            asyncio.run_coroutine_threadsafe(answer(report), event_loop)

    async def answer(report: WorkerReport) -> None:
        worker.follow(await scheduler.report(report))

    worker = Worker("w", config, lambda: VllmEngine(folder, config), Answered())
    receiver = StreamReceiver("127.0.0.1")
    calls: list[asyncio.Task[Any]] = []
    try:
        for number in range(3):
            request = engine_request(str(number), Job([5, 6, 7], max_tokens=400, slo=HURRIED))
            calls.append(asyncio.create_task(worker.generate("w", request, receiver.address)))
        calls.append(asyncio.create_task(_read(receiver)))
        async with asyncio.timeout(60):
            while (status := await worker.status()).policy.is_free:
                await asyncio.sleep(0.01)
            while status.num_steps > (await worker.status()).num_steps - 2:
                await asyncio.sleep(0.01)
        return status
    finally:
        for call in calls:
            call.cancel()
        await asyncio.to_thread(worker.shutdown)
        receiver.close()


async def _read(receiver: Any) -> None:
    while True:
        await receiver.receive()
