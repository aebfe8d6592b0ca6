"""Arrivals drawn from ServeGen's clients, each with its own rate, burstiness and lengths.

Two files make up a trace: `*_arrivals.csv` holds each client's rate and the family of its
inter-arrival times in windows of 600 s, `*_lengths.jsonl` histograms of its prompts and outputs.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from random import Random

from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.trace_files import at_line, csv_rows, json_rows, make_arrival

WINDOW_S = 600.0
"""Length of a window of the arrivals file."""


def draw_servegen(
    path: Path, *, rate_rps: float, duration_s: float, seed: int = 0
) -> list[Arrival]:
    """Draw requests of the clients in `path`, a `*_arrivals.csv`: `rate_rps` on average, for
    `duration_s`.

    The clients have their rates in the busiest window and then in the windows after it, all scaled
    by one factor; clients without known lengths are left out. Inter-arrival times are drawn from
    each client's own family, so that traffic stays as bursty at another rate.
    """
    windows = _read_windows(path)
    lengths = _read_lengths(_lengths_path(path))
    for start_s in windows:
        windows[start_s] = [w for w in windows[start_s] if w.client in lengths]
    if not any(windows.values()):
        raise ValueError(f"{path}: no client has known lengths; name another trace")
    traffic = {start_s: math.fsum(w.rate_rps for w in ws) for start_s, ws in windows.items()}
    busiest_s = max(traffic, key=lambda start_s: (traffic[start_s], -start_s))
    factor = rate_rps / traffic[busiest_s]
    drawn: list[tuple[float, int, int, int]] = []
    begin_s = 0.0
    while begin_s < duration_s:
        end_s = min(begin_s + WINDOW_S, duration_s)
        for window in windows.get(busiest_s + begin_s, []):
            random = Random(f"{seed} {window.client} {begin_s}")
            client_lengths = _nearest(lengths[window.client], window.start_s)
            for time_s in _arrival_times(window, factor, end_s - begin_s, random):
                drawn.append((begin_s + time_s, *client_lengths.draw(random), window.client))
        begin_s = end_s
    drawn.sort()
    return [
        make_arrival(path, f"servegen-{index}-client-{client}", time_s, num_input, num_output)
        for index, (time_s, num_input, num_output, client) in enumerate(drawn)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """One client's traffic in 600 s."""

    client: int
    start_s: float
    rate_rps: float
    family: str
    """Distribution of the inter-arrival times: Weibull, otherwise Gamma."""
    shape: float
    """Shape parameter of the family; 1 is a Poisson process, less is burstier."""


def _read_windows(path: Path) -> dict[float, list[_Window]]:
    """Windows by their start."""
    windows: dict[float, list[_Window]] = {}
    for number, row in csv_rows(path):
        with at_line(path, number):
            window = _Window(
                client=int(row["client"]),
                start_s=float(row["window_start_s"]),
                rate_rps=float(row["rate_rps"]),
                family=row["family"],
                shape=float(row["shape"] or 1),
            )
            windows.setdefault(window.start_s, []).append(window)
    return windows


def _arrival_times(
    window: _Window, factor: float, length_s: float, random: Random
) -> Iterator[float]:
    """Times of a client's requests in a window, with its rate scaled by `factor`."""
    rate = window.rate_rps * factor
    if rate <= 0:
        return
    if window.family == "Weibull":
        scale_s = 1 / (rate * math.gamma(1 + 1 / window.shape))
        draw = partial(random.weibullvariate, scale_s, window.shape)
    else:
        draw = partial(random.gammavariate, window.shape, 1 / (rate * window.shape))
    # A window begins anywhere between two requests.
    time_s = draw() * random.random()
    while time_s < length_s:
        yield time_s
        time_s += draw()


Histogram = tuple[list[int], list[float]]
"""Values and their cumulative weights."""


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Distributions of a client's prompts and outputs from `start_s` on."""

    start_s: float
    inputs: Histogram
    outputs: Histogram

    def draw(self, random: Random) -> tuple[int, int]:
        return _draw(self.inputs, random), _draw(self.outputs, random)


def _draw(histogram: Histogram, random: Random) -> int:
    values, weights = histogram
    at = bisect.bisect_right(weights, random.random() * weights[-1])
    return values[min(at, len(values) - 1)]


def _nearest(lengths: Sequence[_Lengths], start_s: float) -> _Lengths:
    return min(lengths, key=lambda candidate: abs(candidate.start_s - start_s))


def _read_lengths(path: Path) -> dict[int, list[_Lengths]]:
    """Distributions by client."""
    lengths: dict[int, list[_Lengths]] = {}
    for number, row in json_rows(path):
        with at_line(path, number):
            if row["input_tokens"] and row["output_tokens"]:
                lengths.setdefault(int(row["client"]), []).append(
                    _Lengths(
                        float(row["window_start_s"]),
                        _cumulated(row["input_tokens"]),
                        _cumulated(row["output_tokens"]),
                    )
                )
    return lengths


def _cumulated(histogram: list[list[float]]) -> Histogram:
    values = [int(value) for value, _ in histogram]
    return values, list(accumulate(float(weight) for _, weight in histogram))


def _lengths_path(path: Path) -> Path:
    stem = path.name.split("_arrivals.csv")[0]
    for ending in ("jsonl", "jsonl.gz"):
        if (candidate := path.with_name(f"{stem}_lengths.{ending}")).is_file():
            return candidate
    raise ValueError(f"{path}: needs {stem}_lengths.jsonl or .jsonl.gz next to it; put it there")
