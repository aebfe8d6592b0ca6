"""The GlobalScheduler: places each request on a worker, from the view of all workers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scheduler.placement import WorkerLoad, place
from scheduler.request import Request
from workers.worker import WorkerReport

FORGET_AFTER_S = 30.0
"""A placement that its worker has not reported by then never arrived there."""
SILENT_AFTER_S = 30.0
"""A worker that has not reported for this long perhaps hangs; a live one does every 2 s."""


@dataclass(slots=True)
class _WorkerView:
    """The last report of a worker, and what was placed there since."""

    heard_s: float
    """Time of the last report, or of the first mention."""
    reported: dict[str, int] = field(default_factory=dict)
    """Outstanding tokens, by request id."""
    placed: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Outstanding tokens and time of placement, by request id."""
    draining: bool = False

    def is_silent(self, now: float) -> bool:
        return now - self.heard_s > SILENT_AFTER_S

    def load(self, worker_id: str, now: float) -> WorkerLoad:
        for request_id, (_, placed_s) in list(self.placed.items()):
            if now - placed_s > FORGET_AFTER_S:
                del self.placed[request_id]
        return WorkerLoad(
            worker_id,
            sum(self.reported.values()) + sum(tokens for tokens, _ in self.placed.values()),
            len(self.reported) + len(self.placed),
            self.draining,
            self.is_silent(now),
        )


class GlobalScheduler:
    """One actor of the app. Its state is soft: workers tell it again after a restart."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._workers: dict[str, _WorkerView] = {}

    async def place(self, request: Request, worker_ids: Sequence[str]) -> str | None:
        """Choose one of `worker_ids`, which Serve holds for alive; None while all are draining."""
        now = self._clock()
        for gone in self._workers.keys() - set(worker_ids):
            if self._workers[gone].is_silent(now):
                del self._workers[gone]
        loads = [self._view(worker_id, now).load(worker_id, now) for worker_id in worker_ids]
        chosen = place(request, loads)
        if chosen is not None:
            placed = (request.num_outstanding_tokens(), now)
            self._workers[chosen].placed[request.request_id] = placed
        return chosen

    async def report(self, report: WorkerReport) -> None:
        """Take a worker's own account of its requests."""
        view = self._view(report.worker_id, self._clock())
        view.heard_s = self._clock()
        view.reported = report.outstanding
        view.draining = report.draining
        for request_id in (*report.outstanding, *report.finished):
            view.placed.pop(request_id, None)

    async def loads(self) -> list[WorkerLoad]:
        """The present view of all workers."""
        now = self._clock()
        return [view.load(worker_id, now) for worker_id, view in sorted(self._workers.items())]

    def _view(self, worker_id: str, now: float) -> _WorkerView:
        return self._workers.setdefault(worker_id, _WorkerView(now))
