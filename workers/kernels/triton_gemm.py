"""The virtual-padding GEMM in Triton, for CUDA GPUs and Ascend NPUs: one source for both.

`y = x W^T + bias` for any number of rows. Rows are cut into tiles of a few heights, and a program
works down its part of a table of tasks, each a row tile by a block of output features. Rows past a
tile's end are neither read nor written, so nothing is padded in memory. The table is in the memory
of the device: a captured graph replays with another one.

The sum of a row has one order in all tiles: blocks of BLOCK_K input features, one after the other.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from workers.kernels.tiles import Int32s, TileCosts, row_tiles
from workers.kernels.triton_launch import launch

HEIGHTS = (16, 64, 128)
"""Row tiles; the smallest is the smallest that a matrix unit takes."""


@dataclass(frozen=True, slots=True)
class GemmTiles:
    """How the product with one weight is cut: from a measured table, or built in."""

    block_n: int = 64
    """Output features of a task."""
    block_k: int = 64
    """Input features of one step of a sum."""
    num_columns: int = 8
    """Blocks of output features that row tiles go through before the next ones: what is read again
    meanwhile has to be in the second-level cache (the swizzle)."""
    num_warps: int = 8
    num_stages: int = 3


@triton.jit
def _linear_tile(
    x,
    weight,
    scales,
    bias,
    out,
    x_stride,
    out_stride,
    num_features,
    num_inputs,
    first_row,
    num_rows,
    first_feature,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One row tile by one block of output features; of a gated weight, silu(gate) * up."""
    row = tl.arange(0, ROWS)
    feature = first_feature + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    has_row = row < num_rows
    has_feature = feature < num_features
    x_tile = x + first_row.to(tl.int64) * x_stride + row[:, None] * x_stride + column[None, :]
    w_tile = weight + feature[:, None].to(tl.int64) * num_inputs + column[None, :]
    up_tile = w_tile + num_features.to(tl.int64) * num_inputs
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    up_total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for done in range(0, num_inputs, BLOCK_K):
        has_column = column < num_inputs - done
        x_mask = has_row[:, None] & has_column[None, :]
        w_mask = has_feature[:, None] & has_column[None, :]
        xs = tl.load(x_tile + done, mask=x_mask, other=0.0)
        ws = tl.load(w_tile + done, mask=w_mask, other=0).to(xs.dtype)
        total = tl.dot(xs, tl.trans(ws), total, input_precision="ieee")
        if GATED:
            ups = tl.load(up_tile + done, mask=w_mask, other=0).to(xs.dtype)
            up_total = tl.dot(xs, tl.trans(ups), up_total, input_precision="ieee")
    if HAS_SCALES:
        total *= tl.load(scales + feature, mask=has_feature, other=0.0)[None, :]
        if GATED:
            up_scales = tl.load(scales + num_features + feature, mask=has_feature, other=0.0)
            up_total *= up_scales[None, :]
    if HAS_BIAS:
        total += tl.load(bias + feature, mask=has_feature, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_bias = tl.load(bias + num_features + feature, mask=has_feature, other=0.0)
            up_total += up_bias.to(tl.float32)[None, :]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * up_total
    out_tile = out + first_row.to(tl.int64) * out_stride + row[:, None] * out_stride
    tl.store(
        out_tile + feature[None, :],
        total.to(out.dtype.element_ty),
        mask=has_row[:, None] & has_feature[None, :],
    )


@triton.jit
def linear_kernel(
    x,
    weight,
    scales,
    bias,
    out,
    tasks,
    num_tasks,
    x_stride,
    out_stride,
    num_features,
    num_inputs,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    GATED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`x [M, K]` by `weight [N, K]`, as the table of tasks says; `num_features` is N, or half of it
    for a gated weight, and `num_tasks` is in memory. No tile has more than MAX_ROWS rows."""
    for number in range(tl.program_id(0), tl.load(num_tasks), NUM_PROGRAMS):
        task = tasks + number * 4
        first_row, num_rows = tl.load(task), tl.load(task + 1)
        first_feature, height = tl.load(task + 2), tl.load(task + 3)
        for index in tl.static_range(3):
            if (16, 64, 128)[index] <= MAX_ROWS:
                if height == index:
                    _linear_tile(
                        x,
                        weight,
                        scales,
                        bias,
                        out,
                        x_stride,
                        out_stride,
                        num_features,
                        num_inputs,
                        first_row,
                        num_rows,
                        first_feature,
                        (16, 64, 128)[index],
                        BLOCK_N,
                        BLOCK_K,
                        GATED,
                        HAS_SCALES,
                        HAS_BIAS,
                    )


@lru_cache
def tile_costs() -> TileCosts:
    """Costs of row tiles where none were measured: a tile takes as long as the next of HEIGHTS,
    and half as long again as the tallest, for the weights that it reads."""
    fitting = [min(h for h in HEIGHTS if h >= rows) for rows in range(1, HEIGHTS[-1] + 1)]
    return TileCosts(tuple(height + HEIGHTS[-1] / 2 for height in fitting))


@lru_cache(maxsize=1 << 12)
def plan_linear(num_rows: int, num_features: int, tiles: GemmTiles, costs: TileCosts) -> Int32s:
    """The tasks `[num_tasks, 4]` of a product with `num_rows` rows: first row, number of rows,
    first output feature, and which of HEIGHTS. Programs take them in this order: all row tiles of a
    few blocks of output features, then the next blocks."""
    rows = np.array(row_tiles(num_rows, costs), np.int32)
    first = np.cumsum(rows) - rows
    height = np.searchsorted(HEIGHTS, rows)
    blocks = np.arange(0, num_features, tiles.block_n)
    parts = []
    for begin in range(0, len(blocks), tiles.num_columns):
        columns = blocks[begin : begin + tiles.num_columns]
        tile, column = np.divmod(np.arange(len(rows) * len(columns)), len(columns))
        parts.append(np.stack([first[tile], rows[tile], columns[column], height[tile]], axis=1))
    tasks: Int32s = np.concatenate(parts).astype(np.int32)
    return tasks


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Weight:
    """A weight `[n, k]`, as the kernel reads it: the checkpoint's own layout."""

    values: torch.Tensor
    """bf16, fp16, fp32, or int8."""
    scales: torch.Tensor | None = None
    """fp32 `[n]`, one for each output feature of int8 values."""
    gated: bool = False
    """Whether the first half of the rows is a gate and the second what it multiplies."""
    tiles: GemmTiles = GemmTiles()

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.is_contiguous():
            raise ValueError(
                f"weight has shape {tuple(self.values.shape)} and strides {self.values.stride()}; "
                "it must be a contiguous matrix"
            )
        if (self.values.dtype == torch.int8) != (self.scales is not None):
            raise ValueError(
                f"weight is {self.values.dtype}; int8 values, and no other, have scales"
            )
        if self.gated and self.values.shape[0] % 2:
            raise ValueError(
                f"weight has {self.values.shape[0]} rows; gate and up need an even number"
            )

    @property
    def out_features(self) -> int:
        """Columns of what `linear` returns."""
        return self.values.shape[0] // (2 if self.gated else 1)


def quantised(
    weight: torch.Tensor, *, gated: bool = False, tiles: GemmTiles | None = None
) -> Weight:
    """The int8 form of a weight `[n, k]`, with one scale per output feature."""
    scales = weight.float().abs().amax(dim=1).clamp(min=1e-30) / 127
    values = (weight.float() / scales[:, None]).round().to(torch.int8)
    return Weight(values, scales, gated, tiles or GemmTiles())


def linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    num_programs: int,
) -> torch.Tensor:
    """Multiply `x [m, k]`: `x W^T + bias`, `[m, out_features]`, on so many programs.

    Rows of `x` and `out` may have any stride. A row's bits do not depend on the other rows.
    ValueError names what does not fit.
    """
    if x.ndim != 2 or x.shape[1] != weight.values.shape[1] or x.stride(1) != 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}; it must have "
            f"{weight.values.shape[1]} contiguous columns"
        )
    if out is None:
        out = x.new_empty((x.shape[0], weight.out_features))
    if out.shape != (x.shape[0], weight.out_features) or out.stride(1) != 1:
        raise ValueError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}; it must be "
            f"[{x.shape[0]}, {weight.out_features}] with contiguous rows"
        )
    if not x.shape[0]:
        return out
    tiles = weight.tiles
    tasks = torch.from_numpy(plan_linear(x.shape[0], weight.out_features, tiles, tile_costs()))
    num_tasks = torch.tensor([len(tasks)], dtype=torch.int32, device=x.device)
    max_rows = HEIGHTS[int(tasks[:, 3].max())]
    run(x, weight, bias, out, tasks.to(x.device), num_tasks, num_programs, max_rows)
    return out


def run(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tasks: torch.Tensor,
    num_tasks: torch.Tensor,
    num_programs: int,
    max_rows: int = HEIGHTS[-1],
) -> None:
    """`linear` with tasks that are on the device, where a graph can be captured."""
    tiles = weight.tiles
    launch(
        linear_kernel,
        num_programs,
        x,
        weight.values,
        weight.scales if weight.scales is not None else x,
        bias if bias is not None else x,
        out,
        tasks,
        num_tasks,
        x.stride(0),
        out.stride(0),
        weight.out_features,
        weight.values.shape[1],
        NUM_PROGRAMS=num_programs,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        MAX_ROWS=max_rows,
        GATED=weight.gated,
        HAS_SCALES=weight.scales is not None,
        HAS_BIAS=bias is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
