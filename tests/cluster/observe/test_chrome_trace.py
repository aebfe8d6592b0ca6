import json
import math
from typing import Any

import pytest

from cluster.observe.chrome_trace import NUM_REQUESTS, chrome_trace, hidden_share, split
from workers.timeline import Span


def span(began_s: float, ended_s: float, name: str = "step", **of_requests: int) -> Span:
    return Span(name, began_s, ended_s, of_requests)


STEPS = [span(10.0, 10.2, a=8), span(10.2, 10.3, a=1, b=3)]
DRAFTINGS = [span(10.21, 10.22, "suffix", a=4)]
TIMELINES = {"worker 1": STEPS, "draft worker 1": DRAFTINGS}


def events(timelines: dict[str, list[Span]], ph: str) -> list[dict[str, Any]]:
    return [e for e in json.loads(chrome_trace(timelines))["traceEvents"] if e["ph"] == ph]


def tracks(timelines: dict[str, list[Span]]) -> dict[str, tuple[int, int]]:
    return {e["args"]["name"]: (e["pid"], e["tid"]) for e in events(timelines, "M")}


def on(track: tuple[int, int]) -> list[tuple[str, float, float, dict[str, Any]]]:
    return [
        (e["name"], e["ts"], e["dur"], e["args"])
        for e in events(TIMELINES, "X")
        if (e["pid"], e["tid"]) == track
    ]


def test_a_process_has_a_track_with_the_tokens_of_its_requests() -> None:
    assert on(tracks(TIMELINES)["worker 1"]) == [
        ("step: 8", 0.0, 200_000.0, {"a": 8}),
        ("step: 4", 200_000.0, 100_000.0, {"a": 1, "b": 3}),
    ]
    assert on(tracks(TIMELINES)["draft worker 1"]) == [("suffix: 4", 210_000.0, 10_000.0, {"a": 4})]


def test_a_request_has_a_track_of_steps_and_one_of_drafts() -> None:
    assert on(tracks(TIMELINES)["a"]) == [
        ("step: 8", 0.0, 200_000.0, {"in": "worker 1"}),
        ("step: 1", 200_000.0, 100_000.0, {"in": "worker 1"}),
    ]
    assert on(tracks(TIMELINES)["a drafts"]) == [
        ("suffix: 4", 210_000.0, 10_000.0, {"in": "draft worker 1"})
    ]


def test_tracks_are_distinct() -> None:
    found = tracks(TIMELINES | {"worker 2": STEPS})

    assert len(set(found.values())) == len(found) == 3 + 1 + 2 * 2


def test_only_the_first_requests_have_tracks() -> None:
    steps = [span(i, i + 1, "step", **{f"r{i}": 1}) for i in range(NUM_REQUESTS + 1)]

    found = tracks({"worker 1": steps})

    assert f"r{NUM_REQUESTS - 1}" in found
    assert f"r{NUM_REQUESTS}" not in found


def test_a_trace_of_nothing_is_a_trace() -> None:
    assert json.loads(chrome_trace({})) == {"traceEvents": []}


def test_spans_are_split_by_the_kind_of_their_process() -> None:
    assert split(TIMELINES) == (STEPS, DRAFTINGS)


@pytest.mark.parametrize(
    ("steps", "draftings", "share"),
    [
        ([(0, 10)], [(2, 4)], 1.0),
        ([(0, 10)], [(8, 12)], 0.5),
        ([(0, 1), (3, 4)], [(0, 4)], 0.5),
        ([(0, 3), (2, 4), (1, 2)], [(0, 8)], 0.5),  # two workers at once count once
        ([(0, 10), (1, 2)], [(5, 6), (20, 21)], 0.5),
        ([(5, 6)], [(0, 4), (7, 8)], 0.0),
        ([], [(0, 1)], 0.0),
    ],
)
def test_drafting_is_hidden_while_a_worker_computes(
    steps: list[tuple[float, float]], draftings: list[tuple[float, float]], share: float
) -> None:
    hidden = hidden_share([span(*times) for times in draftings], [span(*t) for t in steps])

    assert hidden == pytest.approx(share)


def test_the_hidden_share_of_no_drafting_is_unknown() -> None:
    assert math.isnan(hidden_share([], [span(0, 1)]))
