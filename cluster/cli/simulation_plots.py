"""Plots of simulations, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws without a screen

from matplotlib import pyplot
from matplotlib.axes import Axes

from scheduler.simulation.simulated_worker import StepRecord
from scheduler.simulation.simulator import SimulationResult

MAX_BARS = 2000
"""Steps that a timeline shows; more would be thinner than a line."""


def plot_timeline(steps: Sequence[StepRecord], path: Path, title: str) -> None:
    """Draw the tokens in each step of one worker, by stage, and below them the steps' durations."""
    _, (tokens, seconds) = pyplot.subplots(2, 1, figsize=(10, 6), sharex=True)
    shown = steps[:MAX_BARS]
    begins = [step.began_s for step in shown]
    stages = {
        "decode": [step.num_decode_tokens for step in shown],
        "verify": [step.num_verify_tokens for step in shown],
        "prefill": [step.num_prefill_tokens for step in shown],
    }
    stages = {name: counts for name, counts in stages.items() if any(counts)}
    tokens.stackplot(begins, *stages.values(), labels=list(stages), step="post")
    tokens.set(ylabel="tokens per step", title=title, yscale="symlog")
    tokens.legend(loc="upper right")
    seconds.step(begins, [step.seconds * 1e3 for step in shown], where="post", label="measured")
    predicted = [step.predicted_s * 1e3 for step in shown]
    seconds.step(begins, predicted, where="post", label="predicted", linestyle=":")
    seconds.set(ylabel="ms per step", xlabel="time in s")
    seconds.legend(loc="upper right")
    _save(path)


def plot_latencies(results: Mapping[str, SimulationResult], path: Path) -> None:
    """Draw the cumulative distribution of the requests' latencies for each policy."""
    _, (ttft, tpot) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name, result in results.items():
        _distribution(ttft, [outcome.ttft_s * 1e3 for outcome in result.outcomes], name)
        several = [outcome for outcome in result.outcomes if outcome.num_output_tokens > 1]
        _distribution(tpot, [outcome.tpot_s * 1e3 for outcome in several], name)
    ttft.set(xlabel="time to first token in ms", ylabel="share of requests", xscale="log")
    tpot.set(xlabel="time per output token in ms", xscale="log")
    tpot.legend()
    _save(path)


def plot_goodput(goodput: Mapping[str, Sequence[tuple[float, float, float]]], path: Path) -> None:
    """Draw goodput and attainment against load.

    `goodput` has for each policy one point per load: requests per second offered, requests per
    second that met their targets, and their share.
    """
    _, (rate, share) = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True)
    for name, points in goodput.items():
        offered = [point[0] for point in points]
        rate.plot(offered, [point[1] for point in points], marker="o", label=name)
        share.plot(offered, [point[2] for point in points], marker="o", label=name)
    rate.set(xlabel="requests/s offered", ylabel="requests/s within their targets")
    share.set(xlabel="requests/s offered", ylabel="share within their targets", ylim=(0, 1.02))
    share.legend()
    _save(path)


def _distribution(axes: Axes, values: Sequence[float], name: str) -> None:
    shares = [(index + 1) / len(values) for index in range(len(values))]
    axes.step(sorted(values), shares, where="post", label=name)


def _save(path: Path) -> None:
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)
    pyplot.close()
