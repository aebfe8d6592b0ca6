"""Who sees what a worker does."""

from scheduler.task import StepReport
from workers.reports import WorkerReport


class WorkerObserver:
    """Called in the engine's thread of a worker; this one does nothing."""

    def took_step(self, step: StepReport) -> None:
        """The engine computed a step that a scheduler of ours decided."""

    def reported(self, report: WorkerReport) -> None:
        """The worker reports its load: it has changed, or some time is over."""
