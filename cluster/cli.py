"""The command line `xyserve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cluster.errors import XYServeError
from cluster.model_cli import model_app

if TYPE_CHECKING:
    from workers.calibrate import Calibration

app = typer.Typer(
    help="Serve large language models from a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Start with `xyserve up deploy/local.yaml`, then talk to it with any OpenAI client.",
)
app.add_typer(model_app, name="model")

DEFAULT_CONFIG = Path("deploy/local.yaml")

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
    from cluster.up import up as run

    run(config, demo=demo, temp_dir=temp_dir, console=Console())


@app.command()
def status(app_name: AppName = "xyserve", address: Address = None) -> None:
    """Show the workers of a running app and what they are doing."""
    from cluster.client import XYServe

    with XYServe.connect(address, app_name) as handle:
        state = handle.status()
    table = Table(
        "worker", "pid", "cores", "run", "wait", "tokens to do", "KV", "memory", "steps",
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
        )
    Console().print(table)


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
    from cluster.config import read_serve_file
    from cluster.doctor import examine, print_findings

    if not print_findings(examine(read_serve_file(config)), Console()):
        raise typer.Exit(1)


@app.command()
def calibrate(
    force: Annotated[bool, typer.Option("--force", help="Measure even if it was done.")] = False,
) -> None:
    """Measure which tiles the kernels are fastest with on this CPU.

    A product of matrices is cut into tiles of so many rows each; which
    heights are best depends on the CPU. Measuring takes seconds, on one
    core; let the machine be idle meanwhile. The results are the same bits
    with any tiles: only the time differs.

    The table is kept in the cache folder (XDG_CACHE_HOME, or else ~/.cache),
    one for each CPU and instruction set. Workers read it when they start, and
    without one they use a built-in table.

    Example: xyserve calibrate
    """
    try:
        from workers.calibrate import calibrate as measure
        from workers.calibrate import current_calibration
    except ImportError as error:  # its message says how to build the library
        raise _fail(str(error)) from error

    before = current_calibration()
    if before.is_measured and not force:
        _show_calibration({"measured": before})
        typer.echo(f"Measured before: {before.path}\nTo measure anew: xyserve calibrate --force")
        return
    console = Console(stderr=True)
    doing = f"Timing row tiles on {before.cpu} with {before.isa}"
    if not console.is_terminal:
        console.print(doing)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
            bar = bars.add_task(doing, total=1.0)
            after = measure(lambda share: bars.update(bar, completed=share))
    except OSError as error:
        raise _fail(f"cannot write {before.path} ({error}); set XDG_CACHE_HOME") from error
    _show_calibration({"before" if before.is_measured else "built-in": before, "measured": after})
    typer.echo(f"Written to {after.path}\nWorkers that run keep their table until they restart.")


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
    try:
        app()
    except (XYServeError, ConnectionError, TimeoutError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
