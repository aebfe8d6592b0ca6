"""A real Prometheus on the running app: every query and alert of ours finds what it asks for."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from cluster.observe.dashboards.alerts import ALERTS
from cluster.observe.dashboards.pages import DASHBOARDS
from cluster.observe.dashboards.panels import Panel
from cluster.observe.dashboards.plots import draw, fetch
from cluster.observe.dashboards.prometheus import Period, Prometheus
from cluster.observe.metrics import METRICS, Kind
from tests.e2e.conftest import MODEL, Server
from tests.programs import require
from tests.prometheus_server import prometheus_server

RATE_INTERVAL = "2m"
DATA_TIMEOUT_S = 180
"""Ray exports every 10 s, Prometheus asks every 2 s, and a rate takes two exports."""
REPEATED = "one two three four " * 8
LONG = "The quick brown fox jumps over the lazy dog. " * 60
PANELS = [panel for dashboard in DASHBOARDS for panel in dashboard.panels]


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    require("prometheus", "prometheus")
    discovery = server.ray_folder / "prom_metrics_service_discovery.json"
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus_server(folder, discovery, "2s") as url, Prometheus(url) as prometheus:
        yield prometheus


@contextmanager
def load(client: openai.OpenAI) -> Iterator[None]:
    """Requests of all classes, without end, some of them wrong and some of them left."""

    def complete(slo_class: str, prompt: str, max_tokens: int) -> None:
        client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_headers={"x-slo-class": slo_class},
        )

    def leave() -> None:
        stream = client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=1000, stream=True
        )
        next(iter(stream))
        stream.close()

    def be_wrong() -> None:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt="Hello", max_tokens=-1)

    calls: list[Callable[[], object]] = [
        lambda: complete("interactive", REPEATED, 60),
        lambda: complete("standard", REPEATED, 60),
        lambda: complete("batch", LONG, 40),
        leave,
        be_wrong,
    ]
    stopping = threading.Event()
    faults: list[Exception] = []

    def repeat(call: Callable[[], object]) -> None:
        while not stopping.wait(0.5):
            try:
                call()
            except Exception as fault:  # told when the load ends
                faults.append(fault)
                return

    threads = [threading.Thread(target=repeat, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert faults == []


@pytest.fixture(scope="module")
def period(prometheus: Prometheus, client: openai.OpenAI) -> Period:
    """A time of load in which every panel has got data, or its time is over."""
    began_s = time.time()
    with load(client):
        while True:
            time.sleep(2)
            period = Period(began_s, time.time(), 2, RATE_INTERVAL)
            if not any(missing(prometheus, panel, period) for panel in PANELS):
                return period
            if period.end_s > began_s + DATA_TIMEOUT_S:
                return period  # the tests tell which


def missing(prometheus: Prometheus, panel: Panel, period: Period) -> list[str]:
    """The queries of a panel that give nothing although they must."""
    empty = [
        query.expr for query in panel.queries if not prometheus.query_range(query.expr, period)
    ]
    return [] if panel.may_be_empty else empty


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_a_panel_shows_data(prometheus: Prometheus, period: Period, panel: Panel) -> None:
    assert missing(prometheus, panel, period) == []


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_arrives_unless_it_is_of_rare_events(
    prometheus: Prometheus, period: Period, name: str
) -> None:
    metric = METRICS[name]
    sample = f"{metric.name}_bucket" if metric.kind is Kind.HISTOGRAM else metric.name
    must = [
        panel.title
        for panel in PANELS
        if not panel.may_be_empty and any(f"{sample}{{" in query.expr for query in panel.queries)
    ]
    lines = prometheus.query_range(sample, period)

    assert lines or not must, f"{sample} is missing; these show it: {must}"
    for line in lines:
        labels = {"application", "deployment", "replica", "model_name", *metric.labels}
        assert labels <= line.labels.keys()


def test_vllms_metrics_name_their_replica(prometheus: Prometheus, period: Period) -> None:
    lines = prometheus.query_range("vllm:num_requests_running", period)

    assert lines
    for line in lines:
        assert line.labels["replica"]
        assert "ReplicaId" not in line.labels


def test_alerts_can_be_evaluated_and_those_of_a_broken_app_are_silent(
    prometheus: Prometheus, period: Period
) -> None:
    for alert in ALERTS:
        prometheus.query(alert.expr)
    (group,) = httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}

    firing = prometheus.query_range('ALERTS{alertstate="firing"}', period)
    names = {line.labels["alertname"] for line in firing}
    assert not names & {"XYServeWorkerStuck", "XYServeSchedulerBlind"}


def test_the_dashboards_can_be_drawn(
    prometheus: Prometheus, period: Period, tmp_path: Path
) -> None:
    for dashboard in DASHBOARDS:
        draw(
            dashboard,
            fetch(prometheus, dashboard, period),
            period,
            tmp_path / f"{dashboard.uid}.png",
        )

    assert len(list(tmp_path.glob("*.png"))) == len(DASHBOARDS)
