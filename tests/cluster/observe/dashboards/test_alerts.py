"""When each alert fires, and when it does not: the rules on made-up histories, by `promtool`."""

import json
import subprocess
from pathlib import Path

import pytest

from cluster.observe import metrics
from cluster.observe.dashboards.alerts import ALERTS
from cluster.observe.metrics import Metric, RayMetric, VllmMetric
from tests.programs import require
from tests.prometheus_server import DEPLOY

STEP_S = 15
"""Time between two scrapes; four make a minute."""
AN_HOUR = 60
LONG_AGO_S = -7200

History = dict[str, str]
"""Values by series, in promtool's notation: `0+1x3` is 0 1 2 3, and `_` is no value."""


def scrapes(minutes: float) -> int:
    return int(minutes * 60 / STEP_S) - 1


def series(metric: Metric | VllmMetric | RayMetric, part: str = "", **labels: str) -> str:
    pairs = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{metric.name}{part}{{{pairs}}}"


def flat(value: float, minutes: float = AN_HOUR) -> str:
    return f"{value:g}+0x{scrapes(minutes)}"


def growing(per_scrape: float, minutes: float = AN_HOUR, start: float = 0) -> str:
    return f"{start:g}+{per_scrape:g}x{scrapes(minutes)}"


def nothing(minutes: float) -> str:
    return f"_x{scrapes(minutes)}"


def replica(deployment: str, name: str, started_s: float = LONG_AGO_S, app: str = "a") -> History:
    of = {"application": app, "deployment": deployment, "replica": name}
    return {
        series(metrics.START_TIME, **of): flat(started_s),
        series(metrics.HEALTHY_REPLICAS, **of): flat(1),
    }


def worker(name: str, app: str = "a") -> History:
    """One that works."""
    of = {"application": app, "deployment": "Worker", "replica": name}
    seen = {"application": app, "worker": name}
    return replica("Worker", name, app=app) | {
        series(metrics.STEP_MEASURED_SECONDS, **of): growing(12),
        series(metrics.DRAFT_SILENCE, **of): flat(0),
        series(metrics.VLLM_NUM_REQUESTS_RUNNING, replica=name): flat(3),
        series(metrics.WORKER_REQUESTS, **seen): flat(3),
        series(metrics.WORKER_REPORT_AGE, **seen): flat(1),
        series(metrics.WORKER_SLOWNESS, **seen): flat(1),
        **drafts(name, late=1, app=app),
    }


def drafts(worker: str, late: float, app: str = "a") -> History:
    """Draft tokens of a worker, 100 of them proposed between two scrapes."""
    of = {"application": app, "replica": worker}
    return {
        series(metrics.DRAFT_TOKENS, outcome="proposed", **of): growing(100),
        series(metrics.DRAFT_TOKENS, outcome="late", **of): growing(late),
    }


def requests(good: str, bad: str, ingress: str = "i", app: str = "a") -> History:
    """Requests of an ingress that ended well and by our fault, and as many targets met."""
    of = {"application": app, "replica": ingress, "slo_class": "standard"}
    return {
        series(metrics.REQUESTS, outcome="stop", **of): good,
        series(metrics.REQUESTS, outcome="error", **of): bad,
        series(metrics.SLO_REQUESTS, target="all", met="true", **of): good,
        series(metrics.SLO_REQUESTS, target="all", met="false", **of): flat(0),
        series(metrics.ADMISSIONS, outcome="admitted", application=app, replica=ingress): good,
        series(metrics.ADMISSIONS, outcome="unavailable", application=app, replica=ingress): flat(
            0
        ),
    }


def prefixes(found: float, predicted: float, untold: str = flat(0)) -> History:
    """Prompt tokens between two scrapes, and workers that do not tell of their caches."""
    of = {"application": "a", "replica": "ai"}
    return {
        series(metrics.PREFIX_TOKENS, kind="placed", **of): growing(2 * predicted),
        series(metrics.PREFIX_TOKENS, kind="predicted", **of): growing(predicted),
        series(metrics.PREFIX_TOKENS, kind="found", **of): growing(found),
        series(metrics.PREFIX_UNTOLD_WORKERS, application="a", replica="ag"): untold,
    }


def app(name: str = "a") -> History:
    """A healthy one under load."""
    first, second, ingress = (name + part for part in ("w1", "w2", "i"))
    return (
        worker(first, name)
        | worker(second, name)
        | replica("Ingress", ingress, app=name)
        | replica("GlobalScheduler", f"{name}g", app=name)
        | requests(growing(10), flat(0), ingress, name)
    )


def of(history: History, *words: str) -> list[str]:
    """The series with all of these words in their names or labels."""
    return [one for one in history if all(word in one for word in words)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    require("promtool", "prometheus")
    return tmp_path


def check(folder: Path, history: History, *firing: str, by: str = "alertname") -> None:
    """Exactly these alerts fire in the course of a history, by name or another label."""
    over = f"{AN_HOUR + 30}m"
    fired = f'group by ({by}) (count_over_time(ALERTS{{alertstate="firing"}}[{over}]))'
    test = {
        "interval": f"{STEP_S}s",
        # As after a scrape without it; Prometheus would go on with its last value for 5 minutes.
        "input_series": [
            {"series": one, "values": f"{text} stale"} for one, text in history.items()
        ],
        "promql_expr_test": [
            {
                "expr": fired,
                "eval_time": over,
                "exp_samples": [{"labels": f'{{{by}="{one}"}}', "value": 1} for one in firing],
            }
        ],
    }
    document = {
        "rule_files": [str(DEPLOY / "alerts.yml")],
        "evaluation_interval": f"{STEP_S}s",
        "tests": [test],
    }
    path = folder / "test.yml"
    path.write_text(json.dumps(document))  # which is YAML too
    done = subprocess.run(
        ["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_healthy_app_gives_no_alert(folder: Path) -> None:
    check(folder, app())


def test_an_idle_app_gives_no_alert(folder: Path) -> None:
    history = app()
    for name in history:
        if "_total" in name or "requests" in name:
            history[name] = flat(0)
    check(folder, history)


def test_a_prometheus_that_starts_late_does_not_report_what_was_before(folder: Path) -> None:
    old = requests(growing(10, start=9000), flat(600), "ai")
    old[series(metrics.DRAFT_COLLAPSES, application="a", reason="late")] = flat(7)
    old |= {name: flat(500) for name in of(old, "unavailable")}
    old |= {name: flat(5000) for name in of(old, 'met="false"')}

    check(folder, app() | old)


def test_a_scrape_gap_gives_no_alert(folder: Path) -> None:
    gap = {
        name: f"{text.partition('x')[0]}x{scrapes(20)} stale {nothing(7)} "
        + (growing(10, 33, 1200) if "+10x" in text else text.partition("x")[0] + f"x{scrapes(33)}")
        for name, text in app().items()
    }
    check(folder, gap)


def test_errors_from_the_first_one_on(folder: Path) -> None:
    check(folder, app() | requests(growing(10), growing(1), "ai"), "XYServeErrors")


def test_errors_long_after_the_start(folder: Path) -> None:
    bad = f"0+0x{scrapes(30)} {growing(2, 30)}"
    check(folder, app() | requests(growing(10), bad, "ai"), "XYServeErrors")


def test_one_error_in_a_thousand_and_few_requests_are_no_alert(folder: Path) -> None:
    check(folder, app() | requests(growing(10), f"0+0x{scrapes(30)} 1+0x{scrapes(30)}", "ai"))
    check(folder, app() | requests(flat(0), f"0+0x{scrapes(30)} 3+0x{scrapes(30)}", "ai"))


def test_refused_calls(folder: Path) -> None:
    history = app()
    (refused,) = of(history, "unavailable")
    history[refused] = f"0+0x{scrapes(30)} 1+0x{scrapes(30)}"
    check(folder, history, "XYServeUnavailable")


def test_missed_targets_of_one_class(folder: Path) -> None:
    of_class = {"application": "a", "replica": "ai", "slo_class": "interactive", "target": "all"}
    history = app() | {
        series(metrics.SLO_REQUESTS, met="true", **of_class): growing(8),
        series(metrics.SLO_REQUESTS, met="false", **of_class): growing(2),
    }
    check(folder, history, "XYServeTargetsMissed")
    check(folder, history, "interactive", by="slo_class")


def test_a_class_that_meets_nothing_at_all(folder: Path) -> None:
    history = app()
    (met,), (missed,) = of(history, 'met="true"'), of(history, 'met="false"')
    history |= {met: flat(0), missed: growing(2)}
    check(folder, history, "XYServeTargetsMissed")


@pytest.mark.parametrize(("minutes", "firing"), [(1.5, ()), (4, ("XYServeWorkerStuck",))])
def test_a_worker_that_takes_no_steps_for_minutes(
    folder: Path, minutes: float, firing: tuple[str, ...]
) -> None:
    history, rest = app(), 30 - minutes
    (steps,) = of(history, "step_measured", "aw1")
    history[steps] = f"{growing(12, 30)} {flat(1440, minutes)} {growing(12, rest, 1440)}"
    check(folder, history, *firing)


@pytest.mark.parametrize(
    ("slowness", "minutes", "firing"),
    [(2.5, 20, ()), (4, 0.75, ()), (4, 5, ("XYServeWorkerSlow",))],
)
def test_a_worker_whose_steps_take_long(
    folder: Path, slowness: float, minutes: float, firing: tuple[str, ...]
) -> None:
    history = app()
    (of_it,) = of(history, "slowness", "aw1")
    history[of_it] = f"{flat(1, 30)} {flat(slowness, minutes)} {flat(1, 30 - minutes)}"
    check(folder, history, *firing)


def hung(history: History, name: str, minutes: float) -> History:
    """Half an hour of a worker's history, then it exports and reports nothing more."""
    own = {one: f"{history[one].partition('x')[0]}x{scrapes(30)}" for one in of(history, name)}
    (age,), (placed,) = of(history, "report_age", name), of(history, "worker_requests", name)
    silent = f"0+15x{scrapes(minutes)}"
    return own | {age: f"{flat(1, 30)} {silent}", placed: f"{flat(3, 30 + minutes)}"}


def test_a_worker_that_hangs_while_serve_believes_in_it(folder: Path) -> None:
    history = app()
    history |= hung(history, "aw1", 30) | {
        name: flat(1) for name in of(history, "replica_healthy", "aw1")
    }
    check(folder, history, "XYServeWorkerSilent", "XYServeWorkerStuck")


def test_a_worker_that_died_and_was_replaced_is_no_alert_but_a_note(folder: Path) -> None:
    """The GlobalScheduler remembers the dead one for 5 minutes."""
    history = app()
    new = {name: f"{nothing(31)} {text}" for name, text in worker("aw3").items()}
    (started,) = of(new, "start_time")
    new[started] = f"{nothing(31)} {flat(1860, 29)}"
    check(folder, history | hung(history, "aw1", 5) | new, "XYServeRestarted")


def test_a_worker_less_is_no_alert(folder: Path) -> None:
    history = app()
    check(folder, history | hung(history, "aw1", 5))


def test_the_newest_worker_less_is_no_alert(folder: Path) -> None:
    history = app()
    (started,) = of(history, "start_time", "aw1")
    history[started] = flat(-600)  # the newest, which goes again
    gone = hung(history, "aw1", 5)
    check(folder, history | gone)


def test_workers_that_load_a_large_model_are_no_alert(folder: Path) -> None:
    loading = {
        series(metrics.START_TIME, application="a", deployment="Worker", replica=name): flat(0)
        for name in ("aw1", "aw2")
    }
    check(folder, loading)


def test_an_app_that_starts_again_is_no_alert_but_a_note(folder: Path) -> None:
    before = {name: f"{text.partition('x')[0]}x{scrapes(30)}" for name, text in app().items()}
    after = {
        name.replace('replica="a', 'replica="n').replace('worker="a', 'worker="n'): (
            f"{nothing(33)} {text}" if "start_time" not in name else f"{nothing(33)} {flat(1980)}"
        )
        for name, text in app().items()
    }
    check(folder, before | after, "XYServeRestarted")


def test_an_ingress_that_starts_again_is_no_alert_but_a_note(folder: Path) -> None:
    history = app()
    for name in of(history, 'replica="ai"'):
        text = history[name]
        history[name] = f"{text.partition('x')[0]}x{scrapes(30)}"
        new = flat(1830) if "start_time" in name else text
        history[name.replace('"ai"', '"new"')] = f"{nothing(30.5)} {new}"
    check(folder, history, "XYServeRestarted")


def test_a_global_scheduler_that_sees_no_worker(folder: Path) -> None:
    deaf = {name: f"{flat(1, 30)} 20+0x{scrapes(30)}" for name in of(app(), "report_age")}
    check(folder, app() | deaf, "XYServeSchedulerBlind")


@pytest.mark.parametrize(("minutes", "firing"), [(0.75, ()), (5, ("XYServeSchedulerBlind",))])
def test_a_global_scheduler_that_exports_nothing(
    folder: Path, minutes: float, firing: tuple[str, ...]
) -> None:
    history = app()
    for name in of(history, "report_age"):
        history[name] = f"{flat(1, 30)} stale {nothing(minutes)} {flat(1, 30)}"
    check(folder, history, *firing)


def test_text_that_nobody_can_predict_is_no_alert(folder: Path) -> None:
    """18 times in an hour of ordinary chat; and a draft worker that starts again."""
    collapses = {
        series(metrics.DRAFT_COLLAPSES, application="a", reason="content"): growing(0.075),
        series(metrics.DRAFT_COLLAPSES, application="a", reason="restarted"): growing(0.01),
    }
    check(folder, app() | collapses)


@pytest.mark.parametrize(("minutes", "firing"), [(1, ()), (3, ("XYServeDraftsSilent",))])
def test_a_draft_worker_that_does_not_answer(
    folder: Path, minutes: float, firing: tuple[str, ...]
) -> None:
    history = app()
    (silence,) = of(history, "silence", "aw1")
    history[silence] = f"{flat(0, 30)} 0+15x{scrapes(minutes)} {flat(0, 20)}"
    check(folder, history, *firing)


def test_drafts_that_are_late(folder: Path) -> None:
    check(folder, app() | drafts("aw1", 70) | drafts("aw2", 50), "XYServeDraftsLate")
    check(folder, app() | drafts("aw1", 60) | drafts("aw2", 20))


def test_prompts_that_are_not_cached_where_they_should_be(folder: Path) -> None:
    check(folder, app() | prefixes(found=300, predicted=1000), "XYServePrefixesNotFound")
    check(folder, app() | prefixes(found=700, predicted=1000))
    check(folder, app() | prefixes(found=0, predicted=100))  # too few to say


@pytest.mark.parametrize(("minutes", "firing"), [(2, ()), (8, ("XYServePrefixesUntold",))])
def test_workers_that_do_not_tell_what_is_cached(
    folder: Path, minutes: float, firing: tuple[str, ...]
) -> None:
    untold = f"{flat(0, 30)} {flat(1, minutes)} {flat(0, 20)}"
    check(folder, app() | prefixes(900, 1000, untold), *firing)


def test_of_two_apps_in_a_cluster_only_the_one_in_trouble_is_named(folder: Path) -> None:
    history = app("a") | app("b") | requests(growing(10), growing(2), "bi", "b")
    check(folder, history, "b", by="application")


def test_every_alert_is_tested_here() -> None:
    text = Path(__file__).read_text()

    assert [alert.name for alert in ALERTS if f'"{alert.name}"' not in text] == []
