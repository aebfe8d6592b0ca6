"""The parts of a dashboard: panels in rows on a grid, and the queries that fill them."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from scheduler.worded import Worded

GRID_WIDTH = 24
"""Columns of Grafana's grid."""
MAX_CHARTS = 3
"""Charts side by side; more would be too narrow for their legends."""
STAT_HEIGHT, CHART_HEIGHT = 4, 8
"""Heights on the grid, in Grafana's rows of about 38 pixels."""

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
"""Fixed colours, by legend, of series that appear in several panels."""


class Unit(StrEnum):
    """Unit of a panel's values, by Grafana's name."""

    SECONDS = "s"
    SHARE = "percentunit"
    COUNT = "short"
    REQUESTS_PER_S = "reqps"
    TOKENS_PER_S = "si:tok/s"


class Kind(StrEnum):
    """How a panel is drawn."""

    LINES = "lines"
    STACKED = "stacked"
    """Areas, stacked."""
    BARS = "bars"
    """Bars, for rare events."""
    STAT = "stat"
    """The latest value, in large digits."""


@dataclass(frozen=True, slots=True)
class Query:
    """One expression; `legend` names its series, with `{{label}}` for a label's value."""

    expr: str
    legend: str


class Thresholds(NamedTuple):
    """From which value a panel warns, and from which it is bad.

    Larger values are worse if `bad` is larger than `warn`, smaller ones otherwise.
    """

    warn: float
    bad: float

    def level(self, value: float) -> str:
        """The level of a value: good, warn or bad."""
        sign = 1 if self.bad > self.warn else -1
        if sign * value >= sign * self.bad:
            return "bad"
        return "warn" if sign * value >= sign * self.warn else "good"


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart or number."""

    title: str
    description: str
    """What it shows, which values are good, and what to do about others."""
    unit: Unit
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    thresholds: Thresholds | None = None
    may_be_empty: str = ""
    """Why a healthy cluster may have nothing to show here."""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels of equal height, under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    when_empty: str = "no requests in this period, or no metrics"
    """Text of an empty panel that has no reason of its own."""

    @property
    def panels(self) -> list[Panel]:
        """All of its panels, in order."""
        return [panel for row in self.rows for panel in row.panels]


class Place(NamedTuple):
    """Position on the grid of a panel or a row's heading, from the top left corner."""

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
        height, max_panels = (STAT_HEIGHT, GRID_WIDTH) if is_stats else (CHART_HEIGHT, MAX_CHARTS)
        num_lines = -(-len(row.panels) // max_panels)
        for line in range(num_lines):
            begin, end = (len(row.panels) * at // num_lines for at in (line, line + 1))
            edges = [GRID_WIDTH * at // (end - begin) for at in range(end - begin + 1)]
            for panel, (left, right) in zip(row.panels[begin:end], pairwise(edges), strict=True):
                yield panel, Place(left, y, right - left, height)
            y += height


def in_words(values: type[Worded]) -> str:
    """The values of a label in words, for a panel's description."""
    return ", ".join(f"{value} ({value.text})" for value in values)
