"""How long a worker's steps take compared with what was predicted, and whether it is slow."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

MEMORY_S = 10.0
"""Time over which steps are averaged, and after which a pace without new steps is forgotten."""
MAX_WEIGHT = 0.15
"""Cap on the weight of one step, so that a single outlier makes nobody slow."""
MAX_RATIO = 100.0
"""Bound of a step's ratio to its prediction; anything outside is a clock fault."""
SLOW, USUAL = 3.0, 2.0
"""A worker is slow from the first slowness on, until it is below the second."""
RECOVERED_AFTER_S = 60.0
"""A worker that has not been slow for this long has recovered; a slow one is given no requests, and
what it is worth without any says little."""


class Pace:
    """The mean ratio of a worker's recent steps to their predictions; times are its clock's.

    Steps count by their length, so that a burst of a second on a busy machine moves little.
    """

    def __init__(self) -> None:
        self._log = 0.0
        self._at_s = -math.inf

    def observe(self, ratio: float, seconds: float, now: float) -> None:
        """Take a step of some seconds that ended `now`."""
        if not (ratio > 0 and seconds > 0):
            return
        log = math.log(min(max(ratio, 1 / MAX_RATIO), MAX_RATIO))
        before = self._remembered(now - seconds)
        weight = min(1 - math.exp(-seconds / MEMORY_S), MAX_WEIGHT)
        self._log, self._at_s = before + weight * (log - before), now

    def slowness(self, now: float) -> float:
        """The ratio; it tends to 1 while there are no steps, as what made it slow may be over."""
        return math.exp(self._remembered(now))

    def _remembered(self, now: float) -> float:
        return self._log * math.exp(-max(now - self._at_s, 0.0) / MEMORY_S)


@dataclass(slots=True)
class SlowWatch:
    """Whether a worker is slow, and for how long."""

    slow: bool = False
    slow_s: float = 0.0
    """Time that it has been slow while another worker with requests was not, since it recovered."""
    _at_s: float = -math.inf
    """Time of the last observation."""
    _was_slow_s: float = -math.inf

    def observe(self, slowness: float, others: Iterable[float], now: float) -> bool:
        """Take a worker's slowness, and that of others with requests; returns if `slow` changed.

        If all are slow, the machine or the prediction is to blame, and no worker counts as slow.
        """
        was_slow, others = self.slow, list(others)
        usual = max(1.0, min(others, default=1.0))
        self.slow = slowness > (USUAL if was_slow else SLOW) * usual
        if was_slow and others:
            self.slow_s += now - self._at_s
        if self.slow or was_slow:
            self._was_slow_s = now
        elif now - self._was_slow_s > RECOVERED_AFTER_S:
            self.slow_s = 0.0
        self._at_s = now
        return self.slow != was_slow
