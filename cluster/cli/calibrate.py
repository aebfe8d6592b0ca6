"""`xyserve calibrate`: measure the CPU kernels' row tiles, and the steps of a config's engine."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.options import DEFAULT_CONFIG, Config, fail, show_progress
from cluster.models.model import resolve_model

if TYPE_CHECKING:
    from cluster.config.app_config import AppConfig
    from workers.profiling.calibrate import Calibration
    from workers.profiling.engine_profile import EngineProfile

NUM_SHOWN = 12
"""Rows of the table of predicted and measured steps: what fits on a screen."""
SHOWN_NUM_ROWS = (7, 8, 16, 31, 33)
"""Rows of a step whose tiling is shown: on both sides of the usual tile heights."""


def calibrate(
    config: Config = DEFAULT_CONFIG,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="Measure the row tiles only, not the engine.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure again, even if done.")] = False,
) -> None:
    """Measure this machine: the CPU kernels' row tiles, and the steps of CONFIG's engine.

    The kernels cut a matrix product into tiles of a few rows each; which
    heights are fastest depends on the CPU. Measuring takes seconds on one
    core; keep the machine idle meanwhile. The results are bitwise the same
    with any tiles; only the time differs.

    Workers predict how long a step will take, in order to meet their requests'
    targets. A worker measures its engine briefly when it first starts. This
    command runs about two minutes of varied steps on as many cores as a worker
    has: run it if you want more accurate predictions.

    Both results are kept in the home folder (XYSERVE_HOME, or else
    ~/.cache/xyserve): the tiles by CPU and instruction set, the steps by model,
    engine config, machine and version. Workers read them when they start.

    Example: xyserve calibrate deploy/local.yaml
    """
    # The config's schema would make every other command start more slowly.
    from cluster.config.serve_file import read_serve_file

    app_config = None if kernels_only else read_serve_file(config).config
    if app_config is None or app_config.worker.uses_cpu_kernels:
        _calibrate_kernels(force)
    if app_config is not None:
        _calibrate_engine(config, app_config, force)


def _calibrate_kernels(force: bool) -> None:
    try:
        from workers.profiling.calibrate import calibrate as measure
        from workers.profiling.calibrate import current_calibration

        before = current_calibration()
    except ImportError as error:  # the message says how to build the kernels' library
        raise fail(str(error)) from error

    if before.is_measured and not force:
        _show_calibration({"measured": before})
        _say_measured_before(before.path)
        return
    try:
        with show_progress() as show:
            doing = f"Timing row tiles on {before.cpu} with {before.isa}"
            show(doing, 0.0, 1.0)
            after = measure(lambda share: show(doing, share, 1.0))
    except OSError as error:
        raise _cannot_write(before.path, error) from error
    _show_calibration({"before" if before.is_measured else "built-in": before, "measured": after})
    typer.echo(f"Written to {after.path}\nRunning workers keep their table until they restart.")


def _calibrate_engine(config: Path, app_config: AppConfig, force: bool) -> None:
    from workers.profiling.calibrate import EngineNotMeasured, calibrate_engine, current_profile

    model, worker = resolve_model(app_config.model), app_config.worker
    before, path = current_profile(model, worker)
    if before is not None and before.depth == "full" and not force:
        _show_profile(before)
        _say_measured_before(path)
        return
    try:
        with show_progress() as show:
            doing = f"Timing steps of {app_config.model}"
            show(doing, 0.0, 1.0)
            profile = calibrate_engine(model, worker, lambda share: show(doing, share, 1.0))
    except EngineNotMeasured as error:
        raise fail(f"the engine of {config} cannot be measured: {error}") from error
    except OSError as error:
        raise _cannot_write(path, error) from error
    _show_profile(profile)
    typer.echo(f"Written to {path}\nRunning workers keep their cost model until they restart.")


def _say_measured_before(path: Path) -> None:
    typer.echo(f"Measured before: {path}\nTo measure again: xyserve calibrate --force")


def _cannot_write(path: Path, error: OSError) -> typer.Exit:
    return fail(f"cannot write {path} ({error}); set XYSERVE_HOME")


def _show_profile(profile: EngineProfile) -> None:
    """Print steps that were predicted and then measured, from short to long."""
    table = Table(
        "decodes", "prompt tokens", "context", "predicted", "measured", "error",
        title=f"Steps that the cost model was not fitted to: {NUM_SHOWN} of {len(profile.checked)}",
    )  # fmt: skip
    by_length = sorted(profile.checked, key=lambda step: step.measured_s)
    for step in by_length[:: max(1, len(by_length) // NUM_SHOWN)][:NUM_SHOWN]:
        table.add_row(
            str(step.num_decodes),
            str(step.num_prefill_tokens),
            str(step.num_context_tokens),
            f"{1e3 * step.predicted_s:.1f} ms",
            f"{1e3 * step.measured_s:.1f} ms",
            f"{step.error:.1%}",
        )
    Console().print(table)
    errors = [step.error for step in profile.checked]
    typer.echo(
        f"Median error: {statistics.median(errors):.1%} over {len(errors)} such steps, "
        f"{profile.error:.1%} over the steps it was fitted to ({profile.num_steps} measurements "
        f"in {profile.took_s:.0f} s)"
    )
    gflops, gbytes = profile.peaks.flops_per_s / 1e9, profile.peaks.bytes_per_s / 1e9
    typer.echo(f"Peak rates measured: {gflops:.1f} GFLOP/s, {gbytes:.1f} GB/s")


def _show_calibration(tables: dict[str, Calibration]) -> None:
    """Print tile tables side by side, and the row tiles they give for some numbers of rows.

    In each table the tallest tile over float32 inputs costs its height in rows, so that tables in
    different units compare.
    """
    [*_, newest] = tables.values()
    columns = [
        (f"{inputs}, {name}", inputs, table)
        for inputs in newest.tile_costs
        for name, table in tables.items()
    ]
    names = [name for name, *_ in columns]
    costs = Table("rows in a tile", *names, title=f"Time of a row tile: {newest.cpu}, {newest.isa}")
    for height in range(1, max(map(len, newest.tile_costs.values())) + 1):
        costs.add_row(str(height), *(_cost(table, inputs, height) for _, inputs, table in columns))
    tiles = Table("rows in a step", *names, title="Row tiles")
    for num_rows in SHOWN_NUM_ROWS:
        cuts = (table.row_tiles(inputs, num_rows) for _, inputs, table in columns)
        tiles.add_row(str(num_rows), *(" + ".join(map(str, cut)) for cut in cuts))
    console = Console()
    console.print(costs)
    console.print(tiles)


def _cost(table: Calibration, inputs: str, height: int) -> str:
    """Cost of a tile in rows of the tallest over float32 inputs; empty if there is none so tall."""
    costs, unit = table.tile_costs[inputs], table.tile_costs["float32"]
    return f"{len(unit) * costs[height - 1] / unit[-1]:.2f}" if height <= len(costs) else ""
