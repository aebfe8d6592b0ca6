"""The ledger of requests on an engine: what vLLM does not keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from scheduler.request import Request, RequestState
from workers.engine_request import Progress

if TYPE_CHECKING:  # its tests need not import vLLM
    from vllm.v1.request import Request as VllmRequest

LOOKUP_STEPS = 16
"""Steps between prefix-cache look-ups for a waiting request."""
MAX_LOOKUPS = 8
"""Max look-ups in one step: first ones, and as many repeated ones."""


@dataclass(slots=True)
class RequestNotes:
    """What is noted of one request, in addition to what vLLM keeps."""

    state: RequestState
    num_delivered: int = 0
    """Output tokens that have arrived; async scheduling has more in flight."""
    draft_chances: tuple[float, ...] = ()
    """Chances of the drafts at hand."""
    looked_up: int | None = None
    """Step of the last look-up of its prefix while it waits."""
    num_cached: int = 0
    """Tokens found by that look-up."""


class LiveRequests:
    """The notes on each request from its arrival to its end, by its id.

    A state that it returns never changes afterwards, so that views can be kept.
    """

    def __init__(self) -> None:
        self._notes: dict[str, RequestNotes] = {}
        self._ended_tokens: dict[str, int] = {}
        """Undelivered output tokens of requests that ended since the last delivery."""

    def __len__(self) -> int:
        return len(self._notes)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._notes

    def __getitem__(self, request_id: str) -> RequestNotes:
        return self._notes[request_id]

    def add(self, state: RequestState) -> None:
        """Add a request that has arrived."""
        self._notes[state.request.request_id] = RequestNotes(state, state.num_output_tokens)

    def run(self, request: VllmRequest, now: float) -> RequestState:
        """The state of a running request."""
        notes = self._renewed(request)
        notes.looked_up, notes.num_cached = None, 0
        return _update(notes, request, request.num_computed_tokens, now)

    def wait(self, request: VllmRequest, now: float) -> RequestState:
        """The state of a waiting request."""
        notes = self._renewed(request)
        num_computed = request.num_computed_tokens or notes.num_cached
        state = notes.state
        is_unchanged = (
            state.num_computed_tokens == num_computed
            and state.num_output_tokens == request.num_output_tokens
            and not state.draft_chances
        )
        return state if is_unchanged else _update(notes, request, num_computed, now)

    def peek(self, request: VllmRequest) -> RequestState:
        """The state of a request that runs or waits, of which nothing is noted."""
        notes = self._notes[request.request_id]
        state = notes.state
        if request.num_prompt_tokens != state.request.num_prompt_tokens:
            state = initial_state(request, state.request, None)
        return RequestState(
            state.request,
            state.arrival_s,
            request.num_output_tokens + request.num_output_placeholders,
            request.num_computed_tokens or notes.num_cached,
            state.first_token_s,
            state.last_token_s,
        )

    def look_up(
        self, requests: Iterable[VllmRequest], step: int, prefix_hit: Callable[[VllmRequest], int]
    ) -> None:
        """Note how much of waiting requests is in the prefix cache, where a look-up is due."""
        num_left = {True: MAX_LOOKUPS, False: MAX_LOOKUPS}  # first ones and repeated ones
        for request in requests:
            notes = self._notes[request.request_id]
            is_first = notes.looked_up is None
            is_due = notes.looked_up is None or step - notes.looked_up >= LOOKUP_STEPS
            if request.num_computed_tokens == 0 and is_due and num_left[is_first]:
                num_left[is_first] -= 1
                notes.looked_up = step
                notes.num_cached = prefix_hit(request)

    def deliver(self, requests: Iterable[VllmRequest], now: float) -> dict[str, int]:
        """Note that the output of a step with `requests` has arrived.

        Returns its output tokens by request, those that ended with it included.
        """
        num_new_tokens, self._ended_tokens = self._ended_tokens, {}
        for request in requests:
            if notes := self._notes.get(request.request_id):
                num_new_tokens[request.request_id] = _deliver(notes, request, now)
        return num_new_tokens

    def finish(self, request: VllmRequest) -> None:
        """Drop a request that has ended."""
        notes = self._notes.pop(request.request_id, None)
        if notes and request.num_output_tokens > notes.num_delivered:
            num_new_tokens = request.num_output_tokens - notes.num_delivered
            self._ended_tokens[request.request_id] = num_new_tokens

    def _renewed(self, request: VllmRequest) -> RequestNotes:
        notes = self._notes[request.request_id]
        # The next turn of a streaming-input session comes under the same id.
        if request.num_prompt_tokens != notes.state.request.num_prompt_tokens:
            notes.state = initial_state(request, notes.state.request, None)
            notes.num_delivered = 0
        return notes


def _update(
    notes: RequestNotes, request: VllmRequest, num_computed: int, now: float
) -> RequestState:
    state = notes.state
    # Placeholders are tokens that steps in flight are sampling.
    num_output = request.num_output_tokens + request.num_output_placeholders
    first_token_s, last_token_s = state.first_token_s, state.last_token_s
    if num_output and not notes.num_delivered:
        first_token_s = last_token_s = now
    notes.state = RequestState(
        state.request,
        state.arrival_s,
        num_output,
        num_computed,
        first_token_s,
        last_token_s,
        notes.draft_chances[: len(request.spec_token_ids)],
    )
    return notes.state


def _deliver(notes: RequestNotes, request: VllmRequest, now: float) -> int:
    num_new_tokens = request.num_output_tokens - notes.num_delivered
    if num_new_tokens > 0:
        state = notes.state
        first_token_s = state.first_token_s if notes.num_delivered else now
        notes.state = RequestState(
            state.request,
            state.arrival_s,
            state.num_output_tokens,
            state.num_computed_tokens,
            first_token_s,
            now,
        )
        notes.num_delivered = request.num_output_tokens
    return num_new_tokens


def initial_state(
    request: VllmRequest, ours: Request | None, progress: Progress | None
) -> RequestState:
    """The state of a request that has just arrived; `ours` is None if only vLLM knows it."""
    if ours is None:
        ours = Request(request.request_id, 0, 0, request.priority)
    lengths = request.num_prompt_tokens, request.max_tokens
    if (ours.num_prompt_tokens, ours.max_tokens) != lengths:  # e.g. a session's next turn
        num_prompt_tokens, max_tokens = lengths
        ours = replace(ours, num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens)
    # Times were noted by another process, maybe on another machine, by the wall clock. With nothing
    # between the two readings here, requests that come soon after one another keep their order.
    now, wall_clock_s = time.monotonic(), time.time()

    def here(then_s: float) -> float:
        return now - max(wall_clock_s - then_s, 0.0)

    state = RequestState(ours, here(request.arrival_time))
    if progress:
        state.num_output_tokens = len(progress.output_token_ids)
        state.first_token_s = here(progress.first_token_s)
        state.last_token_s = here(progress.last_token_s)
    return state
