"""What a dashboard is made of: panels in rows on a grid, and the queries that fill them."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

GRID_WIDTH = 24
"""Grafana's."""
MAX_CHARTS = 3
"""Side by side."""


COLOURS = {
    "p50": "#5794F2",
    "p95": "#FF9830",
    "p99": "#E02F44",
    "measured": "#5794F2",
    "predicted": "#FF9830",
    "running": "#73BF69",
    "waiting": "#FF9830",
    "prompt": "#8AB8FF",
    "output": "#73BF69",
    "prefill": "#8AB8FF",
    "decode": "#73BF69",
    "verify": "#B877D9",
    "interactive": "#B877D9",
    "standard": "#5794F2",
    "batch": "#96D98D",
    "stop": "#73BF69",
    "length": "#5794F2",
    "abort": "#FF9830",
    "error": "#E02F44",
    "invalid": "#FF9830",
    "unavailable": "#E02F44",
}
"""Of what should be known at sight, by legend."""


class Unit(StrEnum):
    """Of the values of a panel, by Grafana's name."""

    SECONDS = "s"
    SHARE = "percentunit"
    COUNT = "short"
    REQUESTS_PER_S = "reqps"
    TOKENS_PER_S = "si:tok/s"


class Kind(StrEnum):
    """How a panel is drawn."""

    LINES = "lines"
    STACKED = "stacked"
    """Areas, one upon the other."""
    BARS = "bars"
    """For events that are few."""
    STAT = "stat"
    """The last value, large."""


@dataclass(frozen=True, slots=True)
class Query:
    """One expression; `legend` names its series, `{{label}}` standing for a label's value."""

    expr: str
    legend: str


class Thresholds(NamedTuple):
    """Where a value begins to need attention, and where it is bad.

    Larger values are worse if `bad` is the larger one, smaller ones otherwise.
    """

    warn: float
    bad: float

    def level(self, value: float) -> str:
        """Of a value: good, warn or bad."""
        sign = 1 if self.bad > self.warn else -1
        if sign * value >= sign * self.bad:
            return "bad"
        return "warn" if sign * value >= sign * self.warn else "good"


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram or number."""

    title: str
    description: str
    """What it shows, what is good, and what to do when it is not."""
    unit: Unit
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    thresholds: Thresholds | None = None
    may_be_empty: str = ""
    """Why a cluster in good order may have nothing to show here."""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels of one height, under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    when_empty: str = "no data in this time"
    """What an empty panel says that gives no reason of its own."""

    @property
    def panels(self) -> list[Panel]:
        """All of its panels, in order."""
        return [panel for row in self.rows for panel in row.panels]


class Place(NamedTuple):
    """Of a panel or a row's heading on the grid, from the top left corner."""

    x: int
    y: int
    width: int
    height: int


def layout(dashboard: Dashboard) -> Iterator[tuple[Row | Panel, Place]]:
    """Each row's heading and each panel, with its place."""
    y = 0
    for row in dashboard.rows:
        yield row, Place(0, y, GRID_WIDTH, 1)
        y += 1
        is_stats = all(panel.kind is Kind.STAT for panel in row.panels)
        height, most = (4, GRID_WIDTH) if is_stats else (8, MAX_CHARTS)
        num_lines = -(-len(row.panels) // most)
        for line in range(num_lines):
            begin, end = (len(row.panels) * at // num_lines for at in (line, line + 1))
            edges = [GRID_WIDTH * at // (end - begin) for at in range(end - begin + 1)]
            for panel, (left, right) in zip(row.panels[begin:end], pairwise(edges), strict=True):
                yield panel, Place(left, y, right - left, height)
            y += height
