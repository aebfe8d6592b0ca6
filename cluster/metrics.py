"""What the workers' steps export to Prometheus, through Ray's metrics endpoint of each node."""

import itertools

from ray.serve import metrics

from scheduler.drafting import Cause
from scheduler.task import StepReport
from workers.draft_client import DraftCounts
from workers.engine import DraftStats

STEP_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
DECISION_S = [1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1]
RELATIVE_ERROR = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]


class StepMetrics:
    """Metrics of one worker; Serve adds the tags that name its replica."""

    def __init__(self) -> None:
        self._step_s = metrics.Histogram(
            "xyserve_step_seconds", "How long a step took.", boundaries=STEP_S
        )
        self._decision_s = metrics.Histogram(
            "xyserve_step_decision_seconds",
            "How long planning a step took, which is part of it.",
            boundaries=DECISION_S,
        )
        self._error = metrics.Histogram(
            "xyserve_step_prediction_error",
            "Difference between predicted and measured time of a step, over the measured.",
            boundaries=RELATIVE_ERROR,
        )

    def observe(self, report: StepReport) -> None:
        """Count one step."""
        self._step_s.observe(report.measured_s)
        self._decision_s.observe(report.decided_s)
        self._error.observe(abs(report.plan.predicted_s / report.measured_s - 1))


class DraftMetrics:
    """What came of the drafts for one worker."""

    def __init__(self) -> None:
        self._tokens = metrics.Counter(
            "xyserve_draft_tokens_total",
            "Draft tokens: proposed by draft workers, verified, accepted; late or stale as they "
            "came.",
            tag_keys=("outcome",),
        )
        self._accepted_at = metrics.Counter(
            "xyserve_draft_accepted_tokens_total",
            "Accepted draft tokens by their position behind the newest token.",
            tag_keys=("position",),
        )
        self._rate = metrics.Gauge(
            "xyserve_draft_acceptance_ratio", "Share of the drafts verified lately that were right."
        )
        self._tokens_per_decode = metrics.Gauge(
            "xyserve_draft_tokens_per_decode", "Output tokens that a decode gave lately."
        )
        self._last = DraftCounts()

    def observe(self, stats: DraftStats) -> None:
        """Export what is new in `stats`."""
        for outcome in ("proposed", "verified", "accepted", "late", "stale"):
            new = getattr(stats.counts, outcome) - getattr(self._last, outcome)
            if new > 0:
                self._tokens.inc(new, {"outcome": outcome})
        before = itertools.chain(self._last.accepted_at, itertools.repeat(0))
        for position, (now, then) in enumerate(zip(stats.counts.accepted_at, before, strict=False)):
            if now > then:
                self._accepted_at.inc(now - then, {"position": str(position + 1)})
        self._rate.set(stats.acceptance_rate)
        self._tokens_per_decode.set(stats.tokens_per_span)
        self._last = stats.counts


class CollapseMetrics:
    """How often drafts have stopped being accepted."""

    def __init__(self) -> None:
        self._collapses = metrics.Counter(
            "xyserve_draft_collapses_total",
            "Times that the drafts for a worker were no longer accepted as they had been.",
            tag_keys=("cause",),
        )

    def count(self, worker_id: str, cause: Cause) -> None:
        """Count one."""
        self._collapses.inc(1, {"cause": str(cause)})
