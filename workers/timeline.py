"""What a process did when, for people to look at: the last spans of its steps."""

import time
from collections import deque
from typing import NamedTuple

MAX_SPANS = 20_000


class Span(NamedTuple):
    """Something that took its time."""

    name: str
    began_s: float
    ended_s: float
    of_requests: dict[str, int]
    """What of it was each request's: tokens of a step, drafts of a drafting."""


def wall_clock_ahead_s() -> float:
    """How far the wall clock is ahead of this machine's monotonic one."""
    return time.time() - time.monotonic()


class Timeline:
    """The latest spans of one process; written by one thread, read by others."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)

    def add(self, name: str, began_s: float, ended_s: float, of_requests: dict[str, int]) -> None:
        """Note a span, by the machine's monotonic clock."""
        self._spans.append(Span(name, began_s, ended_s, of_requests))

    def since(self, began_s: float) -> list[Span]:
        """The spans that ended after a time, by the wall clock, which all machines share."""
        ahead_s = wall_clock_ahead_s()
        return [
            span._replace(began_s=span.began_s + ahead_s, ended_s=span.ended_s + ahead_s)
            for span in self._spans.copy()
            if span.ended_s + ahead_s > began_s
        ]
