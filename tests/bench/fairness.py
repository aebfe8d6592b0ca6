"""What a flood of one tenant costs another, and whether shares follow weights, simulated.

    python -m tests.bench.fairness --json fairness.json

Two tenants share workers. `steady` asks for a fifth of what the workers can serve, first alone,
then beside `flood`, which asks for three times what they can, all at random times. Each scene has
its lengths of prompts and outputs, log-normal with a sigma of 0.6, and the device and its workers.
`ratio` is the 90th percentile of the time to first token of `steady` beside the flood, over that
alone; `ratio_before` is the same with placement that knows no tenants. `tokens_share` is what both
get of the workers' tokens per second, as a share of what the flood gets alone and without tenants.

Then two floods with weights 1 and 3, of which the first has requests three times as long:
`weighted` is what the second gets of the predicted device time, which should be 0.75.

It takes about four minutes on a core.

Keys of the summary: `worst_ratio` and `worst_share` over all scenes.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scheduler.fair_shares import FairShares, Share
from scheduler.fleet import Fleet
from scheduler.placement import Placed, Refused, WorkerLoad
from scheduler.request import Request, Slo
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.device import DeviceProfile, read_device
from scheduler.simulation.fair_placer import FairPlacer
from scheduler.simulation.placers import Placer, PredictedSeconds
from scheduler.simulation.simulator import SimulationConfig, SimulationResult, simulate
from tests.bench.report import make_parser, publish, say_row

SIGMA = 0.6
LONGEST = 6
"""Longest prompt and output, in medians."""
STEADY_SHARE = 0.2
FLOOD = 3.0
NUM_SERVED = 300
"""Requests that the workers can serve while a scene lasts."""
TYPICAL_TOKENS = 500


@dataclass(frozen=True, slots=True)
class Scene:
    """What two tenants ask for, and where."""

    name: str
    device: str
    num_workers: int
    num_prompt_tokens: int
    num_output_tokens: int
    slo: Slo

    def ask(
        self, tenant: str, rate: float, seconds: float, begin_s: float = 0.0, longer: float = 1.0
    ) -> list[Arrival]:
        """Requests of a tenant at random times."""
        draw = random.Random(f"{self.name} {tenant}")
        now = begin_s
        found: list[Arrival] = []
        while (now := now + draw.expovariate(rate)) < begin_s + seconds:
            num_prompt = _length(draw, self.num_prompt_tokens * longer)
            num_output = _length(draw, self.num_output_tokens * longer)
            request = Request(
                f"{tenant}{len(found)}",
                num_prompt,
                num_output,
                slo=self.slo,
                slo_class=tenant,
                tenant=tenant,
            )
            found.append(Arrival(request, now, num_output))
        return found


STANDARD = Slo(ttft_s=10.0, tpot_s=0.25)
CHAT = Slo(ttft_s=1.0, tpot_s=0.1)
CPU, NPU = "cpu-avx512-smollm2-135m", "ascend-910b-llama-3-8b"
SCENES = (
    Scene("CPU, chat", CPU, 2, 100, 60, STANDARD),
    Scene("CPU, long prompts", CPU, 2, 400, 20, STANDARD),
    Scene("CPU, long outputs", CPU, 2, 30, 200, STANDARD),
    Scene("910B, chat", NPU, 4, 1000, 200, CHAT),
    Scene("910B, long prompts", NPU, 4, 3000, 20, STANDARD),
)


def _length(draw: random.Random, median: float) -> int:
    length = draw.lognormvariate(math.log(median), SIGMA)
    return max(1, round(min(length, LONGEST * median)))


def token_s(device: DeviceProfile) -> float:
    """Seconds of a token in a full step."""
    shape = device.cost_model.shape()
    for _ in range(device.limits.max_num_seqs):
        shape.add(1, TYPICAL_TOKENS, 1)
    return device.cost_model.predict(shape) / device.limits.max_num_seqs


def serve(
    scene: Scene, arrivals: list[Arrival], make_placer: Callable[[], Placer] = PredictedSeconds
) -> SimulationResult:
    """Serve requests on the workers of a scene."""
    arrivals = sorted(arrivals, key=lambda arrival: arrival.arrival_s)
    config = SimulationConfig(num_workers=scene.num_workers, placer=make_placer)
    return simulate(arrivals, read_device(scene.device), config)


def p90_s(result: SimulationResult, tenant: str) -> float:
    """The 90th percentile of a tenant's times to first token; infinite if one was refused."""
    own = [outcome for outcome in result.outcomes if outcome.slo_class == tenant]
    if any(outcome.is_refused for outcome in own):
        return math.inf
    return float(np.percentile([outcome.ttft_s for outcome in own], 90))


def tokens_per_s(result: SimulationResult, until_s: float) -> float:
    """Tokens of what has ended until a time, per second."""
    ended = [one for one in result.outcomes if one.finish_s <= until_s and not one.is_refused]
    return sum(one.num_prompt_tokens + one.num_output_tokens for one in ended) / until_s


def measure(scene: Scene) -> dict[str, Any]:
    """The figures of one scene."""
    device_token_s = token_s(read_device(scene.device))

    def fair() -> FairPlacer:
        return FairPlacer(FairShares({"flood": 1.0, "steady": 1.0}), device_token_s)

    probe = serve(scene, scene.ask("flood", 1e4, NUM_SERVED / 1e4))
    capacity = probe.summary.requests_per_s
    seconds = NUM_SERVED / capacity
    steady = scene.ask("steady", STEADY_SHARE * capacity, seconds, begin_s=0.2 * seconds)
    flood = scene.ask("flood", FLOOD * capacity, 1.3 * seconds)
    quiet_s = p90_s(serve(scene, steady, fair), "steady")
    beside, before = serve(scene, steady + flood, fair), serve(scene, steady + flood)
    alone = serve(scene, flood)
    return {
        "scene": scene.name,
        "capacity_rps": capacity,
        "quiet_p90_ms": quiet_s * 1e3,
        "beside_p90_ms": p90_s(beside, "steady") * 1e3,
        "ratio": p90_s(beside, "steady") / quiet_s,
        "ratio_before": p90_s(before, "steady") / quiet_s,
        "tokens_share": tokens_per_s(beside, 1.3 * seconds) / tokens_per_s(alone, 1.3 * seconds),
        "weighted": weighted(scene, capacity, device_token_s),
    }


@dataclass(slots=True)
class WatchedPlacer(FairPlacer):
    """Remembers what tenants had when requests were last asked for by both."""

    until_s: float = math.inf
    latest: dict[str, Share] = field(default_factory=dict)

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed | Refused:
        """As ours does."""
        if now <= self.until_s:
            self.latest = self.shares.shares()
        return FairPlacer.choose(self, request, loads, fleet, now)


def weighted(scene: Scene, capacity: float, device_token_s: float) -> float:
    """What a flood of weight 3 gets of the device time beside one of weight 1."""
    seconds = NUM_SERVED / capacity
    shares = FairShares({"one": 1.0, "three": 3.0})
    placer = WatchedPlacer(shares, device_token_s, until_s=seconds)
    one = scene.ask("one", FLOOD * capacity / 3, seconds, longer=3.0)
    three = scene.ask("three", FLOOD * capacity, seconds)
    serve(scene, one + three, lambda: placer)
    had_s = {name: share.attained_s + share.running_s for name, share in placer.latest.items()}
    return had_s["three"] / sum(had_s.values())


def main() -> None:
    """Measure all scenes."""
    options = make_parser(__doc__).parse_args()
    rows = []
    for scene in SCENES:
        rows.append(measure(scene))
        say_row(rows[-1])
    publish(
        "A flood beside a steady tenant",
        rows,
        {
            "worst_ratio": max(row["ratio"] for row in rows),
            "worst_share": min(row["tokens_share"] for row in rows),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
