"""Where the last tokens of a context occurred before: the matches that a suffix tree would find."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

ORDERS = (8, 4, 2, 1)
"""Lengths of the suffixes that are looked up, the longest first; matches are then compared token by
token to their full length."""
MAX_MATCHES = 16
"""Of each suffix the latest places are kept, so many to twice as many."""
MAX_MATCH_LEN = 32


class Match(NamedTuple):
    """A place that the context's last `length` tokens precede."""

    length: int
    token_ids: list[int]
    """The sequence it is in."""
    end: int
    """Index in it of what came next."""


class SuffixIndex:
    """Sequences of tokens that grow, and every place of each of their suffixes of a few lengths.

    A hash table of n-grams in place of a tree: a token costs the same wherever it is, a sequence
    can be taken out again, and the longest matches are the same. Beyond `max_tokens` the sequences
    that have not grown for longest are dropped.
    """

    def __init__(self, max_tokens: int) -> None:
        self.num_tokens = 0
        self._max_tokens = max_tokens
        self._sequences: OrderedDict[Hashable, list[int]] = OrderedDict()
        self._places: dict[tuple[int, ...], list[tuple[Hashable, int]]] = {}
        self._num_indexed: dict[Hashable, int] = {}
        """Of each sequence that has grown since, the tokens whose places are known."""

    def extend(self, key: Hashable, token_ids: Sequence[int]) -> None:
        """Append tokens to the sequence `key`, which begins if there is none.

        What matches before can go on with them at once; that they match themselves is left to
        `catch_up`, so that who is waited for need not wait for that too.
        """
        sequence = self._sequences.setdefault(key, [])
        self._sequences.move_to_end(key)
        self._num_indexed.setdefault(key, len(sequence))
        sequence += token_ids
        self.num_tokens += len(token_ids)

    def catch_up(self) -> None:
        """Find the places of all that has come, and drop what is too much."""
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
        while self.num_tokens > self._max_tokens and len(self._sequences) > 1:
            self.drop(next(iter(self._sequences)))

    def drop(self, key: Hashable) -> None:
        """Forget a sequence; an unknown one is ignored."""
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

    def matches(self, context: Sequence[int], but: Hashable = None) -> list[Match]:
        """The latest places that the longest indexed suffix of `context` precedes, latest first.

        Those in the sequence `but` are left out.
        """
        for order in ORDERS:
            if order > len(context):
                continue
            places = self._places.get(tuple(context[-order:]), ())
            found = []
            for key, end in reversed(places[-MAX_MATCHES - 1 :]):
                sequence = self._sequences[key]
                if key != but and end < len(sequence):
                    length = _common_suffix(context, sequence, end, order)
                    found.append(Match(length, sequence, end))
            if found:
                return found
        return []


def _common_suffix(context: Sequence[int], sequence: list[int], end: int, known: int) -> int:
    """How many of the last tokens of `context` precede `end`, at most MAX_MATCH_LEN."""
    most = min(len(context), end, MAX_MATCH_LEN)
    length = known
    while length < most and context[-1 - length] == sequence[end - 1 - length]:
        length += 1
    return length
