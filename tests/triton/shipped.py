"""The forms of the kernels that workers use, by the layers of common models."""

from dataclasses import dataclass
from typing import Any

from workers.kernels.triton_attention import CHUNK_KEYS, attend_kernel
from workers.kernels.triton_gemm import HEIGHTS, GemmTiles, linear_kernel

NUM_PROGRAMS = 20
TILES = GemmTiles()


@dataclass(frozen=True)
class Gemm:
    """A form of the GEMM."""

    dtype: str = "bf16"
    gated: bool = False
    int8: bool = False
    tiles: GemmTiles = TILES
    max_rows: int = HEIGHTS[-1]

    kernel = linear_kernel

    @property
    def num_warps(self) -> int:
        """Warps of a program on a GPU."""
        return self.tiles.num_warps

    @property
    def signature(self) -> dict[str, str]:
        """The types of its arguments."""
        integers = ("x_stride", "out_stride", "num_features", "num_inputs")
        return {
            "x": f"*{self.dtype}",
            "weight": "*i8" if self.int8 else f"*{self.dtype}",
            "scales": "*fp32",
            "bias": f"*{self.dtype}",
            "out": f"*{self.dtype}",
            "tasks": "*i32",
            "num_tasks": "*i32",
        } | dict.fromkeys(integers, "i32")

    def constants(self, *, is_npu: bool) -> dict[str, Any]:
        """Its constants, on an NPU or a GPU."""
        return {
            "NUM_PROGRAMS": NUM_PROGRAMS,
            "BLOCK_N": self.tiles.block_n,
            "BLOCK_K": self.tiles.block_k,
            "MAX_ROWS": self.max_rows,
            "GATED": self.gated,
            "HAS_SCALES": self.int8,
            "HAS_BIAS": True,
        }


@dataclass(frozen=True)
class Attention:
    """A form of the attention kernel."""

    group: int
    head: int
    dtype: str = "bf16"
    page: int = 64
    window: int = 0
    soft_cap: bool = False
    trees: bool = False
    max_rows: int = HEIGHTS[-1]
    num_warps: int = 8

    kernel = attend_kernel

    @property
    def signature(self) -> dict[str, str]:
        """The types of its arguments."""
        pointers = {
            "query": self.dtype,
            "cache": self.dtype,
            "tables": "i32",
            "masks": "u8",
            "out": self.dtype,
            "partial_values": "fp32",
            "partial_sums": "fp32",
            "tasks": "i32",
            "counts": "i32",
        }
        integers = [
            *("query_stride", "head_stride", "block_stride", "table_stride"),
            *("out_stride", "out_head_stride"),
        ]
        return (
            {name: f"*{kind}" for name, kind in pointers.items()}
            | dict.fromkeys(integers, "i32")
            | {"scale": "fp32", "soft_cap": "fp32"}
        )

    def constants(self, *, is_npu: bool) -> dict[str, Any]:
        """Its constants, on an NPU or a GPU."""
        pad = 1 << (self.group - 1).bit_length()
        return {
            "NUM_PROGRAMS": NUM_PROGRAMS,
            "MAX_ROWS": self.max_rows,
            "MIN_ROWS": min(h for h in HEIGHTS if h >= pad),
            "GROUP": self.group,
            "GROUP_PAD": pad,
            "HEAD": self.head,
            "HEAD_PAD": 1 << (self.head - 1).bit_length(),
            "PAGE": self.page,
            "CHUNK_PAGES": CHUNK_KEYS // self.page,
            "WINDOW": self.window,
            "HAS_SOFT_CAP": self.soft_cap,
            "HAS_TREES": self.trees,
            "IS_FLAT": is_npu,
        }


GEMMS = [
    *(Gemm(dtype, gated) for dtype in ("bf16", "fp16") for gated in (False, True)),
    *(Gemm(int8=True, gated=gated) for gated in (False, True)),
    Gemm("fp32", tiles=GemmTiles(32, 32)),
    *(Gemm(max_rows=rows) for rows in (16, 64)),
    *(Gemm(tiles=GemmTiles(32, block_k)) for block_k in (64, 128)),
    Gemm(tiles=GemmTiles(128, 64, num_warps=8)),
]

ATTENTIONS = [
    Attention(1, 128),  # Llama 2
    Attention(4, 128),  # Llama 3 8B, Mistral
    Attention(7, 128),  # Qwen2.5 7B
    Attention(5, 128),  # Qwen2.5 32B
    Attention(3, 64),  # SmolLM2 135M
    Attention(4, 64, page=128),
    Attention(4, 128, "fp16"),
    Attention(4, 128, trees=True),
    Attention(4, 128, page=128, max_rows=64),  # deploy/npu.yaml
    Attention(4, 128, max_rows=16),  # decodes only
    Attention(4, 128, window=4096, max_rows=64),
    Attention(2, 256, soft_cap=True, max_rows=64),  # Gemma 2
]

TOO_LARGE = [Gemm(tiles=GemmTiles(512, 256)), Attention(1, 256, page=256)]
