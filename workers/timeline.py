"""The latest spans of work of a process, for people to look at."""

import time
from collections import deque
from typing import NamedTuple

MAX_SPANS = 20_000
"""Spans kept: some minutes of steps, in a few megabytes."""


class Span(NamedTuple):
    """A piece of work with its begin and end, in seconds."""

    name: str
    began_s: float
    ended_s: float
    of_requests: dict[str, int]
    """Each request's share: tokens of a step, or drafts of a drafting step."""


def wall_clock_ahead_s() -> float:
    """Seconds that the wall clock is ahead of this machine's monotonic clock."""
    return time.time() - time.monotonic()


class Timeline:
    """The latest spans of one process; written by one thread, read by others."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)

    def add(self, name: str, began_s: float, ended_s: float, of_requests: dict[str, int]) -> None:
        """Add a span, by the machine's monotonic clock."""
        self._spans.append(Span(name, began_s, ended_s, of_requests))

    def since(self, began_s: float) -> list[Span]:
        """Spans that ended after `began_s`; times are of the wall clock, which machines share."""
        ahead_s = wall_clock_ahead_s()
        return [
            span._replace(began_s=span.began_s + ahead_s, ended_s=span.ended_s + ahead_s)
            for span in self._spans.copy()
            if span.ended_s + ahead_s > began_s
        ]
