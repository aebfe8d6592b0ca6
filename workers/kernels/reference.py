"""Slow, obvious twins of the kernels and their planning, which tests compare the fast ones to."""

import math

import numpy as np
import numpy.typing as npt

from workers.kernels.tiles import (
    TASK_COST,
    TASKS_PER_THREAD,
    SpanCut,
    row_tiles,
)

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def linear(x: Float32Array, weight: Float32Array, bias: Float32Array | None = None) -> Float64Array:
    """Multiply rows `x` [M, K] by `weight` [N, K]: `x weight^T + bias`, [M, N]."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    return np.asarray(y if bias is None else y + bias, dtype=np.float64)


def gated_linear(
    x: Float32Array, weight: Float32Array, bias: Float32Array | None = None
) -> Float64Array:
    """Compute `silu(gate) * up`, [M, I]; the rows of `weight` [2 * I, K] are gates, then ups."""
    gate, up = np.split(linear(x, weight, bias), 2, axis=1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up, dtype=np.float64)


def round_to_bf16(values: Float32Array) -> Float32Array:
    """Round finite numbers to the nearest bf16, ties to even; the result is still float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    # bf16 is the upper half of float32; the lower half decides whether to carry one up.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


def round_to_int8(values: Float32Array) -> Float32Array:
    """Each group of 32 columns as integers from -127 to 127 times a scale of its own."""
    rows, columns = values.shape
    groups = np.zeros((rows, -(-columns // 32), 32), np.float32)
    groups.reshape(rows, -1)[:, :columns] = values
    scale = np.abs(groups).max(axis=2, keepdims=True) * np.float32(1 / 127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-35)
    rounded: Float32Array = np.rint(groups * inverse) * scale
    return rounded.reshape(rows, -1)[:, :columns]


def visible_keys(
    num_queries: int,
    seq_len: int,
    sliding_window: int | None = None,
    tree_mask: BoolArray | None = None,
) -> BoolArray:
    """Which of `seq_len` keys each query sees, [num_queries, seq_len]; the queries come last.

    A tree mask [num_queries, num_queries] replaces the causal order among the queries.
    """
    start = seq_len - num_queries
    own = np.arange(start, seq_len)[:, None]
    position = np.arange(seq_len)[None, :]
    visible: BoolArray = position <= own
    if tree_mask is not None:
        visible[:, start:] = tree_mask
    if sliding_window is not None:
        visible &= position > own - sliding_window
    return visible


def attend(
    query: Float32Array,
    key: Float32Array,
    value: Float32Array,
    *,
    scale: float,
    visible: BoolArray,
    soft_cap: float | None = None,
) -> Float64Array:
    """Attend from one span's queries [Q, Hq, D] to all keys and values [S, Hkv, D] of its request.

    Query head h reads key head h // (Hq / Hkv). `visible` is [Q, S]; the row of a query that sees
    no key is zero.
    """
    group_size = query.shape[1] // key.shape[1]
    out = np.empty(query.shape, dtype=np.float64)
    for head in range(query.shape[1]):
        keys = key[:, head // group_size].astype(np.float64)
        values = value[:, head // group_size].astype(np.float64)
        scores = query[:, head].astype(np.float64) @ keys.T * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(visible, scores, -np.inf)
        largest = scores.max(axis=1, keepdims=True, initial=-1e300)  # not the -inf of a blind query
        weights = np.exp(scores - largest)
        sums = weights.sum(axis=1, keepdims=True)
        out[:, head] = weights @ values / np.where(sums > 0, sums, 1)
    return out


def cut_spans(
    query_lens: list[int], seq_lens: list[int], sees_all: list[bool], cut: SpanCut
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The rows of `QueryTiles.tasks` and `QueryTiles.merges`, by one loop after another."""
    tiles = []
    for span, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        max_rows = cut.masked_rows if sees_all[span] else cut.query_rows
        max_tokens = max(1, max_rows // cut.group)
        context = seq_len - query_len
        for first in range(0, query_len, max_tokens):
            count = min(max_tokens, query_len - first)
            end_key = seq_len if sees_all[span] else context + first + count
            window = cut.sliding_window or seq_len
            first_key = max(0, context + first + 1 - window)
            chunks = range(first_key // cut.kv_chunk, math.ceil(end_key / cut.kv_chunk))
            cost = max(count * cut.group, cut.min_rows) * (end_key - first_key) + TASK_COST
            tiles.append(((span, first, count), chunks, cost))

    total_cost = sum(cost for *_, cost in tiles) * cut.num_kv_heads
    max_cost = total_cost / (cut.num_threads * TASKS_PER_THREAD)
    heights_of_size = {count: row_tiles(count * cut.group, cut.costs) for (*_, count), *_ in tiles}
    first_height, num_heights = {}, 0
    for count in sorted(heights_of_size):
        first_height[count] = num_heights
        num_heights += len(heights_of_size[count])

    pieces = []
    splits = []
    num_places = 0
    for tile, chunks, cost in tiles:
        num_pieces = 1
        if cut.num_threads > 1:
            num_pieces = min(len(chunks), math.ceil(cost / max_cost))
        place = None
        if num_pieces > 1 or (cut.merges_all and len(chunks) > 1):
            place = num_places
            splits.append((tile, place, len(chunks)))
            num_places += len(chunks)
        for piece in range(num_pieces):
            begin, end = (i * len(chunks) // num_pieces for i in (piece, piece + 1))
            pieces.append((cost / num_pieces, tile, chunks[0], begin, end, place))

    pieces.sort(key=lambda piece: -piece[0])
    tasks: list[tuple[int, ...]] = [
        (*tile, head, first_chunk + begin, first_chunk + end,
         -1 if place is None else place + begin + head * num_places,
         first_height[tile[2]], len(heights_of_size[tile[2]]))
        for _, tile, first_chunk, begin, end, place in pieces
        for head in range(cut.num_kv_heads)
    ]  # fmt: skip
    merges: list[tuple[int, ...]] = [
        (*tile, head, place + head * num_places, num_chunks)
        for tile, place, num_chunks in splits
        for head in range(cut.num_kv_heads)
    ]
    return tasks, merges
