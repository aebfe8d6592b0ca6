"""What placement knows of the workers' queues and prefix caches, between their reports."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from scheduler.placement import WorkerLoad
from scheduler.prefill_queue import Forecast, PrefillQueue, QueueReport
from scheduler.prefix_index import PrefixDelta, PrefixIndex, block_size_of
from scheduler.request import Request

NUM_CACHED = 8
"""Workers with the most of a prompt in their caches, of which one may be chosen."""
NUM_SHORT = 8
"""Workers with the shortest queues, of which one may be chosen."""


class Fleet:
    """The queues and prefix caches of all workers.

    The GlobalScheduler and the simulator each keep one, which they tell of each report and of each
    placement, and ask for forecasts.
    """

    def __init__(self, index: PrefixIndex | None = None) -> None:
        self.index = index or PrefixIndex()
        self._queues: dict[str, PrefillQueue] = {}
        self._seconds: dict[str, float] = {}
        """How long each queue is, by worker."""
        self._ranked: list[tuple[float, str]] = []
        """The same, the shortest first: a placement need not look at a thousand."""
        self._uncomputed: dict[str, dict[str, Request]] = {}
        """Requests by worker that were placed on it and have no token yet, as far as is known."""

    def report(
        self,
        worker_id: str,
        queue: QueueReport,
        known: Collection[str],
        prefix: PrefixDelta | None,
        now: float,
    ) -> bool:
        """Take a worker's report; `known` are the requests it has or had, `prefix` what has changed
        in its cache. False if it is to send a snapshot of that."""
        view = self._queue(worker_id, now)
        view.report(queue, known, now)
        self._rank(worker_id, view.seconds)
        uncomputed = self._uncomputed[worker_id]
        for request_id in list(uncomputed):
            if request_id not in queue.prefills and not view.expects(request_id):
                self.index.settle(worker_id, uncomputed.pop(request_id))
        return prefix is None or self.index.apply(worker_id, prefix)

    def place(self, worker_id: str, request: Request, now: float) -> None:
        """Note that a request was placed on a worker."""
        cached = self.num_cached_tokens(request, [worker_id])
        view = self._queue(worker_id, now)
        view.add(request, cached.get(worker_id, 0), now)
        self._rank(worker_id, view.seconds)
        self._uncomputed[worker_id][request.request_id] = request
        self.index.expect(worker_id, request)

    def forget(self, worker_id: str) -> None:
        """Forget a worker that is gone."""
        self._queues.pop(worker_id, None)
        self._unrank(worker_id)
        self._uncomputed.pop(worker_id, None)
        self.index.forget(worker_id)

    def forecasts(
        self, request: Request, worker_ids: Sequence[str], now: float
    ) -> dict[str, Forecast]:
        """What is predicted for a request on the workers that may be the best ones for it."""
        cached = self.num_cached_tokens(request, worker_ids)
        return {
            worker_id: self._queue(worker_id, now).forecast(request, cached.get(worker_id, 0), now)
            for worker_id in self._shortlist(worker_ids, cached)
        }

    def loads_for(
        self, request: Request, loads: Sequence[WorkerLoad], now: float
    ) -> list[WorkerLoad]:
        """Those of the loads that may be the best ones for a request, with their forecasts."""
        forecasts = self.forecasts(request, [load.worker_id for load in loads], now)
        return [
            replace(load, forecast=forecasts[load.worker_id])
            for load in loads
            if load.worker_id in forecasts
        ]

    def num_cached_tokens(self, request: Request, worker_ids: Collection[str]) -> dict[str, int]:
        """Tokens of a prompt that each of these workers has cached, if it has any."""
        if not request.block_hashes:
            return {}
        size = block_size_of(request.prefix_format)
        blocks = self.index.match(request.block_hashes, worker_ids, request.prefix_format)
        return {worker_id: num_blocks * size for worker_id, num_blocks in blocks.items()}

    def num_queued_tokens(self, worker_id: str) -> tuple[int, int]:
        """Tokens that a worker has still to prefill, and tokens of requests that it holds."""
        queue = self._queues.get(worker_id)
        return (queue.num_new_tokens, queue.num_tokens) if queue else (0, 0)

    def _shortlist(self, worker_ids: Sequence[str], cached: Mapping[str, int]) -> Sequence[str]:
        if len(worker_ids) <= NUM_CACHED + NUM_SHORT:
            return worker_ids
        wanted = set(worker_ids)
        for unknown in wanted - self._seconds.keys():
            self._rank(unknown, 0.0)
        by_queue = islice((one for _, one in self._ranked if one in wanted), NUM_SHORT)
        by_cache = heapq.nlargest(NUM_CACHED, cached, cached.__getitem__)
        return list(dict.fromkeys((*by_cache, *by_queue)))

    def _rank(self, worker_id: str, seconds: float) -> None:
        self._unrank(worker_id)
        self._seconds[worker_id] = seconds
        insort(self._ranked, (seconds, worker_id))

    def _unrank(self, worker_id: str) -> None:
        if (seconds := self._seconds.pop(worker_id, None)) is not None:
            del self._ranked[bisect_left(self._ranked, (seconds, worker_id))]

    def _queue(self, worker_id: str, now: float) -> PrefillQueue:
        if worker_id not in self._queues:
            self._queues[worker_id] = PrefillQueue(now)
            self._uncomputed[worker_id] = {}
        return self._queues[worker_id]
