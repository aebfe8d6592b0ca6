"""The prompts that a worker has still to compute, and when it would be through with one more."""

import heapq
import math
from bisect import insort
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.request import Request

MAX_STRETCH = 10.0
"""Cap on how much decodes are assumed to slow prefills down."""
FORGET_AFTER_S = 30.0
"""A placement not confirmed by its worker's report within this time is dropped."""


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Seconds that prompts take on a worker: by their tokens, and by the pairs of a token and one
    before it."""

    token_s: float = 0.001
    pair_s: float = 0.0
    is_measured: bool = False
    """Whether it is of this worker; otherwise it is a guess, by which nobody is refused."""

    def seconds(self, num_new_tokens: int, num_tokens: int) -> float:
        """Seconds of the last `num_new_tokens` of `num_tokens` tokens."""
        num_pairs = num_new_tokens * (num_tokens - num_new_tokens / 2)
        return self.token_s * num_new_tokens + self.pair_s * num_pairs


class QueuedPrefill(NamedTuple):
    """A request on a worker that has had no token yet."""

    num_new_tokens: int
    """Tokens that are neither computed nor cached."""
    num_tokens: int
    due_in_s: float
    """Seconds until its first token is due; infinite without a target."""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class QueueReport:
    """A worker's queue at one moment."""

    prefills: Mapping[str, QueuedPrefill] = field(default_factory=dict)
    """By request id."""
    cost: PrefillCost = PrefillCost()
    num_decodes: int = 0
    """Requests that have had their first token."""
    decode_s: float = 0.0
    """Seconds of a step with nothing but their next tokens."""
    tpot_s: float = math.inf
    """The tightest of their targets of time per token."""
    num_tokens: int = 0
    """Tokens of all its requests, cached or not."""
    num_free_kv_tokens: float = math.inf
    """Tokens for which the KV cache has room, what can be evicted included."""


class _Prefill(NamedTuple):
    """In the order in which a worker computes them."""

    priority: int
    due_s: float
    request_id: str
    seconds: float
    num_new_tokens: int
    num_tokens: int
    from_s: float
    """When it was reported or placed; it is not computed before."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted for a request if it is placed on one worker."""

    num_cached_tokens: int = 0
    """Tokens of its prompt that are in the KV cache, or will be when it is computed."""
    prefill_s: float = 0.0
    """Seconds of what is not."""
    ttft_s: float = 0.0
    """Seconds until its first token."""
    num_late: int = 0
    """Requests that miss their time to first token because of it, itself included."""
    is_late: bool = False
    """Whether it misses its own."""
    is_measured: bool = False
    """Whether these seconds come from a measured cost."""
    fits: bool = True
    """Whether the KV cache has room for it and for all that wait."""
    wait_s: float = 0.0
    """Seconds until its prefill begins."""


class PrefillQueue:
    """What is known of a worker's queue: its last report, and what was placed on it since."""

    def __init__(self, now: float) -> None:
        self._report = QueueReport()
        self._as_of_s = now
        self._prefills: list[_Prefill] = []
        self._placed: dict[str, _Prefill] = {}
        """Those that it has not reported, by request id."""
        self._expected: dict[str, int] = {}
        """Tokens that a request was expected to compute when it was placed: what it shares with one
        before it is not yet cached while both wait."""
        self._stretch = 1.0
        self.num_new_tokens = 0
        """Tokens that it has still to prefill."""
        self._num_on_time = 0
        self._on_time_s = 0.0

    def report(self, report: QueueReport, known: Collection[str], now: float) -> None:
        """Take a report of a worker on whose requests it is; `known` are all it has or had."""
        self._report, self._as_of_s = report, now
        self._stretch = _stretch(report)
        for request_id in known:
            self._placed.pop(request_id, None)
        for request_id in self._expected.keys() - self._placed.keys() - report.prefills.keys():
            del self._expected[request_id]
        for request_id, prefill in list(self._placed.items()):
            if now - prefill.from_s > FORGET_AFTER_S:
                del self._placed[request_id]
        queued = [
            self._prefill(
                request_id,
                one.priority,
                now + one.due_in_s,
                min(one.num_new_tokens, self._expected.get(request_id, one.num_new_tokens)),
                one.num_tokens,
                now,
            )
            for request_id, one in report.prefills.items()
        ]
        self._prefills = sorted([*queued, *self._placed.values()])
        self._recount()

    def add(self, request: Request, num_cached_tokens: int, now: float) -> None:
        """Note that a request was placed on the worker."""
        prefill = self._prefill_of(request, num_cached_tokens, now)
        self._placed[request.request_id] = prefill
        self._expected[request.request_id] = prefill.num_new_tokens
        insort(self._prefills, prefill)
        self._recount()

    def forecast(self, request: Request, num_cached_tokens: int, now: float) -> Forecast:
        """What would become of a request, of which so many tokens are in the KV cache."""
        own = self._prefill_of(request, num_cached_tokens, now)
        prefills = self._prefills.copy()
        insort(prefills, own)
        num_on_time, late, end_s = self._run(prefills, own)
        report = self._report
        num_requests = report.num_decodes + len(self._prefills)
        decode_s = report.decode_s * max(1.0, num_requests / max(1, report.num_decodes))
        return Forecast(
            num_cached_tokens=num_cached_tokens,
            prefill_s=own.seconds,
            ttft_s=end_s - now + decode_s,  # a step is in flight, and the next one has decodes
            num_late=self._num_on_time + 1 - num_on_time,
            is_late=late,
            is_measured=report.cost.is_measured,
            wait_s=max(0.0, end_s - now - own.seconds * self._stretch),
            fits=self.num_new_tokens + own.num_new_tokens <= report.num_free_kv_tokens,
        )

    def expects(self, request_id: str) -> bool:
        """Whether a request was placed on the worker that it has not reported."""
        return request_id in self._placed

    @property
    def num_tokens(self) -> int:
        """Tokens of all its requests, cached or not."""
        return self._report.num_tokens + sum(one.num_tokens for one in self._placed.values())

    @property
    def seconds(self) -> float:
        """Seconds of the prefills that can be on time."""
        return self._on_time_s

    def _prefill_of(self, request: Request, num_cached_tokens: int, now: float) -> _Prefill:
        num_tokens = request.num_prefill_tokens
        num_new_tokens = max(1, num_tokens - num_cached_tokens)
        due_s = now + request.slo.ttft_s
        return self._prefill(
            request.request_id, request.priority, due_s, num_new_tokens, num_tokens, now
        )

    def _prefill(
        self,
        request_id: str,
        priority: int,
        due_s: float,
        num_new_tokens: int,
        num_tokens: int,
        from_s: float,
    ) -> _Prefill:
        seconds = self._report.cost.seconds(num_new_tokens, num_tokens)
        return _Prefill(priority, due_s, request_id, seconds, num_new_tokens, num_tokens, from_s)

    def _recount(self) -> None:
        self.num_new_tokens = sum(prefill.num_new_tokens for prefill in self._prefills)
        self._num_on_time, _, end_s = self._run(self._prefills)
        self._on_time_s = end_s - self._as_of_s

    def _run(
        self, prefills: list[_Prefill], own: _Prefill | None = None
    ) -> tuple[int, bool, float]:
        """How many prefills are on time, whether `own` is not, and when it ends; without it, when
        those on time would end if they were computed without a pause.

        As a worker's step scheduler does: by deadline, and whenever one would be late, the longest
        so far is put off until those that can be on time are done.
        """
        taken: list[tuple[int, float, str]] = []
        stretch, end_s, own_end_s = self._stretch, self._as_of_s, math.nan
        put_off_s, is_late = 0.0, False
        for prefill in prefills:
            seconds = prefill.seconds * stretch
            if max(self._as_of_s, prefill.from_s) + seconds > prefill.due_s:  # not even alone
                put_off_s += seconds
                is_late = is_late or prefill is own
                continue
            end_s = max(end_s, prefill.from_s)  # what is before it may be over
            heapq.heappush(taken, (-prefill.priority, -seconds, prefill.request_id))
            end_s += seconds
            if end_s > prefill.due_s:
                _, longest_s, request_id = heapq.heappop(taken)
                end_s += longest_s
                put_off_s -= longest_s
                if own is not None and request_id == own.request_id:
                    is_late = True
            if prefill is own:
                own_end_s = end_s
        if own is None:
            return len(taken), False, self._as_of_s - sum(seconds for _, seconds, _ in taken)
        if is_late:
            own_end_s = end_s + put_off_s
        return len(taken), is_late, own_end_s


def _stretch(report: QueueReport) -> float:
    """How much decodes slow prefills down, which get the part of each step that they leave."""
    if not report.decode_s or report.tpot_s == math.inf:
        return 1.0
    left = 1.0 - report.decode_s / report.tpot_s
    return min(1.0 / left, MAX_STRETCH) if left > 0 else MAX_STRETCH
