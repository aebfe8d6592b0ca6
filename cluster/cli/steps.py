"""`xyserve steps` and `xyserve explain`: look into the steps of a running app."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from scheduler.task import Stage

if TYPE_CHECKING:
    from workers.reports import Peaks, WorkerSteps
    from workers.step_history import StepSummary

POLL_S = 0.5

Address = Annotated[
    str | None, typer.Option(help="Address of the Ray cluster; this machine's if not given.")
]
AppName = Annotated[str, typer.Option("--app", help="Name of the app in its config file.")]


def steps(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show new ones as they come.")] = (
        False
    ),
    last: Annotated[int, typer.Option(min=1, help="Steps of each worker to show.")] = 15,
    worker: Annotated[str, typer.Option(help="Only of workers whose id has this in it.")] = "",
    app_name: AppName = "xyserve",
    address: Address = None,
) -> None:
    """Show what the latest steps of a running app's workers were made of, and how long they took.

    Tokens stand as "tokens/requests" of each stage. "limit" is how long the
    step might last by the targets of those in it. "deferred" counts requests
    that got nothing, by reason. MFU and MBU are shares of the fastest
    arithmetic and reading that were measured on the device.

    Example: xyserve steps --follow
    """
    from cluster.client import XYServe

    console = Console(width=None if Console().is_terminal else 140)
    with XYServe.connect(address, app_name) as handle:

        def found() -> list[WorkerSteps]:
            return [one for one in handle.steps(0.0, last) if worker in one.worker_id]

        if not follow:
            console.print(*map(_table, found()), sep="\n")
            return
        # Ctrl-C is how one ends it.
        with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_side_by_side(found()), refresh=True)
                time.sleep(POLL_S)


def explain(
    request_id: Annotated[
        str, typer.Argument(help="The id of an answer, or of its header x-request-id.")
    ],
    each: Annotated[
        bool, typer.Option("--each", help="Show each step, not one row for alike ones.")
    ] = False,
    app_name: AppName = "xyserve",
    address: Address = None,
) -> None:
    """Tell what happened to a request: where it was placed, what it waited for, each of its steps.

    A part of the id is enough. Ingresses remember their latest 10,000
    requests and refusals, workers their latest 20,000 steps.

    Example: xyserve explain chatcmpl-0f3a --each
    """
    from cluster.client import XYServe
    from cluster.observe.explain import steps_table, tell, tell_refusal
    from cluster.observe.request_history import Refusal

    console = Console(width=None if Console().is_terminal else 140)
    with XYServe.connect(address, app_name) as handle:
        found = handle.explain(request_id)
    if not found:
        typer.echo(
            f"Error: no ingress remembers a request {request_id!r}: is it a part of an answer's "
            "id, of four characters or more, and has no ingress restarted since?",
            err=True,
        )
        raise typer.Exit(1)
    for one in found:
        if isinstance(one, Refusal):
            lines, tables = tell_refusal(one), []
        else:
            lines = tell(one)
            all_steps = [steps for trail in one.attempt_traces for steps in trail.steps.values()]
            tables = [steps_table(own, one.record.arrived_s, each) for own in all_steps]
        console.print(*lines, sep="\n", markup=False, highlight=False)
        console.print(*tables, sep="\n")


def _side_by_side(found: Sequence[WorkerSteps]) -> Table:
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
            *_shares(step, of_worker.peaks),
        )
    return table


def _tokens(step: StepSummary, stage: Stage) -> str:
    num_requests = step.num_requests.get(stage, 0)
    return f"{step.num_tokens[stage]}/{num_requests}" if num_requests else ""


def _shares(step: StepSummary, peaks: Peaks | None) -> tuple[str, str]:
    """Model FLOPs and model bandwidth utilisation."""
    if peaks is None:
        return "-", "-"
    mfu = step.num_flops / step.measured_s / peaks.flops_per_s
    mbu = step.num_bytes / step.measured_s / peaks.bytes_per_s
    return f"{mfu:.0%}", f"{mbu:.0%}"
