"""The index of prefix caches against sets, whatever happens to what workers report."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.prefix_index import PrefixDelta, PrefixIndex, block_size_of, pack, unpack

FORMAT = "sha256/ab/32/model"
WORKERS = ("a", "b", "c")
CHAIN = tuple(range(8))
"""Blocks of one prompt."""


def delta(seq: int, *stored: int, removed: tuple[int, ...] = (), **others: Any) -> PrefixDelta:
    made = PrefixDelta("1", seq, FORMAT, pack(stored), pack(removed))
    return replace(made, **others)


def snapshot(seq: int, *stored: int, **others: Any) -> PrefixDelta:
    return delta(seq, *stored, snapshot=True, **others)


def match(index: PrefixIndex, *blocks: int, format: str = FORMAT) -> dict[str, int]:
    return index.match(pack(blocks), WORKERS, format)


def test_a_prefix_ends_with_the_first_block_that_a_worker_lacks() -> None:
    index = PrefixIndex()
    index.apply("a", snapshot(1, 0, 1, 2, 3))
    index.apply("b", snapshot(1, 0, 1, 3))
    index.apply("c", snapshot(1, 1, 2, 3))

    assert match(index, 0, 1, 2, 3, 4) == {"a": 4, "b": 2}
    assert match(index, 1, 2) == {"a": 2, "b": 1, "c": 2}
    assert index.match(pack([0]), ["b", "unknown"], FORMAT) == {"b": 1}
    assert match(index, 9) == match(index) == {}


def test_a_worker_of_another_format_has_nothing_and_is_counted() -> None:
    index = PrefixIndex()
    index.apply("a", snapshot(1, 0))
    index.apply("b", snapshot(1, 0, format="sha256/ab/16/model"))

    assert match(index, 0) == {"a": 1}
    assert index.num_format_mismatches == 1
    assert match(index, 0, format="other") == {}
    assert index.num_format_mismatches == 3
    assert index.formats == {FORMAT: 1, "sha256/ab/16/model": 1}
    assert [index.format_of(worker) for worker in WORKERS] == [FORMAT, "sha256/ab/16/model", ""]


@pytest.mark.parametrize(
    "strange",
    [
        delta(3, 5),
        delta(1, 5),
        delta(2, 5, incarnation="2"),
        delta(2, 5, format="other"),
        delta(3, num_joined=0),
        delta(4, 5, num_joined=2),
    ],
    ids=["gap", "again", "new life", "new format", "nothing after a gap", "joined after a gap"],
)
def test_a_delta_that_does_not_follow_is_ignored_until_a_snapshot_comes(
    strange: PrefixDelta,
) -> None:
    index = PrefixIndex()
    assert index.apply("a", snapshot(1, 0))
    assert not index.apply("a", strange)
    assert match(index, 5) == {}
    assert match(index, 0) == {"a": 1}
    assert index.apply("a", snapshot(7, 3))
    assert (match(index, 0), match(index, 3)) == ({}, {"a": 1})
    assert index.apply("a", delta(8, 4))
    assert index.apply("a", delta(8, num_joined=0))
    assert index.num_resyncs == 1


def test_a_delta_of_an_unknown_worker_wants_a_snapshot() -> None:
    index = PrefixIndex()

    assert not index.apply("a", delta(1, 0))
    assert not index.apply("a", delta(0, num_joined=0))
    assert index.apply("a", snapshot(2))


def test_a_snapshot_that_was_overtaken_brings_nothing_back() -> None:
    index = PrefixIndex()
    index.apply("a", snapshot(1, 0))
    index.apply("a", delta(2, removed=(0,)))

    assert index.apply("a", snapshot(1, 0))
    assert match(index, 0) == {}


def test_joined_deltas_are_one_that_follows() -> None:
    first, second = delta(2, 1, 2, removed=(0,)), delta(3, 0, 3, removed=(1,))
    index = PrefixIndex()
    index.apply("a", snapshot(1, 0))

    joined = first.then(second)
    assert (list(unpack(joined.stored)), list(unpack(joined.removed))) == ([2, 3], [])
    assert (joined.seq, joined.num_joined, joined.num_hashes) == (3, 2, 2)
    assert index.apply("a", joined)
    assert [match(index, block) for block in range(4)] == [{"a": 1}, {}, {"a": 1}, {"a": 1}]
    assert first.then(snapshot(9, 5)) == snapshot(9, 5)
    assert snapshot(1, 0).then(first) == snapshot(2, 1, 2, num_joined=2)
    assert first.then(first.settled()) == first
    assert first.then(delta(4, 9)) == delta(4, 9)


def test_a_format_says_how_many_tokens_a_block_has() -> None:
    formats = FORMAT, "sha256/ab/128/of/a/hub@main", "", "x/y", "a/b/c/d", "a/b/-1/d"

    assert [block_size_of(format) for format in formats] == [32, 128, 0, 0, 0, 0]


def test_hashes_that_are_none_are_an_error() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        PrefixIndex().apply("a", replace(snapshot(1), stored=b"1234567"))


def test_what_exceeds_the_bound_is_left_out_and_asked_for_when_there_is_room() -> None:
    index = PrefixIndex(100 * 164)
    num = index.max_blocks
    assert 90 < num < 110
    index.apply("a", snapshot(1, *range(1000)))
    assert (index.num_blocks_of("a"), index.num_left_out_of("a")) == (num // 2, 1000 - num // 2)
    assert match(index, *range(1000)) == {"a": num // 2}  # the beginning of the prompt

    index.apply("b", snapshot(1, *range(2000, 3000)))
    assert index.num_blocks_of("b") == num // 4  # its share of the other half
    assert index.num_blocks <= num
    assert index.num_bytes <= 100 * 164
    assert index.apply("b", delta(2, *range(20)))  # what others have takes no room
    assert match(index, *range(30)) == {"a": 30, "b": 20}

    assert index.apply("a", delta(2, removed=tuple(range(10, 1000))))
    assert index.num_left_out_of("a") == 0
    assert index.apply("a", delta(3, *range(5000, 5005)))  # nothing of it is left out
    assert index.apply("b", delta(3, removed=tuple(range(2020, 3000))))
    assert index.num_left_out_of("b") == 0


def test_a_worker_of_which_much_is_left_out_sends_a_snapshot_when_others_are_gone() -> None:
    index = PrefixIndex(400 * 164)
    index.apply("a", snapshot(1, *range(1000)))
    index.apply("b", snapshot(1, *range(2000, 2190)))
    assert index.num_left_out_of("b") > 0

    assert index.apply("b", delta(2, 1))
    index.forget("a")
    assert not index.apply("b", delta(3, 2))
    assert index.apply("b", snapshot(4, *range(2000, 2190)))
    assert index.num_left_out_of("b") == 0
    assert match(index, *range(2000, 2200)) == {"b": 190}


def test_bits_of_workers_that_are_gone_are_cleared_and_used_again() -> None:
    index = PrefixIndex()
    names = [f"w{number}" for number in range(40)]
    for number, name in enumerate(names):
        index.apply(name, snapshot(1, *range(number * 1000, number * 1000 + 2000)))
    for name in names[1:]:
        index.forget(name)
    before = index.num_blocks
    for seq in range(2, 200):
        assert index.apply("w0", delta(seq, seq % 2000))

    assert before == 41_000
    assert index.num_blocks == 2000
    for name in names[1:]:
        index.apply(name, snapshot(1, 7))
    assert len(index._names) == 40
    assert index.match(pack([7, 8]), names, FORMAT) == {"w0": 2} | dict.fromkeys(names[1:], 1)


@dataclass
class Cache:
    """A worker, what it has, and what it has sent that has not arrived."""

    held: set[int] = field(default_factory=set)
    incarnation: int = 0
    seq: int = 0
    wants_snapshot: bool = True
    under_way: list[PrefixDelta] = field(default_factory=list)

    def report(self, draw: random.Random) -> None:
        before = set(self.held)
        for block in draw.sample(CHAIN, draw.randrange(4)):
            self.held ^= {block}
        if draw.random() < 0.1:
            self.held.clear()
        if draw.random() < 0.05:
            self.held, self.seq, self.wants_snapshot = set(), 0, True
            self.incarnation += 1
        name = str(self.incarnation)
        if self.wants_snapshot:
            self.seq += 1
            made = snapshot(self.seq, *sorted(self.held), incarnation=name)
        elif before == self.held:
            made = delta(self.seq, incarnation=name, num_joined=0)
        else:
            self.seq += 1
            stored, removed = self.held - before, tuple(before - self.held)
            made = delta(self.seq, *stored, removed=removed, incarnation=name)
        self.wants_snapshot = False
        self.under_way.append(made)


@settings(max_examples=300, deadline=None)
@given(st.integers(), st.sampled_from([0.0, 0.2, 0.5]))
def test_the_index_is_what_the_workers_have_however_reports_are_lost(
    seed: int, loss: float
) -> None:
    """Lost, swapped, joined; after each that is applied the index is what it was sent as."""
    draw = random.Random(seed)
    index, caches = PrefixIndex(), {name: Cache() for name in WORKERS}
    told: dict[str, set[int]] = {name: set() for name in WORKERS}
    latest: dict[str, tuple[str, int]] = {}
    for _ in range(60):
        name = draw.choice(WORKERS)
        cache = caches[name]
        cache.report(draw)
        if len(cache.under_way) > 1 and draw.random() < 0.5:
            cache.under_way[-2:] = [cache.under_way[-2].then(cache.under_way[-1])]
        if draw.random() < loss / 4:
            draw.shuffle(cache.under_way)
        if draw.random() < 0.05:
            index.forget(name)
            told[name] = set()
            latest.pop(name, None)
        while cache.under_way and draw.random() < 0.6:
            sent = cache.under_way.pop(0)
            if draw.random() < loss:
                continue
            life, seq = latest.get(name, ("", 0))
            is_old = sent.snapshot and (life, seq) >= (sent.incarnation, sent.seq)
            if not index.apply(name, sent):
                cache.wants_snapshot = True
            elif not (is_old and life == sent.incarnation):
                base = set() if sent.snapshot else told[name]
                told[name] = (base - set(unpack(sent.removed))) | set(unpack(sent.stored))
                latest[name] = sent.incarnation, sent.seq
        check(index, told)
    for name, cache in caches.items():
        cache.under_way.clear()
        for _ in range(2):  # one that may be refused, and the snapshot
            cache.report(draw)
            cache.wants_snapshot = not index.apply(name, cache.under_way[-1])
        told[name] = cache.held
    check(index, told)


def check(index: PrefixIndex, told: dict[str, set[int]]) -> None:
    """Compare the index with the sets."""
    for start in range(len(CHAIN)):
        chain = CHAIN[start:]
        expected = {}
        for name, held in told.items():
            num = next((n for n, block in enumerate(chain) if block not in held), len(chain))
            if num:
                expected[name] = num
        assert index.match(pack(chain), WORKERS, FORMAT) == expected
    assert [index.num_blocks_of(name) for name in told] == [len(held) for held in told.values()]
