"""Placements as they were recorded, made again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from scheduler.admission import Admission
from scheduler.fleet import Fleet
from scheduler.placement import Placement, Refused, WorkerLoad, place
from scheduler.prefill_queue import QueueReport
from scheduler.prefix_index import PrefixDelta
from scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Began:
    """A record begins, with what decides beside the workers' reports."""

    admission: Admission | None


@dataclass(frozen=True, slots=True)
class Reported:
    """A worker has reported."""

    worker_id: str
    queue: QueueReport
    known: tuple[str, ...]
    """Requests that it has or had."""
    prefix: PrefixDelta | None
    now: float


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A worker is gone."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Decided:
    """A request was placed, refused or had to wait, by the forecasts of all that came before."""

    request: Request
    loads: tuple[WorkerLoad, ...]
    """The workers that were compared, with what was forecast for the request."""
    placement: Placement | None
    refused: Refused | None
    now: float
    wait_s: float | None = None
    """For how long it was predicted to wait for its tenant's turn; None if it had not to. This
    depends on more than what is recorded, and is not decided again."""
    is_new: bool = True
    """Whether it did not wait before."""


Event = Began | Reported | Forgotten | Decided


def replay(events: Iterable[Event]) -> Iterator[tuple[Decided, Decided]]:
    """Make each decision of a record again; yields it as it was recorded and as it is made now.

    Both are equal, to the last bit of each forecast, if the code and the record are those of then.
    """
    fleet, admission = Fleet(), None
    for event in events:
        match event:
            case Began():
                fleet, admission = Fleet(), event.admission
            case Reported(worker_id, queue, known, prefix, now):
                fleet.report(worker_id, queue, known, prefix, now)
            case Forgotten(worker_id):
                fleet.forget(worker_id)
            case Decided():
                yield event, _decide(event, fleet, admission)
                if event.placement and not event.refused and event.wait_s is None:
                    fleet.place(event.placement.chosen.worker_id, event.request, event.now)


def _decide(event: Decided, fleet: Fleet, admission: Admission | None) -> Decided:
    loads = tuple(fleet.loads_for(event.request, event.loads, event.now))
    placement = place(event.request, loads)
    refused = None
    if admission and placement and event.is_new:
        refused = admission.refusal(event.request, placement, event.wait_s or 0.0)
    return replace(event, loads=loads, placement=placement, refused=refused)
