"""The attention meta-kernel on CPUs: one call for a step's prefill, decode and verify spans."""

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.kernels import native, shapes
from workers.kernels.gemm import Floats, Format
from workers.kernels.shapes import AttentionShape
from workers.kernels.tile_table import tile_costs
from workers.kernels.tiles import Int32s, QueryTiles, SpanCut, plan_query_tiles


def unsupported(num_heads: int, num_kv_heads: int, head_size: int, block_size: int) -> str | None:
    """Why the kernel cannot serve a layer of these sizes; None if it can."""
    panel = 2 * native.kernels().lanes
    return shapes.unsupported(num_heads, num_kv_heads, head_size, block_size, multiple=panel)


def shape_struct(shape: AttentionShape) -> native.AttentionShapeStruct:
    """The shape as C++ sees it, for a contiguous KV cache; ValueError if C++ has no such kernel."""
    return _shape_struct(shape, native.kernels().lanes)


@functools.lru_cache(maxsize=256)
def _shape_struct(shape: AttentionShape, lanes: int) -> native.AttentionShapeStruct:
    """`shape_struct` for an instruction set with vectors of `lanes` floats."""
    sizes = (shape.num_heads, shape.num_kv_heads, shape.head_size, shape.block_size)
    if problem := shapes.unsupported(*sizes, multiple=2 * lanes):
        raise ValueError(problem)
    head_stride = 2 * shape.block_size * shape.head_size
    return native.AttentionShapeStruct(
        *sizes,
        shape.scale,
        shape.soft_cap or 0.0,
        shape.sliding_window or 0,
        Format.BF16_PAIRS if shape.kv_bf16 else Format.FP32,
        head_stride * shape.num_kv_heads,
        head_stride,
    )


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The tasks of one step, for every layer of one shape."""

    shape: AttentionShape
    num_tokens: int
    seq_lens: Int32s
    """`[num_spans]`."""
    tiles: QueryTiles
    struct: native.AttentionPlanStruct
    arrays: tuple[NDArray[Any] | None, ...]
    """Memory that `struct` points into, kept alive here."""


def plan_attention(
    shape: AttentionShape,
    query_start_loc: Int32s,
    seq_lens: Int32s,
    tree_masks: Mapping[int, NDArray[np.bool_]] | None = None,
) -> AttentionPlan:
    """Plan one step; ValueError if the kernel cannot serve the shape or a span is malformed.

    Span r has the query tokens `query_start_loc[r]` to `query_start_loc[r + 1]`, the last of its
    `seq_lens[r]` tokens; each sees the keys up to its own position. If span r has a tree mask, its
    token i sees all keys before the span, and token j of the span where `tree_masks[r][i, j]`.
    """
    shape_struct(shape)  # refuses before anything is planned
    for name, array in (("query_start_loc", query_start_loc), ("seq_lens", seq_lens)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} is {array.dtype}; it must be int32")
    # Copies: the plan outlives the step's buffers.
    query_start_loc, seq_lens = query_start_loc.astype(np.int32), seq_lens.astype(np.int32)
    query_lens = np.diff(query_start_loc)
    _check_spans(query_start_loc, query_lens, seq_lens)
    mask_start, masks = _flatten(tree_masks or {}, query_lens)
    tiles = plan_query_tiles(
        query_lens,
        seq_lens,
        np.zeros(len(seq_lens), bool) if mask_start is None else mask_start >= 0,
        SpanCut(
            group=shape.num_heads // shape.num_kv_heads,
            num_kv_heads=shape.num_kv_heads,
            kv_chunk=native.kernels().kv_chunk,
            sliding_window=shape.sliding_window or 0,
            num_threads=native.num_threads(),
            costs=tile_costs(),
        ),
    )
    arrays = (
        query_start_loc, seq_lens, mask_start, masks, tiles.heights, tiles.tasks, tiles.merges
    )  # fmt: skip
    struct = native.AttentionPlanStruct(
        len(seq_lens),
        len(tiles.tasks),
        len(tiles.merges),
        tiles.num_partials,
        tiles.max_rows,
        *map(native.pointer, arrays),
    )
    num_tokens = int(query_start_loc[-1])
    return AttentionPlan(shape, num_tokens, seq_lens, tiles, struct, arrays)


def _check_spans(query_start_loc: Int32s, query_lens: Int32s, seq_lens: Int32s) -> None:
    if len(query_start_loc) != len(seq_lens) + 1 or query_start_loc[0] != 0:
        raise ValueError(
            f"query_start_loc {query_start_loc.tolist()} must begin with 0 and have one more entry "
            f"than seq_lens {seq_lens.tolist()}"
        )
    if (wrong := np.flatnonzero((query_lens < 0) | (query_lens > seq_lens))).size:
        raise ValueError(
            f"span {wrong[0]} has {query_lens[wrong[0]]} query tokens and a seq_len of "
            f"{seq_lens[wrong[0]]}, which must include them"
        )


def _flatten(
    tree_masks: Mapping[int, NDArray[np.bool_]], query_lens: Int32s
) -> tuple[Int32s | None, NDArray[np.uint8] | None]:
    if not tree_masks:
        return None, None
    start = np.full(len(query_lens), -1, np.int32)
    parts, length = [], 0
    for span, mask in tree_masks.items():
        if not 0 <= span < len(query_lens):
            raise ValueError(f"tree_masks[{span}] belongs to no span; there are {len(query_lens)}")
        size = query_lens[span]
        if mask.shape != (size, size) or mask.dtype != np.bool_:
            raise ValueError(
                f"tree_masks[{span}] is {mask.dtype} with shape {mask.shape}; "
                f"it must be bool with shape ({size}, {size})"
            )
        start[span] = length
        parts.append(mask.astype(np.uint8).ravel())
        length += mask.size
    return start, np.concatenate(parts)


def write_kv(
    shape: AttentionShape,
    kv_cache: NDArray[Any],
    key: Floats,
    value: Floats,
    slot_mapping: NDArray[np.int64],
) -> None:
    """Store keys and values `[num_tokens, num_kv_heads, head_size]` in their slots.

    Tokens with slot -1 are skipped. The layout inside a block of `kv_cache` is the kernel's own; in
    bf16 its elements are uint16.
    """
    _check_cache(shape, kv_cache)
    expected = (len(slot_mapping), shape.num_kv_heads, shape.head_size)
    for name, array in (("key", key), ("value", value)):
        _check(name, array, np.float32, expected)
    _check("slot_mapping", slot_mapping, np.int64, (len(slot_mapping),))
    slots = kv_cache.shape[0] * shape.block_size
    if slot_mapping.size and slot_mapping.max() >= slots:
        raise ValueError(f"slot_mapping holds {slot_mapping.max()}; the cache has {slots} slots")
    native.kernels().write_kv(
        ctypes.byref(shape_struct(shape)),
        kv_cache.ctypes.data,
        len(slot_mapping),
        key.ctypes.data,
        key.strides[0] // 4,
        value.ctypes.data,
        value.strides[0] // 4,
        slot_mapping.ctypes.data,
    )


def attend(
    plan: AttentionPlan,
    query: Floats,
    kv_cache: NDArray[Any],
    block_table: Int32s,
    out: Floats,
) -> Floats:
    """Attend from `query [num_tokens, num_heads, head_size]` into `out`, which has its shape.

    `block_table [num_spans, max_blocks]` holds each span's blocks in `kv_cache`. A row's bits
    depend on its query, its keys and the block size only.
    """
    shape = plan.shape
    _check_cache(shape, kv_cache)
    expected = (plan.num_tokens, shape.num_heads, shape.head_size)
    _check("query", query, np.float32, expected)
    _check("out", out, np.float32, expected)
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    spans = len(plan.seq_lens)
    _check("block_table", block_table, np.int32, (spans, *block_table.shape[1:2]))
    needed = -(-int(plan.seq_lens.max(initial=0)) // shape.block_size)
    if spans and block_table.shape[1] < needed:
        raise ValueError(f"block_table has {block_table.shape[1]} columns; the spans need {needed}")
    data = native.AttentionDataStruct(
        query.ctypes.data,
        query.strides[0] // 4,
        kv_cache.ctypes.data,
        block_table.ctypes.data,
        block_table.strides[0] // 4,
        out.ctypes.data,
        out.strides[0] // 4,
    )
    native.kernels().attend(
        ctypes.byref(shape_struct(shape)), ctypes.byref(plan.struct), ctypes.byref(data)
    )
    return out


def _check_cache(shape: AttentionShape, kv_cache: NDArray[Any]) -> None:
    blocks = kv_cache.shape[0] if kv_cache.ndim else 0
    expected = (blocks, shape.num_kv_heads, shape.block_size, 2 * shape.head_size)
    _check("kv_cache", kv_cache, np.uint16 if shape.kv_bf16 else np.float32, expected)
    if not kv_cache.flags.c_contiguous:
        raise ValueError(f"kv_cache has strides {kv_cache.strides}; it must be contiguous")


def _check(name: str, array: NDArray[Any], dtype: type, expected: tuple[int, ...]) -> None:
    """Refuse what C++ would misread; only the first dimension may have any stride."""
    if array.dtype != dtype:
        raise ValueError(f"{name} is {array.dtype}; it must be {np.dtype(dtype)}")
    if array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}; it must be {expected}")
    rows = array[0] if array.ndim > 1 and array.size else array
    if not rows.flags.c_contiguous:
        raise ValueError(f"{name} has strides {array.strides}; each row must be contiguous")
