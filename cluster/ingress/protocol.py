"""What an ingress exchanges with its clients."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

from scheduler.scaling import ScalingDecision
from workers.reports import DraftWorkerStatus, WorkerStatus

Api = Literal["chat", "completion"]


class Names(NamedTuple):
    """Names of what a call may carry in addition to the request itself."""

    call_id: str
    """Id of the call, by default one that Serve makes; the answer repeats it, and vLLM makes it a
    part of the requests' ids."""
    traceparent: str
    slo_class: str
    ttft_ms: str
    tpot_ms: str


HEADERS = Names("x-request-id", "traceparent", "x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms")
"""Headers of an HTTP request."""

PARAMETERS = Names("request_id", "traceparent", "slo_class", "slo_ttft_ms", "slo_tpot_ms")
"""Parameters of a call of the client handle."""


TENANT = "tenant"
"""Parameter by which a client handle, which is trusted, says for whom it calls."""


class Chunk(msgspec.Struct, array_like=True):
    """A piece of a streamed answer: the JSON of an OpenAI chunk."""

    call_id: str
    data: str


@dataclass(frozen=True, slots=True)
class AppStatus:
    """The app as an ingress sees it."""

    model: str
    workers: list[WorkerStatus]
    num_live_requests: int
    """Requests in flight at this ingress."""
    draft_workers: list[DraftWorkerStatus]
    is_serving: bool = True
    """Whether a request would find a worker now, as `/health` says; otherwise it waits for one."""
    scaling: ScalingDecision | None = None
    """How many workers are wanted, and why; None if that is not decided here."""
