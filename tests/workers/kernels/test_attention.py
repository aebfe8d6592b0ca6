from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.kernels import guarded
from workers.kernels import attention, native, reference
from workers.kernels.attention import (
    AttentionPlan,
    attend,
    plan_attention,
    unsupported,
    write_kv,
)
from workers.kernels.shapes import AttentionShape
from workers.kernels.tiles import TileCosts

pytestmark = pytest.mark.usefixtures("isa", "one_thread")

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

KV_CHUNK = native.kernels().kv_chunk

TOLERANCE = {False: 3e-6, True: 8e-3}
"""For values about 1 in size, and scores within 10, by whether the KV cache is in bf16: weights are
then rounded to eight bits."""

HEADS = [(1, 1), (3, 1), (8, 2), (7, 1), (14, 2)]
"""Query heads and KV heads: groups of 1, 3, 4 and 7."""

ATTEND_BESIDE_GUARDS = """
import numpy as np
from tests.workers.kernels.guarded import guarded
from workers.kernels import native
from workers.kernels.attention import attend, plan_attention, write_kv
from workers.kernels.shapes import AttentionShape

native.use_isa("{isa}")
for at_end in (False, True):
    def ones(*shape, dtype=np.float32):
        return guarded(np.ones(shape, dtype), at_end)

    for seq_lens in ((1,), (32, 5), (31, 33), (1, 64, 63), (300,), (64, 512)):
        shape = AttentionShape(
            num_heads=3, num_kv_heads=1, head_size=32, block_size=32, scale=0.1, sliding_window=200,
            kv_bf16={kv_bf16},
        )
        seq_lens = np.array(seq_lens, np.int32)
        query_lens = np.minimum(seq_lens, 7)
        table = guarded(np.zeros((len(seq_lens), -(-seq_lens.max() // 32)), np.int32), at_end)
        num_blocks = 0
        for row, seq_len in enumerate(seq_lens):
            blocks = -(-seq_len // 32)
            table[row, :blocks] = np.arange(num_blocks, num_blocks + blocks)
            num_blocks += blocks
        cache = ones(num_blocks, 1, 32, 64, dtype=np.uint16 if {kv_bf16} else np.float32)
        slots = guarded(np.arange(num_blocks * 32), at_end)
        write_kv(shape, cache, ones(len(slots), 1, 32), ones(len(slots), 1, 32), slots)
        plan = plan_attention(shape, np.append(0, np.cumsum(query_lens)).astype(np.int32), seq_lens)
        query = ones(query_lens.sum(), 3, 32)
        out = attend(plan, query, cache, table, ones(*query.shape))
        assert np.allclose(out, 1, rtol=1e-2 if {kv_bf16} else 1e-5)
print("untouched")
"""


DEFAULTS: dict[str, Any] = {"block_size": 32}
"""What `make_shape` leaves out."""


@pytest.fixture(autouse=True, params=[False, True], ids=["kv_float32", "kv_bf16"])
def kv_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether keys and values are kept in bf16."""
    monkeypatch.setitem(DEFAULTS, "kv_bf16", request.param)
    return bool(request.param)


def make_shape(
    num_heads: int = 3, num_kv_heads: int = 1, head_size: int = 32, **options: Any
) -> AttentionShape:
    options = {"scale": 1 / np.sqrt(head_size or 1), **DEFAULTS, **options}
    return AttentionShape(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, **options
    )


@dataclass(frozen=True)
class Request:
    """The queries, keys and values of one request's tokens, `[num_tokens, heads, head_size]`."""

    query: Array
    key: Array
    value: Array


def make_request(shape: AttentionShape, num_tokens: int, seed: int = 0) -> Request:
    """Make a request; the shorter of two of one seed is the beginning of the longer."""
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((num_tokens, num_heads, shape.head_size), dtype=np.float32)
    return Request(*np.split(tokens, [shape.num_heads, shape.num_heads + shape.num_kv_heads], 1))


@dataclass(frozen=True)
class Span:
    """The last `num_queries` of the first `seq_len` tokens of a request."""

    request: Request
    num_queries: int
    seq_len: int
    tree_mask: Mask | None = None

    @property
    def query(self) -> Array:
        return self.request.query[self.seq_len - self.num_queries : self.seq_len]


def make_spans(shape: AttentionShape, lengths: Sequence[tuple[int, int]]) -> list[Span]:
    """Make spans of the given `(num_queries, seq_len)`, each of a request of its own."""
    return [
        Span(make_request(shape, seq_len, seed), num_queries, seq_len)
        for seed, (num_queries, seq_len) in enumerate(lengths)
    ]


def make_blocks(shape: AttentionShape, num_blocks: int, fill: float = 0.0) -> npt.NDArray[Any]:
    """Blocks of a KV cache, full of one value."""
    sizes = (num_blocks, shape.num_kv_heads, shape.block_size, 2 * shape.head_size)
    if not shape.kv_bf16:
        return np.full(sizes, fill, np.float32)
    return np.full(sizes, np.float32(fill).view(np.uint32) >> 16, np.uint16)


@dataclass(frozen=True)
class Cache:
    """A KV cache that holds the keys and values of spans, and NaN wherever it holds none."""

    blocks: npt.NDArray[Any]
    block_table: npt.NDArray[np.int32]


def make_cache(shape: AttentionShape, spans: Sequence[Span], seed: int = 0) -> Cache:
    """Write the tokens of spans to blocks in no order; the table is wild where nobody may look."""
    size = shape.block_size
    num_blocks = [-(-span.seq_len // size) for span in spans]
    free = np.random.default_rng(seed).permutation(sum(num_blocks) + 3).astype(np.int32)
    table = np.full((len(spans), max(num_blocks, default=0) + 2), 2**30, np.int32)
    blocks = make_blocks(shape, len(free), np.nan)
    for row, span in enumerate(spans):
        table[row, : num_blocks[row]], free = np.split(free, [num_blocks[row]])
        position = np.arange(span.seq_len)
        slots = table[row, position // size].astype(np.int64) * size + position % size
        key, value = span.request.key[: span.seq_len], span.request.value[: span.seq_len]
        write_kv(shape, blocks, np.ascontiguousarray(key), np.ascontiguousarray(value), slots)
    return Cache(blocks, table)


def make_plan(shape: AttentionShape, spans: Sequence[Span]) -> AttentionPlan:
    query_lens = [span.num_queries for span in spans]
    return plan_attention(
        shape,
        np.cumsum([0, *query_lens]).astype(np.int32),
        np.array([span.seq_len for span in spans], np.int32),
        {row: s.tree_mask for row, s in enumerate(spans) if s.tree_mask is not None},
    )


def attend_all(
    shape: AttentionShape,
    spans: Sequence[Span],
    *,
    plan: AttentionPlan | None = None,
    seed: int = 0,
) -> list[Array]:
    """Attend in one step and return the rows of each span; memory next to the rows is NaN."""
    cache = make_cache(shape, spans, seed)
    plan = plan or make_plan(shape, spans)
    query = between_nans(np.concatenate([span.query for span in spans]))
    out = between_nans(np.zeros_like(query))
    attend(plan, query, cache.blocks, cache.block_table, out)
    rows = out.copy()
    out[:] = np.nan

    assert out.base is not None
    assert np.isnan(out.base).all()
    return np.split(rows, np.cumsum([span.num_queries for span in spans])[:-1])


def between_nans(rows: Array) -> Array:
    """The same rows, with NaN before, after and next to them in memory."""
    num_tokens, num_heads, head_size = rows.shape
    buffer = np.full((num_tokens + 40, num_heads + 2, head_size), np.nan, np.float32)
    buffer[20 : 20 + num_tokens, 1 : 1 + num_heads] = rows
    return buffer[20 : 20 + num_tokens, 1 : 1 + num_heads]


def expected_rows(shape: AttentionShape, span: Span) -> npt.NDArray[np.float64]:
    query = span.query * np.float32(shape.scale)
    inputs = (query, span.request.key[: span.seq_len], span.request.value[: span.seq_len])
    if shape.kv_bf16:
        inputs = tuple(map(reference.round_to_bf16, inputs))  # type: ignore[assignment]
    return reference.attend(
        *inputs,
        scale=1.0,
        visible=reference.visible_keys(
            span.num_queries, span.seq_len, shape.sliding_window, span.tree_mask
        ),
        soft_cap=shape.soft_cap,
    )


def assert_attends(
    shape: AttentionShape, spans: Sequence[Span], tolerance: float | None = None
) -> None:
    tolerance = tolerance or TOLERANCE[shape.kv_bf16]
    for found, span in zip(attend_all(shape, spans), spans, strict=True):
        error = np.abs(found - expected_rows(shape, span))

        assert error.max(initial=0) < tolerance, (span.num_queries, span.seq_len)


def bits(rows: Array) -> bytes:
    return rows.tobytes()


EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
CHUNK_EDGES = [k * KV_CHUNK + i for k in (1, 2, 3) for i in (-1, 0, 1)]

MIX = [
    *[(1, n) for n in (1, 17, 32, 33, KV_CHUNK, KV_CHUNK + 1, 700)],  # decode
    *[(n, n) for n in (2, 7, 33, 130)],  # prefill
    *[(50, 70), (60, KV_CHUNK + 30)],  # chunked prefill
    *[(5, 40), (4, KV_CHUNK + 2), (3, 600)],  # verify
]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size"),
    [
        *[(3, 1, 32), (7, 1, 32), (14, 2, 32)],
        *[(1, 1, 64), (9, 3, 64), (7, 1, 64)],
        *[(1, 1, 128), (8, 2, 128), (7, 1, 128)],
    ],
)
def test_decode_prefill_and_verify_attend_in_one_step(
    num_heads: int, num_kv_heads: int, head_size: int
) -> None:
    shape = make_shape(num_heads, num_kv_heads, head_size)

    assert_attends(shape, make_spans(shape, MIX))


@pytest.mark.parametrize("block_size", [16, 32, 96, 128, KV_CHUNK, KV_CHUNK + 128])
def test_blocks_of_any_size_are_read(block_size: int) -> None:
    if unsupported(3, 1, 32, block_size):
        pytest.skip("this instruction set has no blocks so small")
    shape = make_shape(block_size=block_size)

    assert_attends(shape, make_spans(shape, MIX))


@pytest.mark.parametrize("num_queries", [1, 4])
def test_a_context_of_any_length_is_read(num_queries: int) -> None:
    shape = make_shape()
    lengths = [(min(num_queries, n), n) for n in (*EDGES, *CHUNK_EDGES)]

    assert_attends(shape, make_spans(shape, lengths))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_a_prompt_of_any_length_attends(num_heads: int, num_kv_heads: int) -> None:
    shape = make_shape(num_heads, num_kv_heads)

    assert_attends(shape, make_spans(shape, [(n, n) for n in (*range(1, 21), *EDGES)]))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_long_prompt_attends(num_threads: int) -> None:
    native.set_num_threads(num_threads)
    shape = make_shape()

    assert_attends(shape, make_spans(shape, [(1025, 1025)]))


@pytest.mark.parametrize("window", [1, 2, 7, 32, 33, 100, KV_CHUNK, KV_CHUNK + 1, 5000])
def test_a_query_sees_no_further_than_its_sliding_window(window: int) -> None:
    shape = make_shape(sliding_window=window)

    assert_attends(shape, make_spans(shape, MIX))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_blocks_before_the_sliding_window_may_be_gone(num_threads: int) -> None:
    native.set_num_threads(num_threads)
    shape = make_shape(sliding_window=70)
    (span,) = make_spans(shape, [(3, 2 * KV_CHUNK + 99)])
    cache = make_cache(shape, [span])
    gone = (span.seq_len - span.num_queries + 1 - 70) // shape.block_size
    cache.blocks[cache.block_table[0, :gone]] = make_blocks(shape, 1, np.nan)
    cache.block_table[0, :gone] = 2**30
    out = np.zeros_like(span.query)
    attend(make_plan(shape, [span]), span.query.copy(), cache.blocks, cache.block_table, out)

    assert np.abs(out - expected_rows(shape, span)).max() < TOLERANCE[shape.kv_bf16]


@pytest.mark.parametrize("soft_cap", [1.0, 5.0, 30.0])
def test_scores_are_capped_softly(soft_cap: float) -> None:
    shape = make_shape(soft_cap=soft_cap, scale=1.0)

    # A score is rounded as a number of the size of the cap.
    tolerance = TOLERANCE[shape.kv_bf16] * max(1, soft_cap / 5)
    assert_attends(shape, make_spans(shape, MIX), tolerance)


def test_scores_far_apart_neither_overflow_nor_drown() -> None:
    shape = make_shape(scale=30.0)
    rising, falling = make_spans(shape, [(9, 3 * KV_CHUNK)] * 2)
    slope = np.linspace(0.1, 3, 3 * KV_CHUNK, dtype=np.float32)[:, None, None]
    rising.request.key[:] *= slope
    falling.request.key[:] *= slope[::-1]

    # Scores reach a thousand or two, where a float's last place is 1e-4.
    assert_attends(shape, [rising, falling], max(1e-3, TOLERANCE[shape.kv_bf16]))


@pytest.mark.parametrize("context", [0, 1, 30, KV_CHUNK - 3, KV_CHUNK, 600])
@pytest.mark.parametrize("num_drafts", [1, 5, 37])
def test_a_tree_mask_says_which_drafts_a_draft_sees(num_drafts: int, context: int) -> None:
    shape = make_shape()
    rng = np.random.default_rng(num_drafts)
    mask = np.tri(num_drafts, dtype=np.bool_) & (rng.random((num_drafts, num_drafts)) < 0.5)
    mask |= np.eye(num_drafts, dtype=np.bool_)
    request = make_request(shape, context + num_drafts)
    tree = Span(request, num_drafts, context + num_drafts, mask)

    assert_attends(shape, [tree])
    assert_attends(shape, [*make_spans(shape, MIX[:5]), tree, *make_spans(shape, MIX[9:]), tree])


def test_a_tree_mask_may_show_what_lies_behind() -> None:
    shape = make_shape()
    mask = np.tri(6, dtype=np.bool_).T.copy()

    assert_attends(shape, [Span(make_request(shape, KV_CHUNK + 3), 6, KV_CHUNK + 3, mask)])


def test_a_draft_that_sees_nothing_gives_zeros() -> None:
    shape = make_shape()
    mask = np.tri(6, dtype=np.bool_)
    mask[4] = False

    assert_attends(shape, [Span(make_request(shape, 6), 6, 6, mask)])


def test_a_tree_may_have_a_sliding_window() -> None:
    shape = make_shape(sliding_window=4)
    mask = np.tri(6, dtype=np.bool_)
    mask[3, 2] = mask[5, 4] = False

    assert_attends(shape, [Span(make_request(shape, KV_CHUNK + 3), 6, KV_CHUNK + 3, mask)])


def test_rows_without_query_tokens_change_nothing() -> None:
    shape = make_shape()
    full = make_spans(shape, [(1, 40), (7, 300)])
    empty = [Span(make_request(shape, n), 0, n) for n in (0, 10, 700)]
    mixed = attend_all(shape, [empty[0], full[0], empty[1], full[1], empty[2]])

    assert [len(rows) for rows in mixed] == [0, 1, 0, 7, 0]
    assert [bits(mixed[1]), bits(mixed[3])] == [bits(rows) for rows in attend_all(shape, full)]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_spans", [0, 1, 3])
def test_a_step_without_query_tokens_does_nothing(num_spans: int, num_threads: int) -> None:
    native.set_num_threads(num_threads)
    shape = make_shape()
    zeros = np.zeros(num_spans + 1, np.int32)
    plan = plan_attention(shape, zeros, zeros[1:])
    nothing = np.zeros((0, 3, 32), np.float32)
    table = np.zeros((num_spans, 0), np.int32)

    assert attend(plan, nothing, make_blocks(plan.shape, 0), table, nothing).size == 0


def test_a_request_of_nan_and_infinity_disturbs_no_other() -> None:
    shape = make_shape()
    spans = make_spans(shape, MIX)
    expected = [bits(rows) for rows in attend_all(shape, spans)]
    for row, value in ((3, np.nan), (8, np.inf), (12, -np.inf)):
        for array in (spans[row].request.query, spans[row].request.key, spans[row].request.value):
            array[:] = value
    found = [bits(rows) for rows in attend_all(shape, spans)]

    assert [row for row in range(len(MIX)) if found[row] != expected[row]] == [3, 8, 12]


def test_no_page_beside_an_array_is_touched(isa: str, kv_bf16: bool) -> None:
    script = ATTEND_BESIDE_GUARDS.replace("{isa}", isa).replace("{kv_bf16}", str(kv_bf16))

    assert guarded.run(script) == "untouched\n"


# ---- Bits ----


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 50}, {"soft_cap": 5.0}], ids=["plain", "window", "cap"]
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 1), (8, 2)])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_span_has_the_same_bits_alone_and_in_any_mix(
    num_heads: int, num_kv_heads: int, options: dict[str, Any], num_threads: int
) -> None:
    shape = make_shape(num_heads, num_kv_heads, **options)
    spans = make_spans(shape, MIX)
    alone = [bits(attend_all(shape, [span], seed=seed)[0]) for seed, span in enumerate(spans)]
    native.set_num_threads(num_threads)

    assert [bits(rows) for rows in attend_all(shape, spans)] == alone
    assert [bits(rows) for rows in attend_all(shape, spans[::-1], seed=1)] == alone[::-1]
    assert [bits(attend_all(shape, [span])[0]) for span in spans] == alone


@pytest.mark.parametrize("tree", [False, True])
def test_the_threads_of_plan_and_call_may_differ(tree: bool) -> None:
    shape = make_shape()
    spans = make_spans(shape, MIX)
    if tree:
        mask = np.tri(5, dtype=np.bool_)
        mask[3, 1:3] = mask[4, 3] = False
        spans += [Span(make_request(shape, n), 5, n, mask) for n in (5, KV_CHUNK + 2, 800)]
    expected = [bits(rows) for rows in attend_all(shape, spans)]
    for of_plan, of_call in ((2, 1), (1, 2), (64, 1), (64, 2)):
        native.set_num_threads(of_plan)
        plan = make_plan(shape, spans)
        native.set_num_threads(of_call)

        assert [bits(rows) for rows in attend_all(shape, spans, plan=plan)] == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 50}, {"sliding_window": KV_CHUNK}, {"soft_cap": 5.0}],
    ids=["plain", "short window", "long window", "cap"],
)
@pytest.mark.parametrize("chunk", [1, 7, 32, 33, 100, KV_CHUNK, KV_CHUNK + 1])
def test_the_chunking_of_a_prompt_changes_no_bit(chunk: int, options: dict[str, Any]) -> None:
    shape = make_shape(**options)
    length = KV_CHUNK + 60 if chunk == 1 else 2 * KV_CHUNK + 60
    request = make_request(shape, length)
    (whole,) = attend_all(shape, [Span(request, length, length)])
    ends = [*range(chunk, length, chunk), length]
    chunks = [Span(request, end - start, end) for start, end in zip([0, *ends], ends, strict=False)]
    by_step = [attend_all(shape, [span], seed=span.seq_len)[0] for span in chunks[::5]]

    assert bits(np.concatenate(attend_all(shape, chunks))) == bits(whole)
    assert [bits(rows) for rows in by_step] == [
        bits(whole[span.seq_len - span.num_queries : span.seq_len]) for span in chunks[::5]
    ]


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 80), st.integers(0, KV_CHUNK + 40)), min_size=1, max_size=6
    ),
    group=st.sampled_from([1, 3, 4, 7]),
    window=st.sampled_from([None, 20]),
    num_threads=st.sampled_from([1, 2]),
)
def test_any_mix_is_right_and_has_the_bits_of_its_spans(
    lengths: list[tuple[int, int]], group: int, window: int | None, num_threads: int
) -> None:
    shape = make_shape(2 * group, 2, sliding_window=window)
    spans = make_spans(shape, [(queries, queries + context) for queries, context in lengths])
    native.set_num_threads(1)
    alone = [bits(attend_all(shape, [span])[0]) for span in spans]
    native.set_num_threads(num_threads)

    assert_attends(shape, spans)
    assert [bits(rows) for rows in attend_all(shape, spans)] == alone


@pytest.mark.parametrize("context", [0, 30, KV_CHUNK - 3])
def test_a_tree_of_one_branch_has_the_bits_of_a_chain(context: int) -> None:
    shape = make_shape()
    request, mask = make_request(shape, context + 9), np.tri(9, dtype=np.bool_)
    (chain,) = attend_all(shape, [Span(request, 9, context + 9)])
    (tree,) = attend_all(shape, [Span(request, 9, context + 9, mask)])

    assert bits(tree) == bits(chain)


def test_the_choice_of_tiles_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = make_shape()
    spans = make_spans(shape, MIX)
    expected = [bits(rows) for rows in attend_all(shape, spans)]
    max_height = native.kernels().max_height
    for cheap in range(max_height):
        costs = TileCosts(tuple(1e-9 if i == cheap else 1.0 for i in range(max_height)))
        monkeypatch.setattr(attention, "tile_costs", lambda costs=costs: costs)

        assert [bits(rows) for rows in attend_all(shape, spans)] == expected


def test_calls_of_several_threads_at_once_change_no_bit() -> None:
    native.set_num_threads(2)
    shape = make_shape()
    spans = make_spans(shape, MIX)
    expected = [bits(rows) for rows in attend_all(shape, spans)]
    with ThreadPoolExecutor(4) as callers:
        found = callers.map(lambda seed: attend_all(shape, spans, seed=seed), range(16))

    assert all([bits(rows) for rows in step] == expected for step in found)


# ---- The KV cache ----


def test_keys_and_values_are_written_to_their_slots_and_nowhere_else() -> None:
    shape = make_shape(8, 2)
    request = make_request(shape, 100)
    blocks = make_blocks(shape, 4, np.nan)
    nothing = blocks[0, 0, 0, 0].copy()
    key, value = request.key.copy(), request.value.copy()
    write_kv(shape, blocks, key, value, np.arange(128)[28:].astype(np.int64))

    written = blocks[blocks != nothing] if shape.kv_bf16 else blocks[~np.isnan(blocks)]
    expected = np.concatenate([key, value], axis=None)
    if shape.kv_bf16:
        expected = (reference.round_to_bf16(expected).view(np.uint32) >> 16).astype(np.uint16)
    assert bits(np.sort(written)) == bits(np.sort(expected))


def test_the_order_of_writing_does_not_matter() -> None:
    shape = make_shape(8, 2)
    request = make_request(shape, 100)
    blocks = [make_blocks(shape, 4) for _ in range(3)]
    key, value, slots = request.key.copy(), request.value.copy(), np.arange(100)
    write_kv(shape, blocks[0], key, value, slots)
    for token in np.random.default_rng(0).permutation(100):
        one = slice(token, token + 1)
        write_kv(shape, blocks[1], key[one], value[one], slots[one])
    native.set_num_threads(2)
    write_kv(shape, blocks[2], key[::-1], value[::-1], slots[::-1].copy())

    assert bits(blocks[1]) == bits(blocks[2]) == bits(blocks[0])


def test_keys_and_values_may_lie_in_the_rows_of_a_wider_array() -> None:
    shape = make_shape(8, 2)
    request = make_request(shape, 40)
    apart, side_by_side = (make_blocks(shape, 2) for _ in range(2))
    write_kv(shape, apart, request.key.copy(), request.value.copy(), np.arange(40))
    write_kv(shape, side_by_side, request.key, request.value, np.arange(40))

    assert not request.key.flags.c_contiguous
    assert bits(side_by_side) == bits(apart)


def test_a_token_without_a_slot_is_not_written() -> None:
    shape = make_shape()
    request = make_request(shape, 5)
    blocks, expected = (make_blocks(shape, 1) for _ in range(2))
    write_kv(shape, blocks, request.key, request.value, np.array([0, -1, 2, -1, 4]))
    kept = [0, 2, 4]
    write_kv(shape, expected, request.key[kept], request.value[kept], np.array(kept))

    assert bits(blocks) == bits(expected)


def test_no_tokens_are_written_without_complaint() -> None:
    empty = np.zeros((0, 1, 32), np.float32)

    write_kv(make_shape(), make_blocks(make_shape(), 1), empty, empty, np.arange(0))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (
            {"num_heads": 8, "num_kv_heads": 3},
            r"num_heads \(8\) must be a multiple of num_kv_heads",
        ),
        ({"num_kv_heads": 0}, r"num_heads \(3\) must be a multiple of num_kv_heads \(0\)"),
        ({"head_size": 36}, r"head_size \(36\) must be a positive multiple of"),
        ({"head_size": 0}, r"head_size \(0\) must be a positive multiple of"),
        ({"block_size": 20}, r"block_size \(20\) must be a positive multiple of"),
        ({"sliding_window": 0}, r"sliding_window \(0\) must be positive, or None"),
        ({"soft_cap": -1.0}, r"soft_cap \(-1.0\) must be positive, or None"),
        ({"soft_cap": 0.0}, r"soft_cap \(0.0\) must be positive, or None"),
        ({"num_heads": 0}, r"num_heads \(0\)"),
    ],
)
def test_a_shape_that_the_kernel_does_not_have_is_refused(
    sizes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_attention(make_shape(**sizes), np.array([0, 1], np.int32), np.array([1], np.int32))


@pytest.mark.parametrize("sizes", [{"head_size": 36}, {"block_size": 20}])
def test_a_cache_of_a_shape_that_the_kernel_does_not_have_is_not_written(
    sizes: dict[str, int],
) -> None:
    shape = make_shape(**sizes)
    kv_cache = make_blocks(shape, 1)
    rows = np.zeros((1, 1, shape.head_size), np.float32)
    with pytest.raises(ValueError, match="must be a positive multiple of"):
        write_kv(shape, kv_cache, rows, rows, np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("query_start_loc", "seq_lens", "reason"),
    [
        ([1, 2], [5], r"query_start_loc \[1, 2\] must begin with 0"),
        ([0, 1, 2], [5], "must .* have one more entry than seq_lens"),
        ([], [], "must .* have one more entry than seq_lens"),
        ([0, 3, 2], [5, 5], "span 1 has -1 query tokens"),
        (
            [0, 1, 7],
            [5, 5],
            "span 1 has 6 query tokens and a seq_len of 5, which must",
        ),
        ([0, 0], [-1], "span 0 has 0 query tokens and a seq_len of -1"),
    ],
)
def test_spans_that_contradict_themselves_are_refused(
    query_start_loc: list[int], seq_lens: list[int], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_attention(
            make_shape(), np.array(query_start_loc, np.int32), np.array(seq_lens, np.int32)
        )


@pytest.mark.parametrize(
    ("tree_masks", "reason"),
    [
        ({1: np.ones((3, 4), np.bool_)}, r"tree_masks\[1\] is bool with shape \(3, 4\)"),
        ({2: np.ones((4, 4), np.bool_)}, r"tree_masks\[2\]"),
        ({-1: np.ones((4, 4), np.bool_)}, r"tree_masks\[-1\]"),
        ({1: np.zeros((4, 4), np.float32)}, r"tree_masks\[1\] is float32"),
    ],
    ids=["shape", "no such span", "counted from the end", "an additive mask"],
)
def test_tree_masks_that_do_not_fit_are_refused(tree_masks: dict[int, Mask], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_attention(
            make_shape(), np.array([0, 1, 5], np.int32), np.array([9, 9], np.int32), tree_masks
        )


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"query": np.zeros((4, 3, 32))}, "query is float64; it must be float32"),
        ({"query": np.zeros((5, 3, 32), np.float32)}, r"query has shape \(5, 3, 32\)"),
        ({"query": np.zeros((4, 96), np.float32)}, r"query has shape \(4, 96\)"),
        ({"query": np.zeros((4, 32, 3), np.float32).swapaxes(1, 2)}, "query has strides"),
        ({"out": np.zeros((3, 3, 32), np.float32)}, r"out has shape \(3, 3, 32\)"),
        ({"out": np.zeros((4, 3, 64), np.float32)[:, :, ::2]}, "out has strides"),
        ({"out": np.zeros((4, 3, 32), np.float16)}, "out is float16"),
        (
            {"block_table": np.zeros((2, 1), np.int32)},
            "block_table has 1 columns; the spans need 2",
        ),
        ({"block_table": np.zeros((1, 2), np.int32)}, r"block_table has shape \(1, 2\)"),
        ({"block_table": np.zeros((2, 2), np.int64)}, "block_table is int64; it must be int32"),
        ({"block_table": np.zeros((2, 4), np.int32)[:, ::2]}, "block_table has strides"),
        ({"kv_cache": np.zeros((3, 1, 32, 32), np.float32)}, "kv_cache has shape"),
        ({"kv_cache": np.zeros((3, 2, 32, 64), np.float32)}, "kv_cache has shape"),
        ({"kv_cache": np.zeros((3, 1, 32, 64), np.float16)}, "kv_cache is float16"),
        ({"kv_cache": np.zeros((6, 1, 32, 64), np.float32)[::2]}, "kv_cache has strides"),
    ],
)
def test_arrays_that_do_not_fit_the_plan_are_refused(
    arrays: dict[str, npt.NDArray[Any]], reason: str
) -> None:
    shape = make_shape(kv_bf16=False)
    plan = plan_attention(shape, np.array([0, 1, 4], np.int32), np.array([9, 33], np.int32))
    fitting = {
        "query": np.zeros((4, 3, 32), np.float32),
        "kv_cache": make_blocks(shape, 3),
        "block_table": np.zeros((2, 2), np.int32),
        "out": np.zeros((4, 3, 32), np.float32),
    }
    with pytest.raises(ValueError, match=reason):
        attend(plan, **{**fitting, **arrays})


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"key": np.zeros((3, 1, 32))}, "key is float64; it must be float32"),
        ({"key": np.zeros((2, 1, 32), np.float32)}, r"key has shape \(2, 1, 32\)"),
        ({"value": np.zeros((3, 2, 32), np.float32)}, r"value has shape \(3, 2, 32\)"),
        ({"value": np.zeros((3, 1, 64), np.float32)[:, :, ::2]}, "value has strides"),
        ({"slot_mapping": np.arange(3, dtype=np.int32)}, "slot_mapping is int32"),
        ({"slot_mapping": np.arange(6)[::2]}, "slot_mapping has strides"),
        ({"slot_mapping": np.array([0, 64, 1])}, "slot_mapping holds 64; the cache has 64 slots"),
        ({"kv_cache": np.zeros((2, 1, 32, 65), np.float32)}, "kv_cache has shape"),
    ],
)
def test_keys_and_values_that_do_not_fit_the_cache_are_refused(
    arrays: dict[str, npt.NDArray[Any]], reason: str
) -> None:
    shape = make_shape(kv_bf16=False)
    fitting = {
        "kv_cache": make_blocks(shape, 2),
        "key": np.zeros((3, 1, 32), np.float32),
        "value": np.zeros((3, 1, 32), np.float32),
        "slot_mapping": np.arange(3),
    }
    with pytest.raises(ValueError, match=reason):
        write_kv(shape, **{**fitting, **arrays})


def test_a_cache_in_another_format_is_refused(kv_bf16: bool) -> None:
    rows, slots = np.zeros((1, 1, 32), np.float32), np.zeros(1, np.int64)
    other = make_blocks(make_shape(kv_bf16=not kv_bf16), 1)
    with pytest.raises(ValueError, match=r"kv_cache is (uint16|float32); it must be"):
        write_kv(make_shape(), other, rows, rows, slots)


def test_an_output_that_may_not_be_written_is_refused() -> None:
    shape = make_shape()
    (span,) = make_spans(shape, [(4, 9)])
    cache, out = make_cache(shape, [span]), np.zeros((4, 3, 32), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out"):
        attend(make_plan(shape, [span]), span.query.copy(), cache.blocks, cache.block_table, out)
    assert not out.any()


def test_keys_and_values_may_lie_in_wider_arrays_of_their_own() -> None:
    shape = make_shape(num_heads=2)
    rows = np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)
    slots = np.array([0, 5, 31])
    apart, together = (make_blocks(shape, 1) for _ in range(2))

    write_kv(shape, apart, rows[:, :1], rows[:, 1:2].copy(), slots)
    write_kv(shape, together, rows[:, :1].copy(), rows[:, 1:2].copy(), slots)

    assert together.any()
    np.testing.assert_array_equal(apart, together)
