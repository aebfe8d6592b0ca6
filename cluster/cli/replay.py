"""`xyserve replay`: make recorded decisions again, and compare."""

import statistics
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import fail
from cluster.placement.record import is_record, read_events
from scheduler.placement_replay import Decided
from scheduler.placement_replay import replay as replay_placements
from scheduler.replay import replay as replay_steps
from scheduler.task import BatchPlan


def replay(
    record: Annotated[
        Path,
        typer.Argument(
            help="A file written with `worker.record` or `placement.record`.", exists=True
        ),
    ],
) -> None:
    """Plan each step, or place each request, of RECORD again and compare.

    Exits with status 1 if a decision differs: either the scheduler's code is not the code that
    was recorded, or the record was changed.

    Example: xyserve replay decisions.8x1k2.jsonl
    """
    if is_record(record):
        _replay_placements(record)
        return
    num_steps = num_equal = 0
    first_difference: tuple[int, BatchPlan, BatchPlan] | None = None
    errors: list[float] = []
    try:
        with record.open() as lines:
            for report, plan in replay_steps(lines):
                num_steps += 1
                num_equal += plan == report.plan
                if plan != report.plan and first_difference is None:
                    first_difference = report.step, report.plan, plan
                if plan.tasks and report.measured_s > 0:
                    errors.append(abs(report.plan.predicted_s / report.measured_s - 1))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise fail(f"{record} is not a record that can be replayed: {error}") from error
    typer.echo(f"steps            {num_steps}\nequal plans      {num_equal}")
    if errors:
        errors.sort()
        typer.echo(
            f"predicted time   off by {statistics.median(errors):.0%} in the median step, "
            f"by {errors[len(errors) * 9 // 10]:.0%} or more in one step of ten"
        )
    if first_difference is not None:
        step, recorded, replayed = first_difference
        typer.echo(f"first difference in step {step}\n  recorded {recorded}\n  replayed {replayed}")
        raise typer.Exit(1)


def _replay_placements(record: Path) -> None:
    num_decisions = num_equal = 0
    first_difference: tuple[Decided, Decided] | None = None
    try:
        for recorded, replayed in replay_placements(read_events(record)):
            num_decisions += 1
            num_equal += replayed == recorded
            if replayed != recorded and first_difference is None:
                first_difference = recorded, replayed
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise fail(f"{record} is not a record that can be replayed: {error}") from error
    typer.echo(f"placements       {num_decisions}\nequal            {num_equal}")
    if first_difference is not None:
        recorded, replayed = first_difference
        typer.echo(f"first difference\n  recorded {recorded}\n  replayed {replayed}")
        raise typer.Exit(1)
