"""What the stage policy gains: the load that workers carry with it, and each by itself, simulated.

    python -m tests.bench.stage --json stage.json

Capacity is the highest rate at which 90% of the requests meet both of their targets, as in
`tests.bench.scheduler`, with its traces and targets, on workers that plan by the hybrid scheduler.
Two more traces change their phase half-way, from one in which prompts are the work to one in which
answers are, and back: code completion (2,000 tokens of prompt, 30 of answer) and reasoning (600 and
850). Each phase comes at the same share of what the workers carry of it.

    ours        the stage policy, as the GlobalScheduler decides it with each report
    fixed       a share of prefills that is the same for all workers, always: 0.5

In `noisy` scenes the steps take longer and shorter than predicted, by a deviation of 30%, and the
workers learn from that, as they do live. They have three fifths of the requests, as none of their
steps is skipped, and there are none of Mooncake's long prompts. These scenes, and the changes of
phase, have `tight` targets only: for `loose` ones the requests are too few.

The policy is on by default if it gains at least 5% on two traces and never loses more than 2%.

Keys of the summary: `capacity_geomean`, `capacity_min` and `capacity_max` are of the capacity with
the policy over that without, `num_gains` counts the scenes with at least 1.05, `fixed_max` is the
highest of a fixed share.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from scheduler.simulation.arrivals import (
    Arrival,
    clip_lengths,
    scale_rate,
    with_max_tokens,
    with_slo,
)
from scheduler.simulation.device import DeviceProfile, read_device
from scheduler.simulation.simulator import SimulationConfig, SimulationResult, simulate
from scheduler.simulation.traces import read_trace
from scheduler.stage_policy import StagePolicy, StageView, WorkerPolicy
from tests.bench.report import make_parser, publish, say
from tests.bench.scheduler import (
    ATTAINMENT,
    MAX_MODEL_LEN,
    MAX_RATE,
    MAX_TOKENS,
    PRECISION,
    TARGETS,
    TRACES,
    bisected,
    open_loop,
    targets_of,
)
from tests.workload import find_trace, has_traces

PHASES = {
    "prompts_then_answers": ("azure_2023_code", "servegen_deepseek_r1_arrivals"),
    "answers_then_prompts": ("servegen_deepseek_r1_arrivals", "azure_2023_code"),
}
FIXED_SHARES = (0.5,)
STEPS = ("exact", "noisy")
NOISE = 0.3
GAIN = 1.05

MakePolicy = Callable[[], StagePolicy]


class FixedShare(StagePolicy):
    """The same share for all workers, always."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._policy = WorkerPolicy(share)

    def decide(self, views: Mapping[str, StageView], now: float) -> dict[str, WorkerPolicy]:
        """That share."""
        return dict.fromkeys(views, self._policy)


class CountingPolicy(StagePolicy):
    """Ours, which counts what it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_changes: dict[str, int] = {}
        self.least = 1.0
        _counting.append(self)

    def decide(self, views: Mapping[str, StageView], now: float) -> dict[str, WorkerPolicy]:
        """What ours decides."""
        decided = super().decide(views, now)
        for worker, policy in decided.items():
            self.num_changes[worker] = policy.version
            self.least = min(self.least, policy.prefill_share)
        return decided


_counting: list[CountingPolicy] = []


@dataclass(frozen=True, slots=True)
class Scene:
    """Requests with targets, and where they are served."""

    trace: str
    targets: str
    noisy: bool
    arrivals: list[Arrival]
    device: DeviceProfile
    num_workers: int

    def run(self, stage_policy: MakePolicy | None, rate: float) -> SimulationResult:
        """Serve the requests at a rate."""
        return simulate(
            scale_rate(self.arrivals, rate),
            self.device,
            SimulationConfig(
                num_workers=self.num_workers,
                noise=NOISE if self.noisy else 0.0,
                learns=self.noisy,
                stage_policy=stage_policy,
            ),
        )

    def attains(self, stage_policy: MakePolicy | None, rate: float) -> bool:
        """Whether enough requests meet their targets at this rate."""
        met = [outcome.met_targets for outcome in self.run(stage_policy, rate).outcomes]
        return statistics.mean(met) >= ATTAINMENT

    def capacity(self, stage_policy: MakePolicy | None) -> float:
        """The highest rate that is attained; equal decisions give equal capacities."""
        low, high = 1.0, 2.0
        while not self.attains(stage_policy, low):
            low, high = low / 2, low
        while self.attains(stage_policy, high):
            low, high = high, high * 2
            if high > MAX_RATE:
                # A pool passes no SystemExit on.
                raise RuntimeError(f"{self.trace}: too few requests to load {self.device.name}")
        return bisected(lambda rate: self.attains(stage_policy, rate), low, high, PRECISION)


def read_arrivals(trace: str, num_requests: int) -> list[Arrival]:
    """The first requests of a trace, from the time 0 on."""
    arrivals = open_loop(clip_lengths(read_trace(find_trace(trace)), MAX_MODEL_LEN))
    arrivals = with_max_tokens(arrivals[:num_requests], MAX_TOKENS)
    return [replace(a, arrival_s=a.arrival_s - arrivals[0].arrival_s) for a in arrivals]


def phases(
    traces: tuple[str, str], targets: str, device: DeviceProfile, num_workers: int, count: int
) -> list[Arrival]:
    """Requests of one trace and then of another, each at the workers' capacity for it."""
    parts = [read_arrivals(trace, count // 2) for trace in traces]
    slo = targets_of([arrival for part in parts for arrival in part], targets, device)
    joined: list[Arrival] = []
    for part in parts:
        scene = Scene("", targets, False, with_slo(part, slo), device, num_workers)
        begin_s = joined[-1].arrival_s if joined else 0.0
        at_capacity = scale_rate(scene.arrivals, scene.capacity(None))
        joined += [replace(a, arrival_s=begin_s + a.arrival_s) for a in at_capacity]
    return joined


def make_scene(
    trace: str, targets: str, noisy: bool, device: DeviceProfile, num_workers: int, count: int
) -> Scene:
    """A scene of the table."""
    if trace in PHASES:
        arrivals = phases(PHASES[trace], targets, device, num_workers, count)
    else:
        arrivals = read_arrivals(trace, count)
        arrivals = with_slo(arrivals, targets_of(arrivals, targets, device))
    return Scene(trace, targets, noisy, arrivals, device, num_workers)


def measure(
    trace: str, targets: str, noisy: bool, device: DeviceProfile, num_workers: int, count: int
) -> dict[str, Any]:
    """One row of the table."""
    began_s = time.monotonic()
    scene = make_scene(trace, targets, noisy, device, num_workers, count)
    alone = scene.capacity(None)
    ours = scene.capacity(StagePolicy) / alone
    fixed = {
        f"fixed {share}": scene.capacity(partial(FixedShare, share)) / alone
        for share in FIXED_SHARES
    }
    above = 1.1 * alone
    without, with_it = scene.run(None, above).summary, scene.run(CountingPolicy, above).summary
    counted = _counting.pop()
    row = {
        "trace": trace + (", noisy" if noisy else ""),
        "targets": targets,
        "alone": alone,
        "ours": ours,
        **fixed,
        "ttft met alone": without.ttft_attainment,
        "tpot met alone": without.tpot_attainment,
        "ttft met": with_it.ttft_attainment,
        "tpot met": with_it.tpot_attainment,
        "changes": sum(counted.num_changes.values()),
        "least share": counted.least,
    }
    say(f"{row['trace']} {targets}: {ours:.3f}, {fixed}, {time.monotonic() - began_s:.0f} s")
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The keys of the summary."""
    ratios = [row["ours"] for row in rows]
    return {
        "capacity_geomean": statistics.geometric_mean(ratios),
        "capacity_min": min(ratios),
        "capacity_max": max(ratios),
        "num_gains": sum(ratio >= GAIN for ratio in ratios),
        "fixed_max": max(row[f"fixed {share}"] for row in rows for share in FIXED_SHARES),
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="ascend-910b-llama-3-8b")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--requests", type=int, default=500, help="of each trace")
    traces = (*TRACES, *PHASES)
    parser.add_argument("--traces", nargs="+", default=traces, choices=traces)
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    if not has_traces():
        raise SystemExit("there are no traces; set XYSERVE_DATA to a folder with the data sets")
    device = read_device(options.device)
    scenes = [
        (trace, targets, False, device, options.workers, options.requests)
        for trace in (options.traces if "exact" in options.steps else ())
        for targets in TARGETS
        if targets == "tight" or trace in TRACES
    ]
    scenes += [
        (trace, "tight", True, device, options.workers, options.requests * 3 // 5)
        for trace in (options.traces if "noisy" in options.steps else ())
        if trace != "mooncake_conversation"
    ]
    with multiprocessing.Pool(options.processes, maxtasksperchild=1) as pool:
        rows = pool.starmap(measure, scenes, chunksize=1)
    title = "Capacity, in multiples of that of workers that each decide alone"
    publish(title, rows, summarise(rows), options.json)


if __name__ == "__main__":
    main()
