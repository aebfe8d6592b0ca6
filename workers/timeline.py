"""The latest spans of work of a process, for people to look at."""

import time
from collections import deque
from typing import NamedTuple

MAX_BYTES = 16 << 20
"""Memory of the spans that are kept: some minutes of steps."""
SPAN_BYTES, ENTRY_BYTES = 400, 200
"""Memory of a span, and of each of its requests beside the characters of its id."""


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
        self._spans: deque[Span] = deque()
        self._num_bytes = 0

    def add(self, name: str, began_s: float, ended_s: float, of_requests: dict[str, int]) -> None:
        """Add a span, by the machine's monotonic clock, and drop the oldest beyond the limit."""
        span = Span(name, began_s, ended_s, of_requests)
        self._spans.append(span)
        self._num_bytes += _num_bytes(span)
        while self._num_bytes > MAX_BYTES:
            self._num_bytes -= _num_bytes(self._spans.popleft())

    def since(self, began_s: float) -> list[Span]:
        """Spans that ended after `began_s`; times are of the wall clock, which machines share."""
        ahead_s = wall_clock_ahead_s()
        return [
            span._replace(began_s=span.began_s + ahead_s, ended_s=span.ended_s + ahead_s)
            for span in self._spans.copy()
            if span.ended_s + ahead_s > began_s
        ]


def _num_bytes(span: Span) -> int:
    """The memory that a span takes."""
    ids = span.of_requests
    return SPAN_BYTES + ENTRY_BYTES * len(ids) + sum(map(len, ids))
