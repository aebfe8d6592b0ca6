import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.drafters.suffix_index import MAX_MATCH_LEN, MAX_MATCHES, ORDERS, Match, SuffixIndex

LARGE = 10**6

Extension = tuple[str, list[int]]
TOKENS = st.lists(st.integers(0, 2), max_size=12)
EXTENSIONS = st.lists(st.tuples(st.sampled_from("abc"), TOKENS), max_size=8)


@dataclasses.dataclass
class PlainIndex:
    """The obvious twin: every place there is, in the order of coming, each compared at lookup."""

    sequences: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    places: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def extend(self, key: str, token_ids: list[int]) -> None:
        for token in token_ids:
            self.sequences.setdefault(key, []).append(token)
            self.places.append((key, len(self.sequences[key])))

    def drop(self, key: str) -> None:
        self.sequences.pop(key, None)
        self.places = [place for place in self.places if place[0] != key]

    def matches(self, context: list[int], exclude: str | None) -> list[Match]:
        for order in ORDERS:
            # One more than are given: the latest place is often the end of the context itself.
            places = [place for place in self.places if self._common(context, *place) >= order]
            found = [
                Match(min(self._common(context, key, end), MAX_MATCH_LEN), self.sequences[key], end)
                for key, end in reversed(places[-MAX_MATCHES - 1 :])
                if key != exclude and end < len(self.sequences[key])
            ]
            if found:
                return found
        return []

    def _common(self, context: list[int], key: str, end: int) -> int:
        before = self.sequences[key][:end]
        lengths = range(min(len(context), end), -1, -1)
        return next(n for n in lengths if not n or context[-n:] == before[-n:])


def built(extensions: list[Extension], max_tokens: int = LARGE) -> SuffixIndex:
    index = SuffixIndex(max_tokens)
    for key, token_ids in extensions:
        grow(index, key, token_ids)
    return index


def grow(index: SuffixIndex, key: str, token_ids: list[int]) -> None:
    index.extend(key, token_ids)
    index.catch_up()


def places(index: SuffixIndex) -> set[tuple[object, int]]:
    """All places that it keeps, of suffixes of any length."""
    return {place for of_gram in index._places.values() for place in of_gram}


@given(extensions=EXTENSIONS, context=TOKENS, exclude=st.sampled_from([None, "a"]))
@settings(deadline=None)
def test_matches_are_those_of_a_plain_search(
    extensions: list[Extension], context: list[int], exclude: str | None
) -> None:
    index, plain = built(extensions), PlainIndex()
    for key, token_ids in extensions:
        plain.extend(key, token_ids)

    assert index.matches(context, exclude) == plain.matches(context, exclude)


@given(
    extensions=st.lists(st.tuples(st.sampled_from("abc"), TOKENS), max_size=3),
    dropped=st.sampled_from("abcd"),
    more=st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 2), max_size=4)),
    context=TOKENS,
)
@settings(deadline=None)
def test_after_a_drop_matches_are_those_of_a_plain_search(
    extensions: list[Extension], dropped: str, more: Extension, context: list[int]
) -> None:
    index, plain = built(extensions), PlainIndex()
    for key, token_ids in extensions:
        plain.extend(key, token_ids)
    for either in (index, plain):
        either.drop(dropped)
        either.extend(*more)
    index.catch_up()

    # So many places that none was left out for later ones.
    assert len(plain.places) <= 2 * MAX_MATCHES + 8
    assert index.matches(context, None) == plain.matches(context, None)


@given(
    period=st.integers(1, 5),
    length=st.integers(0, 100),
    context_len=st.integers(0, 2 * MAX_MATCHES),
)
@settings(deadline=None)
def test_of_a_long_repetition_the_latest_places_are_found(
    period: int, length: int, context_len: int
) -> None:
    tokens = [position % period for position in range(length)]
    index, plain = built([("a", tokens)]), PlainIndex()
    plain.extend("a", tokens)
    context = tokens[-context_len:]

    assert index.matches(context) == plain.matches(context, None)


@given(extensions=EXTENSIONS, context=TOKENS)
@settings(deadline=None)
def test_a_match_says_where_the_end_of_the_context_came_before(
    extensions: list[Extension], context: list[int]
) -> None:
    for length, token_ids, end in built(extensions).matches(context):
        assert length
        assert context[-length:] == token_ids[end - length : end]
        assert end < len(token_ids)


@pytest.mark.parametrize("common", [1, 3, 7, 8, 9, MAX_MATCH_LEN - 1, MAX_MATCH_LEN])
def test_a_match_has_the_length_of_what_is_common(common: int) -> None:
    sequence = [100, *range(common), 101]

    assert built([("a", sequence)]).matches([102, *range(common)]) == [
        Match(common, sequence, 1 + common)
    ]


def test_a_match_is_followed_to_a_bounded_length() -> None:
    sequence = list(range(3 * MAX_MATCH_LEN))

    assert built([("a", sequence)]).matches(sequence[:-1]) == [
        Match(MAX_MATCH_LEN, sequence, len(sequence) - 1)
    ]


def test_the_latest_match_comes_first_whatever_sequence_it_is_in() -> None:
    index = built([("a", [1, 2]), ("b", [1, 3]), ("a", [1, 4]), ("b", [5])])

    assert [(match.end, match.token_ids) for match in index.matches([1])] == [
        (3, [1, 2, 1, 4]),
        (1, [1, 3, 5]),
        (1, [1, 2, 1, 4]),
    ]


def test_a_place_that_nothing_follows_is_no_match_until_something_does() -> None:
    index = built([("a", [1, 2])])
    before = index.matches([1, 2])
    index.extend("a", [3])

    assert (before, index.matches([1, 2])) == ([], [Match(2, [1, 2, 3], 2)])


def test_new_tokens_extend_old_matches_at_once_and_begin_new_ones_after_a_catch_up() -> None:
    index = built([("a", [1, 2, 3])])
    index.extend("a", [4, 5])
    before = [index.matches([1, 2]), index.matches([4])]
    index.catch_up()

    tokens = [1, 2, 3, 4, 5]
    assert before == [[Match(2, tokens, 2)], []]
    assert index.matches([4]) == [Match(1, tokens, 4)]


def test_a_sequence_is_dropped_with_what_is_not_indexed_yet() -> None:
    index = built([("a", [1, 2])])
    index.extend("a", [3, 4])
    index.extend("b", [5])
    index.drop("a")
    index.catch_up()

    assert (index.num_tokens, places(index)) == (1, {("b", 1)})


def test_matches_in_an_excluded_sequence_are_left_out() -> None:
    index = built([("a", [1, 2, 3]), ("b", [2, 4])])

    assert index.matches([1, 2], exclude="a") == [Match(1, [2, 4], 1)]


def test_of_a_suffix_as_many_places_are_given_as_are_kept() -> None:
    sequence = [7, 8] * 100
    index = built([("a", sequence)])

    assert [match.end for match in index.matches([7])] == [
        199 - 2 * number for number in range(MAX_MATCHES + 1)
    ]
    assert max(map(len, index._places.values())) <= 2 * MAX_MATCHES


def test_dropping_an_unknown_sequence_changes_nothing() -> None:
    index = built([("a", [1, 2, 3])])
    index.drop("b")

    assert (index.num_tokens, index.matches([1])) == (3, [Match(1, [1, 2, 3], 1)])


@given(extensions=EXTENSIONS)
@settings(deadline=None)
def test_of_what_was_dropped_nothing_is_left(extensions: list[Extension]) -> None:
    index = built(extensions)
    for key in "abc":
        index.drop(key)

    assert (index.num_tokens, index._places, index._sequences) == (0, {}, {})


@given(extensions=EXTENSIONS, max_tokens=st.integers(1, 20))
@settings(deadline=None)
def test_beyond_its_tokens_it_keeps_nothing_but_one_sequence_that_is_longer(
    extensions: list[Extension], max_tokens: int
) -> None:
    index = SuffixIndex(max_tokens)
    for key, token_ids in extensions:
        grow(index, key, token_ids)

        lengths = {of: len(sequence) for of, sequence in index._sequences.items()}
        assert index.num_tokens == sum(lengths.values())
        assert index.num_tokens <= max_tokens or lengths == {key: index.num_tokens}
        assert places(index) <= {(of, n + 1) for of in lengths for n in range(lengths[of])}


def test_the_sequences_that_have_not_grown_for_longest_are_dropped_first() -> None:
    index = built([("a", [1] * 4), ("b", [2] * 4), ("a", [1]), ("c", [3] * 4)], max_tokens=10)

    assert (index.num_tokens, places(index)) == (
        9,
        {("a", n) for n in range(1, 6)} | {("c", n) for n in range(1, 5)},
    )
