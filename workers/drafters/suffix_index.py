"""Finds earlier occurrences of the last tokens of a context, as a suffix tree would."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

ORDERS = (8, 4, 2, 1)
"""Lengths of the suffixes that are looked up, longest first; matches are then compared token by
token to their full length."""
MAX_MATCHES = 16
"""Occurrences kept per suffix: between MAX_MATCHES and twice that."""
MAX_MATCH_LEN = 32
"""Max tokens that a match is compared over: longer ones are no more certain."""


class Match(NamedTuple):
    """An earlier occurrence of the context's last `length` tokens."""

    length: int
    token_ids: list[int]
    """The sequence that contains it."""
    end: int
    """Index of the token that followed it there."""


class SuffixIndex:
    """Growing sequences of tokens, indexed by their n-grams of a few lengths.

    Compared to a suffix tree, each token costs the same wherever it is, sequences can be removed,
    and the longest matches are the same. Beyond `max_tokens`, the sequences that have not grown for
    longest are dropped.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        self.num_tokens = 0
        self._max_tokens = max_tokens
        self._sequences: OrderedDict[Hashable, list[int]] = OrderedDict()
        self._places: dict[tuple[int, ...], list[tuple[Hashable, int]]] = {}
        self._num_indexed: dict[Hashable, int] = {}
        """Tokens already indexed, per sequence that has grown since."""

    def extend(self, key: Hashable, token_ids: Sequence[int]) -> None:
        """Append tokens to the sequence `key`, creating it if there is none.

        Existing matches can continue with the new tokens at once. Matches of these tokens are found
        only after `catch_up`, so that indexing does not delay the draft being waited for.
        """
        sequence = self._sequences.setdefault(key, [])
        self._sequences.move_to_end(key)
        self._num_indexed.setdefault(key, len(sequence))
        sequence += token_ids
        self.num_tokens += len(token_ids)

    def catch_up(self) -> None:
        """Index all new tokens, then drop sequences beyond `max_tokens`."""
        for key, num_indexed in self._num_indexed.items():
            sequence = self._sequences[key]
            for end in range(num_indexed + 1, len(sequence) + 1):
                for order in ORDERS:
                    if order > end:
                        continue
                    places = self._places.setdefault(tuple(sequence[end - order : end]), [])
                    places.append((key, end))
                    if len(places) > 2 * MAX_MATCHES:
                        del places[:MAX_MATCHES]
        self._num_indexed.clear()
        while self._is_full() and len(self._sequences) > 1:
            self.drop(next(iter(self._sequences)))

    def _is_full(self) -> bool:
        return self._max_tokens is not None and self.num_tokens > self._max_tokens

    def drop(self, key: Hashable) -> None:
        """Remove a sequence; unknown keys are ignored."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        self.num_tokens -= len(sequence)
        self._num_indexed.pop(key, None)
        for order in ORDERS:
            for start in range(len(sequence) - order + 1):
                gram = tuple(sequence[start : start + order])
                kept = [place for place in self._places.get(gram, ()) if place[0] != key]
                if kept:
                    self._places[gram] = kept
                else:
                    self._places.pop(gram, None)

    def matches(self, context: Sequence[int], exclude: Hashable = None) -> list[Match]:
        """Latest occurrences of the longest indexed suffix of `context`, latest first.

        Those in the sequence `exclude` are left out.
        """
        for order in ORDERS:
            if order > len(context):
                continue
            places = self._places.get(tuple(context[-order:]), ())
            found = []
            for key, end in reversed(places[-MAX_MATCHES - 1 :]):
                sequence = self._sequences[key]
                if key != exclude and end < len(sequence):
                    length = _common_suffix(context, sequence, end, order)
                    found.append(Match(length, sequence, end))
            if found:
                return found
        return []


def _common_suffix(context: Sequence[int], sequence: list[int], end: int, known: int) -> int:
    """How many of the last tokens of `context` also precede `end`, at most MAX_MATCH_LEN."""
    max_len = min(len(context), end, MAX_MATCH_LEN)
    length = known
    while length < max_len and context[-1 - length] == sequence[end - 1 - length]:
        length += 1
    return length
