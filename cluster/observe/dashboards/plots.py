"""Draws dashboards as PNG files, with the same queries that Grafana uses."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws without a screen

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cluster.observe.dashboards.panels import (
    COLOURS,
    GRID_WIDTH,
    Dashboard,
    Kind,
    Panel,
    Place,
    Row,
    Unit,
    layout,
)
from cluster.observe.dashboards.prometheus import Line, Period, Prometheus

Floats = npt.NDArray[np.float64]

COLUMN_IN, LINE_IN = 0.8, 0.36
"""Width and height of a cell of the grid, in inches."""
HEAD_IN, MARGIN_IN = 0.75, 0.15
"""Height of the page's heading, and the margin around the page."""
LEGEND_LINE_IN, LETTER_IN = 0.17, 0.054
"""Height of a line and mean width of a letter in a legend, at its font size."""
MAX_IN_LEGEND = 12
"""Series named in a legend; more would leave no room for the chart."""
TICKS_S = (5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 86_400, 604_800)
"""Distances between ticks on a time axis, in seconds."""
LEVEL_COLOURS = {"good": "#37872D", "warn": "#E0752D", "bad": "#C4162A"}
BACKGROUND, CARD, EDGE, INK, FAINT = "#F4F5F8", "#FFFFFF", "#DDE0E6", "#24292E", "#8A9099"
PALETTE = ("#5794F2", "#73BF69", "#FF9830", "#B877D9", "#F2CC0C", "#33A2E5", "#E02F44", "#8F6B4D",
           "#56A64B", "#FA6400", "#A352CC", "#7C8590")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Curve:
    """One series of a panel, at all times of the period; NaN where it has no value."""

    legend: str
    group: str
    """Kind of the legend; curves of one kind and legend have the same colour in all panels."""
    values: Floats

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[~np.isnan(self.values)][-1])


Curves = Mapping[Panel, Sequence[Curve]]


def fetch(prometheus: Prometheus, dashboard: Dashboard, period: Period) -> dict[Panel, list[Curve]]:
    """The curves of all panels of a dashboard over a period."""
    times = _times(period)
    return {
        panel: [
            Curve(
                line.legend(query.legend) or panel.title, _group(query.legend), _grid(line, times)
            )
            for query in panel.queries
            for line in prometheus.query_range(query.expr, period)
        ]
        for panel in dashboard.panels
    }


def _times(period: Period) -> Floats:
    num_steps = int((period.end_s - period.begin_s) / period.step_s + 1e-6)
    times: Floats = period.begin_s + period.step_s * np.arange(num_steps + 1, dtype=np.float64)
    return times


def _grid(line: Line, times: Floats) -> Floats:
    values = np.full(len(times), np.nan)
    for time_s, value in line.points.items():
        values[np.abs(times - time_s).argmin()] = value
    return values


def _group(legend: str) -> str:
    return legend.replace("{{worker}}", "{{replica}}")


def draw(dashboard: Dashboard, curves: Curves, period: Period, path: Path) -> None:
    """Write one dashboard to a PNG file."""
    figure = picture(dashboard, curves, period)
    figure.savefig(path, dpi=100, facecolor=BACKGROUND)
    pyplot.close(figure)


def picture(dashboard: Dashboard, curves: Curves, period: Period) -> Figure:
    """Draw one dashboard, on a grid like Grafana's."""
    places = list(layout(dashboard))
    num_lines = max(place.y + place.height for _, place in places)
    width = GRID_WIDTH * COLUMN_IN + 2 * MARGIN_IN
    page = _Page(pyplot.figure(figsize=(width, HEAD_IN + num_lines * LINE_IN + MARGIN_IN)))
    page.figure.set_facecolor(BACKGROUND)
    page.text(MARGIN_IN + 0.05, 0.32, dashboard.title, size=17, weight="bold")
    page.text(MARGIN_IN + 0.05, 0.58, dashboard.description, size=9.5, color=FAINT)
    when = [datetime.fromtimestamp(at_s).astimezone() for at_s in (period.begin_s, period.end_s)]
    times = f"{when[0]:%Y-%m-%d %H:%M} to {when[1]:%H:%M %Z}"
    page.text(width - MARGIN_IN - 0.05, 0.32, times, size=10, color=FAINT, ha="right")
    colours = _colours(curves)
    for item, place in places:
        if isinstance(item, Row):
            y = HEAD_IN + (place.y + 0.62) * LINE_IN
            page.text(MARGIN_IN + 0.05, y, item.title, size=11, weight="bold")
        else:
            _draw_panel(page, item, place, curves[item], period, colours, dashboard.when_empty)
    return page.figure


def _colours(curves: Curves) -> dict[tuple[str, str], Any]:
    """A colour for each legend, the same in all panels."""
    names: dict[str, set[str]] = {}
    for curve in (curve for panel in curves.values() for curve in panel):
        names.setdefault(curve.group, set()).add(curve.legend)
    found: dict[tuple[str, str], Any] = {}
    for group, legends in names.items():
        for index, legend in enumerate(sorted(legends, key=_natural)):
            if group == "{{position}}":  # ordered, so a gradient
                found[group, legend] = pyplot.get_cmap("viridis")(index / max(len(legends), 2))
            else:
                found[group, legend] = COLOURS.get(legend, PALETTE[index % len(PALETTE)])
    return found


def _natural(legend: str) -> list[tuple[int, str]]:
    """A sort key that puts `2` before `10`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", legend)]


class _Page:
    """A figure measured in inches from its top left corner."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = figure.get_size_inches()

    def text(self, x: float, y: float, text: str, size: float, **how: Any) -> None:
        how = {"color": INK, "va": "baseline"} | how
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, **how)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        box = (
            x / self.width,
            1 - (y + height) / self.height,
            width / self.width,
            height / self.height,
        )
        return self.figure.add_axes(box)

    def card(self, x: float, y: float, width: float, height: float) -> None:
        patch = FancyBboxPatch(
            (x, self.height - y - height),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.05",
            facecolor=CARD,
            edgecolor=EDGE,
            transform=self.figure.dpi_scale_trans,
            zorder=-1,
        )
        self.figure.add_artist(patch)


def _draw_panel(
    page: _Page,
    panel: Panel,
    place: Place,
    curves: Sequence[Curve],
    period: Period,
    colours: Mapping[tuple[str, str], Any],
    when_empty: str,
) -> None:
    x, y = MARGIN_IN + place.x * COLUMN_IN + 0.05, HEAD_IN + place.y * LINE_IN + 0.05
    width, height = place.width * COLUMN_IN - 0.1, place.height * LINE_IN - 0.1
    page.card(x, y, width, height)
    page.text(x + 0.12, y + 0.24, panel.title, size=9.5, weight="bold")
    if not curves:
        reason = panel.may_be_empty or when_empty
        middle = y + height / 2 + 0.1
        page.text(x + width / 2, middle, "no data", size=13, color=FAINT, ha="center")
        page.text(x + width / 2, middle + 0.22, reason, size=8.5, color=FAINT, ha="center")
    elif panel.kind is Kind.STAT:
        _draw_stat(page, panel, curves[0], period, (x, y, width, height))
    else:
        curves = sorted(curves, key=lambda curve: _natural(curve.legend))
        num_columns = max(1, int((width - 0.3) / _legend_width(panel.unit, curves)))
        num_lines = -(-min(len(curves), MAX_IN_LEGEND) // num_columns)
        below = 0.3 + num_lines * LEGEND_LINE_IN + 0.08
        axes = page.axes(x + 0.68, y + 0.36, width - 0.85, height - 0.36 - below)
        _draw_chart(axes, panel, curves, period, colours)
        axes.legend(
            *_legend(axes, panel.unit, curves),
            loc="upper left",
            bbox_to_anchor=(-0.56 / (width - 0.85), -0.25 / (height - 0.36 - below)),
            ncols=num_columns,
            frameon=False,
            fontsize=7.5,
            handlelength=1.1,
            columnspacing=1.2,
            borderaxespad=0,
            borderpad=0,
            labelspacing=0.3,
            labelcolor=INK,
        )


def _legend_width(unit: Unit, curves: Sequence[Curve]) -> float:
    return 0.36 + LETTER_IN * max(len(_label(unit, curve)) for curve in curves)


def _label(unit: Unit, curve: Curve) -> str:
    return f"{curve.legend}  {write(curve.last, unit)}"


def _legend(axes: Axes, unit: Unit, curves: Sequence[Curve]) -> tuple[list[Any], list[str]]:
    handles, _ = axes.get_legend_handles_labels()
    labels = [_label(unit, curve) for curve in curves]
    if len(labels) > MAX_IN_LEGEND:
        labels[MAX_IN_LEGEND - 1] = f"and {len(labels) - MAX_IN_LEGEND + 1} more"
    return handles[:MAX_IN_LEGEND], labels[:MAX_IN_LEGEND]


def _draw_stat(
    page: _Page, panel: Panel, curve: Curve, period: Period, box: tuple[float, float, float, float]
) -> None:
    x, y, width, height = box
    level = panel.thresholds.level(curve.last) if panel.thresholds else "good"
    colour = LEVEL_COLOURS[level] if panel.thresholds else INK
    middle = y + 0.42 * height + 0.18
    text = write(curve.last, panel.unit)
    page.text(x + width / 2, middle, text, size=22, weight="bold", color=colour, ha="center")
    axes = page.axes(x + 0.02, y + 0.66 * height, width - 0.04, 0.32 * height)
    times = _times(period)
    low = min(0.0, float(np.nanmin(curve.values)))
    axes.fill_between(times, curve.values, low, color=colour, alpha=0.12, linewidth=0)
    axes.plot(times, curve.values, color=colour, linewidth=1, alpha=0.6)
    axes.set(xlim=(times[0], times[-1]), ylim=(low, low + 1.15 * _top(curve.values - low)))
    axes.axis("off")


def _top(values: Floats) -> float:
    return float(np.nanmax(values)) or 1.0


def _draw_chart(
    axes: Axes,
    panel: Panel,
    curves: Sequence[Curve],
    period: Period,
    colours: Mapping[tuple[str, str], Any],
) -> None:
    times = _times(period)
    shades = [colours[curve.group, curve.legend] for curve in curves]
    if panel.kind is Kind.LINES:
        for curve, shade in zip(curves, shades, strict=True):
            few = np.isfinite(curve.values).sum() < 3
            marker = "." if few else None
            axes.plot(times, curve.values, color=shade, linewidth=1.4, marker=marker, label="_")
            axes.lines[-1].set_label(curve.legend)
        top = max(_top(curve.values) for curve in curves)
    else:
        heights = np.nan_to_num(np.array([curve.values for curve in curves]))
        step = "post" if panel.kind is Kind.BARS else None
        axes.stackplot(
            times, heights, colors=shades, labels=[curve.legend for curve in curves], alpha=0.75,
            step=step, linewidth=0,
        )  # fmt: skip
        top = _top(heights.sum(axis=0))
    _dress(axes, panel, times, top)


def _dress(axes: Axes, panel: Panel, times: Floats, top: float) -> None:
    """Axes, grid and thresholds."""
    limit = 1.02 if panel.unit is Unit.SHARE and 0.6 < top <= 1.001 else 1.12 * top
    axes.set(xlim=(times[0], times[-1]), ylim=(0, limit), facecolor="none")
    for value, level in zip(panel.thresholds or (), ("warn", "bad"), strict=False):
        if value <= limit:
            axes.axhline(value, color=LEVEL_COLOURS[level], linewidth=0.9, alpha=0.5, dashes=(5, 4))
    if panel.unit is Unit.SECONDS and top > 120:
        axes.set_yticks(np.arange(0, limit, _round_time(limit, 5)))
    else:
        whole = panel.kind is Kind.BARS
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value, panel.unit)))
    axes.set_xticks(ticks := _ticks(times), [_clock(at_s, ticks) for at_s in ticks])
    axes.grid(axis="both", color=EDGE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, colors=FAINT, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _ticks(times: Floats) -> list[float]:
    """At most eight round times of day."""
    step_s = _round_time(times[-1] - times[0], 8)
    offset_s = datetime.fromtimestamp(times[0]).astimezone().utcoffset()
    shift_s = offset_s.total_seconds() if offset_s else 0.0
    first = np.ceil((times[0] + shift_s) / step_s) * step_s - shift_s
    return [float(at_s) for at_s in np.arange(first, times[-1], step_s)]


def _round_time(total_s: float, max_ticks: int) -> int:
    """The shortest round time that divides `total_s` into at most `max_ticks` parts."""
    return next((step for step in TICKS_S if total_s <= max_ticks * step), TICKS_S[-1])


def _clock(at_s: float, ticks: Sequence[float]) -> str:
    step_s = ticks[1] - ticks[0] if len(ticks) > 1 else 60
    shape = "%H:%M:%S" if step_s < 60 else "%H:%M" if step_s < 86_400 else "%b %d"
    return datetime.fromtimestamp(at_s).strftime(shape)


SCALES: dict[Unit, tuple[tuple[float, float, str], ...]] = {
    Unit.SECONDS: (
        (1e-3, 1e6, " µs"),
        (1.0, 1e3, " ms"),
        (120.0, 1.0, " s"),
        (7200.0, 1 / 60, " min"),
        (172_800.0, 1 / 3600, " h"),
        (float("inf"), 1 / 86_400, " d"),
    ),
    Unit.SHARE: ((float("inf"), 100.0, " %"),),
}
"""Scales of each unit: the value below which it applies, its factor, and its suffix."""
WORDS = {Unit.COUNT: "", Unit.REQUESTS_PER_S: " req/s", Unit.TOKENS_PER_S: " tok/s"}


def write(value: float, unit: Unit) -> str:
    """Format a value with its unit, with three digits."""
    scales = SCALES.get(unit) or (
        (1e3, 1.0, WORDS[unit]),
        (1e6, 1e-3, f" k{WORDS[unit].lstrip()}" if WORDS[unit] else "k"),
        (float("inf"), 1e-6, f" M{WORDS[unit].lstrip()}" if WORDS[unit] else "M"),
    )
    if value == 0:
        return f"0{'' if unit is Unit.COUNT else scales[-1][2] if unit is Unit.SHARE else ''}"
    factor, word = next((by, word) for below, by, word in scales if abs(value) < below)
    number = value * factor
    digits = max(0, 2 - int(np.floor(np.log10(abs(number))))) if abs(number) < 100 else 0
    text = f"{number:.{min(digits, 3)}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{word}"
