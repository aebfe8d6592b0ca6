import math

import pytest

from scheduler.request import Request, Slo
from scheduler.simulation.arrivals import (
    Arrival,
    clip_lengths,
    first_requests,
    first_seconds,
    scale_rate,
    with_max_tokens,
    with_slo,
)

BLOCK = 512


def arrival(
    name: str,
    arrival_s: float = 0.0,
    num_prompt: int = 600,
    num_output: int = 20,
    *,
    after: str | None = None,
) -> Arrival:
    request = Request(name, num_prompt, num_output)
    return Arrival(
        request, arrival_s, num_output, hash_ids=(0, 1), hash_block_size=BLOCK, after=after
    )


SESSIONS = [
    arrival("a-0", 10.0),
    arrival("a-1", 2.0, after="a-0"),
    arrival("a-2", 2.0, after="a-1"),
    arrival("b-0", 40.0),
    arrival("b-1", 2.0, after="b-0"),
]


def ids(arrivals: list[Arrival]) -> list[str]:
    return [arrival.request.request_id for arrival in arrivals]


def test_a_rate_scales_the_times_but_not_the_gaps_of_sessions() -> None:
    scaled = scale_rate(SESSIONS, 4.0)

    assert [arrival.arrival_s for arrival in scaled] == [2.5, 2.0, 2.0, 10.0, 2.0]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_is_positive(rate: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        scale_rate([], rate)


def test_a_cut_keeps_no_call_without_the_one_before_it() -> None:
    assert ids(first_requests(SESSIONS, 4)) == ["a-0", "a-1", "a-2", "b-0"]
    assert first_requests(SESSIONS[1:], 2) == []


def test_seconds_count_from_the_first_arrival() -> None:
    assert ids(first_seconds(SESSIONS, 30.0)) == ["a-0", "a-1", "a-2"]
    assert first_seconds(SESSIONS, 30.1) == SESSIONS


def test_targets_are_given_to_all_or_by_a_function() -> None:
    arrivals = [arrival("short", num_prompt=100), arrival("long", num_prompt=900)]

    def by_length(arrival: Arrival) -> Slo:
        return Slo(arrival.request.num_prompt_tokens / 1000)

    assert [a.request.slo for a in with_slo(arrivals, Slo(1.0, 0.1))] == [Slo(1.0, 0.1)] * 2
    assert [a.request.slo for a in with_slo(arrivals, by_length)] == [Slo(0.1), Slo(0.9)]


@pytest.mark.parametrize(("max_tokens", "asked"), [(500, 500), (5, 20)])
def test_max_tokens_hide_how_long_outputs_get(max_tokens: int, asked: int) -> None:
    [hidden] = with_max_tokens([arrival("r", num_output=20)], max_tokens)

    assert (hidden.request.max_tokens, hidden.num_output_tokens) == (asked, 20)


@pytest.mark.parametrize(
    ("max_model_len", "num_prompt", "num_output", "hash_ids"),
    [
        (10_000, 600, 20, (0, 1)),
        (610, 600, 10, (0, 1)),
        (600, 599, 1, (0, 1)),
        (100, 99, 1, (0,)),
    ],
)
def test_long_prompts_are_clipped_and_then_outputs(
    max_model_len: int, num_prompt: int, num_output: int, hash_ids: tuple[int, ...]
) -> None:
    [clipped] = clip_lengths([arrival("r", num_prompt=600, num_output=20)], max_model_len)

    assert clipped.request.num_prompt_tokens == num_prompt
    assert clipped.request.max_tokens == clipped.num_output_tokens == num_output
    assert clipped.hash_ids == hash_ids


def test_lengths_leave_room_for_an_answer() -> None:
    with pytest.raises(ValueError, match=r"max_model_len \(1\) must be at least 2"):
        clip_lengths([], 1)
