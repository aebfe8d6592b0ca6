"""What happened to the latest requests of an ingress, kept for `xyserve explain`."""

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from scheduler.placement import Refused
from scheduler.prefill_queue import Forecast
from scheduler.request import Request
from workers.engine_request import Progress
from workers.latest import Latest

MAX_BYTES = 32 << 20
"""Memory of the requests and refusals that are kept: those of about 15,000 usual requests."""
RECORD_BYTES, ATTEMPT_BYTES, REFUSAL_BYTES = 1000, 750, 300
"""Memory of a record, of an attempt and of a refusal, without their texts and tokens."""
MIN_QUERY = 4
"""Minimum length of a query; fewer characters would match too many ids."""


@dataclass(slots=True)
class Attempt:
    """A request's time on one worker."""

    attempt_id: str
    """The request's id on that worker."""
    began_s: float
    lost: str = ""
    """Why the attempt ended before the request did; empty if it did not."""
    forecast: Forecast | None = None
    """What was predicted when it was placed; None if nothing was."""
    placed_s: float = math.inf
    first_token_s: float = math.inf
    """When the first token of this attempt came."""
    num_cached_tokens: int | None = None
    """Tokens that its worker found in its KV cache; None before the first token."""
    queued_s: float = 0.0
    """How long it waited for its tenant's turn before it was placed."""

    @property
    def ttft_s(self) -> float:
        """Time from its placement to its first token; infinite if none has come."""
        return self.first_token_s - self.placed_s if self.first_token_s < math.inf else math.inf


@dataclass(slots=True)
class RequestRecord:
    """A request as its ingress sees it; times by the wall clock."""

    request: Request
    arrived_s: float
    attempts: list[Attempt] = field(default_factory=list)
    first_token_s: float = math.inf
    last_token_s: float = math.inf
    output_token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    """Tokens that have come, in 4 bytes each: the history keeps them."""
    outcome: str = ""
    """vLLM's finish reason, or `unread` if its client did not read the stream; empty while the
    request is in flight."""
    error: str = ""
    refused: Refused | None = None
    """The refusal that it failed with, if it was one."""
    call_id: str = ""
    """Id of its call, which is a part of the request's own id unless the body had another."""

    def deliver(
        self, token_ids: Iterable[int], now: float, num_cached_tokens: int | None = None
    ) -> None:
        """Take new output tokens, if there are any, and with the first ones how much of the prompt
        was cached."""
        num_before = self.num_output_tokens
        self.output_token_ids.extend(token_ids)
        if self.num_output_tokens > num_before:
            self.first_token_s = min(self.first_token_s, now)
            self.last_token_s = now
            for attempt in self.attempts[-1:]:
                attempt.first_token_s = min(attempt.first_token_s, now)
                if attempt.num_cached_tokens is None:
                    attempt.num_cached_tokens = num_cached_tokens

    def progress(self) -> Progress | None:
        """What a new attempt goes on behind; None if nothing has come."""
        if not self.output_token_ids:
            return None
        return Progress(tuple(self.output_token_ids), self.first_token_s, self.last_token_s)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that have come."""
        return len(self.output_token_ids)

    @property
    def ttft_s(self) -> float:
        """Time to the first token, from the arrival; infinite before it."""
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 if there is only one token."""
        if self.num_output_tokens < 2:
            return 0.0
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """Time from the arrival to the last token; infinite before the first."""
        return self.last_token_s - self.arrived_s

    def attainment(self) -> dict[str, bool]:
        """Whether it met each of its targets, and `all` of them; empty if the client left, or did
        not read.

        A request that failed met none.
        """
        if self.outcome in ("abort", "unread"):
            return {}
        slo, failed = self.request.slo, self.outcome == "error"
        met = {}
        if slo.ttft_s < math.inf:
            met["ttft"] = not failed and self.ttft_s <= slo.ttft_s
        if slo.tpot_s < math.inf:
            met["tpot"] = not failed and self.tpot_s <= slo.tpot_s
        return met | {"all": all(met.values())} if met else {}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call of the API that was answered with an error before any request was made of it."""

    call_id: str
    refused_s: float
    """Wall-clock time."""
    status: int
    message: str
    tenant: str = ""

    @property
    def outcome(self) -> str:
        """Whose error it was: `invalid` is the client's, `unavailable` is ours."""
        return "invalid" if self.status < 500 else "unavailable"


class RequestHistory:
    """The latest requests and refusals by id."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._records: Latest[RequestRecord | Refusal] = Latest(max_bytes)

    def add(self, record: RequestRecord | Refusal) -> None:
        """Keep a record, in place of the oldest if there is no room."""
        key = record.call_id if isinstance(record, Refusal) else record.request.request_id
        self._records.add(key, record, _num_bytes(record))

    def settle(self, record: RequestRecord) -> None:
        """Count what a request that has ended takes; until then its ingress needs it anyway."""
        self._records.resize(record.request.request_id, record, _num_bytes(record))

    def find(self, query: str) -> list[RequestRecord | Refusal]:
        """The records whose id contains `query`, oldest first.

        Clients know a part of a request's id: the id of their call, which is also in the answer's
        header x-request-id. A call with n=4 is four requests.
        """
        if len(query) < MIN_QUERY:
            return []
        return [
            record
            for key, record in self._records.items()
            if query in key or (isinstance(record, RequestRecord) and query in record.call_id)
        ]


def _num_bytes(record: RequestRecord | Refusal) -> int:
    """The memory that a record takes."""
    if isinstance(record, Refusal):
        return REFUSAL_BYTES + len(record.call_id) + 4 * len(record.message)
    texts = (record.call_id, record.request.traceparent, record.error)
    attempts = sum(
        ATTEMPT_BYTES + len(one.attempt_id) + 4 * len(one.lost) for one in record.attempts
    )
    tokens = record.output_token_ids.itemsize * len(record.output_token_ids)
    return RECORD_BYTES + 4 * sum(map(len, texts)) + attempts + tokens
