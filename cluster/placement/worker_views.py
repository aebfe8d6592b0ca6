"""What is known of the workers, from their reports and beats and from what was placed on them."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.placement.standings import CLOSED, FULL, SILENT, SLOW, Standings
from scheduler.pace import USUAL, SlowWatch
from scheduler.placement import WorkerLoad
from scheduler.prefill_queue import FORGET_AFTER_S, Forecast
from scheduler.request import Request
from workers.errors import EngineDead, EngineStalled, WorkerError, WorkerSilent
from workers.reports import Stall, WorkerReport

logger = logging.getLogger(__name__)

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
GONE_AFTER_S = 300.0
"""A worker that has been silent for this long is gone; Serve replaces one that hangs."""
SWEEP_S = 0.5
"""Period at which silence is looked for among all workers; with a thousand it takes 1 ms."""
SUSPECT_AFTER_S = 10.0
"""Time of a step after which what it computes for the first time is taken for the cause, and tried
alone. On a busy machine any step may take long."""


@dataclass(slots=True)
class WorkerView:
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
    num_reported_tokens: int = 0
    """Their sum."""
    placed: dict[str, tuple[Request, float]] = field(default_factory=dict)
    """Request and time of placement, by request id."""
    num_hashed: int = 0
    """Requests with full blocks that were ever placed on it."""
    running: dict[str, Request] = field(default_factory=dict)
    """Those of the reported requests that were placed here by this GlobalScheduler."""
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

    def is_silent(self, now: float) -> bool:
        """Whether it is not heard, or its engine makes no steps."""
        return bool(self.stall) or self.is_unheard(now)

    def is_unheard(self, now: float) -> bool:
        """Whether it has been silent for longer than a live one ever is."""
        return now - self.heard_s > max(SILENT_AFTER_S, SILENT_GAPS * self.longest_gap_s)

    def is_serving(self, now: float) -> bool:
        """Whether it takes requests and makes steps."""
        return not (self.dead or self.draining or self.is_silent(now))

    def is_gone(self, now: float) -> bool:
        """Whether nothing more is to be expected of it."""
        return now - self.heard_s >= GONE_AFTER_S or (self.dead and self.is_unheard(now))

    def expects(self, request_id: str, now: float) -> bool:
        """Whether a request was placed on it lately that it has not reported."""
        placed = self.placed.get(request_id)
        return placed is not None and now - placed[1] <= FORGET_AFTER_S

    def known(self, request_ids: Iterable[str]) -> dict[str, Request]:
        """Those of these requests that were placed here by this GlobalScheduler."""
        found: dict[str, Request] = {}
        for request_id in request_ids:
            if request := self.running.get(request_id):
                found[request_id] = request
            elif placed := self.placed.get(request_id):
                found[request_id] = placed[0]
        return found

    def waiting(self) -> list[Request]:
        """Those of its requests, as far as they are known, that have no token yet."""
        reported = [
            request
            for request_id, request in self.running.items()
            if self.reported[request_id] == request.num_outstanding_tokens()
        ]
        return reported + [request for request, _ in self.placed.values()]

    def hear(self, now: float) -> None:
        """It lives: it has sent a report or a beat."""
        gap_s = now - self.heard_s
        decayed_s = self.longest_gap_s * 0.5 ** (gap_s / GAP_HALF_LIFE_S)
        self.longest_gap_s = min(max(gap_s, decayed_s), MAX_GAP_S)
        self.heard_s = now

    def forget_late(self, now: float) -> None:
        """Drop placements that it should have reported long ago."""
        for request_id, (_, placed_s) in list(self.placed.items()):
            if now - placed_s > FORGET_AFTER_S:
                del self.placed[request_id]

    def standing(self, max_num_seqs: float, now: float) -> int:
        """What makes it worse than others whatever is to be placed."""
        if self.dead or self.draining or self.has_suspect:
            return CLOSED
        is_full = len(self.reported) + len(self.placed) >= max_num_seqs
        return SILENT * self.is_silent(now) + SLOW * self.pace.slow + FULL * is_full

    @property
    def has_suspect(self) -> bool:
        """Whether an engine has died under one of its requests."""
        return self.on_trial or any(one.num_engine_deaths for one, _ in self.placed.values())

    def load(
        self,
        worker_id: str,
        kept: bool,
        max_num_seqs: float,
        now: float,
        forecast: Forecast | None = None,
    ) -> WorkerLoad:
        """What placement knows about it; it is `kept` for a trial, or not."""
        self.forget_late(now)
        placed = [request for request, _ in self.placed.values()]
        return WorkerLoad(
            worker_id,
            self.num_reported_tokens + sum(one.num_outstanding_tokens() for one in placed),
            len(self.reported) + len(placed),
            self.draining,
            self.tokens_per_decode,
            self.is_silent(now),
            dead=self.dead,
            on_trial=kept or self.has_suspect,
            token_s=self.token_s,
            slowness=self.slowness,
            slow=self.pace.slow,
            max_num_seqs=max_num_seqs,
            forecast=forecast,
        )


class WorkerViews:
    """The views of all workers, by id."""

    def __init__(self, max_num_seqs: float = math.inf, slow_timeout_s: float = math.inf) -> None:
        """A worker runs at most `max_num_seqs` requests, and is unfit if it is slow for longer than
        `slow_timeout_s`.
        """
        self._max_num_seqs = max_num_seqs
        self._slow_timeout_s = slow_timeout_s
        self._views: dict[str, WorkerView] = {}
        self._standings = Standings()
        self._serving: set[str] = set()
        """Workers that took requests and made steps when they were last looked at."""
        self._swept_s = -math.inf
        self._replaced_by_s = -math.inf
        """Time until which a worker that died may be replaced by a new one."""

    def report(self, report: WorkerReport, now: float) -> WorkerView:
        """Take a worker's report of its requests; returns what is known of it now."""
        view = self._view(report.worker_id, now)
        view.hear(now)
        self._note_report(report.worker_id, view)
        view.reported = report.outstanding
        view.num_reported_tokens = sum(report.outstanding.values())
        view.draining = report.draining
        view.on_trial = report.on_trial
        view.token_s = report.token_s
        if report.drafts is not None:
            view.tokens_per_decode = report.drafts.tokens_per_decode
        if report.death:
            self._note_death(report.worker_id, view, report.death, now)
        self._note_pace(report.worker_id, view, report.slowness, now)
        view.running = view.known(report.outstanding)
        for request_id in (*report.outstanding, *report.finished):
            view.placed.pop(request_id, None)
        self._judge(report.worker_id, view, now)
        return view

    def ended(self, report: WorkerReport) -> list[tuple[Request, int]]:
        """Requests that a report, not yet taken, says have ended by themselves, with the output
        tokens of all their attempts."""
        if (view := self._views.get(report.worker_id)) is None:
            return []
        return [
            (request, request.num_prior_tokens + num_tokens)
            for request_id, request in view.known(report.finished).items()
            if (num_tokens := report.finished[request_id]) is not None
        ]

    def given(self, report: WorkerReport) -> dict[str, int]:
        """Output tokens that requests gave on a worker of which a report, not yet taken, says that
        they have ended there; of one that was aborted, as last reported."""
        if (view := self._views.get(report.worker_id)) is None:
            return {}
        found = {}
        for request_id, request in view.known(report.finished).items():
            num_tokens = report.finished[request_id]
            if num_tokens is None:
                num_left = view.reported.get(request_id, math.inf)
                num_most = request.max_tokens - request.num_prior_tokens
                num_tokens = int(max(0, num_most - num_left))
            found[request_id] = num_tokens
        return found

    def beat(self, worker_id: str, stall: Stall | None, now: float) -> None:
        """Hear of a worker between its reports, and of a step of its engine that seems to hang."""
        view = self._view(worker_id, now)
        view.hear(now)
        if stall and not view.stall:
            logger.warning("engine stalls", extra={"worker": worker_id, "reason": str(stall)})
        elif view.stall and not stall:
            logger.info("engine makes steps again", extra={"worker": worker_id})
        view.stall = stall
        self._judge(worker_id, view, now)

    def bury(self, worker_id: str, reason: str, now: float) -> None:
        """Note that the process of a worker has ended."""
        if (view := self._views.get(worker_id)) and not view.dead:
            self._note_death(worker_id, view, reason, now)

    def add_placed(self, worker_id: str, request: Request, now: float) -> None:
        """Count a request that was placed on a worker, until the worker reports it."""
        view = self._view(worker_id, now)
        view.placed[request.request_id] = request.without_hashes(), now
        view.num_hashed += bool(request.block_hashes)
        self._judge(worker_id, view, now)

    def sweep(self, listed: Sequence[str], now: float) -> list[str]:
        """If it is time to, look which workers are silent, and forget those that Serve does not
        list; returns the ids of those that are forgotten."""
        if now - self._swept_s < SWEEP_S:
            return []
        self._swept_s = now
        for worker_id, view in self._views.items():
            view.forget_late(now)
            self._judge(worker_id, view, now)
        gone = [
            worker_id
            for worker_id in self._views.keys() - set(listed)
            if self._views[worker_id].is_silent(now)
        ]
        for worker_id in gone:
            del self._views[worker_id]
            self._standings.set(worker_id, 0)
            self._serving.discard(worker_id)
        for worker_id in self._views.keys() & set(listed):
            if self._views[worker_id].is_silent(now):
                self._note_silence(worker_id, self._views[worker_id])
        return gone

    def best(self, worker_ids: Sequence[str], kept: str | None) -> Sequence[str]:
        """The workers that are no worse than others whatever is to be placed, at least two if there
        are two; one may be kept for a trial."""
        return self._standings.best(worker_ids, kept)

    def num_closed(self, worker_ids: Sequence[str], kept: str | None) -> int:
        """How many of these workers take nothing."""
        return self._standings.num_closed(worker_ids, kept)

    def loads_of(
        self,
        worker_ids: Iterable[str],
        forecasts: Mapping[str, Forecast],
        kept: str | None,
        now: float,
    ) -> list[WorkerLoad]:
        """The loads of workers that Serve believes to be alive; one may be kept for a trial."""
        return [
            self._view(worker_id, now).load(
                worker_id,
                worker_id == kept,
                self._max_num_seqs,
                now,
                forecasts.get(worker_id),
            )
            for worker_id in worker_ids
        ]

    def loads_and_ages(self, kept: str | None, now: float) -> list[tuple[WorkerLoad, float]]:
        """The loads of all workers, and the age of each one's last report or beat in seconds."""
        return [
            (view.load(worker_id, worker_id == kept, self._max_num_seqs, now), now - view.heard_s)
            for worker_id, view in sorted(self._views.items())
            if not view.is_gone(now)
        ]

    def num_hashed(self, now: float) -> dict[str, int]:
        """Requests with full blocks that were placed on each worker that reports."""
        return {
            worker_id: view.num_hashed
            for worker_id, view in self._views.items()
            if view.has_reported and view.is_serving(now)
        }

    def losses(self, attempts: Mapping[str, str], now: float) -> dict[str, WorkerError]:
        """Which attempts at requests, each with its worker, are to be made elsewhere, and why.

        Those on a worker that is dead, or silent while another one serves, and those that their
        worker does not know of.
        """
        found: dict[str, WorkerError] = {}
        for request_id, worker_id in attempts.items():
            if error := self._loss(request_id, worker_id, now):
                found[request_id] = error
        return found

    def others_serve(self, worker_id: str, now: float) -> bool:
        """Whether another worker than this one takes requests and makes steps."""
        return any(
            other_id != worker_id and self._views[other_id].is_serving(now)
            for other_id in self._serving
        )

    def knows(self, worker_id: str) -> bool:
        """Whether a worker of this id has been heard or mentioned."""
        return worker_id in self._views

    def num_serving(self, now: float) -> int:
        """Workers that have reported, take requests and make steps."""
        return sum(view.has_reported and view.is_serving(now) for view in self._views.values())

    def waiting(self, now: float) -> list[tuple[WorkerLoad, list[Request]]]:
        """The loads of the workers that serve, with those of their requests, as far as they are
        known, that have no token yet."""
        return [
            (view.load(worker_id, False, self._max_num_seqs, now), view.waiting())
            for worker_id, view in self._views.items()
            if view.is_serving(now)
        ]

    def is_one_to_come(self, worker_ids: Iterable[str], now: float) -> bool:
        """Whether a worker that died is still to be replaced, or one of these stalls."""
        return now < self._replaced_by_s or any(
            self._views[worker_id].stall for worker_id in worker_ids
        )

    def _view(self, worker_id: str, now: float) -> WorkerView:
        return self._views.setdefault(worker_id, WorkerView(now))

    def _judge(self, worker_id: str, view: WorkerView, now: float) -> None:
        """Note how a worker stands, of which something has changed or may have."""
        self._standings.set(worker_id, view.standing(self._max_num_seqs, now))
        if view.is_serving(now):
            self._serving.add(worker_id)
        else:
            self._serving.discard(worker_id)

    def _others(self, worker_id: str) -> list[WorkerView]:
        return [view for other_id, view in self._views.items() if other_id != worker_id]

    def _loss(self, request_id: str, worker_id: str, now: float) -> WorkerError | None:
        if (view := self._views.get(worker_id)) is None or not view.has_reported:
            return None
        if view.dead:
            return EngineDead(f"the engine of worker {worker_id} is dead")
        if view.is_silent(now):
            if not self.others_serve(worker_id, now):
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

    def _note_report(self, worker_id: str, view: WorkerView) -> None:
        """Log the first report of a worker, and the first after a silence."""
        if not view.has_reported:
            self._replaced_by_s = -math.inf
            logger.info("worker found", extra={"worker": worker_id})
        elif view.silence_noted:
            logger.info("worker heard again", extra={"worker": worker_id})
        view.has_reported, view.silence_noted = True, False

    def _note_death(self, worker_id: str, view: WorkerView, reason: str, now: float) -> None:
        """Place nothing more on a worker, whose late reports change nothing."""
        view.dead = True
        self._judge(worker_id, view, now)
        self._replaced_by_s = now + MAX_REPLACEMENT_S
        logger.warning("worker is dead", extra={"worker": worker_id, "reason": reason})

    def _note_pace(self, worker_id: str, view: WorkerView, slowness: float, now: float) -> None:
        """Log, once, that a worker is slow, and have it replaced if that lasts.

        Only one at a time, and only while another one works at its usual pace.
        """
        view.slowness = slowness
        if slowness <= USUAL and not view.pace.slow:
            view.pace.observe(slowness, (), now)
            return
        others = [
            other for other in self._others(worker_id) if not (other.dead or other.is_silent(now))
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

    def _note_silence(self, worker_id: str, view: WorkerView) -> None:
        """Log, once, that a worker that Serve believes to be alive is silent."""
        if not view.silence_noted:
            view.silence_noted = True
            logger.warning(
                "worker is silent; does it hang?",
                extra={"worker": worker_id, "silent_s": SILENT_AFTER_S},
            )
