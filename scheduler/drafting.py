"""Which draft worker drafts for a worker, and when and why its drafts are no longer accepted."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.worded import Worded

BUSIER = 0.2
"""Difference in busy share above which a worker moves to the less busy draft worker."""

LEARN_RATE = 0.02
"""Weight of a new acceptance rate in the usual rate."""
COLLAPSE_SHARE, COLLAPSE_DROP = 0.5, 0.15
"""A rate has collapsed if it is below this share of the usual rate and below it by this difference;
the share alone does not count, as a low rate may halve by chance."""
RECOVER_SHARE = 0.8
"""Share of the usual rate at which a collapse ends."""
MIN_VERIFIED = 64
"""Number of verified drafts after which the usual rate counts as known."""
RESTART_MEMORY_S = 30.0
"""Time after its restart in which a draft worker may still lack what it knew before."""


@dataclass(frozen=True, slots=True)
class DraftWorkerLoad:
    """The last known load of one draft worker."""

    draft_worker_id: str
    num_workers: int
    """Number of workers that it drafts for."""
    busy_share: float
    """Fraction of time spent drafting."""
    silent: bool = False
    """Whether it has not reported for long and may have stopped."""


def choose_draft_worker(
    current: str | None, draft_workers: Iterable[DraftWorkerLoad]
) -> str | None:
    """The draft worker for a worker that has `current` now: the least busy that is not silent.

    The current one is kept, as it knows the worker's requests, unless it is silent, or serves other
    workers too while another is less busy by more than `BUSIER`. None if all are silent.
    """
    live = [draft_worker for draft_worker in draft_workers if not draft_worker.silent]
    if not live:
        return None
    best = min(live, key=lambda d: (d.busy_share, d.num_workers, d.draft_worker_id))
    for draft_worker in live:
        if draft_worker.draft_worker_id == current and (
            draft_worker.busy_share <= best.busy_share + BUSIER or draft_worker.num_workers <= 1
        ):
            return current
    return best.draft_worker_id


class CollapseReason(Worded):
    """Why drafts are accepted less often than before."""

    SILENT = "silent", "the draft worker does not answer: it is stopped or overloaded"
    RESTARTED = "restarted", "the draft worker has restarted and must learn again"
    LATE = "late", "most drafts arrive too late to be verified: the draft worker is overloaded"
    CONTENT = "content", "the drafters do not predict the text that is being generated"

    @property
    def is_fault(self) -> bool:
        """Whether something may have to be mended; a restart and other text pass by themselves."""
        return self in (CollapseReason.SILENT, CollapseReason.LATE)


@dataclass(frozen=True, slots=True)
class DraftReport:
    """A worker's report on its drafts; the numbers count from its start."""

    acceptance_rate: float
    """Share of recently verified drafts that were accepted."""
    num_proposed: int
    num_verified: int
    num_late: int
    draft_worker: str | None
    """Incarnation of the draft worker."""
    is_answered: bool
    """Whether the draft worker answers the worker's messages."""


class DraftWatch:
    """Notices when the acceptance rate of one worker's drafts collapses."""

    def __init__(self) -> None:
        self._usual: float | None = None
        self._last: DraftReport | None = None
        self._restarted_s = -math.inf
        self._num_verified = 0
        self.reason: CollapseReason | None = None
        """Why the rate is collapsed now; None if it is not."""

    def observe(self, report: DraftReport, now: float) -> CollapseReason | None:
        """Take in a report; returns the reason if a collapse begins with it."""
        last, self._last = self._last, report
        if last is None:
            return None
        if report.draft_worker != last.draft_worker and last.draft_worker is not None:
            self._restarted_s = now
        num_verified = report.num_verified - last.num_verified
        self._num_verified += num_verified
        before = self.reason
        if not report.is_answered:
            self.reason = CollapseReason.SILENT
        elif self.reason is CollapseReason.SILENT:
            self.reason = None
        if num_verified and self.reason is not CollapseReason.SILENT:
            self._judge(report, last, now)
        return self.reason if self.reason is not before else None

    def _judge(self, report: DraftReport, last: DraftReport, now: float) -> None:
        rate = report.acceptance_rate
        if self._usual is None:
            self._usual = rate
        if self._num_verified < MIN_VERIFIED:
            self._usual += (rate - self._usual) / 2
            return
        if self.reason is not None:
            if rate >= RECOVER_SHARE * self._usual:
                self.reason = None
        elif rate < COLLAPSE_SHARE * self._usual and rate < self._usual - COLLAPSE_DROP:
            self.reason = self._find_reason(report, last, now)
        # During a collapse too: a rate that lasts becomes the usual one.
        self._usual += LEARN_RATE * (rate - self._usual)

    def _find_reason(self, report: DraftReport, last: DraftReport, now: float) -> CollapseReason:
        if now - self._restarted_s < RESTART_MEMORY_S:
            return CollapseReason.RESTARTED
        num_proposed = report.num_proposed - last.num_proposed
        if num_proposed and report.num_late - last.num_late > num_proposed / 2:
            return CollapseReason.LATE
        return CollapseReason.CONTENT
