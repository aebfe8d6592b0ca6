"""How work is cut into tiles: row tiles of a GEMM, query tiles and KV splits of attention."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Ints = NDArray[np.integer[Any]]

ROWS_PER_BLOCK = 120
"""Rows of one GEMM task: they stay in the second-level cache with one chunk of their inputs."""

QUERY_ROWS = 96
"""Max rows (tokens times query heads per KV head) of one query tile: with more rows, keys and
values are read less often, but the scores of a chunk (96 KiB now) have to stay in a cache."""

TASKS_PER_THREAD = 4
"""Tasks that work is cut into for each thread: with several, a thread that loses its core for a
while leaves tasks to the others."""

TASK_COST = 1 << 11
"""Fixed cost of a query tile, in products of one row with one key."""

MIN_ROWS = 4
"""Fewer rows than this take no less time: the tile waits for keys and values from memory."""


@dataclass(frozen=True, slots=True)
class TileCosts:
    """Time of one row tile on one panel, by height (index 0 is height 1), in any unit."""

    of_height: tuple[float, ...]

    @property
    def max_height(self) -> int:
        """Rows of the tallest tile."""
        return len(self.of_height)

    @property
    def of_row(self) -> float:
        """Time of one row in tiles of the best height."""
        return min(cost / height for height, cost in enumerate(self.of_height, 1))


def default_costs(max_height: int, of_row: float = 1.0) -> TileCosts:
    """Costs of tiles on a machine where none were measured, if a row of a tall one costs `of_row`.

    A row takes two multiply-adds per input feature, of which a core starts two per cycle. Tiles of
    fewer than about five rows wait for their own sums: a multiply-add takes four cycles. Each tile
    also begins and ends.
    """
    heights = range(1, max_height + 1)
    costs = (max(4 + 0.3 * height, float(height)) + 0.2 for height in heights)
    return TileCosts(tuple(of_row * cost for cost in costs))


@lru_cache(maxsize=1 << 14)
def row_tiles(num_rows: int, costs: TileCosts) -> tuple[int, ...]:
    """Heights of the row tiles that cover exactly `num_rows` rows in the least time, tallest first;
    of equal times the fewest tiles, and of these the most even ones.

    Rows that fit one tile get one, since each tile reads the weights again.
    """
    tallest = costs.max_height
    if num_rows <= tallest:
        return (num_rows,) if num_rows else ()
    # All but the last few tiles have the height that costs least per row.
    of_row = [cost / height for height, cost in enumerate(costs.of_height, 1)]
    best = max(height for height, cost in enumerate(of_row, 1) if cost == min(of_row))
    whole = max(0, num_rows // best - tallest)
    rest = num_rows - whole * best
    cheapest: list[tuple[float, int, int, tuple[int, ...]]] = [(0.0, 0, 0, ())]
    for rows in range(1, rest + 1):
        options = []
        for height in range(1, min(tallest, rows) + 1):
            cost, count, highest, others = cheapest[rows - height]
            cost += costs.of_height[height - 1]
            options.append((cost, count + 1, max(highest, height), (height, *others)))
        cheapest.append(min(options))
    return tuple(sorted((best,) * whole + cheapest[rest][3], reverse=True))


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """How a GEMM is cut: a task is `row_block` tiles by `panel_block` panels."""

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
    # Large tasks pack and hand out less; but if other row blocks read the same panels next, these
    # have to be in a cache still.
    max_panels = 16 if num_blocks == 1 else 8
    # A multiple of the panels that a tile of one row takes at once, and so even, as the pairs of a
    # gated weight need.
    panel_block = min(max_panels, max(4, wanted // 4 * 4))
    return GemmPlan(num_rows, np.array(heights, np.int32), row_block, panel_block)


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """The tasks of one step's attention, costliest first, and how their results are merged.

    `tasks` rows: span, first_token, num_tokens, kv_head, first_chunk, end_chunk, partial (-1 if the
    tile is not split), start in `heights`, number of heights. `merges` rows: span, first_token,
    num_tokens, kv_head, partial, num_partials.
    """

    tasks: Int32s
    merges: Int32s
    heights: Int32s
    num_partials: int
    """Results of single chunks that the tasks leave for the merges."""
    max_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanCut:
    """What decides, in addition to its spans, how a step's attention is cut."""

    group: int
    """Query heads per KV head."""
    num_kv_heads: int
    kv_chunk: int
    """Keys of one chunk."""
    sliding_window: int
    """0 if there is none."""
    num_threads: int
    costs: TileCosts
    query_rows: int = QUERY_ROWS
    masked_rows: int = QUERY_ROWS
    """Max rows of a query tile of a span in which a mask decides."""
    min_rows: int = MIN_ROWS
    merges_all: bool = False
    """Whether each chunk of a tile that has several is left for a merge, also where one task does
    them all: then a task needs no room for what it merges into."""


def plan_query_tiles(
    query_lens: Int32s, seq_lens: Int32s, sees_all: NDArray[np.bool_], cut: SpanCut
) -> QueryTiles:
    """Cut spans into query tiles, weigh them, and split those that would leave other threads idle.

    Lengths are `[num_spans]`, in tokens. Tokens of a span in `sees_all` may see the whole span (a
    mask decides).
    """
    if not cut.sliding_window and query_lens.max(initial=0) <= 1:
        # Then the plan of decode steps changes only when a request enters its next chunk of keys.
        seq_lens = -(-seq_lens // cut.kv_chunk) * cut.kv_chunk
    lens = (array.astype(np.int32).tobytes() for array in (query_lens, seq_lens))
    return cut_spans(*lens, sees_all.tobytes(), cut)


@lru_cache(maxsize=256)
def cut_spans(
    query_bytes: bytes, seq_bytes: bytes, sees_all_bytes: bytes, cut: SpanCut
) -> QueryTiles:
    """`plan_query_tiles` on the bytes of its arrays, which a cache can compare.

    `reference.cut_spans` does the same by loops, which take two to six times as long:

        for each span, for each `query_rows` rows of its queries:  # a tile
            cost = rows * keys + TASK_COST
            pieces = 1, or enough for the costs of all pieces to be about even
            for each piece of its chunks of keys, for each KV head: a task
            if pieces > 1, for each KV head: a merge of the results of its chunks
        sort the tasks by cost
    """
    query_lens, seq_lens = np.frombuffer(query_bytes, np.int32), np.frombuffer(seq_bytes, np.int32)
    is_masked = np.frombuffer(sees_all_bytes, np.bool_)
    max_rows = np.where(is_masked, cut.masked_rows, cut.query_rows)
    span, first, count = _cut_queries(query_lens, np.maximum(1, max_rows // cut.group))
    context = (seq_lens - query_lens)[span]
    sees_all = is_masked[span]
    end_key = np.where(sees_all, seq_lens[span], context + first + count)
    first_key = np.zeros_like(context)
    if cut.sliding_window:
        first_key = np.maximum(0, context + first + 1 - cut.sliding_window)
    first_chunk, end_chunk = first_key // cut.kv_chunk, -(-end_key // cut.kv_chunk)

    # The paper's load, tile size times KV length, and what it leaves out: a fixed part, and that
    # few rows are no cheaper.
    cost = np.maximum(count * cut.group, cut.min_rows) * (end_key - first_key) + TASK_COST
    chunks = end_chunk - first_chunk
    pieces = np.ones_like(chunks)
    if cut.num_threads > 1 and len(cost):
        max_cost = cost.sum() * cut.num_kv_heads / (cut.num_threads * TASKS_PER_THREAD)
        pieces = np.minimum(chunks, np.ceil(cost / max_cost).astype(int))

    # Each chunk of a split tile has a place for its result, in each KV head.
    is_split = chunks > 1 if cut.merges_all else pieces > 1
    places = np.cumsum(chunks * is_split)
    num_places = int(places[-1]) if len(places) else 0
    first_place = np.where(is_split, places - chunks, -1)
    tile = np.repeat(np.arange(len(span)), pieces)  # of each piece
    piece = index_in_run(pieces)
    begin, end = (first_chunk[tile] + i * chunks[tile] // pieces[tile] for i in (piece, piece + 1))

    sizes, size_of_tile = np.unique(count, return_inverse=True)
    heights = [row_tiles(int(size) * cut.group, cut.costs) for size in sizes]
    num_heights = np.array([len(of_size) for of_size in heights], int)
    first_height = np.cumsum(num_heights) - num_heights

    order, head = _times_heads(np.argsort(-(cost / pieces)[tile], kind="stable"), cut.num_kv_heads)
    of_task = tile[order]
    place = first_place[of_task] + begin[order] - first_chunk[of_task] + head * num_places
    tasks = [
        span[of_task], first[of_task], count[of_task], head, begin[order], end[order],
        np.where(is_split[of_task], place, -1),
        first_height[size_of_tile[of_task]], num_heights[size_of_tile[of_task]],
    ]  # fmt: skip
    split, head = _times_heads(np.flatnonzero(is_split), cut.num_kv_heads)
    merges = [
        span[split], first[split], count[split], head,
        first_place[split] + head * num_places, chunks[split],
    ]  # fmt: skip
    return QueryTiles(
        np.ascontiguousarray(np.stack(tasks, axis=1), np.int32),
        np.ascontiguousarray(np.stack(merges, axis=1), np.int32),
        np.array([height for of_size in heights for height in of_size], np.int32),
        num_places * cut.num_kv_heads,
        int(count.max(initial=0)) * cut.group,
    )


def _cut_queries(query_lens: Int32s, max_tokens: Ints) -> tuple[Ints, Ints, Ints]:
    """Span, first token and number of tokens of each query tile."""
    tokens = np.minimum(np.maximum(query_lens, 1), max_tokens)
    num_tiles = -(-query_lens // tokens)
    span = np.repeat(np.arange(len(query_lens)), num_tiles)
    first = index_in_run(num_tiles) * tokens[span]
    return span, first, np.minimum(tokens[span], query_lens[span] - first)


def index_in_run(lengths: Ints) -> Ints:
    """For runs of these lengths, one after the other: each item's index in its own run."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _times_heads(items: Ints, num_kv_heads: int) -> tuple[Ints, Ints]:
    """Each item once per KV head, and the heads."""
    return np.repeat(items, num_kv_heads), np.tile(np.arange(num_kv_heads), len(items))
