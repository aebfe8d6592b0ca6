"""The GlobalScheduler: places each request on a worker, from the view of all workers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scheduler.placement import WorkerLoad, place
from scheduler.request import Request
from workers.worker import WorkerReport

FORGET_AFTER_S = 30.0
"""A placement that its worker never reports, and a worker that reports no more, are dropped."""


@dataclass(slots=True)
class _WorkerView:
    """The last report of a worker, and what was placed there since."""

    reported: dict[str, int] = field(default_factory=dict)
    placed: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Outstanding tokens and time of placement, by request id."""
    draining: bool = False
    seen_s: float = 0.0

    def load(self, worker_id: str) -> WorkerLoad:
        return WorkerLoad(
            worker_id,
            sum(self.reported.values()) + sum(tokens for tokens, _ in self.placed.values()),
            len(self.reported) + len(self.placed),
            self.draining,
        )


class GlobalScheduler:
    """One actor of the app. Its state is soft: workers tell it again after a restart."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._workers: dict[str, _WorkerView] = {}

    async def place(self, request: Request, worker_ids: Sequence[str]) -> str | None:
        """Choose one of the live workers `worker_ids`; None when all of them are draining."""
        now = self._clock()
        self._forget(now)
        views = {
            worker_id: self._workers.get(worker_id) or _WorkerView() for worker_id in worker_ids
        }
        chosen = place(request, (view.load(worker_id) for worker_id, view in views.items()))
        if chosen is not None:
            view = self._workers.setdefault(chosen, views[chosen])
            view.placed[request.request_id] = (request.num_outstanding_tokens(), now)
            view.seen_s = max(view.seen_s, now)
        return chosen

    async def report(self, report: WorkerReport) -> None:
        """Take a worker's own account of its requests."""
        view = self._workers.setdefault(report.worker_id, _WorkerView())
        view.reported = report.outstanding
        view.draining = report.draining
        view.seen_s = self._clock()
        for request_id in (*report.outstanding, *report.finished):
            view.placed.pop(request_id, None)

    async def loads(self) -> list[WorkerLoad]:
        """The present view of all workers."""
        self._forget(self._clock())
        return [view.load(worker_id) for worker_id, view in sorted(self._workers.items())]

    def _forget(self, now: float) -> None:
        for worker_id, view in list(self._workers.items()):
            for request_id, (_, placed_s) in list(view.placed.items()):
                if now - placed_s > FORGET_AFTER_S:
                    del view.placed[request_id]
            if now - view.seen_s > FORGET_AFTER_S:
                del self._workers[worker_id]
