"""The alert rules, which `grafana.py` writes for Prometheus."""

from dataclasses import dataclass
from enum import StrEnum

from cluster.observe import metrics
from cluster.observe.dashboards.promql import grown, largest, number, rate, series, total
from scheduler.pace import SLOW

APP = "application"
MIN_REQUESTS = 20
"""Requests needed before a share of them means anything."""


class Severity(StrEnum):
    """How soon somebody must look at an alert."""

    CRITICAL = "critical"
    """Now: clients are refused, or a worker is lost."""
    WARNING = "warning"
    """Today: clients wait longer than they should, or soon will."""
    INFO = "info"
    """No action by itself; it explains other alerts."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule; Prometheus fills in `{{ $labels.x }}` and `{{ $value }}` in its texts."""

    name: str
    expr: str
    lasting: str
    """How long the expression must hold before the alert fires."""
    severity: Severity
    summary: str
    description: str
    """What it means and what to do."""


def _share(part: str, whole: str, limit: float) -> str:
    return f"{part} / {whole} > {limit:g} and {whole} >= {MIN_REQUESTS}"


def _requests(counter: metrics.Metric, *matchers: str, by: tuple[str, ...] = (APP,)) -> str:
    return total(grown(series(counter, *matchers), "10m"), *by)


_CLASS = (APP, "slo_class")
_AGE = series(metrics.WORKER_REPORT_AGE)
# Not those that start, stop or are gone: the GlobalScheduler remembers them for a while.
_HEALTHY_WORKERS = series(metrics.HEALTHY_REPLICAS, 'deployment="Worker"') + " > 0"
_RUNNING = largest(series(metrics.VLLM_NUM_REQUESTS_RUNNING), "replica")
# The GlobalScheduler's view, which remains when the worker's own metrics stop.
_PLACED = largest(
    f'label_replace({series(metrics.WORKER_REQUESTS)}, "replica", "$1", "worker", "(.+)")',
    "replica",
)
_LATE, _PROPOSED = (
    total(grown(series(metrics.DRAFT_TOKENS, f'outcome="{outcome}"'), "10m"), APP)
    for outcome in ("late", "proposed")
)
_FOUND, _PREDICTED = (
    total(grown(series(metrics.PREFIX_TOKENS, f'kind="{kind}"'), "10m"), APP)
    for kind in ("found", "predicted")
)
_STEPS = total(rate(series(metrics.STEP_MEASURED_SECONDS), "1m"), "replica")
_UNAVAILABLE = series(metrics.ADMISSIONS, 'outcome="unavailable"')

ALERTS = (
    Alert(
        "XYServeTargetsMissed",
        # Count misses, not hits: a class that meets no target has no series of hits.
        _share(
            _requests(metrics.SLO_REQUESTS, 'target="all"', 'met="false"', by=_CLASS),
            _requests(metrics.SLO_REQUESTS, 'target="all"', by=_CLASS),
            0.1,
        ),
        "2m",
        Severity.WARNING,
        "Class {{ $labels.slo_class }} of {{ $labels.application }} misses its targets",
        "{{ $value | humanizePercentage }} of its requests in 10 minutes missed a target. If they "
        "queue (dashboard overview, Queue), add workers: `num_workers` in the app's config. If "
        "steps take longer than predicted (dashboard steps), another process uses the device, or "
        "`xyserve calibrate` is due. Otherwise the targets of the class are too tight for its "
        "prompts.",
    ),
    Alert(
        "XYServeWorkerStuck",
        f"({_RUNNING} > 0 or {_PLACED} > 0) and on (replica) {_HEALTHY_WORKERS}"
        f" unless on (replica) {_STEPS} > 0",
        "1m",
        Severity.CRITICAL,
        "Worker {{ $labels.replica }} has requests and takes no steps",
        "{{ $value }} requests are running there and have had no token for more than a minute. Its "
        "engine hangs: `py-spy dump --pid PID` shows where (`xyserve status` shows the pid). Then "
        "kill its process: Serve starts another one. Requests without a token yet are retried on "
        "another worker; the others end with an error.",
    ),
    Alert(
        "XYServeWorkerSilent",
        f"{largest(_AGE, APP, 'worker')} > 30 and on ({APP}, worker)"
        f' label_replace({_HEALTHY_WORKERS}, "worker", "$1", "replica", "(.+)")',
        "30s",
        Severity.CRITICAL,
        "Worker {{ $labels.worker }} of {{ $labels.application }} does not report",
        "Its last report is {{ $value | humanizeDuration }} old, and it gets no requests while "
        "others report. Either its process hangs (see its log, then kill it: Serve starts another "
        "one), or its node cannot reach the GlobalScheduler's node.",
    ),
    Alert(
        "XYServeWorkerSlow",
        f"{largest(series(metrics.WORKER_SLOWNESS), APP, 'worker')} > {SLOW:g}",
        "1m",
        Severity.WARNING,
        "Steps of worker {{ $labels.worker }} of {{ $labels.application }} take too long",
        "They take {{ $value | humanize }} times as long as its profile predicts. If other workers "
        "are as slow, other processes use the machine, or `xyserve calibrate` is due. If not, it "
        "gets no requests while others take them, and is replaced after `worker.slow_timeout_s`.",
    ),
    Alert(
        "XYServeSchedulerBlind",
        f"{number(_HEALTHY_WORKERS, APP)} unless on ({APP}) {_AGE} < 15",
        "1m",
        Severity.CRITICAL,
        "The GlobalScheduler of {{ $labels.application }} sees no worker's load",
        "Workers are running, but none of their reports reaches it, or it exports no metrics "
        "itself. Requests are placed regardless of load, or not at all. See the log of the "
        "deployment GlobalScheduler; killing its process is safe: workers report to the new one.",
    ),
    Alert(
        "XYServePrefixesNotFound",
        f"{_FOUND} / {_PREDICTED} < 0.5 and {_PREDICTED} >= 10000",
        "10m",
        Severity.WARNING,
        "Prompts of {{ $labels.application }} are not cached where they should be",
        "Of the tokens that were predicted to be cached in 10 minutes, "
        "{{ $value | humanizePercentage }} were found. Requests are placed where they gain little. "
        "If the KV caches are full (dashboard overview), they evict blocks before they are used: "
        "raise `worker.engine.kv_cache_gib`, or add workers. If not, restart the GlobalScheduler "
        "by killing its process: it asks the workers anew.",
    ),
    Alert(
        "XYServePrefixesUntold",
        f"{largest(series(metrics.PREFIX_UNTOLD_WORKERS), APP)} > 0",
        "5m",
        Severity.WARNING,
        "Workers of {{ $labels.application }} do not tell what their prefix caches have",
        "{{ $value }} workers send no events, or none of any block, although prefix caching and "
        "`worker.prefix_index` are on. Requests are placed as if nothing were cached there. The "
        "log of a worker says why, as `no_prefix_index` of `engine ready`; set "
        "`worker.prefix_index: false` if its model cannot.",
    ),
    Alert(
        "XYServeDraftsSilent",
        f"{largest(series(metrics.DRAFT_SILENCE), APP, 'replica')} > 30",
        "1m",
        Severity.WARNING,
        "Worker {{ $labels.replica }} of {{ $labels.application }} gets no drafts",
        "Its draft worker has not answered for {{ $value | humanizeDuration }}: it is stopped or "
        "overloaded. Answers are still correct, but slower. See its log, then kill it: Serve "
        "starts another one.",
    ),
    Alert(
        "XYServeDraftsLate",
        f"{_LATE} / {_PROPOSED} > 0.5 and {_PROPOSED} >= 1000",
        "5m",
        Severity.WARNING,
        "Drafts of {{ $labels.application }} arrive too late",
        "{{ $value | humanizePercentage }} of its draft tokens in 10 minutes came after their "
        "position had been computed. Answers are still correct, but slower. Give the draft workers "
        "more cores (`draft.cpus`), or add one (`draft.num_workers`).",
    ),
    Alert(
        "XYServeRestarted",
        # Not at the start of the app, when its replicas start one after another.
        f"{number(f'time() - {series(metrics.START_TIME)} < 900', APP, 'deployment')} and "
        f"on ({APP}, deployment) {series(metrics.START_TIME)} offset 15m",
        "0s",
        Severity.INFO,
        "A replica of {{ $labels.deployment }} of {{ $labels.application }} has started",
        "{{ $value }} of its replicas started in the last 15 minutes, while the app was up. If "
        "nobody deployed or added replicas, one died: Ray's log of the dead process has the reason "
        "(`ray list actors --filter state=DEAD`); `dmesg` shows whether the kernel killed it for "
        "lack of memory.",
    ),
    Alert(
        "XYServeErrors",
        _share(
            _requests(metrics.REQUESTS, 'outcome="error"'),
            _requests(metrics.REQUESTS),
            0.01,
        ),
        "1m",
        Severity.CRITICAL,
        "Requests of {{ $labels.application }} fail",
        "{{ $value | humanizePercentage }} of its requests in 10 minutes ended with an error on "
        "our side. The logs of the deployments Ingress and Worker name each request and its error.",
    ),
    Alert(
        "XYServeUnavailable",
        f"{total(grown(_UNAVAILABLE, '5m'), APP)} > 0",
        "30s",
        Severity.CRITICAL,
        "{{ $labels.application }} refuses requests",
        "{{ $value | humanize }} calls in 5 minutes were answered with 503 because no worker could "
        "take them. `serve status` shows whether the deployment Worker is healthy; `xyserve "
        "status` shows whether all workers are draining.",
    ),
)
