"""What should wake somebody: the alert rules, which `grafana.py` writes for Prometheus."""

from dataclasses import dataclass
from enum import StrEnum

from cluster.observe import metrics
from cluster.observe.dashboards.promql import grown, largest, number, rate, series, smallest, total

APP = "application"
MIN_REQUESTS = 20
"""So few requests say nothing of a share."""


class Severity(StrEnum):
    """How soon somebody must look."""

    CRITICAL = "critical"
    """Now: clients are turned away, or a worker is lost."""
    WARNING = "warning"
    """Today: clients wait longer than they should, or soon will."""
    INFO = "info"
    """It explains other alerts."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule; `{{ $labels.x }}` and `{{ $value }}` in its texts are Prometheus' to fill."""

    name: str
    expr: str
    lasting: str
    """How long the expression must hold before the alert fires."""
    severity: Severity
    summary: str
    description: str
    """What it means, and the remedy."""


def _share(part: str, whole: str, limit: float) -> str:
    return f"{part} / {whole} > {limit:g} and {whole} >= {MIN_REQUESTS}"


def _requests(counter: metrics.Metric, *matchers: str, by: tuple[str, ...] = (APP,)) -> str:
    return total(grown(series(counter, *matchers), "10m"), *by)


_CLASS = (APP, "slo_class")
_AGE = series(metrics.WORKER_REPORT_AGE)
_REPLICAS = number(series(metrics.START_TIME, 'deployment="Worker"'), APP)
_RUNNING = largest(series(metrics.VLLM_NUM_REQUESTS_RUNNING), "replica")
# The GlobalScheduler's view, which stays when the worker's own metrics cease.
_PLACED = largest(
    f'label_replace({series(metrics.WORKER_REQUESTS)}, "replica", "$1", "worker", "(.+)")',
    "replica",
)
_STEPS = total(rate(series(metrics.STEP_MEASURED_SECONDS), "1m"), "replica")
_UNAVAILABLE = series(metrics.ADMISSIONS, 'outcome="unavailable"')
_NEWEST_START = largest(series(metrics.START_TIME), APP, "deployment")

ALERTS = (
    Alert(
        "XYServeTargetsMissed",
        # What was missed, not what was met: a class that meets none has no series of those.
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
        "steps last longer than predicted (dashboard steps), something else uses the device, or "
        "`xyserve calibrate` is due. If neither, the targets of the class are tighter than its "
        "prompts allow.",
    ),
    Alert(
        "XYServeWorkerStuck",
        f"({_RUNNING} > 0 or {_PLACED} > 0) unless on (replica) {_STEPS} > 0",
        "1m",
        Severity.CRITICAL,
        "Worker {{ $labels.replica }} has requests and takes no steps",
        "{{ $value }} requests run there and have got no token for more than a minute. Its engine "
        "hangs: end its process (`xyserve status` shows the pid) and Serve starts another; the "
        "requests go on elsewhere. `py-spy dump --pid PID` before that tells where it hangs.",
    ),
    Alert(
        "XYServeWorkerSilent",
        f"{largest(_AGE, APP, 'worker')} > 30",
        "30s",
        Severity.CRITICAL,
        "Worker {{ $labels.worker }} of {{ $labels.application }} does not report",
        "Its last report is {{ $value | humanizeDuration }} old, and it gets no requests while "
        "others report. Either its process hangs (see its log, then end it: Serve starts another) "
        "or its node cannot reach the GlobalScheduler's.",
    ),
    Alert(
        "XYServeSchedulerBlind",
        f"{smallest(_AGE, APP)} > 15 or {_REPLICAS} unless on ({APP}) {_AGE}",
        "1m",
        Severity.CRITICAL,
        "The GlobalScheduler of {{ $labels.application }} sees no worker's load",
        "No worker's report reaches it, or it says nothing itself, while workers are there. "
        "Requests are placed without regard to load, or not at all. See the log of the deployment "
        "GlobalScheduler; ending its process is safe: workers tell their load to the new one.",
    ),
    Alert(
        "XYServeDraftsCollapsed",
        f"{total(grown(series(metrics.DRAFT_COLLAPSES), '10m'), APP, 'reason')} > 0",
        "0s",
        Severity.WARNING,
        "Drafts of {{ $labels.application }} are no longer accepted: {{ $labels.reason }}",
        "Answers are right as ever, but slower. silent or late: a draft worker is stopped or "
        "overloaded; give it cores, or end it and Serve starts another. restarted: wait, it learns "
        "anew. content: other text is written now; nothing to mend.",
    ),
    Alert(
        "XYServeRestarted",
        # Not at the start of the app, whose replicas come one after another.
        f"changes({_NEWEST_START}[15m:15s]) > 0 and {_NEWEST_START} and "
        f"{largest(series(metrics.START_TIME) + ' offset 15m', APP, 'deployment')}",
        "0s",
        Severity.INFO,
        "A replica of {{ $labels.deployment }} of {{ $labels.application }} has started",
        "{{ $value }} times in 15 minutes, while the app was up. If nobody deployed or added "
        "replicas, one died: Ray's log of the dead process has the reason (`ray list actors "
        "--filter state=DEAD`), `dmesg` tells whether the kernel killed it for its memory.",
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
        "{{ $value | humanizePercentage }} of its requests in 10 minutes ended with an error of "
        "ours. The logs of the deployments Ingress and Worker name each request and its error.",
    ),
    Alert(
        "XYServeUnavailable",
        f"{total(grown(_UNAVAILABLE, '5m'), APP)} > 0",
        "30s",
        Severity.CRITICAL,
        "{{ $labels.application }} turns requests away",
        "{{ $value | humanize }} calls in 5 minutes were answered with 503, since no worker could "
        "take them. `serve status` tells whether the deployment Worker is healthy; `xyserve "
        "status` whether all workers drain.",
    ),
)
"""All of them."""
