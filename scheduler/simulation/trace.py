"""Arrivals of requests, read from the published traces or from recorded runs.

    arrivals = read_trace("azure_2023_conv.csv")
    arrivals = with_slo(scale_rate(first_seconds(arrivals, 600), 2.0), Slo(0.5, 0.05))

| file | what is in it |
|---|---|
| `*.jsonl` with `timestamp` and `hash_ids` | Mooncake: lengths, prefixes in blocks of 512 tokens |
| `*.jsonl` with `session_id` and `call` | agent sessions: each call follows the one before |
| `*.csv` with `TIMESTAMP` | Azure: lengths |
| `*_arrivals.csv` beside `*_lengths.jsonl` | ServeGen: clients' rates and lengths, to draw from |
| `*.jsonl` with `arrival_s` | other runs: `input_length`, `output_length`, maybe `class` |
| `*.jsonl` that a worker wrote | decisions (`scheduler.record`): its requests |

All may be compressed with gzip, by the name ending in `.gz`.
"""

import bisect
import calendar
import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import Any

from scheduler import record
from scheduler.request import Request, Slo

MOONCAKE_BLOCK = 512
"""Tokens of one hash id."""
AGENT_BLOCK = 64
"""The same of agent sessions; 256 characters are about as many tokens."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it comes."""

    request: Request
    arrival_s: float
    """Seconds since the trace began; if `after` is set, since that request ended."""
    num_output_tokens: int
    """Tokens that it generates until it ends; no scheduler knows."""
    hash_ids: tuple[int, ...] = ()
    """One id for each block of the prompt: equal ids stand for equal tokens up to the block's
    end."""
    hash_block_size: int = 0
    """Tokens of such a block; 0 where nothing is known of prefixes."""
    after: str | None = None
    """Id of the request that has to end first."""


def read_trace(
    path: str | Path, *, rate_rps: float | None = None, duration_s: float = 600.0, seed: int = 0
) -> list[Arrival]:
    """Read the arrivals of a file, whose kind is seen from its content; sorted by time.

    What a trace leaves open is drawn from `seed`: inside Mooncake's steps of 3 s the time of each
    request; for agent sessions their starts, `rate_rps` sessions per second (0.1 if not given);
    of ServeGen's clients all, at `rate_rps` requests per second (1 if not given) for `duration_s`.
    Other traces have times of their own, for which `scale_rate` is. ValueError if the file cannot
    be used, with its line and a remedy.
    """
    path = Path(path)
    if rate_rps is not None and not 0 < rate_rps < math.inf:
        raise ValueError(f"rate_rps ({rate_rps}) must be positive")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a trace as .csv, .jsonl, or one with .gz")
    lines = _read_lines(path)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise ValueError(f"{path}: the file is empty; name a trace with requests")
    if first.lstrip().startswith("{"):
        keys = _parse_json(path, 1, first).keys()
        if {"session_id", "call"} <= keys:
            return read_agent_sessions(path, sessions_per_s=rate_rps or 0.1, seed=seed)
        if {"timestamp", "hash_ids"} <= keys:
            return read_mooncake(path, seed=seed)
        if {"arrival_s", "input_length"} <= keys:
            return read_recorded(path)
        if "format" in keys:
            return read_recorded(path, enumerate(record.arrivals(_read_lines(path)), 1))
        if {"client", "input_tokens"} <= keys:
            raise ValueError(f"{path}: ServeGen's lengths; name its *_arrivals.csv instead")
        found = ", ".join(sorted(keys))
    else:
        columns = set(first.strip().split(","))
        if {"TIMESTAMP", "ContextTokens"} <= columns:
            return read_azure(path)
        if {"client", "window_start_s"} <= columns:
            return read_servegen(path, rate_rps=rate_rps or 1.0, duration_s=duration_s, seed=seed)
        found = ", ".join(sorted(columns))
    raise ValueError(
        f"{path}:1: no trace of a known kind, with {found}; the plainest is JSON lines of "
        "arrival_s, input_length and output_length"
    )


def read_azure(path: Path) -> list[Arrival]:
    """Read a trace of Azure's LLM inference, 2023."""
    rows = []
    for number, row in _csv_rows(path):
        with _Line(path, number):
            time_s = _utc_seconds(row["TIMESTAMP"])
            rows.append((time_s, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
    rows.sort(key=lambda row: row[0])
    begin_s = rows[0][0] if rows else 0.0
    return [
        _arrival(path, f"azure-{index}", time_s - begin_s, num_input, num_output)
        for index, (time_s, num_input, num_output) in enumerate(rows)
    ]


def read_mooncake(path: Path, *, seed: int = 0) -> list[Arrival]:
    """Read a trace of Mooncake's.

    Where timestamps are recorded in steps, so that many requests share one, each is put at random
    between its step and the next one's.
    """
    rows = []
    for number, row in _json_rows(path):
        with _Line(path, number):
            hash_ids = tuple(map(int, row["hash_ids"]))
            lengths = int(row["input_length"]), int(row["output_length"])
            rows.append((float(row["timestamp"]) / 1000, *lengths, hash_ids))
    times = _spread([row[0] for row in rows], Random(f"{seed} mooncake"))
    found = [
        replace(
            _arrival(path, f"mooncake-{index}", time_s, num_input, num_output),
            hash_ids=hash_ids,
            hash_block_size=MOONCAKE_BLOCK,
        )
        for index, (time_s, (_, num_input, num_output, hash_ids)) in enumerate(
            zip(times, rows, strict=True)
        )
    ]
    return sorted(found, key=_time)


def read_agent_sessions(path: Path, *, sessions_per_s: float, seed: int = 0) -> list[Arrival]:
    """Read recorded sessions of agents; they start as a Poisson process, in the order recorded.

    A call follows the end of the one before it by the whole gap between the two in the record:
    that holds the recorded answer's own time as well as the tool's, which are not told apart there.
    """
    random = Random(f"{seed} sessions")
    sessions: dict[str, list[tuple[float, Arrival]]] = {}
    for number, row in _json_rows(path):
        with _Line(path, number):
            session_id, time_s = str(row["session_id"]), float(row["timestamp"]) / 1000
            name = f"{session_id}-{int(row['call'])}"
            arrival = _arrival(path, name, 0.0, int(row["input_length"]), int(row["output_length"]))
            request = replace(arrival.request, slo_class=str(row.get("suite", "")))
            hash_ids = tuple(map(int, row["hash_ids"]))
            calls = sessions.setdefault(session_id, [])
            calls.append(
                (
                    time_s,
                    replace(
                        arrival,
                        request=request,
                        hash_ids=hash_ids,
                        hash_block_size=AGENT_BLOCK,
                    ),
                )
            )
    found: list[Arrival] = []
    start_s = 0.0
    for calls in sessions.values():
        start_s += random.expovariate(sessions_per_s)
        before: str | None = None
        before_s = 0.0
        for time_s, arrival in calls:
            delay_s = start_s if before is None else max(0.0, time_s - before_s)
            found.append(replace(arrival, arrival_s=delay_s, after=before))
            before, before_s = arrival.request.request_id, time_s
    return found


def read_recorded(
    path: Path, rows: Iterable[tuple[int, dict[str, Any]]] | None = None
) -> list[Arrival]:
    """Read JSON lines of `arrival_s`, `input_length`, `output_length`, and maybe `class`,
    `max_tokens` and `request_id`; `rows` if they were read already."""
    found: list[Arrival] = []
    for number, row in _json_rows(path) if rows is None else rows:
        with _Line(path, number):
            name = str(row.get("request_id", f"recorded-{len(found)}"))
            num_output = int(row["output_length"])
            arrival = _arrival(
                path, name, float(row["arrival_s"]), int(row["input_length"]), num_output
            )
            request = replace(
                arrival.request,
                slo_class=str(row.get("class", "")),
                max_tokens=int(row.get("max_tokens", arrival.num_output_tokens)),
            )
            found.append(replace(arrival, request=request))
    return sorted(found, key=_time)


def read_servegen(
    path: Path, *, rate_rps: float, duration_s: float, seed: int = 0
) -> list[Arrival]:
    """Draw requests of ServeGen's clients: `rate_rps` per second on average, for `duration_s`.

    `path` is a `*_arrivals.csv`, beside which lies the `*_lengths.jsonl`. The clients' rates are
    those of the busiest window of 600 s, after another those that follow it, scaled by one
    factor; clients without known lengths are left out. Inter-arrival times are drawn from each
    client's own family, and so they stay as bursty as they were when the rate is scaled.
    """
    windows: dict[float, list[_Window]] = {}
    for number, row in _csv_rows(path):
        with _Line(path, number):
            window = _Window(
                client=int(row["client"]),
                start_s=float(row["window_start_s"]),
                rate_rps=float(row["rate_rps"]),
                family=row["family"],
                shape=float(row["shape"] or 1),
            )
            windows.setdefault(window.start_s, []).append(window)
    lengths = _read_servegen_lengths(_lengths_path(path))
    for start_s in windows:
        windows[start_s] = [w for w in windows[start_s] if w.client in lengths]
    if not any(windows.values()):
        raise ValueError(f"{path}: no client has known lengths; name another trace")
    traffic = {start_s: math.fsum(w.rate_rps for w in ws) for start_s, ws in windows.items()}
    busiest_s = max(traffic, key=lambda start_s: (traffic[start_s], -start_s))
    factor = rate_rps / traffic[busiest_s]
    found: list[tuple[float, int, int, int]] = []
    begin_s = 0.0
    while begin_s < duration_s:
        end_s = min(begin_s + SERVEGEN_WINDOW_S, duration_s)
        for window in windows.get(busiest_s + begin_s, []):
            random = Random(f"{seed} {window.client} {begin_s}")
            drawn_from = _nearest(lengths[window.client], window.start_s)
            for time_s in _renewal(window, factor, end_s - begin_s, random):
                found.append((begin_s + time_s, *drawn_from.draw(random), window.client))
        begin_s = end_s
    found.sort()
    return [
        _arrival(path, f"servegen-{index}-client-{client}", time_s, num_input, num_output)
        for index, (time_s, num_input, num_output, client) in enumerate(found)
    ]


SERVEGEN_WINDOW_S = 600.0


def scale_rate(arrivals: Iterable[Arrival], rate: float) -> list[Arrival]:
    """Let all come `rate` times as fast; the delays inside of sessions stay.

    ValueError if `rate` is not positive.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate ({rate}) must be positive")
    return [
        arrival if arrival.after else replace(arrival, arrival_s=arrival.arrival_s / rate)
        for arrival in arrivals
    ]


def first_requests(arrivals: Sequence[Arrival], count: int) -> list[Arrival]:
    """The first `count` of them, in the order of the list."""
    return _closed(arrivals[:count])


def first_seconds(arrivals: Iterable[Arrival], duration_s: float) -> list[Arrival]:
    """Those that come in the first `duration_s` seconds, with all that follow upon one of them."""
    listed = list(arrivals)
    begin_s = min((a.arrival_s for a in listed if a.after is None), default=0.0)
    return _closed([a for a in listed if a.after or a.arrival_s < begin_s + duration_s])


def with_slo(arrivals: Iterable[Arrival], slo: Slo | Callable[[Arrival], Slo]) -> list[Arrival]:
    """Give each request targets: the same to all, or what a function says."""
    return [
        replace(a, request=replace(a.request, slo=slo(a) if callable(slo) else slo))
        for a in arrivals
    ]


def with_max_tokens(arrivals: Iterable[Arrival], max_tokens: int) -> list[Arrival]:
    """Let each ask for `max_tokens` at most, or for its own output if that is longer.

    Without this, what readers give asks for its very output, which no live client knows.
    """
    return [
        replace(a, request=replace(a.request, max_tokens=max(max_tokens, a.num_output_tokens)))
        for a in arrivals
    ]


def clip_lengths(arrivals: Iterable[Arrival], max_model_len: int) -> list[Arrival]:
    """Cut prompts and then outputs so that together they have `max_model_len` tokens at most."""
    if max_model_len < 2:
        raise ValueError(f"max_model_len ({max_model_len}) must be at least 2")
    found = []
    for arrival in arrivals:
        num_prompt = min(arrival.request.num_prompt_tokens, max_model_len - 1)
        left = max_model_len - num_prompt
        request = replace(
            arrival.request,
            num_prompt_tokens=num_prompt,
            max_tokens=min(arrival.request.max_tokens, left),
        )
        hash_ids = arrival.hash_ids
        if arrival.hash_block_size:
            hash_ids = hash_ids[: -(-num_prompt // arrival.hash_block_size)]
        num_output = min(arrival.num_output_tokens, left)
        found.append(
            replace(arrival, request=request, num_output_tokens=num_output, hash_ids=hash_ids)
        )
    return found


def _closed(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """Without those that follow one that is not there."""
    known: set[str] = set()
    found = []
    for arrival in arrivals:
        if arrival.after is None or arrival.after in known:
            known.add(arrival.request.request_id)
            found.append(arrival)
    return found


def _time(arrival: Arrival) -> float:
    return arrival.arrival_s


def _arrival(path: Path, name: str, arrival_s: float, num_input: int, num_output: int) -> Arrival:
    """An arrival that asks for the tokens that it gives; empty prompts and outputs count one."""
    if num_input < 0 or num_output < 0 or not 0 <= arrival_s < math.inf:
        raise ValueError(f"{path}: {name} has a negative length or time; correct it")
    num_output = max(1, num_output)
    return Arrival(Request(name, max(1, num_input), num_output), arrival_s, num_output)


def _spread(times: Sequence[float], random: Random) -> list[float]:
    """Put times that were rounded down to a step anywhere in their step."""
    steps = sorted(set(times))
    gaps = [after - before for before, after in pairwise(steps)]
    if len(steps) * 2 > len(times) or not gaps:
        return list(times)
    usual = sorted(gaps)[len(gaps) // 2]
    width = dict(zip(steps, [min(gap, usual) for gap in gaps] + [usual], strict=True))
    return [time_s + random.random() * width[time_s] for time_s in times]


def _utc_seconds(text: str) -> float:
    """Seconds of a time like `2023-11-16 18:15:46.6805900`."""
    day, time = text.split()[:2]
    year, month, number = map(int, day.split("-"))
    hour, minute, second = time.split(":")
    whole = calendar.timegm((year, month, number, int(hour), int(minute), 0))
    return whole + float(second.split("+")[0])


@dataclass(frozen=True, slots=True)
class _Window:
    """A client of ServeGen's in 600 s."""

    client: int
    start_s: float
    rate_rps: float
    family: str
    shape: float


def _renewal(window: _Window, factor: float, length_s: float, random: Random) -> Iterator[float]:
    """Times of a client's requests within a window."""
    rate = window.rate_rps * factor
    if rate <= 0:
        return
    if window.family == "Weibull":
        scale_s = 1 / (rate * math.gamma(1 + 1 / window.shape))
        draw = partial(random.weibullvariate, scale_s, window.shape)
    else:
        draw = partial(random.gammavariate, window.shape, 1 / (rate * window.shape))
    # A window begins anywhere between two requests, not with one.
    time_s = draw() * random.random()
    while time_s < length_s:
        yield time_s
        time_s += draw()


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Distributions of a client's prompts and outputs: values and their cumulative weights."""

    start_s: float
    inputs: tuple[list[int], list[float]]
    outputs: tuple[list[int], list[float]]

    def draw(self, random: Random) -> tuple[int, int]:
        return _draw(self.inputs, random), _draw(self.outputs, random)


def _draw(histogram: tuple[list[int], list[float]], random: Random) -> int:
    values, weights = histogram
    at = bisect.bisect_right(weights, random.random() * weights[-1])
    return values[min(at, len(values) - 1)]


def _read_servegen_lengths(path: Path) -> dict[int, list[_Lengths]]:
    found: dict[int, list[_Lengths]] = {}
    for number, row in _json_rows(path):
        with _Line(path, number):
            if row["input_tokens"] and row["output_tokens"]:
                found.setdefault(int(row["client"]), []).append(
                    _Lengths(
                        float(row["window_start_s"]),
                        _cumulated(row["input_tokens"]),
                        _cumulated(row["output_tokens"]),
                    )
                )
    return found


def _cumulated(histogram: list[list[float]]) -> tuple[list[int], list[float]]:
    values = [int(value) for value, _ in histogram]
    return values, list(accumulate(float(weight) for _, weight in histogram))


def _nearest(lengths: Sequence[_Lengths], start_s: float) -> _Lengths:
    return min(lengths, key=lambda found: abs(found.start_s - start_s))


def _lengths_path(path: Path) -> Path:
    stem = path.name.split("_arrivals.csv")[0]
    for ending in ("jsonl", "jsonl.gz"):
        if (found := path.with_name(f"{stem}_lengths.{ending}")).is_file():
            return found
    raise ValueError(f"{path}: needs {stem}_lengths.jsonl or .jsonl.gz beside it; put it there")


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            yield from lines
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch it anew") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_lines(path), 1):
        if line.strip():
            yield number, _parse_json(path, number, line)


def _parse_json(path: Path, number: int, line: str) -> dict[str, Any]:
    with _Line(path, number):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not an object")
        return row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    text = io.StringIO("".join(_read_lines(path)), newline="")
    reader = csv.DictReader(text)
    for row in reader:
        yield reader.line_num, row


class _Line:
    """Names file and line of what is wrong inside of it."""

    def __init__(self, path: Path, number: int) -> None:
        self._path = path
        self._number = number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KeyError):
            raise ValueError(f"{self._path}:{self._number}: {error} is missing; add it") from error
        if isinstance(error, ValueError | TypeError):
            raise ValueError(
                f"{self._path}:{self._number}: {error}; correct or remove the line"
            ) from error
