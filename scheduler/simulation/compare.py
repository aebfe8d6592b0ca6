"""Policies compared: each simulated on the same arrivals, at one or more rates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from scheduler.policy import StepPolicy
from scheduler.simulation.device import DeviceProfile
from scheduler.simulation.simulator import SimulationResult, Speculation, simulate
from scheduler.simulation.trace import Arrival, scale_rate


@dataclass(frozen=True, slots=True)
class Run:
    """One of the simulations that are compared."""

    policy: str
    load: float
    """Factor on the arrivals' rate."""
    offered_rps: float
    """Requests per second that arrived."""
    result: SimulationResult

    @property
    def label(self) -> str:
        """The name by which tables and plots show it."""
        return run_label(self.policy, self.load)


def run_label(policy: str, load: float) -> str:
    """A policy's name, followed by the load where it is not 1, e.g. `hybrid x0.5`."""
    return policy if load == 1 else f"{policy} x{load:g}"


def compare(
    arrivals: Sequence[Arrival],
    device: DeviceProfile,
    policies: Sequence[StepPolicy],
    loads: Sequence[float],
    *,
    num_workers: int = 1,
    speculation: Speculation | None = None,
    noise: float = 0.0,
    seed: int = 0,
    log_steps: bool = False,
    on_progress: Callable[[str, float], None] = lambda label, share: None,
) -> list[Run]:
    """Simulate each policy at each load; `on_progress` is called with a run's label and progress.

    ValueError or SimulationError as `simulate` raises them.
    """
    runs = []
    for policy in policies:
        for load in loads:
            scaled = scale_rate(arrivals, load)
            result = simulate(
                scaled,
                device,
                policy=policy,
                num_workers=num_workers,
                speculation=speculation,
                noise=noise,
                seed=seed,
                log_steps=log_steps,
                on_progress=partial(on_progress, run_label(policy.name, load)),
            )
            runs.append(Run(policy.name, load, _offered_rps(scaled, result), result))
    return runs


def _offered_rps(arrivals: Sequence[Arrival], result: SimulationResult) -> float:
    """Requests per second that arrived; for closed sessions, those that were served."""
    if any(arrival.after for arrival in arrivals):
        return result.summary.requests_per_s
    times = [arrival.arrival_s for arrival in arrivals]
    span_s = max(times) - min(times)
    return len(times) / span_s if span_s else float(len(times))


def to_dict(runs: Sequence[Run], device: DeviceProfile, num_workers: int) -> dict[str, Any]:
    """All figures of a comparison as JSON can hold them, request by request."""
    return {
        "device": device.name,
        "device_source": device.source,
        "modelled": device.modelled,
        "num_workers": num_workers,
        "runs": [
            {"load": run.load, "offered_rps": run.offered_rps, **run.result.to_dict()}
            for run in runs
        ],
    }
