"""Drafts from earlier text: the request's own, and the outputs of all requests of the cluster."""

import heapq
from dataclasses import dataclass

from typing_extensions import override

from workers.drafters.drafter import ContextKey, Draft, Drafter, HiddenStates
from workers.drafters.suffix_index import MAX_MATCH_LEN, MAX_MATCHES, Match, SuffixIndex

MAX_NODES = 24
"""Max guesses for one request. The worker verifies one path of them; other branches help if the
request has taken one of them before its next drafts arrive."""
MAX_BRANCHES = 2
"""Max guesses after one node: the third likeliest is rarely right and shortens the path."""
MIN_PROB = 0.02
"""Minimum path probability; less likely guesses are not sent."""
MAX_BEHIND = 64
"""Max additions waiting to be indexed; with more, indexing goes before drafting."""
UNSEEN_WEIGHT = 1.0
"""Weight of all tokens that followed no match; a match weighs the square of its length."""
CHANCE_MATCH = 0.5
"""Fraction by which a guess from a match of one token is less likely than its share of the matches:
short matches are often chance. For a match of n tokens it is an nth of this."""


@dataclass(slots=True)
class _SuffixContext:
    """A request with an index of its own tokens."""

    token_ids: list[int]
    num_prompt_tokens: int
    own: SuffixIndex


class SuffixDrafter(Drafter):
    """A `Drafter` without a model, after G. Oliaro et al., "SuffixDecoding" (2024).

    It looks up the longest matches of a request's last tokens, in its own prompt and output and in
    the recent outputs of all requests, and guesses what followed them. A guess's probability is its
    share of the matches, weighted by the squares of their lengths.
    """

    hidden_size = vocab_size = 0

    def __init__(self, max_tokens: int) -> None:
        """Remember the last `max_tokens` tokens of output, at about 0.6 kB each."""
        self._memory = SuffixIndex(max_tokens)
        self._contexts: dict[ContextKey, _SuffixContext] = {}
        self._changed: dict[ContextKey, None] = {}
        self._behind: list[SuffixIndex] = []
        """Indexes with tokens that are not indexed yet."""

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        """Append tokens. The first ones of a request are its prompt, which is not remembered."""
        context = self._contexts.get(key)
        if position == 0 or context is None:
            self._memory.drop(key)
            own = SuffixIndex()
            own.extend(0, token_ids)
            own.catch_up()
            self._contexts[key] = _SuffixContext(list(token_ids), len(token_ids), own)
        else:
            context.token_ids += token_ids
            context.own.extend(0, token_ids)
            self._memory.extend(key, token_ids)
            self._behind += [context.own, self._memory]
        self._changed[key] = None

    @override
    def learn(self, token_ids: list[int]) -> None:
        self._memory.extend(object(), token_ids)
        self._behind.append(self._memory)

    def forget(self, key: ContextKey) -> None:
        """Drop a request that has ended; its output is still remembered."""
        self._contexts.pop(key, None)
        self._changed.pop(key, None)

    @override
    def has_work(self) -> bool:
        return bool(self._changed or self._behind)

    def step(self) -> dict[ContextKey, Draft]:
        """Drafts for all requests that have changed; if there are none, index new tokens."""
        if not self._changed or len(self._behind) > MAX_BEHIND:
            for index in self._behind:
                index.catch_up()
            self._behind.clear()
        drafts = {key: self._draft(key, self._contexts[key]) for key in self._changed}
        self._changed.clear()
        return drafts

    @override
    def shutdown(self) -> None:
        pass

    def _draft(self, key: ContextKey, context: _SuffixContext) -> Draft:
        tail = context.token_ids[-MAX_MATCH_LEN:]
        matches = context.own.matches(tail) + self._memory.matches(tail, exclude=key)
        matches.sort(key=lambda match: -match.length)
        return grow_tree(len(context.token_ids), matches[:MAX_MATCHES])


def grow_tree(position: int, matches: list[Match]) -> Draft:
    """Tree of the likeliest continuations."""
    token_ids: list[int] = []
    parents: list[int] = []
    probs: list[float] = []
    # A heap of leaves by the negated probability of their path, with the matches that agree.
    leaves: list[tuple[float, int, int, list[Match]]] = [(-1.0, -1, 0, matches)]
    while leaves and len(token_ids) < MAX_NODES:
        negated_prob, node, depth, agreeing = heapq.heappop(leaves)
        room = min(MAX_BRANCHES, MAX_NODES - len(token_ids))
        for token, prob, followers in _guesses(agreeing, depth)[:room]:
            if -negated_prob * prob >= MIN_PROB:
                token_ids.append(token)
                parents.append(node)
                probs.append(prob)
                leaf = (negated_prob * prob, len(token_ids) - 1, depth + 1, followers)
                heapq.heappush(leaves, leaf)
    return Draft(position, tuple(token_ids), tuple(parents), tuple(probs))


def _guesses(matches: list[Match], depth: int) -> list[tuple[int, float, list[Match]]]:
    """Guesses at the token `depth` after the context: token, probability, matches that agree."""
    votes: dict[int, list[Match]] = {}
    for match in matches:
        if match.end + depth < len(match.token_ids):
            votes.setdefault(match.token_ids[match.end + depth], []).append(match)
    weights = {
        token: sum((match.length + depth) ** 2 for match in voters)
        for token, voters in votes.items()
    }
    total = sum(weights.values()) + UNSEEN_WEIGHT
    guesses = []
    for token, voters in votes.items():
        longest = voters[0].length + depth  # matches are sorted by length
        prob = weights[token] / total * (1 - CHANCE_MATCH / longest)
        guesses.append((token, prob, voters))
    guesses.sort(key=lambda guess: -guess[1])
    return guesses
