"""Lines of trace files, plain or compressed: the only place where traces are opened.

Errors are ValueErrors that name the file, the line and the remedy.
"""

import csv
import gzip
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from scheduler.request import Request
from scheduler.simulation.arrivals import Arrival

Layout = Literal["json", "csv"]
"""Lines of JSON, or comma-separated values below a line of column names."""


def first_keys(path: Path) -> tuple[Layout, set[str]]:
    """The layout of a file, and the keys of its first object or its column names."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a trace as .csv, .jsonl, or one with .gz")
    first = next((line for line in read_lines(path) if line.strip()), None)
    if first is None:
        raise ValueError(f"{path}: the file is empty; name a trace with requests")
    if first.lstrip().startswith("{"):
        return "json", set(_parse_json(path, 1, first))
    return "csv", set(first.strip().split(","))


def read_lines(path: Path) -> Iterator[str]:
    """Read a text file line by line, decompressed if its name ends in `.gz`."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            yield from lines
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch it again") from error


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a file of JSON lines."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield number, _parse_json(path, number, line)


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a file of comma-separated values, by column name."""
    text = io.StringIO("".join(read_lines(path)), newline="")
    reader = csv.DictReader(text)
    for row in reader:
        yield reader.line_num, row


@contextmanager
def at_line(path: Path, number: int) -> Iterator[None]:
    """Name the file and line in errors that a malformed row causes inside the block."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}:{number}: {error} is missing; add it") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}:{number}: {error}; correct or remove the line") from error


def make_arrival(
    path: Path, name: str, arrival_s: float, num_input: int, num_output: int
) -> Arrival:
    """An arrival whose `max_tokens` is its output; an empty prompt or output counts as one token.

    ValueError, which names `path`, for a negative length or time.
    """
    if num_input < 0 or num_output < 0 or not 0 <= arrival_s < math.inf:
        raise ValueError(f"{path}: {name} has a negative length or time; correct it")
    num_output = max(1, num_output)
    return Arrival(Request(name, max(1, num_input), num_output), arrival_s, num_output)


def _parse_json(path: Path, number: int, line: str) -> dict[str, Any]:
    with at_line(path, number):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not an object")
        return row
