"""What the actors let others see of their work: metrics and spans."""

import time

from cluster.observe.exporter import PlacementMetrics
from cluster.observe.tracing import Tracing
from cluster.placement.observer import SchedulerObserver
from scheduler.drafting import CollapseReason
from scheduler.placement import Placement
from scheduler.request import Request


class SchedulerTelemetry(SchedulerObserver):
    """Counts and traces placements, and counts collapses of drafting."""

    def __init__(self, metrics: PlacementMetrics, tracing: Tracing) -> None:
        self._metrics = metrics
        self._tracing = tracing

    def placed(self, request: Request, placement: Placement, took_s: float) -> None:
        """Count a placement, and make a span of it."""
        self._metrics.count_placement(placement)
        ended_s = time.time()
        runner_up = placement.runner_up
        self._tracing.add(
            "placement", request.traceparent, ended_s - took_s, ended_s,
            {
                "xyserve.worker": placement.chosen.worker_id,
                "xyserve.reason": placement.reason,
                "xyserve.runner_up": runner_up.worker_id if runner_up else "",
            },
        )  # fmt: skip

    def collapsed(self, worker_id: str, reason: CollapseReason) -> None:
        """Count that the drafts for a worker are no longer accepted."""
        self._metrics.count_collapse(worker_id, reason)
