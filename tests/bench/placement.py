"""How much load each way of placing requests carries before they miss their targets, simulated.

    python -m tests.bench.placement --json placement.json

Capacity is the highest rate, in multiples of the trace's own, at which 90% of the requests meet
both of their targets; one that is refused has missed them. All ways see the same: the loads and
prefix caches of the workers as they reported them up to a quarter of a second ago, and what was
placed since. All workers plan their steps by the hybrid scheduler.

    ours              as the GlobalScheduler: predicted seconds, and early refusal
    placement alone   the same without refusal
    round robin, random, session hash
    least tokens      outstanding, as XY-Serve placed before
    power of two      of random workers the one with fewer requests: Ray Serve
    affinity          longest prefix, unless loads differ by more than a threshold: SGLang, Ray
                      Serve LLM; thresholds of 4, 16 and 64 requests, and none
    weighted          tokens to prefill and tokens held, in one sum: Dynamo, llm-d; weights 1, 4, 16

The best of the others at its best setting is the rival. A scene is a trace, a number of workers and
the state of their caches: in `warm` ones the first third of the requests is served and not counted.
Traces of few requests are repeated for many workers, each copy with prompts of its own, and starts
at another time. The agents' calls come at recorded times, as in `tests.bench.scheduler`, or, in
`agents_closed`, each follows the answer to the one before, and the rate is that of sessions.
Targets are those called `tight` in `tests.bench.scheduler`.

Keys of the summary: `capacity_geomean_reuse` is the geometric mean of our capacity over the rival's
in all scenes of traces with reuse, `capacity_min` the lowest over all scenes, `ttft_ratio` the
geometric mean of our p90 TTFT over the rival's at 80% of the rival's capacity (a refused request
counts as infinitely late; where more than a tenth is refused it has no p90, and is left out),
`overload_met` the lowest share of the admitted requests that met both targets at three times our
capacity, `alone_geomean_reuse` and `alone_min` are for placement alone,
`balance_max` is the highest ratio of busy seconds between two workers there, and `longest_ttft`
the longest time to first token of a request that was served, in multiples of its target.
The keys of `tests.bench.placement_live`, which runs last, follow; `--no-live` leaves it out.
"""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from scheduler.admission import Admission
from scheduler.request import Slo
from scheduler.simulation.arrivals import (
    Arrival,
    clip_lengths,
    scale_rate,
    with_max_tokens,
    with_slo,
)
from scheduler.simulation.device import DeviceProfile, read_device
from scheduler.simulation.placers import (
    LeastOutstandingTokens,
    Placer,
    PowerOfTwo,
    PredictedSeconds,
    PrefixAffinity,
    RandomWorker,
    RoundRobin,
    SessionHash,
    WeightedScore,
)
from scheduler.simulation.simulator import SimulationConfig, SimulationResult, simulate
from scheduler.simulation.summary import Outcome
from scheduler.simulation.traces import read_trace
from tests.bench import placement_live
from tests.bench.report import make_parser, publish, say
from tests.bench.scheduler import (
    ATTAINMENT,
    MAX_MODEL_LEN,
    MAX_TOKENS,
    bisected,
    open_loop,
    targets_of,
)
from tests.workload import find_trace, has_traces

PRECISION = 1.03
MAX_RATE = 3000.0
"""Factor on a trace's rate above which its requests are too few to load the workers."""
WARM_SHARE = 1 / 3
"""Share of the requests that warm the caches."""
COPY_IDS = 10_000_000
"""Distance of the ids of blocks of two copies of a trace."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace, and how much of it a scene takes."""

    trace: str
    reuse: bool
    num_requests: int
    """For each worker."""
    closed: bool = False


WORKLOADS = {
    "mooncake_conversation": Workload("mooncake_conversation", True, 250),
    "mooncake_synthetic": Workload("mooncake_synthetic", True, 240),
    "agents": Workload("agent_prefix", True, 500),
    "agents_closed": Workload("agent_prefix", True, 2700, closed=True),
    "servegen": Workload("servegen_m_small_arrivals", False, 300),
    "azure_2023_conv": Workload("azure_2023_conv", False, 300),
    "azure_2023_code": Workload("azure_2023_code", False, 300),
}
MAX_REQUESTS = {4: 12_000, 8: 12_000, 64: 6_000}
"""Requests of a scene at most, by number of workers."""


def rivals(sessions: Mapping[str, str]) -> dict[str, list[Callable[[], Placer]]]:
    """The ways of others, with their settings; first those that usually are best, as one that is
    worse than those before it takes a single simulation."""
    return {
        "affinity": [
            partial(PrefixAffinity, 0.3, 64),
            partial(PrefixAffinity, 0.5, 16),
            partial(PrefixAffinity, 0.3, 4),
        ],
        "weighted": [partial(WeightedScore, weight) for weight in (4.0, 1.0, 16.0)],
        "affinity alone": [partial(PrefixAffinity, 0.3, math.inf)],
        "least tokens": [LeastOutstandingTokens],
        "power of two": [PowerOfTwo],
        "round robin": [RoundRobin],
        "random": [RandomWorker],
        "session hash": [partial(SessionHash, sessions)],
    }


@dataclass(slots=True)
class Scene:
    """Requests with targets, and where they are served."""

    name: str
    num_workers: int
    warm: bool
    device: DeviceProfile
    arrivals: list[Arrival]
    sessions: dict[str, str]
    counted: set[str] = field(init=False)
    """Requests that are counted, by id."""

    def __post_init__(self) -> None:
        first = int(WARM_SHARE * len(self.arrivals)) if self.warm else 0
        self.counted = {arrival.request.request_id for arrival in self.arrivals[first:]}

    def run(self, placer: Callable[[], Placer], rate: float) -> SimulationResult:
        """Serve the requests at a rate."""
        return simulate(
            scale_rate(self.arrivals, rate),
            self.device,
            SimulationConfig(num_workers=self.num_workers, placer=placer),
        )

    def outcomes(self, result: SimulationResult) -> list[Outcome]:
        """The outcomes that count."""
        return [outcome for outcome in result.outcomes if outcome.request_id in self.counted]

    def attains(self, placer: Callable[[], Placer], rate: float) -> bool:
        """Whether enough requests meet their targets at this rate."""
        outcomes = self.outcomes(self.run(placer, rate))
        return statistics.mean(outcome.met_targets for outcome in outcomes) >= ATTAINMENT

    def capacity(self, placer: Callable[[], Placer], start: float, known: float = 0.0) -> float:
        """The highest rate that is attained, or `known` if that is as high."""
        if known and not self.attains(placer, known * PRECISION):
            return known
        low, high = known * PRECISION, max(known, start) * 1.5
        if not known:
            while not self.attains(placer, start):
                start, high = start / 2, start
            low = start
        while high < MAX_RATE and self.attains(placer, high):
            low, high = high, high * 1.5
        return bisected(lambda rate: self.attains(placer, rate), low, high, PRECISION)


def copy_of(arrivals: list[Arrival], number: int, shift_s: float) -> list[Arrival]:
    """The same lengths at other times, with other prompts."""
    name = f"copy{number}-"
    return [
        replace(
            arrival,
            request=replace(arrival.request, request_id=name + arrival.request.request_id),
            arrival_s=arrival.arrival_s + (0.0 if arrival.after else shift_s),
            after=arrival.after and name + arrival.after,
            hash_ids=tuple(block + number * COPY_IDS for block in arrival.hash_ids),
        )
        for arrival in arrivals
    ]


def read_arrivals(workload: Workload, num_requests: int) -> list[Arrival]:
    """So many requests of a trace, repeated if it has fewer."""
    arrivals: list[Arrival] = []
    for number in range(100):
        path = find_trace(workload.trace)
        one = clip_lengths(read_trace(path, seed=number), MAX_MODEL_LEN)
        if not workload.closed:
            one = open_loop(one)
            one = [replace(a, arrival_s=a.arrival_s - one[0].arrival_s) for a in one]
        span_s = max(a.arrival_s for a in one if a.after is None)
        arrivals += copy_of(one, number, number * span_s * 0.618 % span_s) if number else one
        if len(arrivals) >= num_requests:
            break
    if workload.closed:
        return arrivals
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)[:num_requests]


def make_scene(name: str, num_workers: int, warm: bool, device: DeviceProfile) -> Scene:
    """The requests of a scene, with targets."""
    workload = WORKLOADS[name]
    num_requests = min(workload.num_requests * num_workers, MAX_REQUESTS[num_workers])
    arrivals = with_max_tokens(read_arrivals(workload, num_requests), MAX_TOKENS)
    slo: Slo = targets_of(arrivals, "tight", device)
    return Scene(
        name,
        num_workers,
        warm,
        device,
        with_slo(arrivals, slo),
        {arrival.request.request_id: _session_of(arrival) for arrival in arrivals},
    )


def _session_of(arrival: Arrival) -> str:
    """The session by the trace's names; in Mooncake's, which has none, all whose prompts begin with
    the same two blocks."""
    request_id = arrival.request.request_id
    if "mooncake" in request_id and len(arrival.hash_ids) > 1:
        return str(arrival.hash_ids[1])
    return request_id.rpartition("-")[0] if "mooncake" not in request_id else request_id


def measure(scene: Scene) -> dict[str, Any]:
    """One row of the table."""
    began_s = time.monotonic()
    best, best_name = 0.0, ""
    best_placer: Callable[[], Placer] = RoundRobin
    start = float(scene.num_workers)
    for name, settings in rivals(scene.sessions).items():
        for placer in settings:
            capacity = scene.capacity(placer, start, best)
            if capacity > best:
                best, best_placer, best_name = capacity, placer, name
    ours = scene.capacity(_ours, best)
    alone = scene.capacity(PredictedSeconds, best)
    at = scene.run(_ours, 0.8 * best), scene.run(best_placer, 0.8 * best)
    overload = [o for o in scene.run(_ours, 3 * ours).outcomes if not o.is_refused]
    ttft = [_p90_ttft_s(scene.outcomes(result)) for result in at]
    row = {
        "trace": scene.name,
        "workers": scene.num_workers,
        "caches": "warm" if scene.warm else "cold",
        "rival": best_name,
        "capacity of rival": best,
        "ours": ours / best,
        "placement alone": alone / best,
        "p90 ttft of rival": ttft[1],
        "ttft ratio": ttft[0] / ttft[1],
        "hits of rival": at[1].summary.prefix_hit_share,
        "hits": at[0].summary.prefix_hit_share,
        "refused": statistics.mean(o.is_refused for o in at[0].outcomes),
        "met at overload": statistics.mean(o.met_targets for o in overload),
        "balance": _balance(at[0]),
        "longest ttft": max(o.ttft_s / o.slo.ttft_s for o in at[0].outcomes),
    }
    say(
        f"{scene.name} {scene.num_workers} {row['caches']}: {row['ours']:.2f}, alone "
        f"{row['placement alone']:.2f}, ttft {row['ttft ratio']:.2f} of {best_name}, "
        f"{time.monotonic() - began_s:.0f} s"
    )
    return row


def _ours() -> Placer:
    return PredictedSeconds(Admission())


def _p90_ttft_s(outcomes: list[Outcome]) -> float:
    times = [math.inf if outcome.is_refused else outcome.ttft_s for outcome in outcomes]
    return float(np.percentile(times, 90, method="higher"))


def _balance(result: SimulationResult) -> float:
    """The most tokens that a worker computed over the fewest."""
    tokens: dict[str, int] = {}
    for outcome in result.outcomes:
        if not outcome.is_refused:
            computed = outcome.num_prompt_tokens - outcome.num_cached_tokens
            tokens[outcome.worker_id] = tokens.get(outcome.worker_id, 0) + computed
    return max(tokens.values()) / max(1, min(tokens.values()))


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The keys of the summary."""
    reuse = [row for row in rows if WORKLOADS[row["trace"]].reuse]
    summary = {
        "capacity_min": min(row["ours"] for row in rows),
        "alone_min": min(row["placement alone"] for row in rows),
        "ttft_ratio": statistics.geometric_mean(
            row["ttft ratio"] for row in rows if math.isfinite(row["ttft ratio"])
        ),
        "overload_met": min(row["met at overload"] for row in rows),
        "balance_max": max(row["balance"] for row in rows),
        "longest_ttft": max(row["longest ttft"] for row in rows),
    }
    if reuse:
        summary["capacity_geomean_reuse"] = statistics.geometric_mean(r["ours"] for r in reuse)
        summary["alone_geomean_reuse"] = statistics.geometric_mean(
            row["placement alone"] for row in reuse
        )
    return summary


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="ascend-910b-llama-3-8b")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8, 64])
    parser.add_argument("--traces", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--caches", nargs="+", default=["cold", "warm"], choices=["cold", "warm"])
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--no-live", action="store_true", help="only simulate")
    placement_live.add_options(parser)
    options = parser.parse_args()
    if not has_traces():
        raise SystemExit("there are no traces; set XYSERVE_DATA to a folder with the data sets")
    device = read_device(options.device)
    scenes = [
        (trace, num_workers, caches == "warm", device)
        for num_workers in sorted(options.workers, reverse=True)
        for trace in options.traces
        for caches in options.caches
        if caches == "cold" or WORKLOADS[trace].reuse
    ]
    with multiprocessing.Pool(options.processes) as pool:
        rows = pool.starmap(_measure, scenes, chunksize=1)
    summary = summarise(rows)
    if not options.no_live:
        summary |= placement_live.measure(options)[1]
    publish("Capacity, in multiples of the best rival's", rows, summary, options.json)


def _measure(trace: str, num_workers: int, warm: bool, device: DeviceProfile) -> dict[str, Any]:
    return measure(make_scene(trace, num_workers, warm, device))


if __name__ == "__main__":
    main()
