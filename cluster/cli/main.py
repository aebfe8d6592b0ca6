"""The command line `xyserve`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cluster.cli.dashboards import dashboards
from cluster.cli.draft_head import draft_head_app
from cluster.cli.model import model_app
from cluster.cli.replay import replay
from cluster.cli.simulate import simulate
from cluster.cli.steps import explain, steps
from cluster.config.observe import LogConfig
from cluster.errors import XYServeError
from cluster.observe.logs import set_up_logs

if TYPE_CHECKING:
    from cluster.config.app_config import AppConfig
    from workers.profiling.calibrate import Calibration
    from workers.profiling.engine_profile import EngineProfile
    from workers.reports import DraftStats, DraftWorkerStatus

app = typer.Typer(
    help="Serve large language models from a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Start with `xyserve up deploy/local.yaml`, then talk to it with any OpenAI client.",
)
app.add_typer(model_app, name="model")
app.add_typer(draft_head_app, name="draft-head")
app.command()(simulate)
app.command()(replay)
app.command()(dashboards)
app.command()(steps)
app.command()(explain)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xyserve {version('xyserve')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version."),
    ] = False,
) -> None:
    pass


DEFAULT_CONFIG = Path("deploy/local.yaml")
NUM_SHOWN = 12
"""Steps in the table of a profile."""

Config = Annotated[Path, typer.Argument(help="A Serve config file.")]
Address = Annotated[
    str | None, typer.Option(help="Address of the Ray cluster; this machine's if not given.")
]
AppName = Annotated[str, typer.Option("--app", help="Name of the app in its config file.")]


@app.command()
def up(
    config: Config = DEFAULT_CONFIG,
    demo: Annotated[bool, typer.Option(help="Ask one question when it is up.")] = True,
    temp_dir: Annotated[
        Path | None, typer.Option(help="Folder for Ray's files and logs, instead of /tmp/ray.")
    ] = None,
) -> None:
    """Start Ray and the app of CONFIG on this machine, and serve until Ctrl-C.

    On a Ray cluster that runs already, use `serve deploy CONFIG` instead.
    """
    from cluster.cli.up import up as run

    run(config, demo=demo, temp_dir=temp_dir, console=Console())


@app.command()
def status(app_name: AppName = "xyserve", address: Address = None) -> None:
    """Show the workers of a running app and what they are doing."""
    from cluster.client import XYServe

    with XYServe.connect(address, app_name) as handle:
        state = handle.status()
    table = Table(
        "worker", "pid", "cores", "run", "wait", "tokens to do", "KV", "memory", "steps",
        *(("acceptance", "tokens/decode") if state.draft_workers else ()),
        title=f"{app_name}: {state.model}",
    )  # fmt: skip
    for worker in state.workers:
        table.add_row(
            worker.worker_id + (" (draining)" if worker.draining else ""),
            str(worker.pid),
            ",".join(map(str, worker.cpus)) or "any",
            str(worker.num_running),
            str(worker.num_waiting),
            str(worker.num_outstanding_tokens),
            f"{worker.kv_cache_usage:.0%}",
            f"{worker.memory_bytes / 2**30:.1f} GiB",
            str(worker.num_steps),
            *_drafts_cells(worker.drafts),
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    if state.draft_workers:
        console.print(_draft_workers_table(state.draft_workers))


def _drafts_cells(drafts: DraftStats | None) -> tuple[str, ...]:
    if drafts is None:
        return ()
    if not drafts.counts.verified:
        return ("-", "-")
    return (f"{drafts.acceptance_rate:.0%}", f"{drafts.tokens_per_span:.2f}")


def _draft_workers_table(draft_workers: list[DraftWorkerStatus]) -> Table:
    table = Table("draft worker", "pid", "drafters", "requests", "drafts", "busy", "memory")
    for worker in draft_workers:
        table.add_row(
            worker.draft_worker_id + (" (silent)" if worker.silent else ""),
            str(worker.pid),
            ", ".join(worker.drafters),
            str(worker.num_contexts),
            str(worker.num_drafts),
            f"{worker.busy_share:.0%}",
            f"{worker.memory_bytes / 2**30:.1f} GiB",
        )
    return table


@app.command()
def profile(
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to record.")] = 10.0,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("trace.json"),
    app_name: AppName = "xyserve",
    address: Address = None,
) -> None:
    """Record what the workers and draft workers of a running app do, as a trace to look at.

    The trace has a track for each worker's steps, one for each draft
    worker's draftings, and two for each request. Send requests meanwhile.

    Example: xyserve profile --seconds 5 --out trace.json
    """
    from cluster.client import XYServe
    from cluster.observe.chrome_trace import chrome_trace, hidden_share, split

    if not out.parent.is_dir():
        raise _fail(f"--out ({out}): there is no folder {out.parent}")
    with XYServe.connect(address, app_name) as handle:
        began_s = time.time()
        with _progress(f"Recording for {seconds:g} s") as progress:
            while (past_s := time.time() - began_s) < seconds:
                progress(past_s / seconds)
                time.sleep(min(0.1, seconds - past_s))
        timelines = handle.spans(began_s)
    of_workers, of_draft_workers = split(timelines)
    if not of_workers:
        raise _fail(
            "no worker took a step meanwhile, or step_policy.name is vllm, of which none "
            "is kept; send requests while it records"
        )
    try:
        out.write_text(chrome_trace(timelines))
    except OSError as error:
        raise _fail(f"cannot write {out} ({error})") from error
    typer.echo(f"{len(of_workers)} steps and {len(of_draft_workers)} draftings in {out}")
    if of_draft_workers:
        share = hidden_share(of_draft_workers, of_workers)
        typer.echo(f"Of the time of drafting, {share:.0%} was hidden behind steps")
    typer.echo("Open it at https://ui.perfetto.dev or, in Chrome, at chrome://tracing")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; `-` reads stdin.")],
    raw: Annotated[bool, typer.Option(help="Continue the text itself, without a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after this long.")] = None,
    app_name: AppName = "xyserve",
    address: Address = None,
) -> None:
    """Stream one answer from a running app through the client handle.

    Example: xyserve generate "Why is the sky blue?" --max-tokens 100
    """
    from cluster.client import XYServe

    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    params = {"max_tokens": max_tokens, "temperature": temperature, "timeout_s": timeout_s}
    with XYServe.connect(address, app_name) as handle:
        if raw:
            for completion in handle.stream(text, **params):
                typer.echo(completion.choices[0].text, nl=False)
        else:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": text})
            for chunk in handle.stream(messages, **params):
                typer.echo(chunk.choices[0].delta.content or "", nl=False)
    typer.echo()


@app.command()
def doctor(config: Config = DEFAULT_CONFIG) -> None:
    """Check that this machine can serve CONFIG, with a remedy for each thing found."""
    from cluster.cli.doctor import examine, print_findings
    from cluster.config.serve_file import read_serve_file

    if not print_findings(examine(read_serve_file(config)), Console()):
        raise typer.Exit(1)


@app.command()
def calibrate(
    config: Config = DEFAULT_CONFIG,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="Measure the row tiles, and no engine.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure even if it was done.")] = False,
) -> None:
    """Measure this machine: the CPU kernels' row tiles, and the steps of CONFIG's engine.

    A product of matrices is cut into tiles of so many rows each; which
    heights are best depends on the CPU. Measuring takes seconds, on one
    core; let the machine be idle meanwhile. The results are the same bits
    with any tiles: only the time differs.

    Workers predict how long a step will take, to keep their requests' targets.
    For that the engine of CONFIG takes steps of many kinds, for some two
    minutes, on as many cores as a worker has. At its first start a worker does
    the same briefly, so this is for those who want it more exact.

    Both are kept in the cache folder (XDG_CACHE_HOME, or else ~/.cache): the
    tiles for each CPU and instruction set, the steps for each model, engine
    config, machine and version. Workers read them when they start.

    Example: xyserve calibrate deploy/local.yaml
    """
    from cluster.config.serve_file import read_serve_file

    args = None if kernels_only else read_serve_file(config).config
    if args is None or args.worker.uses_own_kernels:
        _calibrate_kernels(force)
    if args is not None:
        _calibrate_engine(config, args, force)


def _calibrate_kernels(force: bool) -> None:
    try:
        from workers.profiling.calibrate import calibrate as measure
        from workers.profiling.calibrate import current_calibration
    except ImportError as error:  # its message says how to build the library
        raise _fail(str(error)) from error

    before = current_calibration()
    if before.is_measured and not force:
        _show_calibration({"measured": before})
        typer.echo(f"Measured before: {before.path}\nTo measure anew: xyserve calibrate --force")
        return
    try:
        with _progress(f"Timing row tiles on {before.cpu} with {before.isa}") as progress:
            after = measure(progress)
    except OSError as error:
        raise _fail(f"cannot write {before.path} ({error}); set XDG_CACHE_HOME") from error
    _show_calibration({"before" if before.is_measured else "built-in": before, "measured": after})
    typer.echo(f"Written to {after.path}\nWorkers that run keep their table until they restart.")


def _calibrate_engine(config: Path, args: AppConfig, force: bool) -> None:
    from cluster.models.model import resolve_model
    from workers.profiling.calibrate import EngineNotMeasured, calibrate_engine, current_profile

    model = resolve_model(args.model)
    before, path = current_profile(model, args.worker)
    if before is not None and before.depth == "full" and not force:
        _show_profile(before)
        typer.echo(f"Measured before: {path}\nTo measure anew: xyserve calibrate --force")
        return
    try:
        with _progress(f"Timing steps of {args.model}") as progress:
            profile = calibrate_engine(model, args.worker, progress)
    except EngineNotMeasured as error:
        raise _fail(f"the engine of {config} cannot be measured: {error}") from error
    except OSError as error:
        raise _fail(f"cannot write {path} ({error}); set XDG_CACHE_HOME") from error
    _show_profile(profile)
    typer.echo(f"Written to {path}\nWorkers that run keep their cost model until they restart.")


@contextmanager
def _progress(doing: str) -> Iterator[Callable[[float], None]]:
    """Show how far it is, as a bar on a terminal, and as one line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(doing)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(doing, total=1.0)
        yield lambda share: bars.update(bar, completed=share)


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
        f"Median error: {statistics.median(errors):.1%} of {len(errors)} such steps, "
        f"{profile.error:.1%} of those it was fitted to ({profile.num_steps} measurements in "
        f"{profile.took_s:.0f} s)"
    )
    gflops, gbytes = profile.peaks.flops_per_s / 1e9, profile.peaks.bytes_per_s / 1e9
    typer.echo(f"Fastest measured: {gflops:.1f} GFLOP/s, {gbytes:.1f} GB/s")


def _show_calibration(tables: dict[str, Calibration]) -> None:
    """Print tables side by side, and the row tiles that they lead to for some numbers of rows.

    The tallest tile costs its height in rows, so that tables in different units compare.
    """
    [*_, newest] = tables.values()
    tallest = len(newest.tile_costs)
    costs = Table(
        "rows of a tile", *tables, title=f"Time of a row tile: {newest.cpu}, {newest.isa}"
    )
    for height in range(1, tallest + 1):
        shares = (table.tile_costs[height - 1] / table.tile_costs[-1] for table in tables.values())
        costs.add_row(str(height), *(f"{tallest * share:.2f}" for share in shares))
    tiles = Table("rows of a step", *tables, title="Row tiles")
    for num_rows in (7, 8, 16, 31, 33):
        cuts = (table.row_tiles(num_rows) for table in tables.values())
        tiles.add_row(str(num_rows), *(" + ".join(map(str, cut)) for cut in cuts))
    console = Console()
    console.print(costs)
    console.print(tiles)


def _fail(message: str) -> typer.Exit:
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(1)


def main() -> None:
    """Run the command line; errors the user can mend are one line, not a traceback."""
    set_up_logs(LogConfig(level="warning"))
    try:
        app()
    except (XYServeError, ConnectionError, TimeoutError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
