"""The GlobalScheduler: places each request on a worker, from the view of all workers."""

import dataclasses
import logging
import math
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.placement.observer import SchedulerObserver
from scheduler.drafting import (
    DraftReport,
    DraftWatch,
    DraftWorkerLoad,
    choose_draft_worker,
)
from scheduler.pace import SlowWatch
from scheduler.placement import (
    Placed,
    Placement,
    RefusalReason,
    Refused,
    WorkerLoad,
    keep_for_trial,
    place,
)
from scheduler.quota import Account, Draw, Grant, Quota
from scheduler.request import Request
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.errors import EngineDead, EngineStalled, WorkerError, WorkerSilent
from workers.latest import Latest
from workers.reports import (
    DraftStats,
    DraftWorkerReport,
    DraftWorkerStatus,
    ReportAnswer,
    Stall,
    WorkerReport,
)

logger = logging.getLogger(__name__)

NO_WORKER_RETRY_S = 0.5
"""Time after which a request asks again, while no worker takes new ones."""
FORGET_AFTER_S = 30.0
"""A placement not confirmed by its worker's report within this time is dropped."""
MAX_REPLACEMENT_S = 120.0
"""Max time that Serve may need to replace a worker; large models take minutes to load."""
SILENT_AFTER_S = 2.0
"""A worker that is not heard for this long, and for `SILENT_GAPS` times its longest silence of
late, may hang or be out of reach; a live one is heard twice a second."""
SILENT_GAPS = 4.0
GAP_HALF_LIFE_S = 30.0
"""Time in which half of a worker's longest silence is forgotten."""
MAX_GAP_S = 1.0
"""A longer silence says nothing of the next one: perhaps the worker was stopped."""
SUSPECT_GONE_AFTER_S = 5 * NO_WORKER_RETRY_S
"""A request that waits for an idle worker and has not asked again for this long has gone."""
GONE_AFTER_S = 300.0
"""A worker that has been silent for this long is gone; Serve replaces one that hangs."""
DRAFT_WORKER_SILENT_AFTER_S = 3.0
"""A draft worker that has not reported, or owes an answer, for this long may be stopped; a live
one reports twice a second."""
SUSPECT_AFTER_S = 10.0
"""Time of a step after which what it computes for the first time is taken for the cause, and tried
alone. On a busy machine any step may take long."""
REFUSE_S = 600.0
"""Time in which requests equal to one that made engines fail are refused."""
MAX_POISONS = 1000
"""Requests that are remembered for that."""
MAX_PLACEMENTS_BYTES = 16 << 20
"""Memory of the placements that are kept for `explain`: those of about 10,000 requests."""
PLACEMENT_BYTES = 1200
"""Memory of a placement, with what it says of two workers."""


@dataclass(slots=True)
class _WorkerView:
    """The last report of a worker, and the requests placed on it since."""

    heard_s: float
    """Time of the last report or beat, or of the first mention."""
    longest_gap_s: float = 0.0
    """Longest time in which it was not heard, decaying."""
    stall: Stall | None = None
    has_reported: bool = False
    silence_noted: bool = False
    reported: dict[str, int] = field(default_factory=dict)
    """Outstanding tokens, by request id."""
    placed: dict[str, tuple[Request, float]] = field(default_factory=dict)
    """Request and time of placement, by request id."""
    draining: bool = False
    dead: bool = False
    on_trial: bool = False
    """Whether an engine has died under one of the reported requests."""
    tokens_per_decode: float = 1.0
    token_s: float | None = None
    slowness: float = 1.0
    pace: SlowWatch = field(default_factory=SlowWatch)
    unfit: str = ""
    """Why it must be replaced; empty if it need not be."""
    draft_worker: str | None = None
    """The draft worker that drafts for it, by id."""
    drafts: DraftWatch = field(default_factory=DraftWatch)

    def is_silent(self, now: float) -> bool:
        """Whether it is not heard, or its engine makes no steps."""
        return bool(self.stall) or self.is_unheard(now)

    def is_unheard(self, now: float) -> bool:
        return now - self.heard_s > max(SILENT_AFTER_S, SILENT_GAPS * self.longest_gap_s)

    def is_serving(self, now: float) -> bool:
        return not (self.dead or self.draining or self.is_silent(now))

    def expects(self, request_id: str, now: float) -> bool:
        """Whether a request was placed on it lately that it has not reported."""
        placed = self.placed.get(request_id)
        return placed is not None and now - placed[1] <= FORGET_AFTER_S

    def hear(self, now: float) -> None:
        gap_s = now - self.heard_s
        decayed_s = self.longest_gap_s * 0.5 ** (gap_s / GAP_HALF_LIFE_S)
        self.longest_gap_s = min(max(gap_s, decayed_s), MAX_GAP_S)
        self.heard_s = now

    def load(
        self, worker_id: str, now: float, kept: bool = False, max_num_seqs: float = math.inf
    ) -> WorkerLoad:
        for request_id, (_, placed_s) in list(self.placed.items()):
            if now - placed_s > FORGET_AFTER_S:
                del self.placed[request_id]
        placed = [request for request, _ in self.placed.values()]
        return WorkerLoad(
            worker_id,
            sum(self.reported.values()) + sum(one.num_outstanding_tokens() for one in placed),
            len(self.reported) + len(placed),
            self.draining,
            self.tokens_per_decode,
            self.is_silent(now),
            dead=self.dead,
            on_trial=kept or self.on_trial or any(one.num_engine_deaths for one in placed),
            token_s=self.token_s,
            slowness=self.slowness,
            slow=self.pace.slow,
            max_num_seqs=max_num_seqs,
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
        max_num_seqs: float = math.inf,
        slow_timeout_s: float | None = None,
        quotas: Mapping[str, Quota] = types.MappingProxyType({}),
    ) -> None:
        """A worker runs at most `max_num_seqs` requests, and is replaced if it is slow for longer
        than `slow_timeout_s`. `quotas` are those of tenants, by name.
        """
        self._clock = clock
        self._observer = observer or SchedulerObserver()
        self._max_num_seqs = max_num_seqs
        self._slow_timeout_s = slow_timeout_s or math.inf
        self._quotas = quotas
        self._accounts: dict[str, Account] = {}
        """What is left of the quotas, by tenant."""
        self._suspects: dict[str, float] = {}
        """Requests that wait for an idle worker, with the time of their last question."""
        self._poisons: OrderedDict[str, tuple[str, float]] = OrderedDict()
        """What was found of requests that made engines fail, and until when, by fingerprint."""
        self._kept: str | None = None
        """The worker that gets nothing else until it is idle and tries one of them."""
        self._replaced_by_s = -math.inf
        """Time until which a worker that died may be replaced by a new one."""
        self._placements: Latest[Placement] = Latest(MAX_PLACEMENTS_BYTES)
        self._workers: dict[str, _WorkerView] = {}
        self._draft_workers: dict[str, _DraftWorkerView] = {}

    async def place(self, request: Request, worker_ids: Sequence[str]) -> Placed | Refused:
        """Choose one of `worker_ids`, which Serve believes to be alive."""
        now = self._clock()
        found, until_s = self._poisons.get(request.fingerprint, ("", -math.inf))
        if now < until_s:
            return Refused(RefusalReason.POISON, math.ceil(until_s - now), found)
        for gone in self._workers.keys() - set(worker_ids):
            if self._workers[gone].is_silent(now):
                del self._workers[gone]
        self._forget_suspects(now)
        loads = [self._load(worker_id, self._view(worker_id, now), now) for worker_id in worker_ids]
        self._note_silence(loads)
        placement = place(request, loads)
        if placement is None or self._risks_the_last_worker(request, loads, now):
            return self._refuse(request, loads, now)
        chosen = placement.chosen.worker_id
        self._workers[chosen].placed[request.request_id] = request, now
        self._suspects.pop(request.request_id, None)
        self._placements.add(request.request_id, placement, PLACEMENT_BYTES)
        self._observer.placed(request, placement, self._clock() - now)
        return Placed(chosen)

    async def draw(self, ingress_id: str, draws: Mapping[str, Draw]) -> dict[str, Grant]:
        """Lease parts of tenants' quotas to an ingress, in place of what it has left of others."""
        now = self._clock()
        return {
            tenant: self._account(tenant, draw, now).draw(ingress_id, draw, now)
            for tenant, draw in draws.items()
        }

    def _account(self, tenant: str, draw: Draw, now: float) -> Account:
        if tenant not in self._accounts:
            self._accounts[tenant] = Account(self._quotas[tenant], draw.levels, now)
        return self._accounts[tenant]

    async def refuse(self, fingerprint: str, found: str) -> None:
        """Refuse requests with this fingerprint for a while, because of what was found of one."""
        self._poisons[fingerprint] = found, self._clock() + REFUSE_S
        self._poisons.move_to_end(fingerprint)
        if len(self._poisons) > MAX_POISONS:
            self._poisons.popitem(last=False)
        logger.warning(
            "requests like one that made engines fail are refused",
            extra={"fingerprint": fingerprint, "found": found, "for_s": REFUSE_S},
        )

    def _risks_the_last_worker(
        self, request: Request, loads: Sequence[WorkerLoad], now: float
    ) -> bool:
        """Whether a worker more is to come, without which this request could end the last one."""
        is_one_to_come = now < self._replaced_by_s or any(
            self._workers[load.worker_id].stall for load in loads
        )
        num_serving = sum(load.is_serving for load in loads)
        return bool(request.num_engine_deaths) and num_serving == 1 and is_one_to_come

    def _refuse(self, request: Request, loads: Sequence[WorkerLoad], now: float) -> Refused:
        """Let a request wait; for one under which an engine died, a worker becomes idle."""
        if not request.num_engine_deaths or not any(load.is_serving for load in loads):
            return Refused(RefusalReason.NO_WORKER, NO_WORKER_RETRY_S)
        self._suspects[request.request_id] = now
        if not any(load.on_trial and load.is_serving for load in loads):
            kept = keep_for_trial(request, loads)
            self._kept = kept.worker_id if kept else None
        return Refused(RefusalReason.NO_IDLE_WORKER, NO_WORKER_RETRY_S)

    def _forget_suspects(self, now: float) -> None:
        """Forget requests that no longer ask, and take the worker kept for them back."""
        for request_id, asked_s in list(self._suspects.items()):
            if now - asked_s > SUSPECT_GONE_AFTER_S:
                del self._suspects[request_id]
        if not self._suspects:
            self._kept = None

    async def placements(self, request_ids: Sequence[str]) -> dict[str, Placement]:
        """Where requests were placed and why; those no longer known are left out."""
        found = {request_id: self._placements.get(request_id) for request_id in request_ids}
        return {request_id: placement for request_id, placement in found.items() if placement}

    async def report(self, report: WorkerReport) -> ReportAnswer:
        """Take a worker's report of its requests."""
        now = self._clock()
        view = self._view(report.worker_id, now)
        view.hear(now)
        self._note_report(report.worker_id, view)
        view.reported = report.outstanding
        view.draining = report.draining
        view.on_trial = report.on_trial
        view.token_s = report.token_s
        if report.death:
            self._note_death(report.worker_id, view, report.death)
        self._note_pace(report.worker_id, view, report.slowness, now)
        for request_id in (*report.outstanding, *report.finished):
            view.placed.pop(request_id, None)
        others = (other for other in self._workers.values() if other is not view)
        others_serve = any(other.is_serving(now) for other in others)
        if report.drafts is None:
            return ReportAnswer(unfit=view.unfit, others_serve=others_serve)
        self._watch(report.worker_id, view, report.drafts, now)
        return ReportAnswer(self._choose_draft_worker(view, now), view.unfit, others_serve)

    async def beat(self, worker_id: str, stall: Stall | None) -> None:
        """Hear of a worker between its reports, and of a step of its engine that seems to hang."""
        now = self._clock()
        view = self._view(worker_id, now)
        view.hear(now)
        if stall and not view.stall:
            logger.warning("engine stalls", extra={"worker": worker_id, "reason": str(stall)})
        elif view.stall and not stall:
            logger.info("engine makes steps again", extra={"worker": worker_id})
        view.stall = stall

    async def bury(self, worker_id: str, reason: str) -> None:
        """Note that the process of a worker has ended, as its client has seen."""
        if (view := self._workers.get(worker_id)) and not view.dead:
            self._note_death(worker_id, view, reason)

    async def losses(self, attempts: Mapping[str, str]) -> dict[str, WorkerError]:
        """Which attempts at requests, each with its worker, are to be made elsewhere, and why.

        Those on a worker that is dead, or silent while another one serves, and those that their
        worker does not know of.
        """
        now = self._clock()
        found: dict[str, WorkerError] = {}
        for request_id, worker_id in attempts.items():
            if error := self._loss(request_id, worker_id, now):
                found[request_id] = error
        return found

    def _loss(self, request_id: str, worker_id: str, now: float) -> WorkerError | None:
        if (view := self._workers.get(worker_id)) is None or not view.has_reported:
            return None
        if view.dead:
            return EngineDead(f"the engine of worker {worker_id} is dead")
        others = (other for other in self._workers.values() if other is not view)
        if view.is_silent(now):
            if not any(other.is_serving(now) for other in others):
                return None
            if (stall := view.stall) is None or view.is_unheard(now):
                silent_s = now - view.heard_s
                return WorkerSilent(f"worker {worker_id} was last heard {silent_s:.1f} s ago")
            if request_id not in stall.suspects:
                return WorkerSilent(f"worker {worker_id} stalls: {stall}")
            is_sure = stall.took_s > SUSPECT_AFTER_S
            return EngineStalled(f"worker {worker_id} stalls: {stall}") if is_sure else None
        if request_id in view.reported or view.expects(request_id, now):
            return None
        return WorkerSilent(f"worker {worker_id} knows nothing of this request")

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
            self._replaced_by_s = -math.inf
            logger.info("worker found", extra={"worker": worker_id})
        elif view.silence_noted:
            logger.info("worker heard again", extra={"worker": worker_id})
        view.has_reported, view.silence_noted = True, False

    def _note_death(self, worker_id: str, view: _WorkerView, reason: str) -> None:
        """Place nothing more on a worker, whose late reports change nothing."""
        view.dead = True
        self._replaced_by_s = self._clock() + MAX_REPLACEMENT_S
        logger.warning("worker is dead", extra={"worker": worker_id, "reason": reason})

    def _note_pace(self, worker_id: str, view: _WorkerView, slowness: float, now: float) -> None:
        """Log, once, that a worker is slow, and have it replaced if that lasts.

        Only one at a time, and only while another one works at its usual pace.
        """
        view.slowness = slowness
        others = [
            other
            for other_id, other in self._workers.items()
            if other_id != worker_id and not (other.dead or other.is_silent(now))
        ]
        at_work = [other for other in others if other.reported]
        if view.pace.observe(slowness, [other.slowness for other in at_work], now):
            extra = {"worker": worker_id, "slowness": slowness}
            if view.pace.slow:
                logger.warning("worker is slow", extra=extra)
            else:
                logger.info("worker is no longer slow", extra=extra)
        if (
            view.pace.slow
            and view.pace.slow_s > self._slow_timeout_s
            and any(not (other.pace.slow or other.draining) for other in at_work)
            and not any(one.unfit for one in (view, *others))
        ):
            view.unfit = f"its steps have taken {slowness:.1f} times as long as predicted"
            logger.warning("slow worker is to be replaced", extra={"worker": worker_id})

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
        view.tokens_per_decode = stats.tokens_per_decode
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
            logger.log(
                logging.WARNING if reason.is_fault else logging.INFO,
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
            (self._load(worker_id, view, now), now - view.heard_s)
            for worker_id, view in sorted(self._workers.items())
            if now - view.heard_s < GONE_AFTER_S and not (view.dead and view.is_unheard(now))
        ]

    def _view(self, worker_id: str, now: float) -> _WorkerView:
        return self._workers.setdefault(worker_id, _WorkerView(now))

    def _load(self, worker_id: str, view: _WorkerView, now: float) -> WorkerLoad:
        return view.load(worker_id, now, worker_id == self._kept, self._max_num_seqs)
