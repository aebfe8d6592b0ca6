"""Requests under which engines died: those that wait to be tried alone, and those refused."""

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence

from scheduler.placement import RefusalReason, Refused, WorkerLoad, keep_for_trial
from scheduler.request import Request

logger = logging.getLogger(__name__)

NO_WORKER_RETRY_S = 0.5
"""Time after which a request asks again, while no worker takes it."""
SUSPECT_GONE_AFTER_S = 5 * NO_WORKER_RETRY_S
"""A request that waits for an idle worker and has not asked again for this long has gone."""
REFUSE_S = 600.0
"""Time in which requests equal to one that made engines fail are refused."""
MAX_POISONS = 1000
"""Requests that are remembered for that."""


class Suspects:
    """Requests under which an engine died, while they wait for a worker to be idle."""

    def __init__(self) -> None:
        self._asked_s: dict[str, float] = {}
        """Time of the last question, by request id."""
        self.kept: str | None = None
        """The worker that gets nothing else until it is idle and tries one of them."""

    def wait(self, request: Request, loads: Sequence[WorkerLoad], now: float) -> None:
        """Let a request wait, and a worker become idle for it unless one has a trial already."""
        self._asked_s[request.request_id] = now
        if not any(load.on_trial and load.is_serving for load in loads):
            kept = keep_for_trial(request, loads)
            self.kept = kept.worker_id if kept else None

    def end_wait(self, request_id: str) -> None:
        """A request has been placed; any may."""
        self._asked_s.pop(request_id, None)

    def forget_gone(self, now: float) -> None:
        """Forget requests that no longer ask, and take the worker kept for them back."""
        for request_id, asked_s in list(self._asked_s.items()):
            if now - asked_s > SUSPECT_GONE_AFTER_S:
                del self._asked_s[request_id]
        if not self._asked_s:
            self.kept = None


def risks_the_last_worker(
    request: Request, loads: Sequence[WorkerLoad], is_one_to_come: bool
) -> bool:
    """Whether a worker more is to come, without which this request could end the last one."""
    num_serving = sum(load.is_serving for load in loads)
    return bool(request.num_engine_deaths) and num_serving == 1 and is_one_to_come


class Poisons:
    """What was found of requests that made engines fail, by fingerprint."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, tuple[str, float]] = OrderedDict()
        """What was found, and until when equal requests are refused."""

    def add(self, fingerprint: str, found: str, now: float) -> None:
        """Refuse requests with this fingerprint for a while, because of what was found of one."""
        self._found[fingerprint] = found, now + REFUSE_S
        self._found.move_to_end(fingerprint)
        if len(self._found) > MAX_POISONS:
            self._found.popitem(last=False)
        logger.warning(
            "requests like one that made engines fail are refused",
            extra={"fingerprint": fingerprint, "found": found, "for_s": REFUSE_S},
        )

    def refusal(self, request: Request, now: float) -> Refused | None:
        """The answer to a request that is equal to one of them."""
        found, until_s = self._found.get(request.fingerprint, ("", -math.inf))
        if now >= until_s:
            return None
        return Refused(RefusalReason.POISON, math.ceil(until_s - now), found)
