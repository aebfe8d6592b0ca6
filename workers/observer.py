"""Who sees what a worker does."""

from workers.reports import WorkerReport
from workers.step_history import TakenStep


class WorkerObserver:
    """Called in the engine's thread of a worker; this one does nothing."""

    def took_step(self, step: TakenStep) -> None:
        """The engine computed a step that a scheduler of ours decided."""

    def reported(self, report: WorkerReport) -> None:
        """The worker reports its load: it has changed, or some time is over."""
