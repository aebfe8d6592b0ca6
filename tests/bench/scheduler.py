"""How much load each step scheduler carries before requests miss their targets, simulated.

    python -m tests.bench.scheduler --json scheduler.json

Capacity is the highest rate at which 90% of the requests meet both of their targets: time to first
token, and mean time per output token. All schedulers plan with the device's own cost model, on the
same requests. A baseline's capacity is the highest over its settings:

    static          vLLM's: budgets of 512, 1024, 2048, 8192 tokens
    decode_first    Sarathi-Serve's: budgets of 256, 512, 1024, 2048
    prefill_first   of XY-Serve's paper: 512, 2048, 4096, with 64 slots, and 2048 with 256

A scene is a trace and a pair of targets. Targets are multiples of the unloaded device's times:
the time to first token of the trace's 90th percentile prompt (of at least 1,000 tokens), and a step
that decodes 16 requests of the trace's mean length. `tight` is 4 and 2.5 times these, `loose` 12
and 6 times. The rate is changed by scaling the times between arrivals, and searched by bisection,
to 2%. The calls of the agent trace arrive at their recorded times too: if each waited for the
answer to the one before, a slow scheduler would lower its own load.

It takes about 15 minutes on two cores.

Keys of the summary: `TRACE_TARGETS` is the hybrid scheduler's capacity over the best baseline's,
`capacity_geomean` and `capacity_min` are over all scenes.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scheduler.policy import StepPolicy
from scheduler.request import Slo
from scheduler.simulation.arrivals import (
    Arrival,
    clip_lengths,
    scale_rate,
    with_max_tokens,
    with_slo,
)
from scheduler.simulation.device import DeviceProfile, read_device
from scheduler.simulation.simulator import SimulationConfig, simulate
from scheduler.simulation.traces import read_trace
from tests.bench.report import make_parser, publish, say
from tests.workload import find_trace, has_traces

TRACES = ("azure_2023_code", "azure_2023_conv", "mooncake_conversation", "agent_prefix")
TARGETS = {"tight": (4.0, 2.5), "loose": (12.0, 6.0)}
ATTAINMENT = 0.9
PRECISION = 1.02
MAX_RATE = 1000
"""Factor on a trace's rate above which its requests are too few to load the device."""
MAX_MODEL_LEN = 131_072
MAX_TOKENS = 2048

HYBRID = StepPolicy()
BASELINES = (
    *(StepPolicy(name="static", budget=budget) for budget in (512, 1024, 2048, 8192)),
    *(StepPolicy(name="decode_first", budget=budget) for budget in (256, 512, 1024, 2048)),
    *(
        StepPolicy(name="prefill_first", budget=budget, reserved_slots=slots)
        for budget, slots in ((512, 64), (2048, 64), (4096, 64), (2048, 256))
    ),
)


@dataclass(frozen=True, slots=True)
class Scene:
    """Requests with targets, and where they are served."""

    trace: str
    targets: str
    arrivals: list[Arrival]
    device: DeviceProfile
    num_workers: int

    def attains(self, policy: StepPolicy, rate: float) -> bool:
        """Whether enough requests meet their targets at this rate."""
        result = simulate(
            scale_rate(self.arrivals, rate),
            self.device,
            SimulationConfig(policy=policy, num_workers=self.num_workers),
        )
        met = statistics.mean(outcome.met_targets for outcome in result.outcomes)
        return met >= ATTAINMENT

    def capacity(self, policy: StepPolicy, known: float = 0.0) -> float:
        """The highest rate that `policy` attains, or `known` if that is as high."""
        if known and not self.attains(policy, known * PRECISION):
            return known
        low, high = known * PRECISION or 1e-3, (known or 1.0) * 2
        while self.attains(policy, high):
            low, high = high, high * 2
            if high > MAX_RATE:
                raise SystemExit(f"{self.trace}: too few requests to load {self.device.name}")
        return bisected(lambda rate: self.attains(policy, rate), low, high, PRECISION)


def bisected(attains: Callable[[float], bool], low: float, high: float, precision: float) -> float:
    """The highest rate that is attained, to within a factor; `low` is, and `high` is not."""
    while high / low > precision:
        middle = (low * high) ** 0.5
        if attains(middle):
            low = middle
        else:
            high = middle
    return low


def open_loop(sessions: list[Arrival]) -> list[Arrival]:
    """All calls at their recorded times, whether or not the one before has been answered."""
    times: dict[str, float] = {}
    for arrival in sessions:
        begin_s = times[arrival.after] if arrival.after else 0.0
        times[arrival.request.request_id] = begin_s + arrival.arrival_s
    timed = [
        replace(arrival, arrival_s=times[arrival.request.request_id], after=None)
        for arrival in sessions
    ]
    return sorted(timed, key=lambda arrival: arrival.arrival_s)


def targets_of(arrivals: Sequence[Arrival], targets: str, device: DeviceProfile) -> Slo:
    """The targets of these requests."""
    prompts = sorted(arrival.request.num_prompt_tokens for arrival in arrivals)
    prompt = max(1000, prompts[int(0.9 * len(prompts))])
    length = round(
        statistics.mean(a.request.num_prompt_tokens + a.num_output_tokens / 2 for a in arrivals)
    )
    prefill, decode = device.cost_model.shape(), device.cost_model.shape()
    prefill.add(prompt, prompt, 1)
    for _ in range(16):
        decode.add(1, length, 1)
    ttft_factor, tpot_factor = TARGETS[targets]
    return Slo(
        ttft_s=ttft_factor * device.cost_model.predict(prefill),
        tpot_s=tpot_factor * device.cost_model.predict(decode),
    )


def make_scene(
    trace: str, targets: str, device: DeviceProfile, num_workers: int, num_requests: int
) -> Scene:
    """The first requests of a trace, with targets."""
    arrivals = clip_lengths(read_trace(find_trace(trace)), MAX_MODEL_LEN)
    arrivals = with_max_tokens(open_loop(arrivals)[:num_requests], MAX_TOKENS)
    slo = targets_of(arrivals, targets, device)
    return Scene(trace, targets, with_slo(arrivals, slo), device, num_workers)


def measure(scene: Scene) -> dict[str, Any]:
    """One row of the table: the capacity of each contestant, in the trace's own rate."""
    capacities: dict[str, float] = {}
    best: dict[str, StepPolicy] = {}
    for policy in BASELINES:
        before = capacities.get(policy.name, 0.0)
        capacities[policy.name] = scene.capacity(policy, before)
        if capacities[policy.name] > before:
            best[policy.name] = policy
    baseline = max(capacities, key=lambda name: capacities[name])
    hybrid = scene.capacity(HYBRID)
    slo = scene.arrivals[0].request.slo
    say(f"{scene.trace} {scene.targets}: {hybrid / capacities[baseline]:.2f}")
    return {
        "trace": scene.trace,
        "targets": scene.targets,
        "device": f"{scene.num_workers} x {scene.device.name}",
        "ttft_s": slo.ttft_s,
        "tpot_ms": 1000 * slo.tpot_s,
        "hybrid": hybrid,
        **capacities,
        "best baseline": f"{baseline}, budget {best[baseline].budget}"
        + (f", {best[baseline].reserved_slots} slots" if baseline == "prefill_first" else ""),
        "ratio": hybrid / capacities[baseline],
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="ascend-910b-llama-3-8b")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--requests", type=int, default=500, help="of each trace")
    parser.add_argument("--traces", nargs="+", default=TRACES, choices=TRACES)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    if not has_traces():
        raise SystemExit("there are no traces; set XYSERVE_DATA to a folder with the data sets")
    device = read_device(options.device)
    scenes = [
        make_scene(trace, targets, device, options.workers, options.requests)
        for trace in options.traces
        for targets in TARGETS
    ]
    with multiprocessing.Pool(options.processes) as pool:
        rows = pool.map(measure, scenes, chunksize=1)
    ratios = [row["ratio"] for row in rows]
    summary = {f"{row['trace']}_{row['targets']}": row["ratio"] for row in rows}
    summary["capacity_geomean"] = statistics.geometric_mean(ratios)
    summary["capacity_min"] = min(ratios)
    publish("Capacity, in multiples of the trace's own rate", rows, summary, options.json)


if __name__ == "__main__":
    main()
