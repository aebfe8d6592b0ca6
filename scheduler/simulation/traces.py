"""Reads the published traces, and recorded runs, as arrivals.

A new format is a reader here, which takes a path and a `Sampling` and returns arrivals, and a line
in `FORMATS`. Files whose names end in `.gz` are decompressed.
"""

import calendar
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from scheduler import record
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.servegen import draw_servegen
from scheduler.simulation.trace_files import (
    Layout,
    at_line,
    csv_rows,
    first_keys,
    json_rows,
    make_arrival,
    read_lines,
)

MOONCAKE_BLOCK = 512
"""Tokens in a block that one hash id stands for."""
AGENT_BLOCK = 64
"""Tokens in a block of agent sessions, which hash 256 characters: about 64 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a reader draws what its trace does not say."""

    rate_rps: float | None = None
    """Requests or sessions per second, if the trace has no times; None is the reader's default."""
    duration_s: float = 600.0
    """Seconds to draw arrivals for, if the trace has no times."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate_rps is not None and not 0 < self.rate_rps < math.inf:
            raise ValueError(f"rate_rps ({self.rate_rps}) must be positive")


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of trace file."""

    layout: Layout
    keys: frozenset[str]
    """Keys or columns of the first row by which the format is recognised."""
    read: Callable[[Path, Sampling], list[Arrival]]


def read_trace(
    path: str | Path, *, rate_rps: float | None = None, duration_s: float = 600.0, seed: int = 0
) -> list[Arrival]:
    """Read the arrivals of a file, whose format is recognised by its content; sorted by time.

    What a trace does not say is drawn from `seed`: the time of each request within Mooncake's steps
    of 3 s; the starts of agent sessions, `rate_rps` per second (0.1 by default); all of ServeGen's
    requests, `rate_rps` per second (1 by default) for `duration_s`. Other traces have their own
    times, which `scale_rate` can change. ValueError with the line and a remedy if the file cannot
    be used.
    """
    path = Path(path)
    sampling = Sampling(rate_rps=rate_rps, duration_s=duration_s, seed=seed)
    layout, keys = first_keys(path)
    for candidate in FORMATS.values():
        if candidate.layout == layout and candidate.keys <= keys:
            return candidate.read(path, sampling)
    if {"client", "input_tokens"} <= keys:
        raise ValueError(f"{path}: ServeGen's lengths; name its *_arrivals.csv instead")
    raise ValueError(
        f"{path}:1: unknown trace format, with {', '.join(sorted(keys))}; known are "
        f"{', '.join(FORMATS)}; the simplest is JSON lines of arrival_s, input_length and "
        "output_length"
    )


def read_azure(path: Path, sampling: Sampling) -> list[Arrival]:
    """Read a trace of Azure's LLM inference, 2023."""
    rows = []
    for number, row in csv_rows(path):
        with at_line(path, number):
            time_s = _utc_seconds(row["TIMESTAMP"])
            rows.append((time_s, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
    rows.sort(key=lambda row: row[0])
    begin_s = rows[0][0] if rows else 0.0
    return [
        make_arrival(path, f"azure-{index}", time_s - begin_s, num_input, num_output)
        for index, (time_s, num_input, num_output) in enumerate(rows)
    ]


def read_mooncake(path: Path, sampling: Sampling) -> list[Arrival]:
    """Read a trace of Mooncake's.

    Where timestamps are rounded to steps, so that many requests share one, each request gets a
    random time between its step and the next one.
    """
    rows = []
    for number, row in json_rows(path):
        with at_line(path, number):
            hash_ids = tuple(map(int, row["hash_ids"]))
            lengths = int(row["input_length"]), int(row["output_length"])
            rows.append((float(row["timestamp"]) / 1000, *lengths, hash_ids))
    times = _spread([row[0] for row in rows], Random(f"{sampling.seed} mooncake"))
    arrivals = [
        replace(
            make_arrival(path, f"mooncake-{index}", time_s, num_input, num_output),
            hash_ids=hash_ids,
            hash_block_size=MOONCAKE_BLOCK,
        )
        for index, (time_s, (_, num_input, num_output, hash_ids)) in enumerate(
            zip(times, rows, strict=True)
        )
    ]
    return sorted(arrivals, key=_time)


def read_agent_sessions(path: Path, sampling: Sampling) -> list[Arrival]:
    """Read recorded sessions of agents, which start as a Poisson process in recorded order.

    A call follows the end of the previous one after the whole recorded gap between the two, which
    is the time of the answer and of the tool together: the record does not separate them.
    """
    random = Random(f"{sampling.seed} sessions")
    sessions: dict[str, list[tuple[float, Arrival]]] = {}
    for number, row in json_rows(path):
        with at_line(path, number):
            session_id, time_s = str(row["session_id"]), float(row["timestamp"]) / 1000
            name = f"{session_id}-{int(row['call'])}"
            lengths = int(row["input_length"]), int(row["output_length"])
            arrival = make_arrival(path, name, 0.0, *lengths)
            call = replace(
                arrival,
                request=replace(arrival.request, slo_class=str(row.get("suite", ""))),
                hash_ids=tuple(map(int, row["hash_ids"])),
                hash_block_size=AGENT_BLOCK,
            )
            sessions.setdefault(session_id, []).append((time_s, call))
    arrivals: list[Arrival] = []
    start_s = 0.0
    for calls in sessions.values():
        start_s += random.expovariate(sampling.rate_rps or 0.1)
        before: str | None = None
        before_s = 0.0
        for time_s, call in calls:
            delay_s = start_s if before is None else max(0.0, time_s - before_s)
            arrivals.append(replace(call, arrival_s=delay_s, after=before))
            before, before_s = call.request.request_id, time_s
    return arrivals


def read_run(path: Path, sampling: Sampling) -> list[Arrival]:
    """Read JSON lines of `arrival_s`, `input_length` and `output_length`, optionally with `class`,
    `max_tokens` and `request_id`."""
    return _run(path, json_rows(path))


def read_decisions(path: Path, sampling: Sampling) -> list[Arrival]:
    """Read the requests from a worker's record of its decisions (`scheduler.record`)."""
    return _run(path, enumerate(record.arrivals(read_lines(path)), 1))


def read_servegen(path: Path, sampling: Sampling) -> list[Arrival]:
    """Draw requests from the rates and lengths of ServeGen's clients."""
    return draw_servegen(
        path,
        rate_rps=sampling.rate_rps or 1.0,
        duration_s=sampling.duration_s,
        seed=sampling.seed,
    )


FORMATS = {
    "agent sessions": Format("json", frozenset({"session_id", "call"}), read_agent_sessions),
    "Mooncake": Format("json", frozenset({"timestamp", "hash_ids"}), read_mooncake),
    "recorded run": Format("json", frozenset({"arrival_s", "input_length"}), read_run),
    "decisions of a worker": Format("json", frozenset({"format"}), read_decisions),
    "Azure": Format("csv", frozenset({"TIMESTAMP", "ContextTokens"}), read_azure),
    "ServeGen": Format("csv", frozenset({"client", "window_start_s"}), read_servegen),
}
"""Formats by name; a file is read by the first one whose layout and keys it has."""


def _run(path: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[Arrival]:
    arrivals: list[Arrival] = []
    for number, row in rows:
        with at_line(path, number):
            name = str(row.get("request_id", f"recorded-{len(arrivals)}"))
            lengths = int(row["input_length"]), int(row["output_length"])
            arrival = make_arrival(path, name, float(row["arrival_s"]), *lengths)
            request = replace(
                arrival.request,
                slo_class=str(row.get("class", "")),
                max_tokens=int(row.get("max_tokens", arrival.num_output_tokens)),
            )
            arrivals.append(replace(arrival, request=request))
    return sorted(arrivals, key=_time)


def _time(arrival: Arrival) -> float:
    return arrival.arrival_s


def _spread(times: Sequence[float], random: Random) -> list[float]:
    """Spread times that were rounded down to a step over their steps."""
    steps = sorted(set(times))
    gaps = [after - before for before, after in pairwise(steps)]
    if len(steps) * 2 > len(times) or not gaps:
        return list(times)
    usual = sorted(gaps)[len(gaps) // 2]
    width = dict(zip(steps, [min(gap, usual) for gap in gaps] + [usual], strict=True))
    return [time_s + random.random() * width[time_s] for time_s in times]


def _utc_seconds(text: str) -> float:
    """Seconds since 1970 of a time such as `2023-11-16 18:15:46.6805900`."""
    day, time = text.split()[:2]
    year, month, number = map(int, day.split("-"))
    hour, minute, second = time.split(":")
    whole = calendar.timegm((year, month, number, int(hour), int(minute), 0))
    return whole + float(second.split("+")[0])
