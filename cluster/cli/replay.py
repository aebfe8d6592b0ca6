"""`xyserve replay`: plan a worker's recorded steps again, and compare the plans."""

import statistics
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import fail
from scheduler.replay import replay as replay_steps
from scheduler.task import BatchPlan


def replay(
    record: Annotated[
        Path, typer.Argument(help="A file written by a worker with `worker.record`.", exists=True)
    ],
) -> None:
    """Plan each step of RECORD again and compare the plans.

    Exits with status 1 if a plan differs: either the scheduler's code is not the code that
    was recorded, or the record was changed.

    Example: xyserve replay decisions.8x1k2.jsonl
    """
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
