"""How well step times are predicted on a real engine, and how soon again after a disturbance.

    python -m tests.bench.prediction --json prediction.json

The default model runs on one core with our kernels and the profile that `xyserve calibrate` made of
it (or the brief one of a first start). Requests have the lengths of the Azure conversation trace,
clipped, which the profile was not fitted to; a new one arrives when fewer than `--running` run.
After `--steps` steps another process takes half of the core, and after `--steps` more it ends.

Keys of the summary, medians of the relative error: `quiet_error` before the disturbance;
`disturbed_error` and `recovered_error` over steps 150 to 200 after the other process began and
ended; `disturbed_at_once` and `recovered_at_once` over the first 20 steps after it.
"""

import itertools
import multiprocessing
import os
import random
import statistics
from typing import Any

from cluster.models.default_model import DEFAULT_MODEL
from cluster.models.model import resolve_model
from scheduler.request import Slo
from scheduler.task import StepReport
from tests.bench.report import make_parser, publish
from tests.workers.planned_engine import Job, KeptSteps, add_job
from tests.workload import conversation_lengths
from workers.config import EngineConfig, WorkerConfig

SLO = Slo(ttft_s=10, tpot_s=0.25)


def spin(core: int) -> None:
    """Compute for ever on one core."""
    os.sched_setaffinity(0, [core])
    while True:
        pass


def errors(reports: list[StepReport], first: int, last: int) -> float:
    """The median relative error of some of the steps."""
    return statistics.median(
        abs(report.plan.predicted_s / report.measured_s - 1) for report in reports[first:last]
    )


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of each phase, 200 or more")
    parser.add_argument("--running", type=int, default=6)
    options = parser.parse_args()
    # As in deploy/local.yaml, so that its profile is found.
    config = WorkerConfig(engine=EngineConfig(dtype="float32", max_num_seqs=32, kv_cache_gib=1.0))
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [core])
    os.environ.update(config.env)
    from workers.profiling.vllm_calibrated_engine import make_engine

    kept = KeptSteps()
    reports = kept.reports
    engine: Any = make_engine(resolve_model(DEFAULT_MODEL), config, kept)
    draw = random.Random(0)
    lengths = conversation_lengths()
    names = map(str, itertools.count())

    def run_steps() -> list[StepReport]:
        reports.clear()
        while len(reports) < options.steps:
            while sum(engine.core.scheduler.get_request_counts()) < options.running:
                prompt, output = draw.choice(lengths)
                tokens = [draw.randrange(1000, 40_000) for _ in range(min(max(prompt, 16), 400))]
                job = Job(tokens, max_tokens=min(max(output, 8), 100), slo=SLO)
                add_job(engine, next(names), job)
            engine.step()
        return list(reports)

    run_steps()  # warm up
    quiet = run_steps()
    thief = multiprocessing.get_context("fork").Process(target=spin, args=(core,), daemon=True)
    thief.start()
    disturbed = run_steps()
    thief.terminate()
    thief.join()
    recovered = run_steps()
    summary = {
        "quiet_error": errors(quiet, 0, len(quiet)),
        "disturbed_at_once": errors(disturbed, 0, 20),
        "disturbed_error": errors(disturbed, 150, 200),
        "recovered_at_once": errors(recovered, 0, 20),
        "recovered_error": errors(recovered, 150, 200),
    }
    rows = [
        {
            "phase": name,
            "steps": len(phase),
            "median step ms": 1000 * statistics.median(report.measured_s for report in phase),
            "median error": errors(phase, 0, len(phase)),
        }
        for name, phase in (("quiet", quiet), ("disturbed", disturbed), ("recovered", recovered))
    ]
    publish("Predicted against measured time of steps, one core", rows, summary, options.json)


if __name__ == "__main__":
    main()
