"""The GlobalScheduler: places each request on a worker, from the view of all workers."""

import dataclasses
import math
import time
import types
from collections.abc import Callable, Mapping, Sequence

from cluster.placement.accounts import Accounts
from cluster.placement.draft_pool import DraftPool
from cluster.placement.observer import SchedulerObserver
from cluster.placement.prefix_watch import FormatWatch, PrefixStats, Resyncs, num_untold
from cluster.placement.record import PlacementRecorder
from cluster.placement.scaler import Scaler
from cluster.placement.stages import Stages
from cluster.placement.suspects import (
    NO_WORKER_RETRY_S,
    Poisons,
    Suspects,
    risks_the_last_worker,
)
from cluster.placement.worker_views import WorkerViews
from scheduler.admission import Admission
from scheduler.fair_shares import FairShares, Share, device_time, yielding
from scheduler.fleet import NUM_CACHED, NUM_SHORT, Fleet
from scheduler.output_length import OutputLengths
from scheduler.placement import Placed, Placement, RefusalReason, Refused, WorkerLoad, place
from scheduler.placement_replay import Began, Decided, Event, Forgotten, Reported
from scheduler.quota import Draw, Grant, Quota
from scheduler.request import Request
from scheduler.scaling import ScalingDecision, ScalingSettings
from scheduler.stage_policy import StageView, WorkerPolicy
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.errors import WorkerError
from workers.latest import Latest
from workers.reports import (
    DraftReportAnswer,
    DraftStats,
    DraftWorkerReport,
    DraftWorkerStatus,
    ReportAnswer,
    Stall,
    WorkerReport,
)

MAX_PLACEMENTS_BYTES = 16 << 20
"""Memory of the placements that are kept for `explain`: those of about 10,000 requests."""
PLACEMENT_BYTES = 1200
"""Memory of a placement, with what it says of two workers."""


class GlobalScheduler:
    """One actor of the app. Its state is soft: workers report again after a restart."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        observer: SchedulerObserver | None = None,
        max_num_seqs: float = math.inf,
        slow_timeout_s: float | None = None,
        quotas: Mapping[str, Quota] = types.MappingProxyType({}),
        weights: Mapping[str, float] = types.MappingProxyType({}),
        predicts: bool = True,
        admission: Admission | None = None,
        recorder: PlacementRecorder | None = None,
        learn_output_lengths: bool = True,
        scaling: ScalingSettings | None = None,
        draft_scaling: ScalingSettings | None = None,
        sets_stages: bool = False,
    ) -> None:
        """A worker runs at most `max_num_seqs` requests, and is replaced if it is slow for longer
        than `slow_timeout_s`. `quotas` and `weights` are those of tenants, by name. If it
        `predicts`, requests are placed by time to first token, otherwise by outstanding tokens.
        `admission` refuses those that would be late; None: none. `recorder` writes down what
        decides. If the lengths of outputs are not learned, each is predicted to be `max_tokens`.
        The numbers of workers and draft workers are decided here where there is a `scaling` of
        theirs. If it `sets_stages`, each report is answered with a policy.
        """
        self._clock = clock
        self._observer = observer or SchedulerObserver()
        self._predicts = predicts
        self._admission = admission
        self._recorder = recorder
        if recorder:
            recorder.write(Began(admission))
        self._workers = WorkerViews(max_num_seqs, slow_timeout_s or math.inf)
        self._fleet = Fleet()
        self._resyncs = Resyncs()
        self._formats = FormatWatch()
        self._suspects = Suspects()
        self._poisons = Poisons()
        self._draft_pool = DraftPool()
        self._accounts = Accounts(quotas)
        self._stages = Stages(self._observer.policy_changed) if sets_stages else None
        self._shares = FairShares(weights)
        self.output_lengths = OutputLengths()
        """What the requests that ended say of the lengths of others."""
        self._learn_output_lengths = learn_output_lengths
        self._scaler = Scaler(self.output_lengths, scaling, draft_scaling)
        self._placements: Latest[Placement] = Latest(MAX_PLACEMENTS_BYTES)

    async def place(self, request: Request, worker_ids: Sequence[str]) -> Placed | Refused:
        """Choose one of `worker_ids`, which Serve believes to be alive."""
        now = self._clock()
        if refused := self._poisons.refusal(request, now):
            return refused
        for gone in self._workers.sweep(worker_ids, now):
            self._draft_pool.forget_worker(gone)
            self._forget(gone)
        self._suspects.forget_gone(now)
        yields = self._shares.yields(request, now)
        request = yielding(request, yields)
        loads = self._loads_for(request, worker_ids, now)
        placement = place(request, loads)
        wait_s = self._shares.wait_s(request, loads, now)
        is_new = not self._shares.waits(request.request_id)
        refused = None
        if self._admission and placement and is_new:
            refused = self._admission.refusal(request, placement, wait_s or 0.0)
        if not request.num_engine_deaths:  # such a one is not placed by forecast
            self._record(Decided(request, tuple(loads), placement, refused, now, wait_s, is_new))
        if placement is None or (
            request.num_engine_deaths
            and risks_the_last_worker(request, loads, self._workers.is_one_to_come(worker_ids, now))
        ):
            return self._refuse(request, loads, now)
        if refused:
            self._observer.refused(request, refused)
            return refused
        if wait_s is not None:
            return self._wait(request, placement, wait_s, is_new, now)
        if len(loads) < len(worker_ids):
            num_closed = self._workers.num_closed(worker_ids, self._suspects.kept)
            placement = dataclasses.replace(placement, num_closed=num_closed)
        chosen = placement.chosen.worker_id
        self._workers.add_placed(chosen, request, now)
        self._fleet.place(chosen, request, now)
        self._note_share(request, placement.chosen, now)
        if is_new:
            self._scaler.offer(request, placement.chosen)
        self._suspects.end_wait(request.request_id)
        self._placements.add(request.request_id, placement, PLACEMENT_BYTES)
        self._observer.placed(request, placement, self._clock() - now)
        prefix_format = self._fleet.index.format_of(chosen)
        return Placed(chosen, prefix_format, placement.chosen.forecast, yields)

    def _wait(
        self, request: Request, placement: Placement, wait_s: float, is_new: bool, now: float
    ) -> Refused:
        """Have a request wait for its tenant's turn."""
        answer = self._shares.wait(request, wait_s, now)
        if answer.is_final:
            self._observer.refused(request, answer)
        elif is_new:
            self._scaler.offer(request, placement.chosen)
            self._observer.queued(request)
        return answer

    def _note_share(self, request: Request, load: WorkerLoad, now: float) -> None:
        """Charge a request to its tenant's share."""
        num_tokens = None
        if self._learn_output_lengths:
            num_tokens = self.output_lengths.predict(request).mean
        self._shares.place(request, load.worker_id, device_time(request, load, num_tokens), now)

    def _loads_for(
        self, request: Request, worker_ids: Sequence[str], now: float
    ) -> list[WorkerLoad]:
        """The loads of the workers that may be the best ones for a request, with what is predicted
        for it there. All of them if an engine has died under it: it is tried on an idle one, or one
        becomes idle."""
        kept = self._suspects.kept
        if request.num_engine_deaths or not self._predicts:
            return self._workers.loads_of(worker_ids, {}, kept, now)
        if len(worker_ids) > NUM_CACHED + NUM_SHORT:
            worker_ids = self._workers.best(worker_ids, kept)
        num_mismatches = self._fleet.index.num_format_mismatches
        forecasts = self._fleet.forecasts(request, worker_ids, now)
        if self._fleet.index.num_format_mismatches > num_mismatches:
            self._formats.note(request.prefix_format, self._fleet.index.formats, now)
        return self._workers.loads_of(forecasts, forecasts, kept, now)

    def _forget(self, worker_id: str) -> None:
        """Forget what is on a worker that is gone, or whose engine is."""
        self._fleet.forget(worker_id)
        self._resyncs.forget(worker_id)
        self._shares.forget(worker_id)
        if self._stages:
            self._stages.forget(worker_id)
        self._record(Forgotten(worker_id))

    def _record(self, event: Event) -> None:
        if self._recorder and self._predicts:
            self._recorder.write(event)

    def _refuse(self, request: Request, loads: Sequence[WorkerLoad], now: float) -> Refused:
        """Let a request wait; for one under which an engine died, a worker becomes idle."""
        if not request.num_engine_deaths or not any(load.is_serving for load in loads):
            return Refused(RefusalReason.NO_WORKER, NO_WORKER_RETRY_S)
        self._suspects.wait(request, loads, now)
        return Refused(RefusalReason.NO_IDLE_WORKER, NO_WORKER_RETRY_S)

    async def placements(self, request_ids: Sequence[str]) -> dict[str, Placement]:
        """Where requests were placed and why; those no longer known are left out."""
        found = {request_id: self._placements.get(request_id) for request_id in request_ids}
        return {request_id: placement for request_id, placement in found.items() if placement}

    async def refuse(self, fingerprint: str, found: str) -> None:
        """Refuse requests with this fingerprint for a while, because of what was found of one."""
        self._poisons.add(fingerprint, found, self._clock())

    async def draw(self, ingress_id: str, draws: Mapping[str, Draw]) -> dict[str, Grant]:
        """Lease parts of tenants' quotas to an ingress, in place of what it has left of others."""
        return self._accounts.draw(ingress_id, draws, self._clock())

    async def report(self, report: WorkerReport) -> ReportAnswer:
        """Take a worker's report of its requests."""
        now = self._clock()
        if self._learn_output_lengths:
            for request, num_output_tokens in self._workers.ended(report):
                self.output_lengths.observe(request, num_output_tokens)
        for request_id, num_output_tokens in self._workers.given(report).items():
            self._shares.end(request_id, num_output_tokens)
        self._shares.sweep(report.worker_id, report.outstanding, now)
        view = self._workers.report(report, now)
        if view.dead:
            self._forget(report.worker_id)
        self._scaler.note_targets(report.worker_id, report.targets)
        if change := self._scaler.decide(self._workers, now):
            self._observer.rescaled(change)
        return ReportAnswer(
            self._draft_worker(report.worker_id, report.drafts, now) if report.drafts else None,
            view.unfit,
            self._workers.others_serve(report.worker_id, now),
            resync_prefix=not view.dead and self._note_queue(report, now),
            policy=None if view.dead else self._worker_policy(report, now),
            num_workers_wanted=self._scaler.num_workers_wanted,
        )

    def _worker_policy(self, report: WorkerReport, now: float) -> WorkerPolicy | None:
        """Note what is on a worker's steps, and set their bounds; None if nobody does."""
        if self._stages is None:
            return None
        view = StageView(report.stages)
        if report.drafts:
            drafter = self._draft_pool.drafter_of(report.worker_id, now)
            view = StageView(report.stages, report.drafts.acceptance_rate, *drafter)
        return self._stages.report(report.worker_id, view, now)

    def policies(self) -> dict[str, WorkerPolicy]:
        """The bounds that the stage policy sets for each worker's steps."""
        return self._stages.policies if self._stages else {}

    def _note_queue(self, report: WorkerReport, now: float) -> bool:
        """Note a worker's queue and what its prefix cache has; whether to ask for all of that."""
        known = (*report.outstanding, *report.finished)
        self._record(Reported(report.worker_id, report.queue, known, report.prefix, now))
        ok = self._fleet.report(report.worker_id, report.queue, known, report.prefix, now)
        return self._resyncs.is_to_ask(report.worker_id, report.prefix, ok, now)

    def _draft_worker(
        self, worker_id: str, stats: DraftStats, now: float
    ) -> DraftWorkerAddress | None:
        """Note how well drafts serve a worker, and choose who drafts for it."""
        if reason := self._draft_pool.watch(worker_id, stats, now):
            self._observer.collapsed(worker_id, reason)
        return self._draft_pool.choose(worker_id, now)

    async def beat(self, worker_id: str, stall: Stall | None) -> None:
        """Hear of a worker between its reports, and of a step of its engine that seems to hang."""
        self._workers.beat(worker_id, stall, self._clock())

    async def bury(self, worker_id: str, reason: str) -> None:
        """Note that the process of a worker has ended, as its client has seen."""
        self._workers.bury(worker_id, reason, self._clock())
        self._forget(worker_id)

    async def losses(self, attempts: Mapping[str, str]) -> dict[str, WorkerError]:
        """Which attempts at requests, each with its worker, are to be made elsewhere, and why."""
        return self._workers.losses(attempts, self._clock())

    async def loads(self) -> list[WorkerLoad]:
        """The current view of all workers."""
        return [load for load, _ in self.loads_and_ages()]

    def loads_and_ages(self) -> list[tuple[WorkerLoad, float]]:
        """The current view of all workers, and the age of each one's last report in seconds."""
        return self._workers.loads_and_ages(self._suspects.kept, self._clock())

    def prefix_stats(self) -> PrefixStats:
        """What is known of the workers' prefix caches."""
        index, num_hashed = self._fleet.index, self._workers.num_hashed(self._clock())
        return PrefixStats(
            num_workers=sum(index.formats.values()),
            num_untold=num_untold(index, num_hashed),
            num_blocks=index.num_blocks,
            num_bytes=index.num_bytes,
            num_resyncs=self._resyncs.num_asked,
            num_format_mismatches=index.num_format_mismatches,
        )

    def shares(self) -> dict[str, Share]:
        """What each tenant has of the workers, and waits for."""
        return self._shares.shares()

    async def report_draft_worker(self, report: DraftWorkerReport) -> DraftReportAnswer:
        """Take a draft worker's report."""
        now = self._clock()
        peers = self._draft_pool.report(report, now)
        self._scaler.decide_drafts(self._draft_pool.busy_shares(now), now)
        return DraftReportAnswer(peers, self._scaler.num_draft_workers_wanted)

    @property
    def scaling(self) -> ScalingDecision | None:
        """The latest decision on the number of workers; None while there is none, or if others
        decide."""
        return self._scaler.decision

    async def draft_workers(self) -> list[DraftWorkerStatus]:
        """The current view of all draft workers."""
        return self._draft_pool.statuses(self._clock())
