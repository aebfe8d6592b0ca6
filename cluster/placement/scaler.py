"""How many workers and draft workers there should be, from all that is known of them."""

import logging
import math

from cluster.placement.worker_views import WorkerViews
from scheduler.output_length import OutputLengths
from scheduler.placement import WorkerLoad
from scheduler.request import Request
from scheduler.scaling import (
    DraftScaling,
    Scaling,
    ScalingDecision,
    ScalingObservation,
    ScalingSettings,
)
from workers.reports import TargetCounts

logger = logging.getLogger(__name__)

DECIDE_S = 1.0
"""Period of the decisions, if reports come as often."""


class Scaler:
    """The numbers of workers and draft workers that are wanted; its state is soft."""

    def __init__(
        self,
        lengths: OutputLengths,
        workers: ScalingSettings | None,
        draft_workers: ScalingSettings | None,
    ) -> None:
        """Without settings others decide on a number."""
        self._lengths = lengths
        self._scaling = Scaling(workers) if workers else None
        self._draft_scaling = DraftScaling(draft_workers) if draft_workers else None
        self._decided_s = self._drafts_decided_s = -math.inf
        self._offered_s = 0.0
        """Work that was offered since the last decision."""
        self._ended = TargetCounts()
        """Requests that ended since then."""
        self._counts: dict[str, TargetCounts] = {}
        """What each worker has counted, by its id."""
        self.decision: ScalingDecision | None = None
        """The latest about the workers."""
        self.num_draft_workers_wanted: int | None = None

    @property
    def num_workers_wanted(self) -> int | None:
        """None while nothing is decided."""
        return self.decision.num_wanted if self.decision else None

    def offer(self, request: Request, load: WorkerLoad) -> None:
        """Count the work of a request that was placed on a worker with this load."""
        if self._scaling and load.token_s is not None:
            num_tokens = request.num_prefill_tokens + self._num_decodes(request, load)
            self._offered_s += num_tokens * load.token_s * load.slowness

    def note_targets(self, worker_id: str, counts: TargetCounts) -> None:
        """Take how many requests a worker has counted since its start."""
        before = self._counts.get(worker_id, counts)
        self._counts[worker_id] = counts
        self._ended += counts - before

    def decide(self, workers: WorkerViews, now: float) -> ScalingDecision | None:
        """Decide on the number of workers, at most once in `DECIDE_S`; a decision that changes
        it, if there is one."""
        if self._scaling is None or now - self._decided_s < DECIDE_S:
            return None
        self._decided_s = now
        self._counts = {id_: n for id_, n in self._counts.items() if workers.knows(id_)}
        before = self.num_workers_wanted
        queue_s, wait_s = self._queue(workers, now)
        self.decision = self._scaling.wanted(
            ScalingObservation(
                self._offered_s,
                workers.num_serving(now),
                queue_s,
                wait_s,
                self._ended.num_judged,
                self._ended.num_met,
            ),
            now,
        )
        self._offered_s, self._ended = 0.0, TargetCounts()
        if self.decision is None:
            return None
        if self.decision.num_wanted == (before or self.decision.num_ready):
            return None
        logger.info("other number of workers wanted", extra={"decision": str(self.decision)})
        return self.decision

    def decide_drafts(self, busy_shares: list[float], now: float) -> None:
        """Decide on the number of draft workers, by the share of its time that each is busy."""
        if self._draft_scaling is None or now - self._drafts_decided_s < DECIDE_S:
            return
        self._drafts_decided_s = now
        before = self.num_draft_workers_wanted
        self.num_draft_workers_wanted = wanted = self._draft_scaling.wanted(busy_shares, now)
        if before not in (None, wanted):
            busy = [round(share, 2) for share in busy_shares]
            extra = {"wanted": wanted, "busy_shares": busy}
            logger.info("other number of draft workers wanted", extra=extra)

    def _queue(self, workers: WorkerViews, now: float) -> tuple[float, float]:
        """Work of the requests without a token, and in which time the most urgent is to have it.

        Where all slots are taken, they wait until others have ended, for about as long as they take
        themselves.
        """
        queue_s, wait_s = 0.0, math.inf
        for load, waiting in workers.waiting(now):
            is_full = load.num_requests > load.max_num_seqs
            for request in waiting:
                num_tokens: float = request.num_prefill_tokens
                if is_full:
                    num_tokens += self._num_decodes(request, load)
                queue_s += num_tokens * (load.token_s or 0.0) * load.slowness
                wait_s = min(wait_s, request.slo.ttft_s)
        return queue_s, wait_s

    def _num_decodes(self, request: Request, load: WorkerLoad) -> float:
        num_output_tokens = self._lengths.predict(request).mean - request.num_prior_tokens
        return num_output_tokens / load.tokens_per_decode
