"""Policies compared: each simulated on the same arrivals, at one or more rates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from scheduler.policy import StepPolicy
from scheduler.simulation.arrivals import Arrival, scale_rate
from scheduler.simulation.device import DeviceProfile
from scheduler.simulation.simulator import SimulationConfig, SimulationResult, simulate


@dataclass(frozen=True, slots=True)
class Run:
    """One of the simulations compared."""

    policy: str
    load: float
    """Factor on the arrivals' rate."""
    offered_rps: float
    """Requests per second that arrived."""
    result: SimulationResult

    @property
    def label(self) -> str:
        """Its name in tables and plots."""
        return run_label(self.policy, self.load)


def run_label(policy: str, load: float) -> str:
    """A policy's name, followed by the load where it is not 1, e.g. `hybrid x0.5`."""
    return policy if load == 1 else f"{policy} x{load:g}"


def compare(
    arrivals: Sequence[Arrival],
    device: DeviceProfile,
    policies: Sequence[StepPolicy],
    loads: Sequence[float],
    config: SimulationConfig,
    *,
    on_progress: Callable[[str, float], None] = lambda label, share: None,
) -> list[Run]:
    """Simulate each policy at each load, with all else as in `config`.

    `on_progress` is called with a run's label and the share of it that is done. Raises ValueError
    or SimulationError as `simulate` does.
    """
    runs = []
    for policy in policies:
        for load in loads:
            scaled = scale_rate(arrivals, load)
            result = simulate(
                scaled,
                device,
                replace(config, policy=policy),
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
