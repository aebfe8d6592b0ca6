from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.kernels import reference
from workers.kernels.tiles import (
    QUERY_ROWS,
    QueryTiles,
    SpanCut,
    TileCosts,
    default_costs,
    plan_gemm,
    plan_query_tiles,
    row_tiles,
)

KV_CHUNK = 256

COSTS = [
    default_costs(6),
    default_costs(12),
    TileCosts((1.0,)),
    TileCosts((1.0, 1.1, 9.0, 9.0)),  # two rows cost least per row
    TileCosts((9.0, 9.0, 9.0, 1.0)),
]

table = st.lists(st.floats(0.1, 10), min_size=1, max_size=12).map(
    lambda costs: TileCosts(tuple(costs))
)


def least_cost(num_rows: int, costs: TileCosts) -> float:
    """Try each height for the next tile."""
    least = [0.0]
    for rows in range(1, num_rows + 1):
        heights = range(1, min(rows, costs.max_height) + 1)
        least.append(min(least[rows - h] + costs.of_height[h - 1] for h in heights))
    return least[num_rows]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("num_rows", [*range(0, 60), 255, 256, 257, 1025])
def test_row_tiles_cover_each_row_once(num_rows: int, costs: TileCosts) -> None:
    heights = row_tiles(num_rows, costs)

    assert sum(heights) == num_rows
    assert set(heights) <= set(range(1, costs.max_height + 1))
    assert sorted(heights, reverse=True) == list(heights)


@pytest.mark.parametrize("costs", COSTS)
def test_rows_that_fit_one_tile_take_one(costs: TileCosts) -> None:
    for num_rows in range(1, costs.max_height + 1):
        assert row_tiles(num_rows, costs) == (num_rows,)


def test_the_table_decides_between_tiles() -> None:
    assert row_tiles(8, TileCosts((1.5, 2.5, 3.0, 3.9, 5.1))) == (4, 4)
    assert row_tiles(8, TileCosts((1.5, 2.5, 3.0, 4.1, 4.9))) == (5, 3)


@settings(max_examples=100, deadline=None)
@given(num_rows=st.integers(0, 200), costs=table)
def test_more_rows_are_covered_in_the_least_time(num_rows: int, costs: TileCosts) -> None:
    heights = row_tiles(num_rows, costs)

    assert sum(heights) == num_rows
    if num_rows > costs.max_height:
        found = sum(costs.of_height[height - 1] for height in heights)
        assert found == pytest.approx(least_cost(num_rows, costs))


@pytest.mark.parametrize("num_rows", [1, 6, 33, 120, 121, 1025])
@pytest.mark.parametrize("num_panels", [1, 2, 9, 600])
@pytest.mark.parametrize("num_threads", [1, 2, 64])
def test_the_tasks_of_a_gemm_hold_whole_pairs_of_panels(
    num_rows: int, num_panels: int, num_threads: int
) -> None:
    plan = plan_gemm(num_rows, num_panels, num_threads, default_costs(6))

    assert (plan.num_rows, tuple(plan.heights)) == (num_rows, row_tiles(num_rows, default_costs(6)))
    assert plan.panel_block % 2 == 0
    assert (plan.panel_block > 0, plan.row_block > 0) == (True, True)


@pytest.mark.parametrize("num_rows", [1, 120, 1025])
def test_a_large_gemm_has_tasks_for_every_thread(num_rows: int) -> None:
    plan = plan_gemm(num_rows, 512, 8, default_costs(6))
    num_tasks = -(-len(plan.heights) // plan.row_block) * -(-512 // plan.panel_block)

    assert num_tasks >= 4 * 8


# ---- Query tiles ----


def make_cut(**options: Any) -> SpanCut:
    defaults: dict[str, Any] = {
        "group": 3,
        "num_kv_heads": 1,
        "kv_chunk": KV_CHUNK,
        "sliding_window": 0,
        "num_threads": 1,
        "costs": default_costs(6),
    }
    return SpanCut(**defaults | options)


def plan_spans(
    spans: list[tuple[int, int]], sees_all: NDArray[np.bool_] | None = None, **options: Any
) -> QueryTiles:
    """Plan spans of `(num_queries, context)`."""
    query_lens = np.array([num_queries for num_queries, _ in spans], np.int32)
    seq_lens = query_lens + np.array([context for _, context in spans], np.int32)
    sees_all = np.zeros(len(spans), np.bool_) if sees_all is None else sees_all
    return plan_query_tiles(query_lens, seq_lens, sees_all, make_cut(**options))


def chunks_read(tiles: QueryTiles) -> Iterator[tuple[int, int, int, int]]:
    """Give the span, token, KV head and KV chunk of each part of the work, task by task."""
    for span, first_token, num_tokens, kv_head, first_chunk, end_chunk, *_ in tiles.tasks.tolist():
        for token in range(first_token, first_token + num_tokens):
            for chunk in range(first_chunk, end_chunk):
                yield span, token, kv_head, chunk


steps = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 2, 5, 31, 33, 200]), st.integers(0, 2000)), max_size=8
)
cuts = st.fixed_dictionaries(
    {
        "group": st.sampled_from([1, 3, 7, 100]),
        "num_kv_heads": st.sampled_from([1, 3]),
        "sliding_window": st.sampled_from([0, 1, 300]),
        "num_threads": st.sampled_from([1, 2, 16]),
    }
)

cuts_of_gpus = st.fixed_dictionaries(
    {
        "query_rows": st.sampled_from([64, 128]),
        "masked_rows": st.sampled_from([16, 64]),
        "min_rows": st.just(16),
        "merges_all": st.booleans(),
        "costs": st.just(TileCosts((1.0,) * 128)),
    }
)


@settings(max_examples=60, deadline=None)
@given(spans=steps, options=cuts, with_masks=st.booleans())
def test_each_token_reads_each_chunk_that_it_sees_once(
    spans: list[tuple[int, int]], options: dict[str, int], with_masks: bool
) -> None:
    sees_all = np.arange(len(spans)) % 2 == with_masks
    read = list(chunks_read(plan_spans(spans, sees_all=sees_all, **options)))
    window = options["sliding_window"]
    seen = set()
    for span, (num_queries, context) in enumerate(spans):
        for token in range(num_queries):
            first = max(0, context + token + 1 - window) if window else 0
            last = context + (num_queries - 1 if sees_all[span] else token)
            for chunk in range(first // KV_CHUNK, last // KV_CHUNK + 1):
                seen |= {(span, token, head, chunk) for head in range(options["num_kv_heads"])}

    assert len(read) == len(set(read))
    assert set(read) >= seen


@settings(max_examples=200, deadline=None)
@given(
    spans=steps,
    options=st.one_of(cuts, st.builds(lambda a, b: a | b, cuts, cuts_of_gpus)),
    with_masks=st.booleans(),
)
def test_spans_are_cut_as_by_plain_loops(
    spans: list[tuple[int, int]], options: dict[str, Any], with_masks: bool
) -> None:
    # Two tokens at least: the lengths of spans in a step of single tokens are rounded up first.
    spans = [*spans, (2, 5)]
    sees_all = np.arange(len(spans)) % 2 == with_masks
    tiles = plan_spans(spans, sees_all, **options)
    tasks, merges = reference.cut_spans(
        [num_queries for num_queries, _ in spans],
        [num_queries + context for num_queries, context in spans],
        sees_all.tolist(),
        make_cut(**options),
    )

    assert tiles.tasks.tolist() == [list(task) for task in tasks]
    assert tiles.merges.tolist() == [list(merge) for merge in merges]


@settings(max_examples=60, deadline=None)
@given(spans=steps, group=st.sampled_from([1, 3, 7, 100]), num_threads=st.sampled_from([1, 2, 16]))
def test_the_row_tiles_of_a_task_hold_its_tokens_and_heads(
    spans: list[tuple[int, int]], group: int, num_threads: int
) -> None:
    tiles = plan_spans(spans, group=group, num_threads=num_threads)
    for _, _, num_tokens, *_, start, count in tiles.tasks.tolist():
        assert tiles.heights[start : start + count].sum() == num_tokens * group
        assert num_tokens * group <= max(QUERY_ROWS, group)
        assert num_tokens * group <= tiles.max_rows


@settings(max_examples=60, deadline=None)
@given(
    spans=steps, num_kv_heads=st.sampled_from([1, 3]), num_threads=st.sampled_from([1, 2, 16, 64])
)
def test_partial_results_are_merged_in_the_order_of_their_chunks(
    spans: list[tuple[int, int]], num_kv_heads: int, num_threads: int
) -> None:
    tiles = plan_spans(spans, num_kv_heads=num_kv_heads, num_threads=num_threads)
    written: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for *tile, first_chunk, end_chunk, partial, _, _ in tiles.tasks.tolist():
        if partial >= 0:
            pairs = [
                (chunk, partial + chunk - first_chunk) for chunk in range(first_chunk, end_chunk)
            ]
            written.setdefault(tuple(tile), []).extend(pairs)
    merged = {
        tuple(tile): list(range(partial, partial + num_partials))
        for *tile, partial, num_partials in tiles.merges.tolist()
    }
    in_order = {tile: [at for _, at in sorted(pairs)] for tile, pairs in written.items()}

    assert merged == in_order
    assert sorted(at for slots in in_order.values() for at in slots) == list(
        range(tiles.num_partials)
    )


def test_one_thread_splits_nothing() -> None:
    tiles = plan_spans([(1, 100_000), (1, 5), (300, 4000)], num_threads=1)

    assert (tiles.num_partials, len(tiles.merges)) == (0, 0)


def test_a_long_context_alone_keeps_every_thread_busy() -> None:
    tiles = plan_spans([(1, 100_000)], num_threads=8)

    assert len(tiles.tasks) >= 8
    shares = tiles.tasks[:, 5] - tiles.tasks[:, 4]
    assert shares.max() - shares.min() <= 1


def test_short_contexts_are_not_split() -> None:
    assert plan_spans([(1, 200)] * 3, num_threads=16).num_partials == 0


def test_the_costliest_tasks_come_first() -> None:
    tiles = plan_spans([(1, 10), (1, 900), (20, 900), (1, 3000), (5, 40)])

    assert tiles.tasks[:, 0].tolist() == [2, 3, 1, 4, 0]


@pytest.mark.parametrize("spans", [[], [(0, 0)], [(0, 700), (0, 3)]])
@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_step_without_query_tokens_has_no_tasks(
    spans: list[tuple[int, int]], num_threads: int
) -> None:
    tiles = plan_spans(spans, num_threads=num_threads)

    assert (tiles.tasks.size, tiles.merges.size, tiles.num_partials, tiles.max_rows) == (0, 0, 0, 0)
