"""Which worker serves a request."""

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.request import Request


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What placement knows of one worker."""

    worker_id: str
    num_outstanding_tokens: int
    """Prompt and output tokens its requests may still need."""
    num_requests: int
    draining: bool = False
    """Finishes what it has and takes nothing new."""
    tokens_per_span: float = 1.0
    """Output tokens that a decode gives in the mean: more than one where drafts are accepted."""
    silent: bool = False
    """Has not reported for long: perhaps it hangs, and its load is out of date."""


def place(request: Request, workers: Iterable[WorkerLoad]) -> str | None:
    """Choose the worker for `request`: the one with the least outstanding tokens.

    Where drafts are accepted, tokens take less time by that much, and count for less. Among equals
    the one with fewer requests wins, then the smaller id, so that the same view gives the same
    choice. A silent worker is the last resort. None when no worker takes new requests.
    """
    candidates = [worker for worker in workers if not worker.draining]
    if not candidates:
        return None
    best = min(
        candidates,
        key=lambda w: (
            w.silent,
            w.num_outstanding_tokens / w.tokens_per_span,
            w.num_requests,
            w.worker_id,
        ),
    )
    return best.worker_id
