"""What happened to the latest requests of an ingress, kept for `xyserve explain`."""

import math
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from scheduler.placement import Refused
from scheduler.request import Request
from workers.engine_request import Progress

MAX_RECORDS = 10_000
"""Requests and refusals that are kept, about 1 kB each and 4 bytes per output token."""
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
    """vLLM's finish reason; empty while the request is in flight."""
    error: str = ""
    refused: Refused | None = None
    """The refusal that it failed with, if it was one."""
    call_id: str = ""
    """Id of its call, which is a part of the request's own id unless the body had another."""

    def deliver(self, token_ids: Iterable[int], now: float) -> None:
        """Take new output tokens, if there are any."""
        num_before = self.num_output_tokens
        self.output_token_ids.extend(token_ids)
        if self.num_output_tokens > num_before:
            self.first_token_s = min(self.first_token_s, now)
            self.last_token_s = now

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
        """Whether it met each of its targets, and `all` of them; empty if the client left.

        A request that failed met none.
        """
        if self.outcome == "abort":
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

    @property
    def outcome(self) -> str:
        """Whose error it was: `invalid` is the client's, `unavailable` is ours."""
        return "invalid" if self.status < 500 else "unavailable"


class RequestHistory:
    """The latest requests and refusals by id."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self._records: OrderedDict[str, RequestRecord | Refusal] = OrderedDict()
        self._max_records = max_records

    def add(self, record: RequestRecord | Refusal) -> None:
        """Keep a record, and evict the oldest if there are too many."""
        key = record.call_id if isinstance(record, Refusal) else record.request.request_id
        self._records[key] = record
        self._records.move_to_end(key)
        while len(self._records) > self._max_records:
            self._records.popitem(last=False)

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
