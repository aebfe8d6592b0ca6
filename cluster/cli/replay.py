"""`xyserve replay`: a worker's recorded decisions, taken again."""

import statistics
from pathlib import Path
from typing import Annotated

import typer

from scheduler.replay import replay as replay_steps
from scheduler.task import BatchPlan


def replay(
    record: Annotated[
        Path, typer.Argument(help="A file that `worker.record` had written.", exists=True)
    ],
) -> None:
    """Decide each step of RECORD again and compare the plans.

    Exits with 1 if a plan differs: then the scheduler's code is not the one that was recorded, or
    the record was changed.

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
        typer.echo(f"Error: {record} is not a record that can be replayed: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"steps            {num_steps}\nequal plans      {num_equal}")
    if errors:
        errors.sort()
        typer.echo(
            f"predicted time   off by {statistics.median(errors):.0%} in the median step, "
            f"by {errors[len(errors) * 9 // 10]:.0%} or more in every tenth"
        )
    if first_difference is not None:
        step, recorded, replayed = first_difference
        typer.echo(f"first difference in step {step}\n  recorded {recorded}\n  replayed {replayed}")
        raise typer.Exit(1)
