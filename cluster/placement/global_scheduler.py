"""The GlobalScheduler: places each request on a worker, from the view of all workers."""

import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.placement.observer import SchedulerObserver
from scheduler.drafting import (
    DraftReport,
    DraftWatch,
    DraftWorkerLoad,
    choose_draft_worker,
)
from scheduler.placement import (
    Placed,
    Placement,
    RefusalReason,
    Refused,
    WorkerLoad,
    place,
)
from scheduler.request import Request
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.reports import DraftStats, DraftWorkerReport, DraftWorkerStatus, WorkerReport

logger = logging.getLogger(__name__)

NO_WORKER_RETRY_S = 0.5
"""Time after which a request asks again, while no worker takes new ones."""
FORGET_AFTER_S = 30.0
"""A placement not confirmed by its worker's report within this time is dropped."""
SILENT_AFTER_S = 30.0
"""A worker that has not reported for this long may hang; a live one reports every 2 s."""
GONE_AFTER_S = 300.0
"""A worker that has been silent for this long is gone; Serve replaces one that hangs."""
DRAFT_WORKER_SILENT_AFTER_S = 3.0
"""A draft worker that has not reported, or owes an answer, for this long may be stopped; a live
one reports twice a second."""
MAX_PLACEMENTS = 10_000
"""Placements that are kept for `explain`."""


@dataclass(slots=True)
class _WorkerView:
    """The last report of a worker, and the requests placed on it since."""

    heard_s: float
    """Time of the last report, or of the first mention."""
    has_reported: bool = False
    silence_noted: bool = False
    reported: dict[str, int] = field(default_factory=dict)
    """Outstanding tokens, by request id."""
    placed: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Outstanding tokens and time of placement, by request id."""
    draining: bool = False
    tokens_per_span: float = 1.0
    draft_worker: str | None = None
    """The draft worker that drafts for it, by id."""
    drafts: DraftWatch = field(default_factory=DraftWatch)

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
            self.tokens_per_span,
            self.is_silent(now),
        )


@dataclass(frozen=True, slots=True)
class _DraftWorkerView:
    """The last report of a draft worker."""

    report: DraftWorkerReport
    heard_s: float

    def is_silent(self, now: float) -> bool:
        return now - self.heard_s > DRAFT_WORKER_SILENT_AFTER_S


class GlobalScheduler:
    """One actor of the app. Its state is soft: workers report again after a restart."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        observer: SchedulerObserver | None = None,
    ) -> None:
        self._clock = clock
        self._observer = observer or SchedulerObserver()
        self._placements: OrderedDict[str, Placement] = OrderedDict()
        self._workers: dict[str, _WorkerView] = {}
        self._draft_workers: dict[str, _DraftWorkerView] = {}

    async def place(self, request: Request, worker_ids: Sequence[str]) -> Placed | Refused:
        """Choose one of `worker_ids`, which Serve believes to be alive."""
        now = self._clock()
        for gone in self._workers.keys() - set(worker_ids):
            if self._workers[gone].is_silent(now):
                del self._workers[gone]
        loads = [self._view(worker_id, now).load(worker_id, now) for worker_id in worker_ids]
        self._note_silence(loads)
        placement = place(request, loads)
        if placement is None:
            return Refused(RefusalReason.NO_WORKER, NO_WORKER_RETRY_S)
        chosen = placement.chosen.worker_id
        placed = (request.num_outstanding_tokens(), now)
        self._workers[chosen].placed[request.request_id] = placed
        self._placements[request.request_id] = placement
        if len(self._placements) > MAX_PLACEMENTS:
            self._placements.popitem(last=False)
        self._observer.placed(request, placement, self._clock() - now)
        return Placed(chosen)

    async def placements(self, request_ids: Sequence[str]) -> dict[str, Placement]:
        """Where requests were placed and why; those no longer known are left out."""
        known = self._placements
        return {request_id: known[request_id] for request_id in request_ids if request_id in known}

    async def report(self, report: WorkerReport) -> DraftWorkerAddress | None:
        """Take a worker's report of its requests; returns the draft worker that drafts for it."""
        now = self._clock()
        view = self._view(report.worker_id, now)
        view.heard_s = now
        self._note_report(report.worker_id, view)
        view.reported = report.outstanding
        view.draining = report.draining
        for request_id in (*report.outstanding, *report.finished):
            view.placed.pop(request_id, None)
        if report.drafts is None:
            return None
        self._watch(report.worker_id, view, report.drafts, now)
        return self._choose_draft_worker(view, now)

    async def report_draft_worker(self, report: DraftWorkerReport) -> list[DraftWorkerAddress]:
        """Take a draft worker's report; returns the others, with which it shares memories."""
        now = self._clock()
        if (draft_worker_id := report.address.draft_worker_id) not in self._draft_workers:
            logger.info("draft worker found", extra={"draft_worker": draft_worker_id})
        self._draft_workers[draft_worker_id] = _DraftWorkerView(report, now)
        return [
            other.report.address
            for other in self._draft_workers.values()
            if other.report.address != report.address and not other.is_silent(now)
        ]

    async def draft_workers(self) -> list[DraftWorkerStatus]:
        """The current view of all draft workers."""
        now = self._clock()
        return [
            dataclasses.replace(view.report.status, silent=view.is_silent(now))
            for _, view in sorted(self._draft_workers.items())
        ]

    def _note_report(self, worker_id: str, view: _WorkerView) -> None:
        """Log the first report of a worker, and the first after a silence."""
        if not view.has_reported:
            logger.info("worker found", extra={"worker": worker_id})
        elif view.silence_noted:
            logger.info("worker heard again", extra={"worker": worker_id})
        view.has_reported, view.silence_noted = True, False

    def _note_silence(self, loads: Sequence[WorkerLoad]) -> None:
        """Log, once, which of the workers that Serve believes to be alive are silent."""
        for load in loads:
            view = self._workers[load.worker_id]
            if load.silent and not view.silence_noted:
                view.silence_noted = True
                logger.warning(
                    "worker is silent; does it hang?",
                    extra={"worker": load.worker_id, "silent_s": SILENT_AFTER_S},
                )

    def _watch(self, worker_id: str, view: _WorkerView, stats: DraftStats, now: float) -> None:
        """Note how well drafts serve a worker, and log it when they no longer do."""
        view.tokens_per_span = stats.tokens_per_span
        reason = view.drafts.observe(
            DraftReport(
                stats.acceptance_rate,
                stats.counts.proposed,
                stats.counts.verified,
                stats.counts.late,
                stats.draft_worker,
                stats.silent_s < DRAFT_WORKER_SILENT_AFTER_S,
            ),
            now,
        )
        if reason is not None:
            logger.warning(
                "drafts are no longer accepted",
                extra={
                    "worker": worker_id,
                    "acceptance_rate": round(stats.acceptance_rate, 2),
                    "reason": reason.text,
                },
            )
            self._observer.collapsed(worker_id, reason)

    def _choose_draft_worker(self, view: _WorkerView, now: float) -> DraftWorkerAddress | None:
        for gone, draft_worker in list(self._draft_workers.items()):
            if now - draft_worker.heard_s > FORGET_AFTER_S:
                del self._draft_workers[gone]
        chosen = choose_draft_worker(
            view.draft_worker,
            [
                DraftWorkerLoad(
                    draft_worker_id,
                    sum(other.draft_worker == draft_worker_id for other in self._workers.values()),
                    draft_worker.report.status.busy_share,
                    draft_worker.is_silent(now),
                )
                for draft_worker_id, draft_worker in self._draft_workers.items()
            ],
        )
        # While all are silent, the old one may come back.
        view.draft_worker = chosen or view.draft_worker
        known = self._draft_workers.get(view.draft_worker) if view.draft_worker else None
        return known.report.address if known else None

    async def loads(self) -> list[WorkerLoad]:
        """The current view of all workers."""
        return [load for load, _ in self.loads_and_ages()]

    def loads_and_ages(self) -> list[tuple[WorkerLoad, float]]:
        """The current view of all workers, and the age of each one's last report in seconds."""
        now = self._clock()
        return [
            (view.load(worker_id, now), now - view.heard_s)
            for worker_id, view in sorted(self._workers.items())
            if now - view.heard_s < GONE_AFTER_S
        ]

    def _view(self, worker_id: str, now: float) -> _WorkerView:
        return self._workers.setdefault(worker_id, _WorkerView(now))
