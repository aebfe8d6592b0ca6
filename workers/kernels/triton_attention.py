"""The attention meta-kernel in Triton, for CUDA GPUs and Ascend NPUs: one source for both.

One launch serves a step's prefill, decode and verify spans. A program works down its part of a
table of tasks, each a query tile of one KV head by some chunks of its keys; a tile has 16, 64 or
128 rows, which are tokens times the query heads of the KV head. Keys and values are read by whole
pages, one in each turn of the loop. The table is in the memory of the device: a captured graph
replays with another one.

A row's bits do not depend on its tile or on the number of programs: keys are cut into chunks at
fixed places, the sum of each begins anew, and where there are several `merge_kernel` merges them in
order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from workers.kernels.shapes import AttentionShape
from workers.kernels.tiles import Int32s, SpanCut, TileCosts, index_in_run, plan_query_tiles
from workers.kernels.triton_gemm import HEIGHTS
from workers.kernels.triton_launch import launch

CHUNK_KEYS = 2048
"""Keys of a chunk, if its pages have so many; there is at least one page."""
TASK_FIELDS, MERGE_FIELDS = 12, 8
NO_TREE = -1


@triton.jit
def _rows(
    num_tokens, stride,
    ROWS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD: tl.constexpr,
    IS_FLAT: tl.constexpr,
):  # fmt: skip
    """Where a tile's rows begin, and which of them there are."""
    row = tl.arange(0, ROWS)
    if IS_FLAT:
        place = row * HEAD
        exists = row < num_tokens * GROUP_PAD
    else:
        token, member = row // GROUP_PAD, row % GROUP_PAD
        place = token * stride + member * HEAD
        exists = (token < num_tokens) & (member < GROUP)
    return place, exists


@triton.jit
def _store(
    out, total, values, num_tokens, stride,
    ROWS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr, IS_FLAT: tl.constexpr,
):  # fmt: skip
    """Write a tile's rows; those that see no key are zero."""
    column = tl.arange(0, HEAD_PAD)
    place, exists = _rows(num_tokens, stride, ROWS, GROUP, GROUP_PAD, HEAD, IS_FLAT)
    rows = values / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        out + place[:, None] + column[None, :],
        rows.to(out.dtype.element_ty),
        mask=exists[:, None] & (column < HEAD)[None, :],
    )


@triton.jit
def _attend_tile(
    query, cache, table, masks, out, partial_values, partial_sums,
    num_tokens, first_position, seq_len, mask_start, query_len, first_in_span,
    first_chunk, end_chunk, partial,
    query_stride, block_stride, out_stride, scale, soft_cap,
    ROWS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr, PAGE: tl.constexpr, CHUNK_PAGES: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, HAS_TREES: tl.constexpr, IS_FLAT: tl.constexpr,
):  # fmt: skip
    """One query tile of one KV head; `query`, `cache`, `table`, `out` begin where it does."""
    row, column, key = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD), tl.arange(0, PAGE)
    place, exists = _rows(num_tokens, query_stride, ROWS, GROUP, GROUP_PAD, HEAD, IS_FLAT)
    mask = exists[:, None] & (column < HEAD)[None, :]
    queries = tl.load(query + place[:, None] + column[None, :], mask=mask, other=0.0)
    position = first_position + row // GROUP_PAD
    context = seq_len - query_len
    end_key = first_position + num_tokens
    num_masked = 0
    if HAS_TREES:
        end_key = tl.where(mask_start >= 0, seq_len, end_key)
        num_masked = tl.where(mask_start >= 0, query_len, 0)
    first_key = 0
    if WINDOW:
        first_key = tl.maximum(first_position + 1 - WINDOW, 0)

    for chunk in range(first_chunk, end_chunk):
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        values = tl.zeros((ROWS, HEAD_PAD), tl.float32)
        first_page = tl.maximum(chunk * CHUNK_PAGES, first_key // PAGE)
        end_page = tl.minimum((chunk + 1) * CHUNK_PAGES, (end_key + PAGE - 1) // PAGE)
        for page in range(first_page, end_page):
            block = cache + tl.load(table + page).to(tl.int64) * block_stride
            key_position = page * PAGE + key
            kv_mask = (key_position < seq_len)[:, None] & (column < HEAD)[None, :]
            kv = block + key[:, None] * (2 * HEAD) + column[None, :]
            keys = tl.load(kv, mask=kv_mask, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            if HAS_SOFT_CAP:  # tanh by exp, which all compilers have
                scores = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 / soft_cap * scores) + 1.0))
            visible = key_position[None, :] <= position[:, None]
            if HAS_TREES:
                own = key_position - context
                is_own = (own >= 0) & (own < num_masked)
                bits = masks + mask_start + (first_in_span * GROUP_PAD + row)[:, None] * query_len
                bits_mask = (row < num_tokens * GROUP_PAD)[:, None] & is_own[None, :]
                seen = tl.load(bits + own[None, :], mask=bits_mask, other=0)
                is_causal = (own < 0) | (num_masked == 0)
                visible = (visible & is_causal[None, :]) | (seen != 0)
            if WINDOW:
                visible = visible & (key_position[None, :] > position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            weights = tl.exp(scores - base[:, None])
            share = tl.exp(largest - base)
            total = total * share + tl.sum(weights, 1)
            vs = tl.load(kv + HEAD, mask=kv_mask, other=0.0)
            values = values * share[:, None]
            values = tl.dot(weights.to(vs.dtype), vs, values, input_precision="ieee")
            largest = new
        if partial >= 0:
            first_row = partial + (chunk - first_chunk) * ROWS
            tl.store(partial_sums + (first_row + row) * 2, largest)
            tl.store(partial_sums + (first_row + row) * 2 + 1, total)
            rows = partial_values + first_row.to(tl.int64) * HEAD_PAD
            tl.store(rows + row[:, None] * HEAD_PAD + column[None, :], values)
        else:
            _store(
                out, total, values, num_tokens, out_stride,
                ROWS, GROUP, GROUP_PAD, HEAD, HEAD_PAD, IS_FLAT,
            )  # fmt: skip


@triton.jit
def attend_kernel(
    query, cache, tables, masks, out, partial_values, partial_sums, tasks, counts,
    query_stride, head_stride, block_stride, table_stride, out_stride, out_head_stride,
    scale, soft_cap,
    NUM_PROGRAMS: tl.constexpr, MAX_ROWS: tl.constexpr, MIN_ROWS: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    PAGE: tl.constexpr, CHUNK_PAGES: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, HAS_TREES: tl.constexpr, IS_FLAT: tl.constexpr,
):  # fmt: skip
    """All tasks of a step; there are `counts[0]`. Tiles have MIN_ROWS to MAX_ROWS rows, those with
    masks fewer than 128 if possible, for which there are registers."""
    for number in range(tl.program_id(0), tl.load(counts), NUM_PROGRAMS):
        task = tasks + number * 12
        span, height = tl.load(task), tl.load(task + 1)
        first_token, num_tokens, head = tl.load(task + 2), tl.load(task + 3), tl.load(task + 4)
        first_chunk, end_chunk = tl.load(task + 5), tl.load(task + 6)
        partial, seq_len = tl.load(task + 7), tl.load(task + 8)
        query_len, first_in_span = tl.load(task + 9), tl.load(task + 10)
        mask_start = tl.load(task + 11)
        own_query = query + first_token.to(tl.int64) * query_stride + head * head_stride
        own_out = out + first_token.to(tl.int64) * out_stride + head * out_head_stride
        own_cache = cache + head * (2 * PAGE * HEAD)
        table = tables + span * table_stride
        first_position = seq_len - query_len + first_in_span
        for index in tl.static_range(3):
            if (16, 64, 128)[index] >= MIN_ROWS and (16, 64, 128)[index] <= MAX_ROWS:
                if height == index:
                    _attend_tile(
                        own_query, own_cache, table, masks, own_out, partial_values, partial_sums,
                        num_tokens, first_position, seq_len, mask_start, query_len, first_in_span,
                        first_chunk, end_chunk, partial,
                        query_stride, block_stride, out_stride, scale, soft_cap,
                        (16, 64, 128)[index], GROUP, GROUP_PAD, HEAD, HEAD_PAD, PAGE, CHUNK_PAGES,
                        WINDOW, HAS_SOFT_CAP, HAS_TREES and (index < 2 or MIN_ROWS == 128), IS_FLAT,
                    )  # fmt: skip


@triton.jit
def _merge_tile(
    partial_values, partial_sums, out, num_tokens, num_partials, out_stride,
    ROWS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr, IS_FLAT: tl.constexpr,
):  # fmt: skip
    """The chunks of one tile, in order; all pointers begin where it does."""
    row, column = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, HEAD_PAD), tl.float32)
    for number in range(num_partials):
        sums = partial_sums + (number * ROWS + row) * 2
        rows = partial_values + (number * ROWS + row[:, None]) * HEAD_PAD + column[None, :]
        more_largest, more_total = tl.load(sums), tl.load(sums + 1)
        new = tl.maximum(largest, more_largest)
        base = tl.where(new == float("-inf"), 0.0, new)
        share, more_share = tl.exp(largest - base), tl.exp(more_largest - base)
        total = total * share + more_total * more_share
        values = values * share[:, None] + tl.load(rows) * more_share[:, None]
        largest = new
    _store(
        out, total, values, num_tokens, out_stride,
        ROWS, GROUP, GROUP_PAD, HEAD, HEAD_PAD, IS_FLAT,
    )  # fmt: skip


@triton.jit
def merge_kernel(
    partial_values, partial_sums, out, merges, counts, out_stride, out_head_stride,
    NUM_PROGRAMS: tl.constexpr, MAX_ROWS: tl.constexpr, MIN_ROWS: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    IS_FLAT: tl.constexpr,
):  # fmt: skip
    """All tiles whose chunks were different tasks; there are `counts[1]`."""
    for number in range(tl.program_id(0), tl.load(counts + 1), NUM_PROGRAMS):
        merge = merges + number * 8
        height, first_token = tl.load(merge), tl.load(merge + 1)
        num_tokens, head = tl.load(merge + 2), tl.load(merge + 3)
        partial, num_partials = tl.load(merge + 4), tl.load(merge + 5)
        own_out = out + first_token.to(tl.int64) * out_stride + head * out_head_stride
        values = partial_values + partial.to(tl.int64) * HEAD_PAD
        sums = partial_sums + partial.to(tl.int64) * 2
        for index in tl.static_range(3):
            if (16, 64, 128)[index] >= MIN_ROWS and (16, 64, 128)[index] <= MAX_ROWS:
                if height == index:
                    _merge_tile(
                        values, sums, own_out, num_tokens, num_partials, out_stride,
                        (16, 64, 128)[index], GROUP, GROUP_PAD, HEAD, HEAD_PAD, IS_FLAT,
                    )  # fmt: skip


@triton.jit
def write_kv_kernel(
    key, value, cache, slots, num_tokens,
    key_stride, value_stride, block_stride,
    NUM_PROGRAMS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Store the keys and values of a step in their slots; a token with slot -1 is skipped."""
    column = tl.arange(0, HEAD_PAD)
    mask = column < HEAD
    for token in range(tl.program_id(0), num_tokens, NUM_PROGRAMS):
        slot = tl.load(slots + token).to(tl.int32)
        if slot >= 0:
            block = cache + (slot // PAGE).to(tl.int64) * block_stride
            for head in range(NUM_KV_HEADS):
                place = block + head * (2 * PAGE * HEAD) + (slot % PAGE) * (2 * HEAD) + column
                keys = tl.load(key + token * key_stride + head * HEAD + column, mask=mask)
                tl.store(place, keys.to(cache.dtype.element_ty), mask=mask)
                values = tl.load(value + token * value_stride + head * HEAD + column, mask=mask)
                tl.store(place + HEAD, values.to(cache.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The tasks of one step, on the device, for every layer of one shape."""

    shape: AttentionShape
    tasks: torch.Tensor
    """int32 `[at least num_tasks, 12]`."""
    merges: torch.Tensor
    """int32 `[at least num_merges, 8]`."""
    counts: torch.Tensor
    """int32 `[2]`: how many tasks and merges there are."""
    masks: torch.Tensor
    """uint8: those of the spans that have one."""
    partial_values: torch.Tensor
    partial_sums: torch.Tensor
    num_tokens: int
    max_rows: int
    has_trees: bool
    num_programs: int


def group_pad(shape: AttentionShape) -> int:
    """Rows of a tile for each token: its query heads, filled up to a power of two."""
    return int(triton.next_power_of_2(shape.num_heads // shape.num_kv_heads))


def head_pad(shape: AttentionShape) -> int:
    """Columns of a tile: those of a head, filled up to a power of two."""
    return int(triton.next_power_of_2(shape.head_size))


def chunk_pages(shape: AttentionShape) -> int:
    """Pages of a chunk."""
    return max(1, CHUNK_KEYS // shape.block_size)


def heights(shape: AttentionShape, max_rows: int = HEIGHTS[-1]) -> tuple[int, ...]:
    """The rows that tiles may have: those of HEIGHTS in which a token fits, up to `max_rows` if one
    of them does."""
    fitting = [height for height in HEIGHTS if height >= group_pad(shape)]
    return tuple(height for height in fitting if height <= max(max_rows, fitting[0]))


def max_rows_on_npu(shape: AttentionShape) -> int:
    """The tallest tile for which an NPU has buffers (192 KiB of a core's), as its compiler says."""
    is_large = head_pad(shape) * shape.block_size > 128 * 64 or head_pad(shape) > 128
    return 64 if is_large or shape.sliding_window else HEIGHTS[-1]


def unsupported(shape: AttentionShape) -> str | None:
    """Why the kernel cannot serve a layer; None if it can."""
    if group_pad(shape) > HEIGHTS[-1]:
        group = shape.num_heads // shape.num_kv_heads
        return f"a KV head has {group} query heads; the kernel has tiles of {HEIGHTS[-1]} rows"
    if shape.block_size & (shape.block_size - 1) or shape.block_size < 16:
        return f"block_size ({shape.block_size}) must be a power of two of at least 16"
    return None


def tables_of(
    shape: AttentionShape,
    query_start_loc: Int32s,
    seq_lens: Int32s,
    mask_start: Int32s,
    num_programs: int,
    max_rows: int = HEIGHTS[-1],
) -> tuple[Int32s, Int32s, int, int]:
    """The tables of tasks and merges, the rows of all partial results, and those of the tallest
    tile.

    Programs take every `num_programs`-th task: the costliest come first, and every second round is
    dealt in reverse, so that the sums are about even.
    """
    pad, sizes = group_pad(shape), heights(shape, max_rows)
    query_lens = np.diff(query_start_loc)
    cut = SpanCut(
        group=pad,
        num_kv_heads=shape.num_kv_heads,
        kv_chunk=chunk_pages(shape) * shape.block_size,
        sliding_window=shape.sliding_window or 0,
        num_threads=num_programs,
        costs=_ONE_TILE,
        query_rows=sizes[-1],
        masked_rows=max((h for h in sizes if h < HEIGHTS[-1]), default=HEIGHTS[-1]),
        min_rows=sizes[0],
        merges_all=True,
    )
    tiles = plan_query_tiles(query_lens, seq_lens, mask_start >= 0, cut)
    first_height = HEIGHTS.index(sizes[0])

    def height_of(num_tokens: Int32s) -> Int32s:
        return first_height + np.searchsorted(sizes, num_tokens * pad).astype(np.int32)

    # The chunks of a tile have places one after the other, each of as many rows as the tile.
    span, first, count, head, place, num_places = tiles.merges.T
    height = height_of(count)
    rows = np.zeros(tiles.num_partials + 1, np.int64)
    each = np.repeat(np.arange(len(place)), num_places)
    rows[place[each] + index_in_run(num_places) + 1] = np.array(HEIGHTS)[height[each]]
    first_row = np.cumsum(rows)
    merges = np.zeros((len(place), MERGE_FIELDS), np.int32)
    merges[:, :6] = np.stack(
        [height, query_start_loc[span] + first, count, head, first_row[place], num_places], axis=1
    )

    span, first, count, head, first_chunk, end_chunk, place, *_ = tiles.tasks.T
    partial = np.where(place < 0, -1, first_row[np.maximum(place, 0)])
    tasks = np.stack(
        [
            span, height_of(count), query_start_loc[span] + first, count, head,
            first_chunk, end_chunk, partial,
            seq_lens[span], query_lens[span], first, mask_start[span],
        ],
        axis=1,
    ).astype(np.int32)  # fmt: skip
    tallest = int(height_of(count).max(initial=first_height))
    return _dealt(tasks, num_programs), merges, int(first_row[-1]), HEIGHTS[tallest]


_ONE_TILE = TileCosts((1.0,) * HEIGHTS[-1])


def _dealt(tasks: Int32s, num_programs: int) -> Int32s:
    """The tasks with every second round reversed."""
    order = np.arange(len(tasks))
    for begin in range(num_programs, len(tasks), 2 * num_programs):
        order[begin : begin + num_programs] = order[begin : begin + num_programs][::-1]
    return np.ascontiguousarray(tasks[order])


class AttentionPlanner:
    """Plans the steps of the layers of one shape, each in the place of the one before.

    Its tables stay where they are on the device while there is room in them: a captured graph finds
    the plan of the next step where it was captured.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        num_programs: int,
        device: torch.device | str = "cpu",
        max_rows: int = HEIGHTS[-1],
    ) -> None:
        """Plan for so many programs, with tiles of at most `max_rows` rows; ValueError if the
        kernel cannot serve the shape."""
        if problem := unsupported(shape):
            raise ValueError(problem)
        self._shape, self._num_programs, self._max_rows = shape, num_programs, max_rows
        self._device = device
        self._tables: dict[str, torch.Tensor] = {}

    def plan(
        self,
        query_start_loc: Int32s,
        seq_lens: Int32s,
        tree_masks: Mapping[int, NDArray[np.bool_]] | None = None,
    ) -> AttentionPlan:
        """Plan a step; the plan before is no longer valid.

        Span r has the query tokens `query_start_loc[r]` to `query_start_loc[r + 1]`, the last of
        its `seq_lens[r]` tokens; each sees the keys up to its own position. If span r has a tree
        mask, its token i sees all keys before the span, and token j of the span where
        `tree_masks[r][i, j]`.
        """
        query_start_loc, seq_lens = query_start_loc.astype(np.int32), seq_lens.astype(np.int32)
        mask_start = np.full(len(seq_lens), NO_TREE, np.int32)
        parts = [np.zeros(1, np.uint8)]
        for span, mask in (tree_masks or {}).items():
            mask_start[span] = sum(map(len, parts))
            parts.append(mask.astype(np.uint8).repeat(group_pad(self._shape), axis=0).ravel())
        tasks, merges, num_rows, max_rows = tables_of(
            self._shape, query_start_loc, seq_lens, mask_start, self._num_programs, self._max_rows
        )
        return AttentionPlan(
            shape=self._shape,
            tasks=self._written("tasks", tasks),
            merges=self._written("merges", merges),
            counts=self._written("counts", np.array([len(tasks), len(merges)], np.int32)),
            masks=self._written("masks", np.concatenate(parts)),
            **self._partials(num_rows),
            num_tokens=int(query_start_loc[-1]),
            max_rows=max_rows,
            has_trees=bool(tree_masks),
            num_programs=self._num_programs,
        )

    def reserve(self, num_spans: int, query_len: int, seq_len: int) -> None:
        """Make room for every step of at most so many spans, each with at most so many query tokens
        and keys."""
        shape, sizes = self._shape, heights(self._shape, self._max_rows)
        num_chunks = -(-seq_len // (chunk_pages(shape) * shape.block_size))
        per_tile = sizes[-1] // group_pad(shape)
        num_tiles = num_spans * -(-query_len // per_tile) * shape.num_kv_heads
        rows = next(h for h in sizes if h >= min(query_len, per_tile) * group_pad(shape))
        self._room("tasks", num_tiles * num_chunks, (TASK_FIELDS,), torch.int32)
        self._room("merges", num_tiles, (MERGE_FIELDS,), torch.int32)
        self._partials(num_tiles * num_chunks * rows if num_chunks > 1 else 0)

    def _partials(self, num_rows: int) -> dict[str, torch.Tensor]:
        return {
            "partial_values": self._room(
                "partial_values", num_rows, (head_pad(self._shape),), torch.float32
            ),
            "partial_sums": self._room("partial_sums", num_rows, (2,), torch.float32),
        }

    def _written(self, name: str, values: NDArray[Any]) -> torch.Tensor:
        source = torch.from_numpy(values)
        table = self._room(name, len(values), values.shape[1:], source.dtype)
        table[: len(values)].copy_(source, non_blocking=True)
        return table

    def _room(
        self, name: str, length: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """The table of this name, with room for so many rows; a larger one if it has less."""
        table = self._tables.get(name)
        if table is None or len(table) < length:
            room = max(1, length if table is None else max(length, 2 * len(table)))
            table = torch.empty((room, *shape), dtype=dtype, device=self._device)
            self._tables[name] = table
        return table


def plan_attention(
    shape: AttentionShape,
    query_start_loc: Int32s,
    seq_lens: Int32s,
    tree_masks: Mapping[int, NDArray[np.bool_]] | None = None,
    *,
    num_programs: int,
    device: torch.device | str = "cpu",
    max_rows: int = HEIGHTS[-1],
) -> AttentionPlan:
    """Plan one step in tables of its own; see `AttentionPlanner`."""
    planner = AttentionPlanner(shape, num_programs=num_programs, device=device, max_rows=max_rows)
    return planner.plan(query_start_loc, seq_lens, tree_masks)


def attend(
    plan: AttentionPlan,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    *,
    is_flat: bool = False,
    num_warps: int = 4,
    num_stages: int = 2,
) -> torch.Tensor:
    """Attend from `query [num_tokens, num_heads, head_size]` into `out`, which has its shape.

    `kv_cache` is `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, keys before values, and
    `block_table` int32 `[num_spans, max_blocks]` has each span's blocks in it. With `is_flat` the
    rows of a tile are copied next to each other first: an NPU loads blocks, not rows.
    """
    shape, sizes = plan.shape, heights(plan.shape)
    _check_cache(shape, kv_cache)
    for name, tensor in (("query", query), ("out", out)):
        expected = (plan.num_tokens, shape.num_heads, shape.head_size)
        if tensor.shape != expected or tensor[0].stride() != (shape.head_size, 1):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; it must be "
                f"{expected} with contiguous rows"
            )
    common = {
        "NUM_PROGRAMS": plan.num_programs,
        "MAX_ROWS": plan.max_rows,
        "MIN_ROWS": sizes[0],
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "GROUP_PAD": group_pad(shape),
        "HEAD": shape.head_size,
        "HEAD_PAD": head_pad(shape),
        "IS_FLAT": is_flat,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    result = out
    if is_flat:
        query = flattened(shape, query)
        out = torch.empty_like(query)
    launch(
        attend_kernel,
        plan.num_programs,
        query,
        kv_cache,
        block_table,
        plan.masks,
        out,
        plan.partial_values,
        plan.partial_sums,
        plan.tasks,
        plan.counts,
        *_strides(shape, query),
        kv_cache.stride(0),
        block_table.stride(0),
        *_strides(shape, out),
        shape.scale,
        shape.soft_cap or 0.0,
        PAGE=shape.block_size,
        CHUNK_PAGES=chunk_pages(shape),
        WINDOW=shape.sliding_window or 0,
        HAS_SOFT_CAP=shape.soft_cap is not None,
        HAS_TREES=plan.has_trees,
        **common,
    )
    launch(
        merge_kernel,
        plan.num_programs,
        plan.partial_values,
        plan.partial_sums,
        out,
        plan.merges,
        plan.counts,
        *_strides(shape, out),
        **common,
    )
    if is_flat:
        group = shape.num_heads // shape.num_kv_heads
        rows = out[:, :, :group].permute(1, 0, 2, 3)
        result.copy_(rows.reshape(result.shape))
    return result


def flattened(shape: AttentionShape, query: torch.Tensor) -> torch.Tensor:
    """The rows of each KV head next to each other, `[num_kv_heads, num_tokens, group_pad,
    head_size]`; those that only fill up the group are zero."""
    group = shape.num_heads // shape.num_kv_heads
    rows = query.view(len(query), shape.num_kv_heads, group, shape.head_size).permute(1, 0, 2, 3)
    flat = query.new_zeros((shape.num_kv_heads, len(query), group_pad(shape), shape.head_size))
    flat[:, :, :group] = rows
    return flat


def _strides(shape: AttentionShape, rows: torch.Tensor) -> tuple[int, int]:
    """From a token to the next, and from a KV head to the next."""
    if rows.ndim == 4:
        return rows.stride(1), rows.stride(0)
    return rows.stride(0), shape.num_heads // shape.num_kv_heads * shape.head_size


def write_kv(
    shape: AttentionShape,
    kv_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_programs: int,
) -> None:
    """Store keys and values `[num_tokens, num_kv_heads, head_size]` in their slots.

    Tokens with slot -1 are skipped.
    """
    _check_cache(shape, kv_cache)
    expected = (len(slot_mapping), shape.num_kv_heads, shape.head_size)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}")
    launch(
        write_kv_kernel,
        num_programs,
        key,
        value,
        kv_cache,
        slot_mapping,
        len(slot_mapping),
        key.stride(0),
        value.stride(0),
        kv_cache.stride(0),
        NUM_PROGRAMS=num_programs,
        NUM_KV_HEADS=shape.num_kv_heads,
        HEAD=shape.head_size,
        HEAD_PAD=head_pad(shape),
        PAGE=shape.block_size,
    )


def _check_cache(shape: AttentionShape, kv_cache: torch.Tensor) -> None:
    expected = (shape.num_kv_heads, shape.block_size, 2 * shape.head_size)
    if kv_cache.shape[1:] != expected or not kv_cache.is_contiguous():
        raise ValueError(
            f"kv_cache has shape {tuple(kv_cache.shape)} and strides {kv_cache.stride()}; it must "
            f"be contiguous, [num_blocks, {', '.join(map(str, expected))}]"
        )
