"""`xyserve up`: start Ray and the app on this machine."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.options import DEFAULT_CONFIG, Config


def up(
    config: Config = DEFAULT_CONFIG,
    demo: Annotated[bool, typer.Option(help="Ask one question once the app is up.")] = True,
    temp_dir: Annotated[
        Path | None, typer.Option(help="Folder for Ray's files and logs, instead of /tmp/ray.")
    ] = None,
) -> None:
    """Start Ray and the app of CONFIG on this machine, and serve until Ctrl-C.

    On a Ray cluster that is already running, use `serve deploy CONFIG` instead.
    """
    # Importing Ray takes seconds.
    from cluster.cli.launch import launch

    launch(config, demo=demo, temp_dir=temp_dir, console=Console())
