"""The interface of drafters, which guess the next tokens of workers' requests."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

HiddenStates = NDArray[np.float16]


class ContextKey(NamedTuple):
    """A request on one incarnation of a worker."""

    worker: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree of guesses at the tokens of a request from `position` on.

    Node i holds `token_ids[i]` and follows node `parents[i] < i`, or the context if that is -1.
    `probs[i]` is the drafter's own estimate of the probability that node i is right if its parent
    is.
    """

    position: int
    """Number of tokens of the request, prompt and output, before the first guess."""
    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    probs: tuple[float, ...]


class Drafter(Protocol):
    """Guesses for any number of requests; used from one thread only."""

    hidden_size: int
    """Width of the hidden states that it needs; 0 if it needs none."""
    vocab_size: int
    """Number of tokens that it knows, the first ones; 0 if it takes any."""

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        """Append `token_ids`, the request's tokens from `position` on.

        `position` is 0 for a request that is new or starts again, else the number of tokens known
        so far. `hidden_states [n, hidden_size]` are the target model's states after the final norm
        at the n tokens before the last one; n may be any number, 0 included.
        """

    def learn(self, token_ids: list[int]) -> None:
        """Learn from an output that another draft worker has seen."""

    def forget(self, key: ContextKey) -> None:
        """Drop a request that has ended; unknown keys are ignored."""

    def has_work(self) -> bool:
        """Whether there is something for `step` to do."""

    def step(self) -> dict[ContextKey, Draft]:
        """Do a short piece of work and return the drafts that are new or better than before.

        Called repeatedly while there is work. Messages are read between two calls, so a step should
        take only a fraction of a step of the target.
        """

    def shutdown(self) -> None:
        """Release all resources."""
