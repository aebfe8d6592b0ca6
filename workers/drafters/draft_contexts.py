"""The requests that a draft worker knows, and how much of each its drafters have."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from workers.drafters.drafter import ContextKey, Drafter, HiddenStates
from workers.drafts.draft_stream import ContextDelta

MIN_MEMORY = 16
"""Tokens of the shortest output that is shared with other draft workers: shorter ones hold little
that could come again."""


@dataclass(slots=True)
class _Context:
    """One request."""

    num_prompt_tokens: int
    num_given: list[int]
    """Number of tokens that each drafter has."""
    token_ids: list[int] = field(default_factory=list)
    updated_s: float = 0.0


class DraftContexts:
    """Tokens of all requests; passes them on to the drafters while drafts are wanted."""

    def __init__(self, drafters: Mapping[str, Drafter]) -> None:
        self._drafters = drafters
        self._contexts: dict[ContextKey, _Context] = {}
        self._outputs: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._contexts)

    def fault(self, delta: ContextDelta) -> str:
        """Why a drafter could not take these tokens in, whatever came before; empty if all can."""
        for name, drafter in self._drafters.items():
            if drafter.vocab_size and max(delta.token_ids) >= drafter.vocab_size:
                return f"a token is not in the vocabulary of {name}"
            if drafter.hidden_size and len(delta.hidden_states) % _row_bytes(drafter):
                return f"hidden states have another width than those of {name}"
        return ""

    def extend(self, key: ContextKey, delta: ContextDelta, now: float) -> bool:
        """Append new tokens; if some before them are missing, forget the request: False."""
        context = self._contexts.get(key)
        if delta.position == 0 or context is None:
            context = self._contexts[key] = _Context(
                num_prompt_tokens=len(delta.token_ids), num_given=[0] * len(self._drafters)
            )
        if delta.position != len(context.token_ids):
            self.forget(key)
            return False
        context.token_ids += delta.token_ids
        context.updated_s = now
        if delta.num_wanted:  # else the drafters get these tokens with later ones
            self._give(key, context, delta.hidden_states)
        return True

    def _give(self, key: ContextKey, context: _Context, hidden_states: bytes) -> None:
        for index, drafter in enumerate(self._drafters.values()):
            num_given = context.num_given[index]
            states = _decode_states(hidden_states, drafter.hidden_size)
            drafter.extend(key, num_given, context.token_ids[num_given:], states)
            context.num_given[index] = len(context.token_ids)

    def forget(self, key: ContextKey) -> None:
        """Drop a request, but keep its output for `take_outputs`; unknown keys are ignored."""
        if (context := self._contexts.pop(key, None)) is None:
            return
        output = context.token_ids[context.num_prompt_tokens :]
        if len(output) >= MIN_MEMORY:
            self._outputs.append(output)
        for drafter in self._drafters.values():
            drafter.forget(key)

    def forget_unchanged(self, since_s: float) -> None:
        """Forget the requests that got no tokens since a time."""
        for key, context in list(self._contexts.items()):
            if context.updated_s < since_s:
                self.forget(key)

    def take_outputs(self) -> list[list[int]]:
        """Outputs of the requests forgotten since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs


def _row_bytes(drafter: Drafter) -> int:
    return drafter.hidden_size * np.dtype(np.float16).itemsize


def _decode_states(raw: bytes, hidden_size: int) -> HiddenStates | None:
    if not hidden_size or not raw:
        return None
    return np.frombuffer(raw, np.float16).reshape(-1, hidden_size)
