"""Arrivals of requests, and how a workload is cut, scaled and given targets.

arrivals = read_trace("azure_2023_conv.csv")
arrivals = with_slo(scale_rate(first_seconds(arrivals, 600), 2.0), Slo(0.5, 0.05))
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from scheduler.request import Request, Slo


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it arrives."""

    request: Request
    arrival_s: float
    """Seconds since the trace began; if `after` is set, since that request ended."""
    num_output_tokens: int
    """Tokens that it generates until it ends; hidden from schedulers."""
    hash_ids: tuple[int, ...] = ()
    """One id for each block of the prompt; equal ids mean equal tokens up to the block's end."""
    hash_block_size: int = 0
    """Tokens in a block of `hash_ids`; 0 if nothing is known about prefixes."""
    after: str | None = None
    """Id of the request that has to end first."""


def scale_rate(arrivals: Iterable[Arrival], rate: float) -> list[Arrival]:
    """The arrivals at `rate` times their rate; delays within a session are kept.

    ValueError if `rate` is not positive.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate ({rate}) must be positive")
    return [
        arrival if arrival.after else replace(arrival, arrival_s=arrival.arrival_s / rate)
        for arrival in arrivals
    ]


def first_requests(arrivals: Sequence[Arrival], count: int) -> list[Arrival]:
    """The first `count` arrivals, in the order of the list."""
    return _without_orphans(arrivals[:count])


def first_seconds(arrivals: Iterable[Arrival], duration_s: float) -> list[Arrival]:
    """The arrivals of the first `duration_s` seconds, with all calls that follow one of them."""
    listed = list(arrivals)
    begin_s = min((a.arrival_s for a in listed if a.after is None), default=0.0)
    return _without_orphans([a for a in listed if a.after or a.arrival_s < begin_s + duration_s])


def with_slo(arrivals: Iterable[Arrival], slo: Slo | Callable[[Arrival], Slo]) -> list[Arrival]:
    """The arrivals with targets: the same for all, or what a function returns for each."""
    return [
        replace(a, request=replace(a.request, slo=slo(a) if callable(slo) else slo))
        for a in arrivals
    ]


def with_max_tokens(arrivals: Iterable[Arrival], max_tokens: int) -> list[Arrival]:
    """The arrivals with `max_tokens`, or with the length of their own output if that is longer.

    As read, a request's `max_tokens` is exactly its output, which no live client knows in advance.
    """
    return [
        replace(a, request=replace(a.request, max_tokens=max(max_tokens, a.num_output_tokens)))
        for a in arrivals
    ]


def clip_lengths(arrivals: Iterable[Arrival], max_model_len: int) -> list[Arrival]:
    """Cut prompts, then outputs, to at most `max_model_len` tokens together."""
    if max_model_len < 2:
        raise ValueError(f"max_model_len ({max_model_len}) must be at least 2")
    clipped = []
    for arrival in arrivals:
        num_prompt = min(arrival.request.num_prompt_tokens, max_model_len - 1)
        left = max_model_len - num_prompt
        request = replace(
            arrival.request,
            num_prompt_tokens=num_prompt,
            max_tokens=min(arrival.request.max_tokens, left),
        )
        hash_ids = arrival.hash_ids
        if arrival.hash_block_size:
            hash_ids = hash_ids[: -(-num_prompt // arrival.hash_block_size)]
        num_output = min(arrival.num_output_tokens, left)
        clipped.append(
            replace(arrival, request=request, num_output_tokens=num_output, hash_ids=hash_ids)
        )
    return clipped


def _without_orphans(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """The arrivals without calls that follow a request which is left out."""
    known: set[str] = set()
    kept = []
    for arrival in arrivals:
        if arrival.after is None or arrival.after in known:
            known.add(arrival.request.request_id)
            kept.append(arrival)
    return kept
