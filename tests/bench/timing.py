"""How the benchmarks of single kernels take turns, and what they compute from the times."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from workers.kernels import native

COLD_BYTES = 64 * 2**20
"""Minimum size of all copies of a contestant's data: twice an L3 cache of 32 MiB."""

BUDGET_S = 0.25
"""Time to measure a cell."""
MIN_ROUNDS, MAX_ROUNDS = 3, 21
"""Bounds of the number of rounds that are measured within the budget."""

TURN_S = 0.002
"""Minimum duration of a turn: long enough that the clock and a cold start matter little."""

SETTLE_S = 0.005
"""Pause between turns with several threads: those of the last turn may spin for a while."""

Call = Callable[[], Any]


def interleaved(contestants: dict[str, Call], threads: int) -> dict[str, float]:
    """Median seconds per call of each contestant, in turns; they must be warmed up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    calls = dict.fromkeys(contestants, 1)
    order = list(contestants)
    ends_s = time.perf_counter() + BUDGET_S
    while len(times[order[0]]) < MAX_ROUNDS and (
        len(times[order[0]]) < MIN_ROUNDS or time.perf_counter() < ends_s
    ):
        for name in order:
            if threads > 1:
                time.sleep(SETTLE_S)
            times[name].append(turn_s(contestants[name], calls[name]))
            calls[name] = max(1, round(TURN_S / min(times[name])))
        order.append(order.pop(0))
    return {name: statistics.median(own) for name, own in times.items()}


def geomeans(
    rows: list[dict[str, Any]], groups: dict[str, list[dict[str, Any]]]
) -> dict[str, float]:
    """The geometric mean of `ratio` in each group that has rows, and the minimum of all rows."""
    means = {
        f"geomean_{name}": statistics.geometric_mean(row["ratio"] for row in group)
        for name, group in groups.items()
        if group
    }
    return means | {"min_ratio": min(row["ratio"] for row in rows)}


def set_threads(threads: int) -> None:
    """Give both sides `threads` threads; before first use, as oneDNN keeps its first setting."""
    torch.set_num_threads(threads)
    native.set_num_threads(threads)


def turn_s(call: Call, times: int) -> float:
    """Mean seconds of `times` calls in a row."""
    began_s = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began_s) / times
