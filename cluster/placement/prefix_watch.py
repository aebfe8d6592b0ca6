"""Whether the workers tell what their prefix caches have, and the requests can be compared."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from scheduler.prefix_index import PrefixDelta, PrefixIndex

logger = logging.getLogger(__name__)

MAX_RESYNCS = 4
"""Workers that are asked at the same time for all that they have: a large cache takes 20 ms, in
which nothing is placed, and after a restart all are to tell it."""
RESYNC_TIMEOUT_S = 10.0
"""Time after which a worker that was asked is asked again."""
MISMATCH_S = 10.0
"""Time for which formats must differ until that is logged: an ingress learns the block size from
its first answers."""
TOLD_AFTER_REQUESTS = 20
"""Requests with full blocks after which a worker has some in its cache."""


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """What is known of the workers' prefix caches; counts are since the start."""

    num_workers: int
    """Workers whose caches are known."""
    num_untold: int
    """Workers that do not tell what theirs have."""
    num_blocks: int
    num_bytes: int
    """Memory of the index."""
    num_resyncs: int
    """Times that a worker was asked for all that it has."""
    num_format_mismatches: int
    """Workers whose blocks could not be compared with those of a request, over all requests."""


class Resyncs:
    """The workers that were asked for all that their prefix caches have, a few at a time."""

    def __init__(self) -> None:
        self._asked_s: dict[str, float] = {}
        self.num_asked = 0

    def is_to_ask(self, worker_id: str, delta: PrefixDelta | None, ok: bool, now: float) -> bool:
        """Whether to ask a worker whose report was `ok`, or lacked one before it."""
        if ok or (delta and delta.snapshot):
            self._asked_s.pop(worker_id, None)
        if ok:
            return False
        for asked, asked_s in list(self._asked_s.items()):
            if now - asked_s > RESYNC_TIMEOUT_S:
                del self._asked_s[asked]
        if worker_id in self._asked_s or len(self._asked_s) >= MAX_RESYNCS:
            return False
        self._asked_s[worker_id] = now
        self.num_asked += 1
        return True

    def forget(self, worker_id: str) -> None:
        """Wait no longer for a worker that is gone."""
        self._asked_s.pop(worker_id, None)


class FormatWatch:
    """Logs, once, that requests and workers differ in what their hashes are of."""

    def __init__(self) -> None:
        self._since_s: dict[tuple[str, str], float] = {}
        self._warned: set[tuple[str, str]] = set()

    def note(self, format: str, workers: Collection[str], now: float) -> None:
        """Note that a request's hashes have a format, and those of workers others."""
        for other in workers:
            pair = format, other
            since_s = self._since_s.setdefault(pair, now)
            if other != format and pair not in self._warned and now - since_s > MISMATCH_S:
                self._warned.add(pair)
                logger.warning(
                    "prompts cannot be placed where they are cached: the hashes of an ingress and "
                    "of a worker are of different things (function/seed/block size/model); give "
                    "all nodes the same vLLM, model, block_size and PYTHONHASHSEED",
                    extra={"ingress": format, "worker": other},
                )


def num_untold(index: PrefixIndex, num_requests: Mapping[str, int]) -> int:
    """Workers that do not tell what their caches have, of those with so many requests with full
    blocks so far: they tell nothing at all, or have told of no block when they must have some."""
    return sum(
        not index.format_of(worker_id)
        or (num > TOLD_AFTER_REQUESTS and not index.num_blocks_of(worker_id))
        for worker_id, num in num_requests.items()
    )
