"""What an ingress and the client handle exchange."""

from dataclasses import dataclass
from typing import Literal

import msgspec

from workers.reports import DraftWorkerStatus, WorkerStatus

Api = Literal["chat", "completion"]


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
    """Of this ingress."""
    draft_workers: list[DraftWorkerStatus]
