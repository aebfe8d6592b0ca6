"""Timelines of workers and draft workers: as a Chrome trace, and how well drafting is hidden."""

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workers.timeline import Span

NUM_REQUESTS = 64
"""Requests with tracks of their own: the first ones seen. More would be too many to view."""

Timelines = Mapping[str, Sequence[Span]]
"""Spans by process name: `worker ID` or `draft worker ID`."""


def chrome_trace(timelines: Timelines) -> str:
    """Convert timelines to JSON for ui.perfetto.dev and chrome://tracing.

    There is a track for each process, and two for each request: its part in the workers' steps, and
    its drafts. They show what was drafted while which tokens were computed.
    """
    spans = sorted(
        ((span, process) for process, own in timelines.items() for span in own),
        key=lambda pair: pair[0].began_s,
    )
    start_s = spans[0][0].began_s if spans else 0.0
    processes = sorted(timelines, key=lambda process: (is_draft_worker(process), process))
    tracks = {process: (index, 0) for index, process in enumerate(processes, start=1)}
    events = [_name("process_name", track, process) for process, track in tracks.items()]
    for span, process in spans:
        args = dict(span.of_requests)
        events.append(_event(span, start_s, tracks[process], _process_label(span), args))
    return json.dumps({"traceEvents": events + _request_events(spans, start_s, len(tracks) + 1)})


def hidden_share(draft_spans: Iterable[Span], worker_spans: Iterable[Span]) -> float:
    """Fraction of the drafting time in which a worker computed a step; NaN if nothing was drafted.

    In the rest of that time no worker computed: it was idle or waited for drafts.
    """
    busy = _union(worker_spans)
    starts = [began_s for began_s, _ in busy]
    drafting_s = hidden_s = 0.0
    for span in draft_spans:
        drafting_s += span.ended_s - span.began_s
        first = max(0, bisect_right(starts, span.began_s) - 1)
        for began_s, ended_s in busy[first : bisect_right(starts, span.ended_s)]:
            hidden_s += max(0.0, min(ended_s, span.ended_s) - max(began_s, span.began_s))
    return hidden_s / drafting_s if drafting_s else float("nan")


def split(timelines: Timelines) -> tuple[list[Span], list[Span]]:
    """The spans of all workers, and the spans of all draft workers."""
    worker_spans: list[Span] = []
    draft_spans: list[Span] = []
    for process, spans in timelines.items():
        (draft_spans if is_draft_worker(process) else worker_spans).extend(spans)
    return worker_spans, draft_spans


def is_draft_worker(process: str) -> bool:
    """Whether a process is a draft worker, by its name."""
    return process.startswith("draft worker ")


def _union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The union of the spans' times, as disjoint intervals in order."""
    union: list[tuple[float, float]] = []
    for began_s, ended_s in sorted((span.began_s, span.ended_s) for span in spans):
        if union and began_s <= union[-1][1]:
            union[-1] = (union[-1][0], max(ended_s, union[-1][1]))
        else:
            union.append((began_s, ended_s))
    return union


def _request_events(
    spans: Sequence[tuple[Span, str]], start_s: float, pid: int
) -> list[dict[str, Any]]:
    """The events of the requests' tracks: two for each, since steps and drafting overlap."""
    seen = dict.fromkeys(request_id for span, _ in spans for request_id in span.of_requests)
    numbers = {request_id: index for index, request_id in enumerate(list(seen)[:NUM_REQUESTS])}
    events = [_name("process_name", (pid, 0), "requests")] if numbers else []
    for request_id, number in numbers.items():
        events.append(_name("thread_name", (pid, 2 * number + 1), request_id))
        events.append(_name("thread_name", (pid, 2 * number + 2), f"{request_id} drafts"))
    for span, process in spans:
        for request_id, num_tokens in span.of_requests.items():
            if (index := numbers.get(request_id)) is not None:
                track = (pid, 2 * index + 1 + is_draft_worker(process))
                label = f"{span.name}: {num_tokens}"
                events.append(_event(span, start_s, track, label, {"in": process}))
    return events


def _process_label(span: Span) -> str:
    return f"{span.name}: {sum(span.of_requests.values())}"


def _event(
    span: Span, start_s: float, track: tuple[int, int], name: str, args: dict[str, Any]
) -> dict[str, Any]:
    pid, tid = track
    return {
        "name": name,
        "ph": "X",  # a complete event: with start and duration
        "ts": round(1e6 * (span.began_s - start_s), 1),
        "dur": round(1e6 * (span.ended_s - span.began_s), 1),
        "pid": pid,
        "tid": tid,
        "args": args,
    }


def _name(kind: str, track: tuple[int, int], name: str) -> dict[str, Any]:
    pid, tid = track
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
