"""Drafts from what was written before: by the request itself, and by all others of the cluster."""

import heapq
from dataclasses import dataclass

from workers.drafters.drafter import ContextKey, Draft, HiddenStates
from workers.drafters.suffix_index import MAX_MATCH_LEN, MAX_MATCHES, Match, SuffixIndex

MAX_NODES = 24
"""Guesses for one request. The worker verifies one path of them; those beside it are of use when
the request has taken another turn before its next drafts come."""
MAX_BRANCHES = 2
MIN_PROB = 0.02
"""Of a path: below it no guess is worth its way."""
MAX_BEHIND = 64
"""Additions that wait to be learnt; with more, even drafts wait for them."""
NO_MATCH = 1.0
"""Weight of what was never seen, beside the squares of the lengths of the matches."""


@dataclass(slots=True)
class _Context:
    token_ids: list[int]
    num_prompt_tokens: int
    own: SuffixIndex


class SuffixDrafter:
    """A `Drafter` without a model, after G. Oliaro et al., "SuffixDecoding" (2024).

    What follows the longest matches of a request's last tokens, in its own prompt and output and in
    the outputs of all requests seen lately, is what it guesses; a guess's chance is its share of
    the matches, each weighted by the square of its length.
    """

    hidden_size = 0

    def __init__(self, max_tokens: int) -> None:
        """Remember the last `max_tokens` tokens of output, about 0.6 KB each."""
        self._memory = SuffixIndex(max_tokens)
        self._contexts: dict[ContextKey, _Context] = {}
        self._changed: dict[ContextKey, None] = {}
        self._behind: list[SuffixIndex] = []
        """Indexes that have tokens to find the places of."""

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        """Take in tokens. What comes first for a request is its prompt, and is not remembered."""
        context = self._contexts.get(key)
        if position == 0 or context is None:
            self._memory.drop(key)
            own = SuffixIndex(1 << 62)
            own.extend(0, token_ids)
            own.catch_up()
            self._contexts[key] = _Context(list(token_ids), len(token_ids), own)
        else:
            context.token_ids += token_ids
            context.own.extend(0, token_ids)
            self._memory.extend(key, token_ids)
            self._behind += [context.own, self._memory]
        self._changed[key] = None

    def learn(self, token_ids: list[int]) -> None:
        """Remember an output that another draft worker has seen."""
        self._memory.extend(object(), token_ids)
        self._behind.append(self._memory)

    def forget(self, key: ContextKey) -> None:
        """The request has ended; its output is remembered."""
        self._contexts.pop(key, None)
        self._changed.pop(key, None)

    def has_work(self) -> bool:
        """Whether anything has come since the last step."""
        return bool(self._changed or self._behind)

    def step(self) -> dict[ContextKey, Draft]:
        """Drafts for all contexts that have changed; if there are none, learn what has come."""
        if not self._changed or len(self._behind) > MAX_BEHIND:
            for index in self._behind:
                index.catch_up()
            self._behind.clear()
        drafts = {key: self._draft(key, self._contexts[key]) for key in self._changed}
        self._changed.clear()
        return drafts

    def shutdown(self) -> None:
        """Nothing to release."""

    def _draft(self, key: ContextKey, context: _Context) -> Draft:
        tail = context.token_ids[-MAX_MATCH_LEN:]
        matches = context.own.matches(tail) + self._memory.matches(tail, but=key)
        matches.sort(key=lambda match: -match.length)
        return grow_tree(len(context.token_ids), matches[:MAX_MATCHES])


def grow_tree(position: int, matches: list[Match]) -> Draft:
    """The tree of the likeliest continuations, the likeliest node first."""
    token_ids: list[int] = []
    parents: list[int] = []
    probs: list[float] = []
    # Leaves by the chance of the path to them, each with the matches that agree with the path.
    leaves: list[tuple[float, int, int, list[Match]]] = [(-1.0, -1, 0, matches)]
    while leaves and len(token_ids) < MAX_NODES:
        chance, node, depth, agreeing = heapq.heappop(leaves)
        room = min(MAX_BRANCHES, MAX_NODES - len(token_ids))
        for token, prob, followers in _guesses(agreeing, depth)[:room]:
            if -chance * prob >= MIN_PROB:
                token_ids.append(token)
                parents.append(node)
                probs.append(prob)
                leaf = (chance * prob, len(token_ids) - 1, depth + 1, followers)
                heapq.heappush(leaves, leaf)
    return Draft(position, tuple(token_ids), tuple(parents), tuple(probs))


def _guesses(matches: list[Match], depth: int) -> list[tuple[int, float, list[Match]]]:
    """What `matches` say comes `depth` tokens on: token, chance and those that say so."""
    votes: dict[int, list[Match]] = {}
    for match in matches:
        if match.end + depth < len(match.token_ids):
            votes.setdefault(match.token_ids[match.end + depth], []).append(match)
    weights = {
        token: sum((match.length + depth) ** 2 for match in voters)
        for token, voters in votes.items()
    }
    total = sum(weights.values()) + NO_MATCH
    guesses = []
    for token, voters in votes.items():
        longest = voters[0].length + depth  # they come sorted
        prob = weights[token] / total * (1 - 0.5 / longest)
        guesses.append((token, prob, voters))
    guesses.sort(key=lambda guess: -guess[1])
    return guesses
