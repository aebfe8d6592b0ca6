"""What is known of one request: the answer to `xyserve explain`."""

from dataclasses import dataclass

from cluster.observe.request_history import RequestRecord
from scheduler.placement import Placement
from workers.step_history import RequestStep


@dataclass(frozen=True, slots=True)
class AttemptTrace:
    """What is known of one attempt at a request."""

    placement: Placement | None
    """None if the GlobalScheduler has forgotten it, or has restarted since."""
    steps: dict[str, list[RequestStep]]
    """Steps by worker; empty if the worker that it ran on has died."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A request and the trace of each of its attempts."""

    record: RequestRecord
    attempt_traces: list[AttemptTrace]
