"""Tables and plots of simulations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scheduler.simulation.compare import Run
from scheduler.simulation.device import DeviceProfile, device_names, read_device

Cell = Callable[[Run], str]
"""Formats one figure of a run."""


def _number(figure: str, form: str) -> Cell:
    return lambda run: format(getattr(run.result.summary, figure), form)


def _ms(part: str, figure: str) -> Cell:
    return lambda run: f"{getattr(getattr(run.result.summary, part), figure) * 1e3:,.1f}"


ROWS: dict[str, Cell] = {
    "requests/s offered": lambda run: f"{run.offered_rps:.2f}",
    "requests/s": _number("requests_per_s", ".2f"),
    "good requests/s": _number("goodput_rps", ".2f"),
    "within both targets": _number("attainment", ".1%"),
    "within TTFT": _number("ttft_attainment", ".1%"),
    "within TPOT": _number("tpot_attainment", ".1%"),
    **{
        f"{name} {figure}, ms": _ms(part, figure)
        for name, part in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("end to end", "e2e_s"))
        for figure in ("mean", "p50", "p90", "p99")
    },
    "output tokens/s": _number("output_tokens_per_s", ",.0f"),
    "makespan, s": _number("makespan_s", ",.1f"),
    "busy": _number("utilisation", ".1%"),
    "requests per step": _number("mean_batch", ".1f"),
    "tokens per step": _number("mean_step_tokens", ".1f"),
    "preemptions": _number("num_preemptions", "d"),
    "prompt from cache": _number("prefix_hit_share", ".1%"),
}
"""Rows of the table of one load; each run is a column."""
SHORT_ROWS = (
    "requests/s offered",
    "good requests/s",
    "within both targets",
    "TTFT p50, ms",
    "TTFT p99, ms",
    "TPOT p50, ms",
    "TPOT p99, ms",
    "busy",
)
"""Columns of the table of several loads; each run is a row."""


def print_devices() -> None:
    """Print the device profiles that come with the package."""
    table = Table("device", "from", "KV tokens", "source", title="Device profiles")
    for name in device_names():
        profile = read_device(name)
        table.add_row(name, _origin(profile), f"{profile.num_kv_tokens:,}", profile.source)
    Console().print(table)


def print_runs(
    runs: Sequence[Run], profile: DeviceProfile, num_workers: int, num_requests: int
) -> None:
    """Print the runs side by side, or one below the other if there are several loads."""
    title = f"{num_requests} requests on {num_workers} x {profile.name} ({_origin(profile)})"
    if len({run.load for run in runs}) > 1:
        table = Table("policy", *SHORT_ROWS, title=title)
        for run in runs:
            table.add_row(run.label, *(ROWS[row](run) for row in SHORT_ROWS))
    else:
        table = Table("", *(run.label for run in runs), title=title)
        for row, cell in ROWS.items():
            table.add_row(row, *map(cell, runs))
    console = Console()
    console.print(table)
    classes = sorted({name for run in runs for name in run.result.by_class})
    if classes:
        shares = Table("class", *(run.label for run in runs), title="Share within both targets")
        for name in classes:
            cells = (f"{run.result.by_class[name].attainment:.1%}" for run in runs)
            shares.add_row(name or "none", *cells)
        console.print(shares)


def _origin(profile: DeviceProfile) -> str:
    return "modelled" if profile.modelled else "measured"


def write_plots(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Write the plots of the runs into an existing folder; the runs must have logged their steps.

    Goodput against load is plotted if there are several loads.
    """
    # Matplotlib takes about a second to import.
    from cluster.cli.simulation_plots import plot_goodput, plot_latencies, plot_timeline

    written = [folder / "latencies.png"]
    plot_latencies({run.label: run.result for run in runs}, written[0])
    for run in runs:
        worker_id, steps = next(iter(run.result.steps.items()))
        written.append(folder / f"timeline-{run.label.replace(' ', '-')}.png")
        plot_timeline(steps, written[-1], f"{run.label}, {worker_id}")
    if len({run.load for run in runs}) > 1:
        points: dict[str, list[tuple[float, float, float]]] = {}
        for run in sorted(runs, key=lambda run: run.load):
            summary = run.result.summary
            point = (run.offered_rps, summary.goodput_rps, summary.attainment)
            points.setdefault(run.policy, []).append(point)
        written.append(folder / "goodput.png")
        plot_goodput(points, written[-1])
    return written
