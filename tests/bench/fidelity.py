"""A small trace live on two CPU workers, and the same trace simulated.

    python -m tests.bench.fidelity --json fidelity.json

The simulated workers take the steps' times from a profile of the engine, which takes minutes to
measure the first time: as `xyserve calibrate` measures it, alone, and again on both cores at once,
as the workers of one machine share its memory and caches. How much the rest of the cluster slows
steps down on the same two cores is measured in a run of other requests before each measured one:
two factors, for steps next to an idle and next to a busy worker. The simulated workers are planned
by the same scheduler.

Requests are the first of the Azure conversation trace, of clipped lengths, at `--rate` times the
rate of one request at a time; they are sent by the client handle, which takes the times.

Keys of the summary: `ttft_error` and `tpot_error`, relative errors of the means; `makespan_error`,
relative error of the makespan; `step_median_error`, median relative error of the predicted seconds
of the live steps. Medians over the rounds.
"""

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from cluster.client import XYServe
from cluster.config.app_config import AppConfig, parse_args
from cluster.models.model import resolve_model
from scheduler.cost_model import CostModel
from scheduler.replay import replay
from scheduler.request import Request, Slo
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.device import DeviceProfile
from scheduler.simulation.simulator import SimulationConfig, simulate
from scheduler.task import Limits, StepReport
from tests.bench.answers import Answer, ask, makespan_s
from tests.bench.overhead import running_app
from tests.bench.report import make_parser, publish, say_row
from tests.workload import conversation_lengths, prompts_of
from workers.profiling.calibrate import measure_engine
from workers.profiling.engine_profile import EngineProfile, profile_key, profile_path

TTFT_MS, TPOT_MS = 10_000, 250
LOOP_S = 0.01
"""Longest gap between two steps that counts as part of the first one."""


def calibrated_device(
    model: str, config: AppConfig, num_workers: int, folder: Path
) -> DeviceProfile:
    """The simulator's profile of a worker of `config`, alone and next to all others.

    Takes minutes to measure, and is kept in `folder` for the next time.
    """
    file = folder / f"{profile_path(profile_key(model, config.worker)).stem}-{num_workers}.json"
    if file.exists():
        return DeviceProfile.from_dict(json.loads(file.read_text()))
    with Progress(console=Console(stderr=True)) as bars:

        def measure(name: str) -> EngineProfile:
            bar = bars.add_task(f"Measuring the engine's steps, {name}", total=1.0)
            return measure_engine(
                model, config.worker, lambda share: bars.update(bar, completed=share)
            )

        alone = measure("alone")
        with ThreadPoolExecutor(num_workers) as pool:
            crowded, *_ = pool.map(measure, [f"next to {num_workers - 1} more"] * num_workers)
    engine = config.worker.engine
    device = DeviceProfile(
        name="this machine",
        source="measured by tests.bench.fidelity",
        modelled=False,
        cost_model=CostModel.from_dict(alone.cost_model),
        crowded_cost_model=CostModel.from_dict(crowded.cost_model),
        limits=Limits(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            kv_block_size=alone.kv_block_size,
            num_kv_blocks=alone.num_kv_blocks,
        ),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(device.to_dict()))
    return device


def make_arrivals(
    device: DeviceProfile, num_requests: int, num_workers: int, rate: float
) -> list[Arrival]:
    """The trace's requests, with gaps scaled to the speed of this machine."""
    lengths = [
        (min(max(prompt, 16), 400), min(max(output, 8), 100))
        for prompt, output in conversation_lengths()[:num_requests]
    ]
    alone_s = 0.0
    for prompt, output in lengths:
        shape = device.cost_model.shape()
        shape.add(prompt, prompt, 1)
        alone_s += device.cost_model.predict(shape)
        shape = device.cost_model.shape()
        shape.add(1, prompt, 1)
        alone_s += output * device.cost_model.predict(shape)
    gap_s = alone_s / num_requests / num_workers / rate
    slo = Slo(TTFT_MS / 1000, TPOT_MS / 1000)
    return [
        # Gaps from 0.5 to 1.5 of the mean: neither regular nor bursty.
        Arrival(
            Request(str(index), prompt, output, slo=slo),
            gap_s * (index + 0.5 * (index * 7 % 11) / 11),
            output,
        )
        for index, (prompt, output) in enumerate(lengths)
    ]


async def live(handle: XYServe, arrivals: list[Arrival], prompts: list[list[int]]) -> list[Answer]:
    """Send each request at its time; returns the answers with the times of their tokens."""
    began_s = time.perf_counter() + 0.5

    async def one(arrival: Arrival, prompt: list[int]) -> Answer:
        await asyncio.sleep(began_s + arrival.arrival_s - time.perf_counter())
        targets = {"slo_ttft_ms": TTFT_MS, "slo_tpot_ms": TPOT_MS}
        return await ask(handle, prompt, arrival.num_output_tokens, **targets)

    return await asyncio.gather(*map(one, arrivals, prompts))


def read_records(folder: Path) -> list[list[StepReport]]:
    """The steps of each worker, each of which must have the same plan in a replay."""
    records = []
    for record in sorted(folder.glob("*.jsonl")):
        with record.open() as lines:
            steps = list(replay(lines))
        for report, plan in steps:
            if plan != report.plan:
                raise SystemExit(f"{record}: step {report.step} has another plan in a replay")
        records.append([report for report, _ in steps if report.plan.tasks])
    return records


def in_cluster(device: DeviceProfile, records: list[list[StepReport]]) -> DeviceProfile:
    """The device with step times inside the cluster, from the begin of a step to the next one."""
    assert device.crowded_cost_model is not None
    models = {False: device.cost_model, True: device.crowded_cost_model}
    measured, predicted = {False: 0.0, True: 0.0}, {False: 0.0, True: 0.0}
    for own, other in (records, records[::-1]):
        begins = np.array([report.began_s for report in other])
        ends = begins + [report.measured_s for report in other]
        for report, following in itertools.pairwise(own):
            began_s, end_s = report.began_s, report.began_s + report.measured_s
            if following.began_s - end_s < LOOP_S:
                end_s = following.began_s
            overlaps_s = np.minimum(ends, end_s) - np.maximum(begins, began_s)
            share = np.maximum(overlaps_s, 0).sum() / (end_s - began_s)
            if 0.2 < share < 0.8:  # neither alone nor next to a busy worker
                continue
            is_crowded = bool(share > 0.5)
            shape = models[is_crowded].shape_of(report.plan.tasks)
            measured[is_crowded] += end_s - began_s
            predicted[is_crowded] += models[is_crowded].predict(shape)
    alone, crowded = (
        CostModel.from_dict(
            models[c].to_dict() | {"speed": models[c].speed * measured[c] / predicted[c]}
        )
        for c in (False, True)
    )
    return replace(device, cost_model=alone, crowded_cost_model=crowded)


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--profiles", type=Path, default=Path("/tmp/xyserve-fidelity"))
    parser.add_argument("--port", type=int, default=8125)
    options = parser.parse_args()
    args: dict[str, Any] = {
        "num_workers": 2,
        "worker": {"engine": {"dtype": "float32", "max_num_seqs": 32}},
    }
    config = parse_args(args)
    model = resolve_model(config.model)
    device = calibrated_device(model, config, 2, options.profiles)
    arrivals = make_arrivals(device, options.requests, 2, options.rate)
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    lengths = [arrival.request.num_prompt_tokens for arrival in arrivals]
    prompts = prompts_of(tokenizer, lengths)
    # The factors are measured with other lengths: the second half in place of the first.
    others = prompts_of(tokenizer, lengths[len(lengths) // 2 :])
    rows = []
    for index in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            args["worker"]["record"] = str(Path(folder) / "record")
            with running_app(args, options.port) as handle:
                asyncio.run(live(handle, arrivals[: len(others)], others))
                began_s = time.monotonic()
                answers = asyncio.run(live(handle, arrivals, prompts))
            records = read_records(Path(folder))
        before = [[r for r in record if r.began_s < began_s] for record in records]
        around = in_cluster(device, before)
        errors = [
            abs(report.plan.predicted_s / report.measured_s - 1)
            for record in records
            for report in record
            if report.began_s >= began_s
        ]
        measured = {
            "ttft_s": statistics.mean(answer.ttft_s for answer in answers),
            "tpot_s": statistics.mean(answer.tpot_s for answer in answers),
            "makespan_s": makespan_s(answers),
        }
        first_s = min(answer.sent_s for answer in answers)
        sent = [
            replace(arrival, arrival_s=answer.sent_s - first_s)
            for arrival, answer in zip(arrivals, answers, strict=True)
        ]
        summary = simulate(sent, around, SimulationConfig(num_workers=2)).summary
        simulated = {
            "ttft_s": summary.ttft_s.mean,
            "tpot_s": summary.tpot_s.mean,
            "makespan_s": summary.makespan_s,
        }
        rows.append(
            {"round": index, "step_median_error": statistics.median(errors)}
            | {f"live {key}": value for key, value in measured.items()}
            | {f"simulated {key}": value for key, value in simulated.items()}
            | {
                key.replace("_s", "_error"): abs(simulated[key] / value - 1)
                for key, value in measured.items()
            }
        )
        say_row(rows[-1])
    keys = ("ttft_error", "tpot_error", "makespan_error", "step_median_error")
    medians = {key: statistics.median(row[key] for row in rows) for key in keys}
    publish("Simulated against measured, two CPU workers", rows, medians, options.json)


if __name__ == "__main__":
    main()
