"""The dashboards on a real Prometheus, which scrapes a cluster that exists in its metrics only."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
from matplotlib import image, pyplot
from typer.testing import CliRunner

from cluster.cli.dashboards import dashboards
from cluster.observe.dashboards.pages import DASHBOARDS
from cluster.observe.dashboards.panels import Dashboard, Kind, Unit
from cluster.observe.dashboards.plots import draw, fetch, picture, write
from cluster.observe.dashboards.prometheus import Line, Period, Prometheus, PrometheusFailed
from cluster.observe.metrics import METRICS
from tests.cluster.observe.catalogue_exporter import CatalogueExporter
from tests.programs import free_port, require
from tests.prometheus_server import prometheus_server

RATE_INTERVAL = "8s"
DATA_TIMEOUT_S = 150
"""Some of the events are rare."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    require("prometheus", "prometheus")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    discovery = folder / "discovery.json"
    discovery.write_text(json.dumps([{"targets": [f"127.0.0.1:{port}"], "labels": {"job": "ray"}}]))
    with (
        CatalogueExporter(port),
        prometheus_server(folder, discovery, "1s", "1s") as url,
        Prometheus(url) as prometheus,
    ):
        yield prometheus


@pytest.fixture(scope="module")
def period(server: Prometheus) -> Period:
    """A time in which every panel has data that must have some."""
    began_s, missing = time.time(), ["nothing asked yet"]
    while missing:
        assert time.time() < began_s + DATA_TIMEOUT_S, missing
        time.sleep(1)
        period = Period(began_s, time.time(), 1, RATE_INTERVAL)
        missing = [
            panel.title
            for dashboard in DASHBOARDS
            for panel, curves in fetch(server, dashboard, period).items()
            if len(curves) < len(panel.queries) and not panel.may_be_empty
        ]
    return period


def test_relabelling_gives_metrics_the_names_and_labels_that_queries_use(
    server: Prometheus, period: Period
) -> None:
    names = httpx.get(f"{server.url}/api/v1/label/__name__/values").json()["data"]

    assert [name for name in names if name.startswith(("ray_xyserve_", "ray_vllm_"))] == []
    assert {"xyserve_step_seconds_bucket", "vllm:num_requests_running"} <= set(names)
    for line in server.query("vllm:num_requests_running"):
        assert line.labels["replica"]
        assert "ReplicaId" not in line.labels
    for line in server.query("xyserve_live_requests"):
        assert line.labels["replica"]


def test_the_exporter_of_this_test_has_the_whole_catalogue(
    server: Prometheus, period: Period
) -> None:
    known = set(httpx.get(f"{server.url}/api/v1/label/__name__/values").json()["data"])

    assert {
        metric.name
        for metric in METRICS.values()
        if not {metric.name, f"{metric.name}_bucket"} & known
    } == set()


def test_the_alerts_are_evaluated_without_fault(server: Prometheus, period: Period) -> None:
    def rules() -> list[dict[str, str]]:
        (group,) = httpx.get(f"{server.url}/api/v1/rules").json()["data"]["groups"]
        return list(group["rules"])

    while any(rule["health"] == "unknown" for rule in rules()):
        assert time.time() < period.end_s + DATA_TIMEOUT_S
        time.sleep(0.5)
    assert {rule["health"] for rule in rules()} == {"ok"}
    assert "error expanding template" not in httpx.get(f"{server.url}/api/v1/rules").text


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_a_dashboard_becomes_a_picture(
    server: Prometheus, period: Period, dashboard: Dashboard, tmp_path: Path
) -> None:
    path = tmp_path / "dashboard.png"

    draw(dashboard, fetch(server, dashboard, period), period, path)

    height, width, _ = image.imread(path).shape
    assert width == 1950
    assert height > 1000
    assert path.stat().st_size > 50_000


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_a_picture_has_every_title_and_every_curve(
    server: Prometheus, period: Period, dashboard: Dashboard
) -> None:
    curves = fetch(server, dashboard, period)
    figure = picture(dashboard, curves, period)

    texts = [text.get_text() for text in figure.texts]
    assert {dashboard.title, *(panel.title for panel in dashboard.panels)} <= set(texts)
    assert texts.count("no data") == sum(not shown for shown in curves.values())
    legends = [
        [text.get_text().partition("  ")[0] for text in legend.get_texts()]
        for axes in figure.axes
        if (legend := axes.get_legend()) is not None
    ]
    assert sorted(map(sorted, legends)) == sorted(
        sorted(curve.legend for curve in shown)
        for panel, shown in curves.items()
        if shown and panel.kind is not Kind.STAT
    )
    pyplot.close(figure)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_a_panel_without_data_gives_the_reason(server: Prometheus, dashboard: Dashboard) -> None:
    long_ago = Period(1_000_000, 1_000_600, 10)
    figure = picture(dashboard, fetch(server, dashboard, long_ago), long_ago)

    texts = [text.get_text() for text in figure.texts]
    assert texts.count("no data") == len(dashboard.panels)
    for panel in dashboard.panels:
        assert (panel.may_be_empty or dashboard.when_empty) in texts
    pyplot.close(figure)


def run(*args: str) -> str:
    app = typer.Typer()
    app.command()(dashboards)
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_writes_a_picture_of_each(
    server: Prometheus, period: Period, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "folder"

    output = run("--prometheus", server.url, "--out", str(out), "--minutes", "0.5")

    names = {"overview.png", "steps.png", "placement.png", "speculation.png"}
    assert {path.name for path in out.iterdir()} == names
    assert output.count("wrote ") == 4


def test_without_prometheus_the_command_names_the_address_and_the_remedy(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"

    with pytest.raises(PrometheusFailed) as failed:
        run("--prometheus", address, "--out", str(tmp_path / "out"))

    assert address in str(failed.value)
    assert "prometheus --config.file=deploy/prometheus.yml" in str(failed.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:9090", "http://", "nonsense"])
def test_an_address_that_is_none_is_an_error_of_the_same_kind(address: str) -> None:
    with Prometheus(address) as prometheus, pytest.raises(PrometheusFailed, match="--prometheus"):
        prometheus.query("up")


def test_something_else_at_the_address_is_not_taken_for_prometheus() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"

    with (
        Prometheus(address) as prometheus,
        pytest.raises(PrometheusFailed, match="not a Prometheus"),
    ):
        prometheus.query("up")

    thread.join()
    server.server_close()


def test_what_prometheus_does_not_understand_is_reported(server: Prometheus) -> None:
    with pytest.raises(PrometheusFailed, match=r"parse error.*: rate\("):
        server.query("rate(")


def test_variables_of_grafana_stand_for_all(server: Prometheus, period: Period) -> None:
    # `up` would do, except for a scrape that takes too long on a busy machine.
    constant = 'xyserve_start_time_seconds{application=~"$app",deployment="Ingress"}'

    (line,) = server.query(f"sum(rate({constant}[$__rate_interval]))", "10s")

    assert list(line.points.values()) == [0]


def test_a_legend_takes_the_values_of_labels() -> None:
    line = Line({"worker": "w1", "reason": "tie"}, {})

    assert line.legend("{{worker}} by {{reason}}{{none}}") == "w1 by tie"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, Unit.SECONDS, "0"),
        (0.00043, Unit.SECONDS, "430 µs"),
        (0.0156, Unit.SECONDS, "15.6 ms"),
        (1.5, Unit.SECONDS, "1.5 s"),
        (90, Unit.SECONDS, "90 s"),
        (600, Unit.SECONDS, "10 min"),
        (90_000, Unit.SECONDS, "25 h"),
        (0, Unit.SHARE, "0 %"),
        (0.9312, Unit.SHARE, "93.1 %"),
        (1, Unit.SHARE, "100 %"),
        (0, Unit.COUNT, "0"),
        (7, Unit.COUNT, "7"),
        (1234, Unit.COUNT, "1.23k"),
        (2_500_000, Unit.COUNT, "2.5M"),
        (0.25, Unit.REQUESTS_PER_S, "0.25 req/s"),
        (1500, Unit.TOKENS_PER_S, "1.5 ktok/s"),
        (0, Unit.TOKENS_PER_S, "0"),
    ],
)
def test_values_are_written_with_their_unit(value: float, unit: Unit, text: str) -> None:
    assert write(value, unit) == text
