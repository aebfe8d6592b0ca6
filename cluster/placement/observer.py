"""The hooks through which others follow what the GlobalScheduler decides."""

from scheduler.drafting import CollapseReason
from scheduler.placement import Placement, Refused
from scheduler.request import Request
from scheduler.scaling import ScalingDecision
from scheduler.stage_policy import WorkerPolicy


class SchedulerObserver:
    """Called in the event loop of the GlobalScheduler; this one does nothing."""

    def placed(self, request: Request, placement: Placement, took_s: float) -> None:
        """A request was placed; the decision took `took_s` seconds."""

    def queued(self, request: Request) -> None:
        """A request has to wait for its tenant's turn."""

    def refused(self, request: Request, refused: Refused) -> None:
        """A request was refused for good."""

    def rescaled(self, decision: ScalingDecision) -> None:
        """Another number of workers is wanted."""

    def collapsed(self, worker_id: str, reason: CollapseReason) -> None:
        """The drafts for a worker are no longer accepted."""

    def policy_changed(self, worker_id: str, policy: WorkerPolicy) -> None:
        """The stage policy has set other bounds for a worker's steps."""
