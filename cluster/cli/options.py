"""What the commands share: options of the same meaning, how one fails, how one shows progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn

DEFAULT_CONFIG = Path("deploy/local.yaml")
Config = Annotated[Path, typer.Argument(help="A Serve config file.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of the Ray cluster; default: RAY_ADDRESS, or the one on this machine."
    ),
]
AppName = Annotated[str, typer.Option("--app", help="The app's name in its config file.")]

ShowProgress = Callable[[str, float, float], None]
"""Called with what is being done, how much of it is done, and the total (0 if not known)."""


def fail(message: str) -> typer.Exit:
    """Print an error; raise what this returns to exit with status 1."""
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(1)


def output_console(width: int) -> Console:
    """A console on stdout; `width` columns wide where stdout is not a terminal."""
    return Console(width=None if Console().is_terminal else width)


@contextmanager
def show_progress(*columns: ProgressColumn) -> Iterator[ShowProgress]:
    """Show progress on stderr: as a bar on a terminal, elsewhere as one line for each activity.

    `columns` replace rich's default columns of the bar.
    """
    console = Console(stderr=True)
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar = bars.add_task("", total=None, visible=False)
    shown = ""

    def show(doing: str, done: float, total: float) -> None:
        nonlocal shown
        if doing != shown:
            shown = doing
            bars.reset(bar, description=doing, visible=True)
            if not console.is_terminal:
                console.print(doing)
        bars.update(bar, completed=done, total=total or None)

    with bars:
        yield show
