"""What the Triton kernels need to know of the device on which vLLM runs."""

from dataclasses import dataclass
from functools import cache

import torch
from vllm.platforms import current_platform

from workers.config import is_npu_emulated
from workers.kernels.shapes import AttentionShape
from workers.kernels.triton_attention import max_rows_on_npu
from workers.kernels.triton_gemm import HEIGHTS, GemmTiles

PROGRAMS_PER_CORE = 2
"""On a GPU, so that one loads while the other computes."""
EMULATED_CORES = 2
"""One would leave untested that tasks are dealt out."""


@dataclass(frozen=True, slots=True)
class TritonDevice:
    """How kernels are launched on a device."""

    is_npu: bool
    num_programs: int
    """Programs that run at once."""

    def max_rows(self, shape: AttentionShape) -> int:
        """Rows of the tallest tile of an attention layer."""
        return max_rows_on_npu(shape) if self.is_npu else HEIGHTS[-1]

    def gemm_tiles(self, dtype: torch.dtype) -> GemmTiles:
        """Tiles of a product in a data type, whose buffers fit."""
        return GemmTiles(32, 32) if dtype == torch.float32 else GemmTiles()


@cache
def triton_device() -> TritonDevice:
    """The device of this process."""
    if is_npu_emulated():
        return TritonDevice(True, EMULATED_CORES)
    num_cores = current_platform.num_compute_units()
    if current_platform.device_type == "npu":
        return TritonDevice(True, num_cores)
    return TritonDevice(False, PROGRAMS_PER_CORE * num_cores)
