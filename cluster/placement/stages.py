"""The stage policy: decided several times a second, from the latest report of each worker."""

from collections.abc import Callable

from scheduler.stage_policy import ALONE, SILENT_S, StagePolicy, StageView, WorkerPolicy

DECIDE_S = 0.25
"""Shortest time between two decisions, each of which looks at all workers."""


class Stages:
    """What is known of the workers' stages, and the policies set from it."""

    def __init__(self, on_change: Callable[[str, WorkerPolicy], object]) -> None:
        """`on_change` is called with each worker's policy that has changed."""
        self._on_change = on_change
        self._policy = StagePolicy()
        self._views: dict[str, tuple[StageView, float]] = {}
        """With the time of the report, by worker."""
        self._decided_s = float("-inf")
        self.policies: dict[str, WorkerPolicy] = {}
        """By worker; those of workers that are silent are gone."""

    def report(self, worker_id: str, view: StageView, now: float) -> WorkerPolicy:
        """Take a worker's report; returns its policy."""
        self._views[worker_id] = view, now
        if now - self._decided_s >= DECIDE_S:
            self._decided_s = now
            self._decide(now)
        return self.policies.get(worker_id, ALONE)

    def forget(self, worker_id: str) -> None:
        """Forget a worker that is gone."""
        self._views.pop(worker_id, None)

    def _decide(self, now: float) -> None:
        heard = {
            worker_id: view
            for worker_id, (view, heard_s) in self._views.items()
            if now - heard_s <= SILENT_S
        }
        before, self.policies = self.policies, self._policy.decide(heard, now)
        for worker_id, policy in self.policies.items():
            if policy != before.get(worker_id, ALONE):
                self._on_change(worker_id, policy)
