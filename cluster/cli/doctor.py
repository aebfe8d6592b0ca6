"""`xyserve doctor`: whether this machine can serve a config, and a remedy for each problem."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.cli.options import DEFAULT_CONFIG, Config

if TYPE_CHECKING:
    from cluster.cli.checks import Finding


def doctor(config: Config = DEFAULT_CONFIG) -> None:
    """Check whether this machine can serve CONFIG, and print a remedy for each problem."""
    # The config's schema would make every other command start more slowly.
    from cluster.cli.probes import examine
    from cluster.config.serve_file import read_serve_file

    if not print_findings(examine(read_serve_file(config)), Console()):
        raise typer.Exit(1)


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
