"""The draft workers: which of them drafts for a worker, and whether its drafts are accepted."""

import dataclasses
import logging
from dataclasses import dataclass, field

from scheduler.drafting import (
    CollapseReason,
    DraftReport,
    DraftWatch,
    DraftWorkerLoad,
    choose_draft_worker,
)
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.reports import DraftStats, DraftWorkerReport, DraftWorkerStatus

logger = logging.getLogger(__name__)

DRAFT_WORKER_SILENT_AFTER_S = 3.0
"""A draft worker that has not reported, or owes an answer, for this long may be stopped; a live
one reports twice a second."""
DRAFT_WORKER_GONE_AFTER_S = 30.0
"""One that has not reported for this long is forgotten."""


@dataclass(frozen=True, slots=True)
class DraftWorkerView:
    """The last report of a draft worker."""

    report: DraftWorkerReport
    heard_s: float

    def is_silent(self, now: float) -> bool:
        """Whether it has not reported for long: perhaps it is stopped or dead."""
        return now - self.heard_s > DRAFT_WORKER_SILENT_AFTER_S


@dataclass(slots=True)
class _Drafting:
    """Drafts for one worker."""

    draft_worker: str | None = None
    """The draft worker that makes them, by id."""
    watch: DraftWatch = field(default_factory=DraftWatch)


class DraftPool:
    """The views of all draft workers, by id, and for which workers they draft."""

    def __init__(self) -> None:
        self._views: dict[str, DraftWorkerView] = {}
        self._drafting: dict[str, _Drafting] = {}
        """By the id of the worker."""

    def report(self, report: DraftWorkerReport, now: float) -> list[DraftWorkerAddress]:
        """Take a draft worker's report; returns the others, with which it shares memories."""
        if (draft_worker_id := report.address.draft_worker_id) not in self._views:
            logger.info("draft worker found", extra={"draft_worker": draft_worker_id})
        self._views[draft_worker_id] = DraftWorkerView(report, now)
        return [
            other.report.address
            for other in self._views.values()
            if other.report.address != report.address and not other.is_silent(now)
        ]

    def statuses(self, now: float) -> list[DraftWorkerStatus]:
        """All draft workers, as they last reported themselves."""
        return [
            dataclasses.replace(view.report.status, silent=view.is_silent(now))
            for _, view in sorted(self._views.items())
        ]

    def busy_shares(self, now: float) -> list[float]:
        """How busy each draft worker is that is not silent."""
        return [
            view.report.status.busy_share
            for view in self._views.values()
            if not view.is_silent(now)
        ]

    def watch(self, worker_id: str, stats: DraftStats, now: float) -> CollapseReason | None:
        """Note how well drafts serve a worker; logs and returns why they no longer do."""
        reason = self._drafting_for(worker_id).watch.observe(
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
            logger.log(
                logging.WARNING if reason.is_fault else logging.INFO,
                "drafts are no longer accepted",
                extra={
                    "worker": worker_id,
                    "acceptance_rate": round(stats.acceptance_rate, 2),
                    "reason": reason.text,
                },
            )
        return reason

    def choose(self, worker_id: str, now: float) -> DraftWorkerAddress | None:
        """Choose the draft worker that drafts for a worker from now on; None if there is none."""
        for gone, view in list(self._views.items()):
            if now - view.heard_s > DRAFT_WORKER_GONE_AFTER_S:
                del self._views[gone]
        drafting = self._drafting_for(worker_id)
        chosen = choose_draft_worker(drafting.draft_worker, self._loads(now))
        # While all are silent, the old one may come back.
        drafting.draft_worker = chosen or drafting.draft_worker
        known = self._views.get(drafting.draft_worker) if drafting.draft_worker else None
        return known.report.address if known else None

    def drafter_of(self, worker_id: str, now: float) -> tuple[str, float]:
        """What drafts for a worker, by id, and its busy share; empty if nothing does."""
        drafting = self._drafting.get(worker_id)
        view = self._views.get(drafting.draft_worker or "") if drafting else None
        if view is None or view.is_silent(now):
            return "", 0.0
        return view.report.address.draft_worker_id, view.report.status.busy_share

    def forget_worker(self, worker_id: str) -> None:
        """Draft no longer for a worker, which has gone."""
        self._drafting.pop(worker_id, None)

    def _drafting_for(self, worker_id: str) -> _Drafting:
        return self._drafting.setdefault(worker_id, _Drafting())

    def _loads(self, now: float) -> list[DraftWorkerLoad]:
        return [
            DraftWorkerLoad(
                draft_worker_id,
                sum(one.draft_worker == draft_worker_id for one in self._drafting.values()),
                view.report.status.busy_share,
                view.is_silent(now),
            )
            for draft_worker_id, view in self._views.items()
        ]
