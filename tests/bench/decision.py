"""What deciding a step costs, as a share of the step, on a real engine.

    python -m tests.bench.decision --json decision.json

The default model decodes on one core with our kernels. Each row is a number of running requests,
with targets, and a number of requests that wait for a seat; figures are medians over the steps that
decode all running ones. A decision is reading vLLM's requests, planning and preempting.

Keys of the summary: `share_RUNNING_WAITING`, decision over step; `decision_ms_RUNNING_WAITING`.
"""

import os
import random
import statistics
from typing import Any

from cluster.models.default_model import DEFAULT_MODEL
from cluster.models.model import resolve_model
from scheduler.request import Slo
from scheduler.task import StepReport
from tests.bench.report import make_parser, publish, say_row
from tests.workers.planned_engine import Job, KeptSteps, add_job
from workers.config import EngineConfig, WorkerConfig

CASES = ((16, 0), (64, 0), (256, 0), (256, 256))
MAX_SEQS = 256
NUM_STEPS = 24
SLO = Slo(ttft_s=600, tpot_s=10)


def measure(engine: Any, num_running: int, num_waiting: int, reports: list[StepReport]) -> None:
    """Fill `reports` with the steps in which `num_running` requests decode."""
    draw = random.Random(0)
    names = [f"{num_running}-{num_waiting}-{index}" for index in range(num_running + num_waiting)]
    for name in names:
        prompt = [draw.randrange(1000, 40_000) for _ in range(16)]
        add_job(engine, name, Job(prompt, max_tokens=4 * NUM_STEPS, slo=SLO))
    while len(reports) < NUM_STEPS:
        engine.step()
        if reports and reports[-1].plan.num_tokens != num_running:
            reports.clear()  # some are still in prefill
    engine.abort_requests(names)
    engine.step()


def main() -> None:
    """Run the benchmark."""
    options = make_parser(__doc__).parse_args()
    config = WorkerConfig(
        engine=EngineConfig(
            dtype="float32", max_num_seqs=MAX_SEQS, max_model_len=256, kv_cache_gib=2
        )
    )
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    os.environ.update(config.env)
    from workers.profiling.vllm_calibrated_engine import make_engine

    kept = KeptSteps()
    reports = kept.reports
    engine = make_engine(resolve_model(DEFAULT_MODEL), config, kept)
    rows = []
    for num_running, num_waiting in CASES:
        reports.clear()
        measure(engine, num_running, num_waiting, reports)
        step_s = statistics.median(report.measured_s for report in reports)
        decided_s = statistics.median(report.decided_s for report in reports)
        rows.append(
            {
                "running": num_running,
                "waiting": num_waiting,
                "step ms": 1000 * step_s,
                "decision ms": 1000 * decided_s,
                "share": decided_s / step_s,
            }
        )
        say_row(rows[-1])
    summary = {f"share_{row['running']}_{row['waiting']}": row["share"] for row in rows} | {
        f"decision_ms_{row['running']}_{row['waiting']}": row["decision ms"] for row in rows
    }
    publish("Deciding a step, one core", rows, summary, options.json)


if __name__ == "__main__":
    main()
