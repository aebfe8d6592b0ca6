"""How much of its steps each worker gives to prefills, and how deep it drafts, by the view of all.

A worker fills each step by the targets of its own requests (`scheduler.hybrid`). Several times a
second the GlobalScheduler sets the bounds within which it does, from what all workers report.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

from scheduler.prefill_queue import MAX_STRETCH, QueueReport
from scheduler.worded import Worded

SHARE_STEP = 0.1
"""By how much a share changes at a time."""
MIN_SHARE = 0.1
"""Smallest share that is set: with less, a prompt would only get on by the turn of the oldest."""
HOLD_S = 2.0
"""Shortest time between two changes of one worker's policy, so that a change shows before the next
is made."""
SILENT_S = 6.0
"""Time without an answer of the GlobalScheduler after which a worker goes on alone: three times the
longest time between two reports."""
DEPTHS = (1, 2, 4, None)
"""Drafts for each request at most, from the fewest to all that pay; with none, nobody would learn
when they pay again."""
DRAFT_WORKER_FULL, DRAFT_WORKER_FREE = 0.9, 0.6
"""Busy share from which on a draft worker's drafts come late, and up to which it has room again."""
LOW_ACCEPTANCE = 0.4
"""Share of accepted drafts below which a worker's drafts are given up for those of others."""


class PolicyReason(Worded):
    """Why a worker's policy is what it is."""

    ALONE = "alone", "the GlobalScheduler has set none"
    SILENCE = "silence", "the GlobalScheduler has not answered for a while"
    DECODES_LATE = (
        "decodes_late",
        "more decodes than prefills would be late, and it had the most decodes of those workers",
    )
    LEAST_WORK = (
        "least_work",
        "more decodes than prefills would be late elsewhere, and it had the least work",
    )
    PREFILLS_LATE = "prefills_late", "more prefills than decodes would be late"
    FEW_LATE = "few_late", "no more decodes than prefills would be late, if any"
    DRAFT_WORKER_FULL = (
        "draft_worker_full",
        "its draft worker was saturated, and it accepted the smallest share of the drafts",
    )
    DRAFT_WORKER_FREE = "draft_worker_free", "its draft worker had room again"


@dataclass(frozen=True, slots=True)
class WorkerPolicy:
    """The bounds within which a worker fills its steps.

    The roles of workers that hand KV caches on belong here too, once there is a hand-off:
    `takes_new`, whether placement gives it new requests, and `handoff_after`, the output tokens
    after which a request goes on elsewhere.
    """

    prefill_share: float = 1.0
    """Longest time for prefills, as a share of what a step with decodes may last; of 0 to 1."""
    max_drafts: int | None = None
    """Drafts of one request that a step verifies at most; None leaves it to the worker."""
    version: int = 0
    """Counts the changes of this worker's policy."""
    reason: PolicyReason = PolicyReason.ALONE
    """Why it is not the one before."""

    def __post_init__(self) -> None:
        if not 0 <= self.prefill_share <= 1:
            raise ValueError(f"prefill_share ({self.prefill_share}) must be from 0 to 1")
        if self.max_drafts is not None and self.max_drafts < 0:
            raise ValueError(f"max_drafts ({self.max_drafts}) must not be negative")

    @property
    def is_free(self) -> bool:
        """Whether it bounds nothing."""
        return self.prefill_share == 1.0 and self.max_drafts is None


ALONE = WorkerPolicy()
SILENCE = WorkerPolicy(reason=PolicyReason.SILENCE)


class FollowedPolicy:
    """The policy that a worker follows: the last one given, while such answers come."""

    def __init__(self) -> None:
        self._given: WorkerPolicy | None = None
        self._heard_s = 0.0

    def follow(self, policy: WorkerPolicy | None, now: float) -> None:
        """Take what the GlobalScheduler has answered; None if it sets no policies."""
        self._given, self._heard_s = policy, now

    def at(self, now: float) -> WorkerPolicy:
        """The policy of a step that is planned `now`."""
        if self._given is None:
            return ALONE
        if now - self._heard_s > SILENT_S:
            return SILENCE
        return self._given


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a worker's requests are to the stage policy."""

    num_decodes: int = 0
    work_s: float = 0.0
    """Seconds of all its prefills and of one step of its decodes."""
    late_decodes: float = 0.0
    """Decodes that are behind their time per token, weighted by priority."""
    late_prefills: float = 0.0
    """Prefills that are predicted to miss their time to first token, weighted by priority."""


@dataclass(frozen=True, slots=True)
class StageView:
    """What the stage policy knows of one worker."""

    report: StageReport = StageReport()
    acceptance_rate: float = 1.0
    """Share of its recently verified drafts that were accepted."""
    draft_worker: str = ""
    """What drafts for it; empty if nothing does."""
    draft_worker_busy: float = 0.0
    """Share of its time that this draft worker spends drafting."""


def weight(priority: int) -> float:
    """How much a request counts: half as much as one of the next more urgent priority."""
    return 2.0 ** -max(-16, min(priority, 16))


def late_prefills(queue: QueueReport) -> float:
    """The prefills that a worker's queue makes late, by weight.

    As a worker's step scheduler does: by deadline, and whenever one would be late, the longest
    taken so far is.
    """
    left = 1.0 - queue.decode_s / queue.tpot_s
    stretch = 1.0 / max(left, 1.0 / MAX_STRETCH)
    order = sorted(queue.prefills.values(), key=lambda one: (one.priority, one.due_in_s))
    taken: list[tuple[int, float]] = []
    end_s, late = 0.0, 0.0
    for prefill in order:
        work_s = stretch * queue.cost.seconds(prefill.num_new_tokens, prefill.num_tokens)
        heapq.heappush(taken, (-prefill.priority, -work_s))
        end_s += work_s
        if end_s > prefill.due_in_s:
            negative_priority, negative_s = heapq.heappop(taken)
            end_s += negative_s
            late += weight(-negative_priority)
    return late


class StagePolicy:
    """Sets the policies of all workers; times are of one clock.

    If more decodes than prefills are predicted to miss their targets, over all workers, then of the
    workers with late decodes the one with the most decodes gives a tenth less of its steps to
    prefills, and the one with the least work a tenth more. Otherwise the one with the smallest
    share gets a tenth back. How many drafts a worker verifies is its own matter, as it knows what
    they are worth; but those of a saturated draft worker are late for all that it drafts for, so
    the one that accepts the fewest makes room.
    """

    def __init__(self) -> None:
        self._policies: dict[str, WorkerPolicy] = {}
        self._changed_s: dict[str, float] = {}
        """Time of each worker's last change, or since when it is known."""

    def decide(self, views: Mapping[str, StageView], now: float) -> dict[str, WorkerPolicy]:
        """The policies of these workers from now on; those of others are forgotten."""
        self._policies = {worker: self._policies.get(worker, ALONE) for worker in views}
        self._changed_s = {worker: self._changed_s.get(worker, now) for worker in views}
        self._set_shares({worker: view.report for worker, view in views.items()}, now)
        self._set_depths(views, now)
        return dict(self._policies)

    def _set_shares(self, reports: Mapping[str, StageReport], now: float) -> None:
        num_decodes = sum(report.late_decodes for report in reports.values())
        num_prefills = sum(report.late_prefills for report in reports.values())
        if num_decodes > num_prefills:
            late = [worker for worker, report in reports.items() if report.late_decodes]
            most = max(late, key=lambda worker: (reports[worker].num_decodes, worker))
            least = min(reports, key=lambda worker: (reports[worker].work_s, worker))
            self._add_to_share(most, -SHARE_STEP, PolicyReason.DECODES_LATE, now)
            if least != most:
                self._add_to_share(least, SHARE_STEP, PolicyReason.LEAST_WORK, now)
        elif self._policies:
            smallest = min(self._policies, key=lambda w: (self._policies[w].prefill_share, w))
            is_late = num_prefills > num_decodes
            reason = PolicyReason.PREFILLS_LATE if is_late else PolicyReason.FEW_LATE
            self._add_to_share(smallest, SHARE_STEP, reason, now)

    def _add_to_share(self, worker: str, change: float, reason: PolicyReason, now: float) -> None:
        # In tenths, so that changes there and back end where they began.
        share = round(self._policies[worker].prefill_share + change, 1)
        share = min(max(share, MIN_SHARE), 1.0)
        self._change(worker, replace(self._policies[worker], prefill_share=share), reason, now)

    def _set_depths(self, views: Mapping[str, StageView], now: float) -> None:
        drafted_by: dict[str, list[str]] = {}
        for worker, view in views.items():
            drafted_by.setdefault(view.draft_worker, []).append(worker)
        for workers in drafted_by.values():
            busy = max(views[worker].draft_worker_busy for worker in workers)
            lowest = min(workers, key=lambda worker: (views[worker].acceptance_rate, worker))
            if busy >= DRAFT_WORKER_FULL and views[lowest].acceptance_rate < LOW_ACCEPTANCE:
                self._go_deeper(lowest, -1, PolicyReason.DRAFT_WORKER_FULL, now)
            elif busy <= DRAFT_WORKER_FREE:
                shallowest = min(workers, key=lambda worker: (self._depth(worker), worker))
                self._go_deeper(shallowest, +1, PolicyReason.DRAFT_WORKER_FREE, now)

    def _depth(self, worker: str) -> int:
        """Index of its maximum of drafts among all."""
        return DEPTHS.index(self._policies[worker].max_drafts)

    def _go_deeper(self, worker: str, change: int, reason: PolicyReason, now: float) -> None:
        depth = min(max(self._depth(worker) + change, 0), len(DEPTHS) - 1)
        policy = replace(self._policies[worker], max_drafts=DEPTHS[depth])
        self._change(worker, policy, reason, now)

    def _change(self, worker: str, policy: WorkerPolicy, reason: PolicyReason, now: float) -> None:
        before = self._policies[worker]
        if policy != before and now - self._changed_s[worker] >= HOLD_S:
            version = before.version + 1
            self._policies[worker] = replace(policy, version=version, reason=reason)
            self._changed_s[worker] = now
