"""`xyserve doctor`: whether this machine can serve a config, and a remedy for each problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.cli.options import DEFAULT_CONFIG, Address, Config

if TYPE_CHECKING:
    from cluster.cli.checks import Finding
    from cluster.config.serve_file import ServeFile


def doctor(
    config: Config = DEFAULT_CONFIG,
    links: Annotated[
        bool,
        typer.Option("--links", help="Check instead whether the nodes of the running app connect."),
    ] = False,
    address: Address = None,
) -> None:
    """Check whether this machine can serve CONFIG, and print a remedy for each problem."""
    # The config's schema would make every other command start more slowly.
    from cluster.cli.probes import examine
    from cluster.config.serve_file import read_serve_file

    serve_file = read_serve_file(config)
    if not print_findings(_links(serve_file, address) if links else examine(serve_file), Console()):
        raise typer.Exit(1)


def _links(serve_file: ServeFile, address: str | None) -> list[Finding]:
    # Importing Ray takes seconds.
    from cluster.cli.links import examine_links

    return examine_links(serve_file, address)


def print_findings(findings: list[Finding], console: Console) -> bool:
    """Print the findings as a table, each with its remedy; True if none of them is a failure."""
    colors = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        level = Text(finding.level, colors[finding.level])
        table.add_row(level, Text(finding.check), Text(finding.detail))
        if finding.remedy:
            table.add_row("", "", Text(f"-> {finding.remedy}", "cyan"))
    num_fails, num_warns = (
        sum(finding.level == level for finding in findings) for level in ("fail", "warn")
    )
    console.print(table)
    console.print(f"{len(findings)} checks, {num_fails} failed, {num_warns} with a warning")
    return num_fails == 0
