"""What a draft worker asks of a drafter: guesses at the next tokens of others' requests."""

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
    """Guesses at the tokens of a request from `position` on, as a tree.

    Node i holds `token_ids[i]`; it follows node `parents[i] < i`, or the context if that is -1.
    `probs[i]` is the drafter's own estimate of the chance that node i is right if its parent is.
    """

    position: int
    """How many tokens of the request, prompt and output, come before the first guess."""
    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    probs: tuple[float, ...]


class Drafter(Protocol):
    """Guesses for any number of requests; used from one thread only."""

    hidden_size: int
    """Width of the hidden states that it wants with each context; 0 if it needs none."""

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        """Take in that the request's tokens from `position` on are `token_ids`.

        `position` is 0 for a new request, or one that starts again, and else the number of tokens
        known so far. `hidden_states [n, hidden_size]` are the target model's final ones (after the
        last norm) at the n tokens before the last; n can be anything from 0 on.
        """

    def learn(self, token_ids: list[int]) -> None:
        """Take in an output that another draft worker has seen, if it is of use."""

    def forget(self, key: ContextKey) -> None:
        """The request has ended; unknown keys are ignored."""

    def has_work(self) -> bool:
        """Whether `step` would find something to do."""

    def step(self) -> dict[ContextKey, Draft]:
        """Do a short piece of work, and give the drafts that are new or better than before.

        It is called again and again while there is work, and between two calls the contexts that
        have come are taken in: a step should last no longer than a fraction of the target's.
        """

    def shutdown(self) -> None:
        """Release everything."""
