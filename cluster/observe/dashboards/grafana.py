"""Writes the dashboards as Grafana's JSON and the alerts as Prometheus' rules, in `deploy/`.

Run it with `make dashboards` after a change in this folder.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

from cluster.observe import metrics
from cluster.observe.dashboards.alerts import ALERTS, Alert
from cluster.observe.dashboards.pages import DASHBOARDS
from cluster.observe.dashboards.panels import COLOURS, Dashboard, Kind, Panel, Place, Row, layout
from cluster.observe.dashboards.promql import series

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
DATA_SOURCE = models.DataSourceRef("prometheus", "$datasource")
VARIABLES = {
    "app": ("App", "application", series(metrics.START_TIME)),
    "model": ("Model", "model_name", series(metrics.START_TIME, 'application=~"$app"')),
    "worker": (
        "Worker",
        "replica",
        series(metrics.START_TIME, 'application=~"$app"', 'deployment="Worker"'),
    ),
    "slo_class": ("Class", "slo_class", series(metrics.REQUESTS, 'application=~"$app"')),
}
"""Label, metric label and series of each variable, by name."""
ALERTS_HEADER = """\
# Alert rules for Prometheus; deploy/prometheus.yml names this file.
# Written by `make dashboards` from cluster/observe/dashboards/alerts.py: change that one.
"""
LEVEL_COLOURS = {"good": "green", "warn": "orange", "bad": "red"}


def main() -> None:
    """Write all files."""
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.relative_to(DEPLOY.parent)}")


def files() -> dict[Path, str]:
    """The contents of each file, by path."""
    found = {
        DEPLOY / "grafana" / f"{dashboard.uid.removeprefix('xyserve-')}.json": (
            json.dumps(grafana_dashboard(dashboard), cls=JSONEncoder, indent=2, sort_keys=True)
            + "\n"
        )
        for dashboard in DASHBOARDS
    }
    groups = {"groups": [{"name": "xyserve", "rules": [_rule(alert) for alert in ALERTS]}]}
    rules = yaml.safe_dump(groups, sort_keys=False, width=100, allow_unicode=True)
    return found | {DEPLOY / "alerts.yml": ALERTS_HEADER + rules}


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.lasting,
        "labels": {"severity": alert.severity.value},
        "annotations": {"summary": alert.summary, "description": alert.description},
    }


def grafana_dashboard(dashboard: Dashboard) -> models.Dashboard:
    """Convert one dashboard to Grafana's model."""
    made = (
        builders.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags(["xyserve"])
        .refresh("10s")
        .time("now-15m", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            builders.DashboardLink("XY-Serve")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["xyserve"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(builders.DatasourceVariable("datasource").label("Data").type("prometheus"))
    )
    expressions = " ".join(query.expr for panel in dashboard.panels for query in panel.queries)
    for name in VARIABLES:
        if f"${name}" in expressions:
            made.with_variable(_variable(name))
    for number, (item, place) in enumerate(layout(dashboard), start=1):
        if isinstance(item, Row):
            row = builders.Row(item.title).id(number).grid_pos(_grid(place))
            made.with_row(row)
        else:
            made.with_panel(_panel(item, dashboard).id(number).grid_pos(_grid(place)))
    return made.build()


def _grid(place: Place) -> models.GridPos:
    return models.GridPos(h=place.height, w=place.width, x=place.x, y=place.y)


def _variable(name: str) -> builders.QueryVariable:
    label, of_label, of_series = VARIABLES[name]
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(DATA_SOURCE)
        .query(f"label_values({of_series}, {of_label})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel, dashboard: Dashboard) -> stat.Panel | timeseries.Panel:
    made = _stat() if panel.kind is Kind.STAT else _chart(panel)
    made.title(panel.title).description(panel.description).datasource(DATA_SOURCE)
    made.unit(panel.unit).no_value(panel.may_be_empty or dashboard.when_empty)
    made.thresholds(_thresholds(panel))
    for letter, query in zip("ABCDEF", panel.queries, strict=False):
        made.with_target(
            prometheus.Dataquery()
            .ref_id(letter)
            .datasource(DATA_SOURCE)
            .expr(query.expr)
            .legend_format(query.legend)
            .range()
        )
    return made


def _thresholds(panel: Panel) -> builders.ThresholdsConfig:
    steps = [models.Threshold(None, LEVEL_COLOURS["good"])]
    if panel.thresholds is not None:
        warn, bad = panel.thresholds
        if warn < bad:
            steps += [models.Threshold(warn, LEVEL_COLOURS["warn"])]
            steps += [models.Threshold(bad, LEVEL_COLOURS["bad"])]
        else:
            steps = [models.Threshold(None, LEVEL_COLOURS["bad"])]
            steps += [models.Threshold(bad, LEVEL_COLOURS["warn"])]
            steps += [models.Threshold(warn, LEVEL_COLOURS["good"])]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _stat() -> stat.Panel:
    return (
        stat.Panel()
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .text_mode(common.BigValueTextMode.VALUE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def _chart(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .color_scheme(builders.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
        .tooltip(
            common_builders.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
        .show_points(common.VisibilityMode.NEVER)
        .line_width(1.5)
        .min(0)
    )
    if panel.kind is Kind.BARS:
        made.draw_style(common.GraphDrawStyle.BARS).fill_opacity(60)
    if panel.kind in (Kind.STACKED, Kind.BARS):
        made.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if panel.kind is Kind.STACKED:
        made.fill_opacity(40)
    if panel.thresholds is not None:
        dashed = common.GraphThresholdsStyleMode.DASHED
        made.thresholds_style(common_builders.GraphThresholdsStyleConfig().mode(dashed))
    for query in panel.queries:
        if colour := COLOURS.get(query.legend):
            fixed = {"mode": "fixed", "fixedColor": colour}
            made.override_by_name(query.legend, [models.DynamicConfigValue("color", fixed)])
    return made


if __name__ == "__main__":
    main()
