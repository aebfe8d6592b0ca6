"""The ledger of requests on an engine: what vLLM does not keep of them."""

import time
from dataclasses import dataclass, field, replace

from vllm.v1.request import Request as VllmRequest

from scheduler.request import Request, RequestState


@dataclass(slots=True)
class _Live:
    """A request on the engine: what vLLM does not keep of it."""

    state: RequestState
    num_delivered: int = 0
    """Output tokens that have come; under async scheduling more are on their way."""
    draft_chances: tuple[float, ...] = ()
    """Of the drafts at hand."""
    hidden_states: list[bytes] = field(default_factory=list)
    """Of each token that was computed since the draft worker was told last."""
    has_begun: bool = False
    """Whether a step has computed some of it."""
    looked_up: int | None = None
    """Step of the last look-up of its prefix since it waits."""
    num_cached: int = 0
    """What the look-up found."""

    def run(self, request: VllmRequest, now: float) -> RequestState:
        """Its state as it runs. A new object each time: views are kept."""
        self._renew(request, now)
        self.looked_up, self.num_cached = None, 0
        return self._update(request, request.num_computed_tokens, now)

    def wait(self, request: VllmRequest, now: float) -> RequestState:
        """Its state as it waits."""
        self._renew(request, now)
        num_computed = request.num_computed_tokens or self.num_cached
        state = self.state
        unchanged = (
            state.num_computed_tokens == num_computed
            and state.num_output_tokens == request.num_output_tokens
            and not state.draft_chances
        )
        return state if unchanged else self._update(request, num_computed, now)

    def deliver(self, num_output_tokens: int, now: float) -> int:
        """Note that there are so many output tokens now; how many of them are new."""
        num_new_tokens = num_output_tokens - self.num_delivered
        if num_new_tokens > 0:
            state = self.state
            first_token_s = state.first_token_s if self.num_delivered else now
            self.state = _moved(
                state, state.num_output_tokens, state.num_computed_tokens, first_token_s, now
            )
            self.num_delivered = num_output_tokens
        return num_new_tokens

    def _renew(self, request: VllmRequest, now: float) -> None:
        # The next turn of a streaming-input session comes under the same id.
        if request.num_prompt_tokens != self.state.request.num_prompt_tokens:
            self.state = _initial_state(request, self.state.request, now)
            self.num_delivered = 0

    def _update(self, request: VllmRequest, num_computed: int, now: float) -> RequestState:
        state = self.state
        # Placeholders are tokens that steps in flight are sampling.
        num_output = request.num_output_tokens + request.num_output_placeholders
        first_token_s, last_token_s = state.first_token_s, state.last_token_s
        if num_output and not self.num_delivered:
            first_token_s = last_token_s = now
        self.state = _moved(state, num_output, num_computed, first_token_s, last_token_s)
        self.state.draft_chances = self.draft_chances[: len(request.spec_token_ids)]
        return self.state


def _moved(
    state: RequestState,
    num_output_tokens: int,
    num_computed_tokens: int,
    first_token_s: float,
    last_token_s: float,
) -> RequestState:
    return RequestState(
        state.request,
        state.arrival_s,
        num_output_tokens,
        num_computed_tokens,
        first_token_s,
        last_token_s,
    )


def _initial_state(request: VllmRequest, ours: Request | None, now: float) -> RequestState:
    """The state of a request that has just come; `ours` is None if only vLLM knows of it."""
    if ours is None:
        ours = Request(request.request_id, 0, 0, request.priority)
    lengths = request.num_prompt_tokens, request.max_tokens
    if (ours.num_prompt_tokens, ours.max_tokens) != lengths:  # e.g. a session's next turn
        num_prompt_tokens, max_tokens = lengths
        ours = replace(ours, num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens)
    # Its arrival was noted by another process, maybe on another machine, by the wall clock.
    age_s = max(time.time() - request.arrival_time, 0.0)
    return RequestState(ours, now - age_s)


MAX_HIDDEN_STATES = 256
"""The hidden states of so many of a request's last tokens go to the draft worker at most."""
