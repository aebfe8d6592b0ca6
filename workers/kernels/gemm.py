"""The virtual-padding GEMM on CPUs: `y = x W^T + b` for any number of rows, weights packed once."""

import ctypes
from enum import IntEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from workers.kernels import native
from workers.kernels.tile_table import Inputs, tile_costs
from workers.kernels.tiles import GemmPlan, plan_gemm

Floats = NDArray[np.float32]


class Format(IntEnum):
    """How weights are stored: `xy::Format`."""

    FP32 = 0
    BF16 = 1  # lossless for weights that are bf16 in the checkpoint
    INT8 = 2  # one scale per output feature
    INT4 = 3  # a bf16 scale and minimum per group of 32 input features
    BF16_PAIRS = 4  # as BF16, for inputs that are rounded to bf16
    INT8_QUADS = 5  # as INT8 and INT4, for inputs that are rounded to int8
    INT4_QUADS = 6

    @property
    def inputs(self) -> Inputs:
        """What a product makes of its inputs."""
        if self == Format.BF16_PAIRS:
            return Inputs.BF16
        return Inputs.INT8 if self in (Format.INT8_QUADS, Format.INT4_QUADS) else Inputs.FLOAT32

    @property
    def has_scales(self) -> bool:
        """Whether each output feature has a scale, applied to the sums."""
        return self in (Format.INT8, Format.INT8_QUADS)


FORMAT_FOR = {
    (Format.BF16, Inputs.BF16): Format.BF16_PAIRS,
    (Format.INT8, Inputs.INT8): Format.INT8_QUADS,
    (Format.INT4, Inputs.INT8): Format.INT4_QUADS,
}
"""Formats of the same weights for other inputs."""


class Epilogue(IntEnum):
    """What is done with the product: `xy::Epilogue`."""

    STORE = 0
    ADD = 1
    SILU_MUL = 2


class Weight:
    """A weight matrix `[n, k]`, packed for the instruction set in use."""

    def __init__(self, n: int, k: int, format: Format, gate_up: bool) -> None:
        """Allocate a packed weight, for `pack` or `read_weights` to fill."""
        kernels = native.kernels()
        self.n, self.k, self.gate_up = n, k, gate_up
        self._format = format
        self._panels = native.weights_arena.empty(kernels.packed_bytes(n, k, format, gate_up))
        panel = 2 * kernels.lanes
        self.num_panels = 2 * -(-n // 2 // panel) if gate_up else -(-n // panel)
        self._scales = np.zeros(self.num_panels * panel, np.float32) if format.has_scales else None
        self.struct = native.WeightStruct(
            n, k, format, gate_up, native.pointer(self._panels), native.pointer(self._scales)
        )

    @classmethod
    def pack(
        cls,
        weight: Floats,
        format: str = "auto",
        *,
        gate_up: bool = False,
        inputs: Inputs = Inputs.FLOAT32,
    ) -> Self:
        """Pack a float32 weight `[n, k]`.

        `format` is the name of a `Format` in lower case, for products with such `inputs` if there
        is one for them; or auto: bf16 if that is lossless, else fp32. With `gate_up` the first half
        of the rows is the gate and the second the up projection, and `linear` returns
        silu(gate) * up. ValueError names what cannot be packed.
        """
        _check_array("weight", weight, 2)
        n, k = weight.shape
        if not weight.size:
            raise ValueError(f"weight has shape {weight.shape}; it must not be empty")
        weight = np.ascontiguousarray(weight)
        if gate_up and n % 2:
            raise ValueError(f"weight has {n} rows; gate and up together need an even number")
        names = ["auto", *(known.name.lower() for known in Format)]
        if format not in names:
            raise ValueError(f"format ({format!r}) must be one of {', '.join(names)}")
        lossless = is_bf16(weight)
        if format in ("bf16", "bf16_pairs") and not lossless:
            raise ValueError("weight has values that bf16 would round; pack it as fp32 or auto")
        if not np.isfinite(weight).all():
            row, column = np.argwhere(~np.isfinite(weight))[0]
            raise ValueError(
                f"weight[{row}, {column}] is {weight[row, column]}; the checkpoint is damaged"
            )
        if format == "auto":
            format = "bf16" if lossless else "fp32"
        chosen = Format[format.upper()]
        packed = cls(n, k, FORMAT_FOR.get((chosen, inputs), chosen), gate_up)
        native.kernels().pack(
            ctypes.byref(packed.struct), native.pointer(weight), native.pointer(packed._scales)
        )
        return packed

    @property
    def format(self) -> str:
        """Name of the format, in lower case."""
        return self._format.name.lower()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        """The memory that holds the packed weight."""
        return (self._panels,) if self._scales is None else (self._panels, self._scales)

    @property
    def out_features(self) -> int:
        """Columns of what `linear` returns."""
        return self.n // 2 if self.gate_up else self.n

    def unpacked(self) -> Floats:
        """The values that the packed weight represents, `[n, k]`."""
        rows = np.empty((self.n, self.k), np.float32)
        native.kernels().unpack(ctypes.byref(self.struct), native.pointer(rows))
        return rows

    def plan(self, num_rows: int) -> GemmPlan:
        """How a product with `num_rows` rows is cut into tiles and tasks."""
        costs = tile_costs(self._format.inputs)
        return plan_gemm(num_rows, self.num_panels, native.num_threads(), costs)


def is_bf16(values: Floats) -> bool:
    """Whether bf16 holds every value exactly: the lower half of each float is zero."""
    return not (values.view(np.uint32) & 0xFFFF).any()


def linear(
    x: Floats,
    weight: Weight,
    bias: Floats | None = None,
    out: Floats | None = None,
    *,
    add: bool = False,
) -> Floats:
    """Multiply: `x W^T + bias`, from `[m, k]` to `[m, out_features]`, added to `out` if `add`.

    Rows of `x` and `out` may have any stride. A row's bits do not depend on the other rows.
    """
    _check_array("x", x, 2, columns=weight.k)
    num_rows = x.shape[0]
    if add and weight.gate_up:
        raise ValueError("add does not work with a gate_up weight, whose halves are multiplied")
    if out is None:
        if add:
            raise ValueError("add needs an `out` to add to")
        out = np.empty((num_rows, weight.out_features), np.float32)
    _check_array("out", out, 2, columns=weight.out_features)
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if out.shape[0] != num_rows:
        raise ValueError(f"out has {out.shape[0]} rows, x has {num_rows}")
    if bias is not None:
        _check_array("bias", bias, 1, columns=weight.n)
    run(
        weight,
        num_rows,
        x.ctypes.data,
        x.strides[0] // 4,
        None if bias is None else bias.ctypes.data,
        out.ctypes.data,
        out.strides[0] // 4,
        Epilogue.ADD if add else Epilogue.SILU_MUL if weight.gate_up else Epilogue.STORE,
    )
    return out


def run(
    weight: Weight,
    num_rows: int,
    x: int,
    x_stride: int,
    bias: int | None,
    out: int,
    out_stride: int,
    epilogue: Epilogue = Epilogue.STORE,
) -> None:
    """`linear` on addresses of float32 rows that the caller has checked; strides in floats."""
    if num_rows:
        plan = plan_struct(weight.plan(num_rows))
        native.kernels().linear(
            ctypes.byref(weight.struct),
            ctypes.byref(plan),
            x,
            x_stride,
            bias,
            epilogue,
            out,
            out_stride,
        )


def plan_struct(plan: GemmPlan) -> native.GemmPlanStruct:
    """The plan as C++ sees it; it points into `plan`, which the caller keeps alive."""
    return native.GemmPlanStruct(
        plan.num_rows,
        len(plan.heights),
        native.pointer(plan.heights),
        plan.row_block,
        plan.panel_block,
    )


def _check_array(name: str, array: NDArray[Any], ndim: int, columns: int | None = None) -> None:
    if array.dtype != np.float32:
        raise ValueError(f"{name} is {array.dtype}; it must be float32")
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; it must have {ndim} dimensions")
    if array.size and array.strides[-1] != 4:
        raise ValueError(
            f"{name} has strides {array.strides}; the last dimension must be contiguous"
        )
    if columns is not None and array.shape[-1] != columns:
        raise ValueError(f"{name} has shape {array.shape}; its last dimension must be {columns}")
