"""How work is cut into tiles: row tiles of a GEMM, query tiles and KV splits of attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Ints = NDArray[np.integer[Any]]

ROWS_PER_BLOCK = 120
"""Rows of one GEMM task: with a chunk of their inputs they stay in the second-level cache."""

QUERY_ROWS = 96
"""Most rows (tokens times query heads per KV head) of one query tile."""

TASKS_PER_THREAD = 4
"""So many that a thread which was taken off its core for a while leaves no long tail."""

TASK_COST = 1 << 11
"""What a query tile costs beside its products, in products of one row with one key."""

MIN_ROWS = 4
"""A tile of fewer rows takes no less time: it waits for keys and values to come from memory."""


@dataclass(frozen=True, slots=True)
class TileCosts:
    """Time of one row tile on one panel by its height (index 0 is height 1), in any unit."""

    of_height: tuple[float, ...]

    @property
    def max_height(self) -> int:
        """Rows of the tallest tile."""
        return len(self.of_height)


def default_costs(max_height: int) -> TileCosts:
    """What tiles cost where nothing was measured: a low one waits for its sums."""
    heights = range(1, max_height + 1)
    return TileCosts(tuple(max(3.7 + 0.1 * height, float(height)) for height in heights))


@lru_cache(maxsize=1 << 14)
def row_tiles(num_rows: int, costs: TileCosts) -> tuple[int, ...]:
    """Heights of the row tiles that cover `num_rows` rows exactly in the least time, tallest first.

    Rows that fit one tile take one, since each tile reads the weights anew.
    """
    tallest = costs.max_height
    if num_rows <= tallest:
        return (num_rows,) if num_rows else ()
    # All but the last few tiles are of the height that costs least per row.
    of_row = [cost / height for height, cost in enumerate(costs.of_height, 1)]
    best = max(height for height, cost in enumerate(of_row, 1) if cost == min(of_row))
    whole = max(0, num_rows // best - tallest)
    rest = num_rows - whole * best
    cheapest: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for rows in range(1, rest + 1):
        cheapest.append(
            min(
                (cheapest[rows - height][0] + costs.of_height[height - 1],
                 (height, *cheapest[rows - height][1]))
                for height in range(1, min(tallest, rows) + 1)
            )
        )  # fmt: skip
    return tuple(sorted((best,) * whole + cheapest[rest][1], reverse=True))


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """How a GEMM is cut: one task is `row_block` tiles by `panel_block` panels."""

    num_rows: int
    heights: Int32s
    row_block: int
    panel_block: int


@lru_cache(maxsize=1 << 12)
def plan_gemm(num_rows: int, num_panels: int, num_threads: int, costs: TileCosts) -> GemmPlan:
    """Cut the product of `num_rows` rows with `num_panels` panels for `num_threads` threads."""
    heights = row_tiles(num_rows, costs)
    num_blocks = max(1, -(-num_rows // ROWS_PER_BLOCK))
    row_block = max(1, -(-len(heights) // num_blocks))
    wanted = num_panels * num_blocks // (num_threads * TASKS_PER_THREAD)
    # Even, for the pairs of a gated weight; a multiple of the panels one low tile takes at once.
    panel_block = min(16 if num_blocks == 1 else 8, max(4, wanted // 4 * 4))
    return GemmPlan(num_rows, np.array(heights, np.int32), row_block, panel_block)


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """The tasks of one step's attention, costliest first, and how their results are merged.

    `tasks` rows: span, first_token, num_tokens, kv_head, first_chunk, end_chunk, partial (-1:
    none), start in `heights`, number of heights. `merges` rows: span, first_token, num_tokens,
    kv_head, partial, num_partials.
    """

    tasks: Int32s
    merges: Int32s
    heights: Int32s
    num_partials: int
    max_rows: int


def plan_query_tiles(
    query_lens: Int32s,
    seq_lens: Int32s,
    *,
    group: int,
    num_kv_heads: int,
    kv_chunk: int,
    sliding_window: int,
    sees_all: NDArray[np.bool_],
    num_threads: int,
    costs: TileCosts,
) -> QueryTiles:
    """Cut spans into query tiles, weigh them, split what would keep one thread busy alone.

    Lengths are `[num_spans]`, in tokens; `group` is query heads per KV head; tokens of a span in
    `sees_all` may see the whole span (a mask decides); `sliding_window` 0 is none.
    """
    if not sliding_window and query_lens.max(initial=0) <= 1:
        # So the tasks of decode steps change only when a request enters its next chunk of keys.
        seq_lens = -(-seq_lens // kv_chunk) * kv_chunk
    return cut_spans(
        *(lens.astype(np.int32).tobytes() for lens in (query_lens, seq_lens)),
        sees_all.tobytes(),
        group,
        num_kv_heads,
        kv_chunk,
        sliding_window,
        num_threads,
        costs,
    )


@lru_cache(maxsize=256)
def cut_spans(
    query_bytes: bytes,
    seq_bytes: bytes,
    sees_all_bytes: bytes,
    group: int,
    num_kv_heads: int,
    kv_chunk: int,
    sliding_window: int,
    num_threads: int,
    costs: TileCosts,
) -> QueryTiles:
    """`plan_query_tiles` of spans whose lengths come as the bytes of int32 arrays."""
    query_lens, seq_lens = np.frombuffer(query_bytes, np.int32), np.frombuffer(seq_bytes, np.int32)
    span, first, count = _cut_queries(query_lens, max(1, QUERY_ROWS // group))
    context = (seq_lens - query_lens)[span]
    sees_all = np.frombuffer(sees_all_bytes, np.bool_)[span]
    end_key = np.where(sees_all, seq_lens[span], context + first + count)
    first_key = np.maximum(0, context + first + 1 - (sliding_window or 1 << 30))
    first_chunk, end_chunk = first_key // kv_chunk, -(-end_key // kv_chunk)

    # The paper's load, tile size times KV length, with what it leaves out: a fixed part, and that
    # few rows are no cheaper.
    cost = np.maximum(count * group, MIN_ROWS) * (end_key - first_key) + TASK_COST
    chunks = end_chunk - first_chunk
    pieces = np.ones_like(chunks)
    if num_threads > 1 and len(cost):
        limit = cost.sum() * num_kv_heads / (num_threads * TASKS_PER_THREAD)
        pieces = np.minimum(chunks, np.ceil(cost / limit).astype(int))

    # Each chunk of a tile that is split has a place for its result, in each KV head.
    is_split = pieces > 1
    places = np.cumsum(chunks * is_split)
    num_places = int(places[-1]) if len(places) else 0
    first_place = np.where(is_split, places - chunks, -1)
    tile = np.repeat(np.arange(len(span)), pieces)
    piece = np.arange(len(tile)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin, end = (
        first_chunk[tile] + at * chunks[tile] // pieces[tile] for at in (piece, piece + 1)
    )

    sizes, size_of_tile = np.unique(count, return_inverse=True)
    heights = [row_tiles(int(size) * group, costs) for size in sizes]
    num_heights = np.array([len(of_size) for of_size in heights], int)
    first_height = np.cumsum(num_heights) - num_heights

    order, head = _times_heads(np.argsort(-(cost / pieces)[tile], kind="stable"), num_kv_heads)
    at = tile[order]
    place = first_place[at] + begin[order] - first_chunk[at] + head * num_places
    tasks = [
        span[at], first[at], count[at], head, begin[order], end[order],
        np.where(is_split[at], place, -1),
        first_height[size_of_tile[at]], num_heights[size_of_tile[at]],
    ]  # fmt: skip
    at, head = _times_heads(np.flatnonzero(is_split), num_kv_heads)
    merges = [
        span[at], first[at], count[at], head, first_place[at] + head * num_places, chunks[at]
    ]  # fmt: skip
    return QueryTiles(
        np.ascontiguousarray(np.stack(tasks, axis=1), np.int32),
        np.ascontiguousarray(np.stack(merges, axis=1), np.int32),
        np.array([height for of_size in heights for height in of_size], np.int32),
        num_places * num_kv_heads,
        int(count.max(initial=0)) * group,
    )


def _cut_queries(query_lens: Int32s, most_tokens: int) -> tuple[Ints, Ints, Ints]:
    """Span, first token and number of tokens of each query tile."""
    tokens = np.minimum(np.maximum(query_lens, 1), most_tokens)
    num_tiles = -(-query_lens // tokens)
    span = np.repeat(np.arange(len(query_lens)), num_tiles)
    index = np.arange(len(span)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    first = index * tokens[span]
    return span, first, np.minimum(tokens[span], query_lens[span] - first)


def _times_heads(items: Ints, num_kv_heads: int) -> tuple[Ints, Ints]:
    """Each item once for each KV head, and the heads."""
    return np.repeat(items, num_kv_heads), np.tile(np.arange(num_kv_heads), len(items))


def parse_costs(document: Mapping[str, object], max_height: int) -> TileCosts | None:
    """The costs in what `xyserve calibrate` wrote; None if they are of other tiles."""
    costs = document.get("tile_costs")
    if not isinstance(costs, list) or len(costs) != max_height:
        return None
    return TileCosts(tuple(float(cost) for cost in costs))
