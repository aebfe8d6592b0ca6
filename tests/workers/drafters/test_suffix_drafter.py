import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.drafters.drafter import ContextKey, Draft
from workers.drafters.suffix_drafter import (
    MAX_BEHIND,
    MAX_NODES,
    MIN_PROB,
    SuffixDrafter,
    grow_tree,
)
from workers.drafters.suffix_index import Match

A, B, C = (ContextKey("worker", name) for name in "abc")
LARGE = 10**6
UNSEEN = itertools.count(10**6)
"""Tokens that occur once."""

TOKENS = st.lists(st.integers(0, 2), max_size=30)
EVENTS = st.lists(
    st.tuples(st.sampled_from([A, B, C]), st.sampled_from(["more", "again", "end"]), TOKENS),
    max_size=10,
)


def make_drafter(max_tokens: int = LARGE) -> SuffixDrafter:
    return SuffixDrafter(max_tokens)


def write(drafter: SuffixDrafter, key: ContextKey, prompt: list[int], output: list[int]) -> None:
    """A request with all of its output, which the drafter has time to learn."""
    drafter.extend(key, 0, prompt)
    drafter.extend(key, len(prompt), output)
    while drafter.has_work():
        drafter.step()


def ask(drafter: SuffixDrafter, key: ContextKey, prompt: list[int], output: list[int]) -> Draft:
    """The draft for a request that has come so far."""
    drafter.extend(key, 0, prompt)
    drafter.extend(key, len(prompt), output)
    return draft_of(drafter, key)


def draft_of(drafter: SuffixDrafter, key: ContextKey) -> Draft:
    return drafter.step()[key]


def likeliest(draft: Draft) -> list[int]:
    """The tokens along the likeliest children from the root."""
    tokens, node = [], -1
    while below := [i for i, parent in enumerate(draft.parents) if parent == node]:
        node = max(below, key=lambda i: draft.probs[i])
        tokens.append(draft.token_ids[node])
    return tokens


def apply(drafter: SuffixDrafter, events: list[tuple[ContextKey, str, list[int]]]) -> list[Draft]:
    """The drafts of each step, one after each event."""
    lengths: dict[ContextKey, int] = {}
    drafts: list[Draft] = []
    for key, event, tokens in events:
        if event == "end":
            lengths.pop(key, None)
            drafter.forget(key)
        else:
            position = lengths.get(key, 0) if event == "more" else 0
            drafter.extend(key, position, list(tokens))
            lengths[key] = position + len(tokens)
        of_step = drafter.step()
        assert {of: draft.position for of, draft in of_step.items()} == (
            {} if event == "end" else {key: lengths[key]}
        )
        drafts += of_step.values()
    return drafts


def test_a_request_repeats_its_own_prompt() -> None:
    drafter = make_drafter()
    drafter.extend(A, 0, [1, 2, 3, 4, 5, 6, 7, 1, 2, 3])

    draft = draft_of(drafter, A)

    assert draft.position == 10
    assert likeliest(draft)[:4] == [4, 5, 6, 7]


def test_a_request_repeats_its_own_output() -> None:
    drafter = make_drafter()
    write(drafter, A, [9], [1, 2, 3, 4])
    drafter.extend(A, 5, [1, 2])

    assert likeliest(draft_of(drafter, A))[:2] == [3, 4]


def test_a_repetition_may_run_into_what_has_just_come() -> None:
    drafter = make_drafter()
    write(drafter, A, [9], [1, 2])
    drafter.extend(A, 3, [3, 1])

    assert likeliest(draft_of(drafter, A)) == [2, 3, 1]


def test_a_request_repeats_the_output_of_another_on_any_worker() -> None:
    drafter = make_drafter()
    write(drafter, ContextKey("elsewhere", "a"), [9], [1, 2, 3, 4, 5])

    assert likeliest(ask(drafter, A, [8], [1, 2])) == [3, 4, 5]


def test_a_request_never_repeats_the_prompt_of_another() -> None:
    drafter = make_drafter()
    write(drafter, A, [1, 2, 3, 4, 5], [9])

    assert ask(drafter, B, [8], [1, 2]) == Draft(3, (), (), ())


def test_what_no_token_of_was_seen_before_has_no_draft() -> None:
    drafter = make_drafter()
    drafter.extend(A, 0, [1, 2, 3])

    assert drafter.step() == {A: Draft(3, (), (), ())}


def test_a_step_drafts_for_what_has_changed_since_the_last() -> None:
    drafter = make_drafter()
    drafter.extend(A, 0, [1])
    drafter.extend(B, 0, [1])
    first = drafter.step()
    idle = (drafter.has_work(), drafter.step())
    drafter.extend(B, 1, [2])

    assert (set(first), idle, drafter.has_work()) == ({A, B}, (False, {}), True)
    assert set(drafter.step()) == {B}


@pytest.mark.parametrize("num_common", [1, 2, 5, 10])
def test_a_guess_is_likelier_behind_a_longer_match(num_common: int) -> None:
    drafts = []
    for length in (num_common, num_common + 1):
        drafter = make_drafter()
        drafter.extend(A, 0, [*range(length), 100, 101, *range(length)])
        drafts.append(draft_of(drafter, A))

    assert [draft.token_ids[0] for draft in drafts] == [100, 100]
    assert drafts[0].probs[0] < drafts[1].probs[0]


def test_of_two_guesses_that_of_the_longer_match_is_likelier() -> None:
    drafter = make_drafter()
    drafter.extend(A, 0, [5, 1, 2, 10, 1, 2, 20, 5, 1, 2])

    draft = draft_of(drafter, A)

    assert draft.token_ids[:2] == (10, 20)
    assert draft.parents[:2] == (-1, -1)
    assert draft.probs[0] > draft.probs[1]


def test_of_two_guesses_the_more_frequent_is_likelier() -> None:
    drafter = make_drafter()
    drafter.extend(A, 0, [3, 1, 20, 4, 1, 10, 5, 1, 20, 6, 1])

    draft = draft_of(drafter, A)

    assert draft.token_ids[:2] == (20, 10)
    assert draft.probs[0] > draft.probs[1]


def test_a_guess_is_likelier_when_more_matches_agree() -> None:
    drafter = make_drafter()
    probs = []
    for _ in range(3):
        drafter.learn([1, 2, 3, next(UNSEEN)])
        write(drafter, A, [9], [next(UNSEEN)])
        probs.append(ask(drafter, A, [9], [1, 2]).probs[0])

    assert probs == sorted(set(probs))


def test_what_comes_further_along_a_match_is_likelier_as_behind_a_longer_one() -> None:
    drafter = make_drafter()
    drafter.extend(A, 0, [1, 2, 3, 4, 5, 1])

    probs = draft_of(drafter, A).probs

    assert probs == tuple(sorted(probs))


@given(
    matches=st.lists(
        st.builds(
            lambda length, token_ids, end: Match(length, token_ids, min(end, len(token_ids) - 1)),
            st.integers(1, 32),
            st.lists(st.integers(0, 3), min_size=1, max_size=40),
            st.integers(0, 40),
        ),
        max_size=16,
    )
)
@settings(deadline=None)
def test_whatever_matches_the_tree_is_well_formed(matches: list[Match]) -> None:
    matches.sort(key=lambda match: -match.length)

    draft = grow_tree(7, matches)

    num_nodes = len(draft.token_ids)
    path_probs = {-1: 1.0}
    for node, (parent, prob) in enumerate(zip(draft.parents, draft.probs, strict=True)):
        assert -1 <= parent < node
        assert 0 < prob <= 1
        path_probs[node] = path_probs[parent] * prob
    assert draft.position == 7
    assert len(draft.parents) == num_nodes <= MAX_NODES
    assert bool(num_nodes) == bool(matches)
    assert min(path_probs.values()) >= MIN_PROB
    siblings = list(zip(draft.parents, draft.token_ids, strict=True))
    assert len(set(siblings)) == num_nodes
    for node in path_probs:
        below = [p for p, parent in zip(draft.probs, draft.parents, strict=True) if parent == node]
        assert sum(below) <= 1


def test_a_tree_that_branches_at_its_last_node_has_no_node_more() -> None:
    common = list(range(MAX_NODES - 1))
    matches = [Match(32, [*common, turn], 0) for turn in (100, 200)]

    assert grow_tree(7, matches).token_ids == (*common, 100)


@given(events=EVENTS)
@settings(deadline=None)
def test_whatever_comes_a_draft_is_for_the_tokens_that_came(
    events: list[tuple[ContextKey, str, list[int]]],
) -> None:
    for draft in apply(make_drafter(max_tokens=40), events):
        assert len(draft.token_ids) <= MAX_NODES


@given(events=EVENTS)
@settings(deadline=None)
def test_the_same_tokens_give_the_same_drafts(
    events: list[tuple[ContextKey, str, list[int]]],
) -> None:
    assert apply(make_drafter(40), events) == apply(make_drafter(40), events)


def test_position_0_starts_a_request_again() -> None:
    drafter = make_drafter()
    write(drafter, A, [1, 2, 3], [4, 1, 2])
    write(drafter, B, [9], [next(UNSEEN)])
    drafter.extend(A, 0, [1])
    drafter.extend(B, 2, [4])

    # Neither its old prompt nor its old output is known to itself or to others.
    assert drafter.step() == {A: Draft(1, (), (), ()), B: Draft(3, (), (), ())}


def test_a_request_that_is_forgotten_leaves_its_output_to_others() -> None:
    drafter = make_drafter()
    write(drafter, A, [7, 8, 9], [1, 2, 3, 4])
    drafter.forget(A)

    assert likeliest(ask(drafter, B, [7], [8, 1, 2])) == [3, 4]


def test_a_request_that_is_forgotten_is_not_drafted_for_and_unknown_ones_are_ignored() -> None:
    drafter = make_drafter()
    drafter.extend(A, 0, [1, 2, 1])
    drafter.forget(A)
    drafter.forget(B)

    assert (drafter.has_work(), drafter.step()) == (False, {})


def test_outputs_of_long_ago_are_forgotten() -> None:
    drafter = make_drafter(max_tokens=10)
    write(drafter, A, [9], [1, 2, 3])
    write(drafter, B, [9], [next(UNSEEN) for _ in range(8)])

    assert ask(drafter, C, [8], [1, 2]) == Draft(3, (), (), ())


def test_a_prompt_of_any_length_is_repeated_whatever_the_memory_holds() -> None:
    drafter = make_drafter(max_tokens=1)
    drafter.extend(A, 0, [*range(1000), 0, 1, 2])

    assert likeliest(draft_of(drafter, A))[:3] == [3, 4, 5]


def test_a_drafter_that_starts_in_the_middle_of_a_request_repeats_all_of_it() -> None:
    drafter, restarted = make_drafter(), make_drafter()
    write(drafter, A, [9, 1, 2, 3], [4, 5])
    drafter.extend(A, 6, [1, 2])
    restarted.extend(A, 0, [9, 1, 2, 3, 4, 5, 1, 2])

    assert draft_of(restarted, A) == draft_of(drafter, A)


def test_an_output_that_another_draft_worker_has_seen_is_repeated_too() -> None:
    drafter = make_drafter()
    drafter.learn([1, 2, 3, 4])
    has_work = drafter.has_work()
    while drafter.has_work():
        assert drafter.step() == {}

    assert (has_work, likeliest(ask(drafter, A, [9], [1, 2]))) == (True, [3, 4])


def test_what_other_draft_workers_have_seen_is_forgotten_as_what_it_saw_itself() -> None:
    drafter = make_drafter(max_tokens=10)
    for tokens in ([1, 2, 3], [next(UNSEEN) for _ in range(8)]):
        drafter.learn(tokens)
    drafter.step()

    assert ask(drafter, A, [9], [1, 2]) == Draft(3, (), (), ())


def test_drafts_are_made_before_what_has_come_is_learnt() -> None:
    drafter = make_drafter()
    write(drafter, A, [9], [1, 2])
    drafter.extend(A, 3, [3])
    drafter.extend(A, 4, [1])
    drafts = [drafter.step(), drafter.step()]

    assert [list(of_step) for of_step in drafts] == [[A], []]
    assert not drafter.has_work()


def test_a_drafter_that_never_has_a_quiet_moment_learns_all_the_same() -> None:
    drafter = make_drafter()
    drafter.extend(A, 0, [9])
    for position in range(1, 1 + 2 * MAX_BEHIND):
        drafter.extend(A, position, [position % 10])
        draft = draft_of(drafter, A)

    assert draft.token_ids
    assert len(drafter._behind) <= MAX_BEHIND + 2
