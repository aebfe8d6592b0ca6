"""`xyserve steps`: the latest steps of a running app's workers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.table import Table

from cluster.cli.options import Address, AppName, output_console
from scheduler.task import Stage

if TYPE_CHECKING:
    from workers.reports import Peaks, WorkerSteps
    from workers.step_history import StepSummary

POLL_S = 0.5
"""Time between two looks at the workers with --follow: about as fast as one can read."""


def steps(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep showing new steps, until Ctrl-C.")
    ] = False,
    last: Annotated[int, typer.Option(min=1, help="Steps of each worker to show.")] = 15,
    worker: Annotated[str, typer.Option(help="Only workers whose id contains this.")] = "",
    app_name: AppName = "xyserve",
    address: Address = None,
) -> None:
    """Show what the workers' latest steps contained, and how long they took.

    The column of each stage shows "tokens/requests". "limit" is the longest
    duration that meets the targets of all requests in the step. "deferred"
    counts the requests left out of the step, by reason. MFU and MBU are
    relative to the peak FLOP/s and bytes/s that were measured on the device.

    Example: xyserve steps --follow
    """
    # Importing Ray takes seconds.
    from cluster.client import XYServe

    console = output_console(width=140)
    with XYServe.connect(address, app_name) as handle:

        def found() -> list[WorkerSteps]:
            return [one for one in handle.steps(0.0, last) if worker in one.worker_id]

        if not follow:
            console.print(*map(_table, found()), sep="\n")
            return
        # Ctrl-C is the usual way to end it.
        with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_stacked(found()), refresh=True)
                time.sleep(POLL_S)


def _stacked(found: Sequence[WorkerSteps]) -> Table:
    grid = Table.grid()
    for of_worker in found:
        grid.add_row(_table(of_worker))
    return grid


def _table(of_worker: WorkerSteps) -> Table:
    stages = list(Stage)
    table = Table(
        "time", "step", *stages, "new", "predicted", "measured", "limit", "deferred", "MFU", "MBU",
        title=f"worker {of_worker.worker_id}",
        title_justify="left",
    )  # fmt: skip
    for step in of_worker.steps:
        table.add_row(
            time.strftime("%H:%M:%S", time.localtime(step.began_s)),
            str(step.step),
            *(_tokens(step, stage) for stage in stages),
            str(step.num_new_tokens),
            f"{1e3 * step.predicted_s:.1f} ms",
            f"{1e3 * step.measured_s:.1f} ms",
            "-" if step.limit_s == math.inf else f"{1e3 * step.limit_s:.0f} ms",
            " ".join(f"{reason} {number}" for reason, number in step.deferred.items()),
            *_utilisation(step, of_worker.peaks),
        )
    return table


def _tokens(step: StepSummary, stage: Stage) -> str:
    num_requests = step.num_requests.get(stage, 0)
    return f"{step.num_tokens[stage]}/{num_requests}" if num_requests else ""


def _utilisation(step: StepSummary, peaks: Peaks | None) -> tuple[str, str]:
    """Model FLOPs utilisation and model bandwidth utilisation."""
    if peaks is None:
        return "-", "-"
    mfu = step.num_flops / step.measured_s / peaks.flops_per_s
    mbu = step.num_bytes / step.measured_s / peaks.bytes_per_s
    return f"{mfu:.0%}", f"{mbu:.0%}"
