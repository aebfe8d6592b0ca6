import dataclasses
import itertools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard as GrafanaDashboard

from cluster.observe import metrics
from cluster.observe.dashboards import grafana
from cluster.observe.dashboards.alerts import ALERTS
from cluster.observe.dashboards.pages import DASHBOARDS
from cluster.observe.dashboards.panels import GRID_WIDTH, Dashboard, Panel, Row, Thresholds, layout
from cluster.observe.dashboards.promql import grown, ratio, series, shown
from cluster.observe.metrics import METRICS, Kind, Metric, VllmMetric
from tests.programs import require
from tests.prometheus_server import DEPLOY

PANELS = [panel for dashboard in DASHBOARDS for panel in dashboard.panels]
QUERIES = [query for panel in PANELS for query in panel.queries]
EXPRESSIONS = [query.expr for query in QUERIES] + [alert.expr for alert in ALERTS]
VLLM = {metric.name for metric in vars(metrics).values() if isinstance(metric, VllmMetric)}
NAME = re.compile(r"\b(?:xyserve_|vllm:)\w+")
COMMON_LABELS = {"application", "deployment", "replica", "model_name", "le"}

register_default_plugins()


def sample_names(metric: Metric) -> set[str]:
    """What Prometheus has of a metric and we may use: never the sum of a histogram."""
    if metric.kind is Kind.HISTOGRAM:
        return {f"{metric.name}_bucket", f"{metric.name}_count"}
    return {metric.name}


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_every_metric_is_shown_or_watched(metric: Metric) -> None:
    used = {name for expr in EXPRESSIONS for name in NAME.findall(expr)}

    assert sample_names(metric) & used


def test_every_name_in_an_expression_is_a_metric() -> None:
    known = {name for metric in METRICS.values() for name in sample_names(metric)}
    known |= VLLM | {f"{name}_bucket" for name in VLLM}

    assert {name for expr in EXPRESSIONS for name in NAME.findall(expr)} <= known


def test_every_label_in_an_expression_is_one_of_its_metrics() -> None:
    by_name = {name: metric for metric in METRICS.values() for name in sample_names(metric)}
    for expr in EXPRESSIONS:
        known = set(COMMON_LABELS)
        for name in NAME.findall(expr):
            known |= set(by_name[name].labels if name in by_name else ())
        matchers = re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expr)
        grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", expr)
        labels = {label.strip() for group in grouped for label in group.split(",")} - {""}
        assert labels | set(matchers) <= known, expr


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.legend)
def test_every_label_in_a_legend_is_kept_by_its_expression(query: Any) -> None:
    kept = {
        label
        for group in re.findall(r"\bby \(([^)]*)\)", query.expr)
        for label in group.split(", ")
    }

    assert set(re.findall(r"{{(\w+)}}", query.legend)) <= kept


def test_legends_without_labels_distinguish_the_queries_of_a_panel() -> None:
    for panel in PANELS:
        legends = [query.legend for query in panel.queries]
        assert len(set(legends)) == len(legends) > 0, panel.title


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_every_panel_says_what_it_shows(panel: Panel) -> None:
    assert len(panel.description) > 40
    assert panel.description.endswith(".")
    assert panel.title


def test_no_histogram_is_read_by_its_sum() -> None:
    assert [expr for expr in EXPRESSIONS if "_sum" in expr] == []
    with pytest.raises(AssertionError):
        series(metrics.STEP_SECONDS, part="_sum")


def test_expressions_are_built_as_they_read() -> None:
    assert series(metrics.STEP_TOKENS) == "xyserve_step_tokens_total"
    assert shown(metrics.PLACEMENTS, 'reason="tie"') == (
        'xyserve_placements_total{application=~"$app",model_name=~"$model",worker=~"$worker",'
        'reason="tie"}'
    )
    assert shown(metrics.VLLM_KV_CACHE_USAGE) == 'vllm:kv_cache_usage_perc{model_name=~"$model"}'
    assert ratio("a", "b") == "(a or 0 * b) / (b > 0)"
    assert grown("c", "5m") == "increase(c[5m])"


def test_thresholds_know_which_way_is_worse() -> None:
    latency, attainment = Thresholds(warn=1, bad=10), Thresholds(warn=0.95, bad=0.9)

    assert [latency.level(value) for value in (0.5, 1, 20)] == ["good", "warn", "bad"]
    assert [attainment.level(value) for value in (1.0, 0.93, 0.2)] == ["good", "warn", "bad"]


@pytest.mark.parametrize(
    ("path", "text"), grafana.files().items(), ids=[path.name for path in grafana.files()]
)
def test_what_is_checked_in_is_what_the_code_makes(path: Path, text: str) -> None:
    assert path.read_text() == text, "run `make dashboards`"


def test_no_other_dashboard_is_checked_in() -> None:
    assert set((DEPLOY / "grafana").glob("*.json")) == {
        path for path in grafana.files() if path.suffix == ".json"
    }


DOCUMENTS = [
    pytest.param(json.loads(text), id=path.stem)
    for path, text in grafana.files().items()
    if path.suffix == ".json"
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_grafanas_own_types_read_a_dashboard_without_loss(
    document: dict[str, Any],
) -> None:
    read = GrafanaDashboard.from_json(document)

    assert json.loads(json.dumps(read, cls=JSONEncoder)) == document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_panels_lie_next_to_each_other(document: dict[str, Any]) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        assert x + width <= GRID_WIDTH, panel["title"]
        covered = set(itertools.product(range(x, x + width), range(y, y + height)))
        assert not covered & cells, panel["title"]
        cells |= covered

    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    assert len(cells) == GRID_WIDTH * (1 + max(y for _, y in cells))  # and no gap


@pytest.mark.parametrize("document", DOCUMENTS)
def test_panels_have_a_unit_and_ask_the_chosen_data_source(
    document: dict[str, Any],
) -> None:
    source = {"type": "prometheus", "uid": "$datasource"}
    panels = [panel for panel in document["panels"] if panel["type"] != "row"]
    for panel in panels:
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == source
        assert [target["datasource"] for target in panel["targets"]] == [source] * len(
            panel["targets"]
        )
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len(panels) == len({panel["title"] + str(panel["gridPos"]) for panel in panels})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_dashboard_has_the_variables_that_it_uses(document: dict[str, Any]) -> None:
    variables = {one["name"]: one for one in document["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", json.dumps(document["panels"]))) - {"__rate_interval"}

    assert set(variables) == used
    assert {"app", "model", "datasource"} <= used
    for name, one in variables.items():
        assert one["type"] == ("datasource" if name == "datasource" else "query")
        if name != "datasource":
            assert (one["includeAll"], one["multi"], one["allValue"]) == (True, True, ".*")


def test_names_of_dashboards_and_alerts_are_unique() -> None:
    for values in (
        [dashboard.uid for dashboard in DASHBOARDS],
        [dashboard.title for dashboard in DASHBOARDS],
        [alert.name for alert in ALERTS],
    ):
        assert len(set(values)) == len(values)


def test_every_alert_has_a_summary_and_a_remedy() -> None:
    for alert in ALERTS:
        assert all(dataclasses.astuple(alert)), alert.name
        assert len(alert.description) > 80, alert.name


def test_rows_are_filled_evenly() -> None:
    dashboard = Dashboard(
        "u", "t", "d", (Row("one", tuple(PANELS[:1])), Row("two", tuple(PANELS[6:11])))
    )

    assert [tuple(place) for _, place in layout(dashboard)] == [
        (0, 0, 24, 1), (0, 1, 24, 4),
        (0, 5, 24, 1), (0, 6, 12, 8), (12, 6, 12, 8), (0, 14, 8, 8), (8, 14, 8, 8), (16, 14, 8, 8),
    ]  # fmt: skip


def promtool(*args: str | Path) -> None:
    done = subprocess.run(
        [require("promtool", "prometheus"), *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_no_fault_in_the_config() -> None:
    promtool("check", "config", DEPLOY / "prometheus.yml")
    promtool("check", "rules", DEPLOY / "alerts.yml")
