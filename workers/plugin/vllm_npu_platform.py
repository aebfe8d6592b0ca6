"""Ascend NPUs as a platform of vLLM.

Plain vLLM knows no NPUs, and the platform that others have for them is behind vLLM by half a year.
Ours is small because it leaves to torch_npu what a GPU's worker asks of torch.
"""

import os
from typing import TYPE_CHECKING, Any

import torch
import torch_npu
from typing_extensions import override
from vllm.platforms.interface import Platform, PlatformEnum

from workers.plugin.names import QUANTIZATION, attention_backend

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BLOCK_SIZE = 128


class NpuPlatform(Platform):
    """Ascend NPUs by torch_npu.

    Models run eagerly: our kernels read their plans from the device's memory, as captured graphs
    need it, but nothing has been captured on an NPU yet.
    """

    _enum = PlatformEnum.OOT
    device_name = device_type = "npu"
    dispatch_key = "PrivateUse1"
    ray_device_key = "NPU"
    device_control_env_var = "ASCEND_RT_VISIBLE_DEVICES"
    ray_noset_device_env_vars = ["RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"]
    dist_backend = "hccl"
    simple_compile_backend = "eager"
    supported_quantization = [QUANTIZATION]

    @classmethod
    @override
    def import_kernels(cls) -> None:
        """vLLM's own compiled kernels are for other devices."""

    @classmethod
    @override
    def register_triton_kernel_overrides(cls) -> None:
        """Have in torch what vLLM's runner has in a Triton that triton-ascend is too old for."""
        from vllm.triton_utils.dispatcher import register_kernels

        register_kernels(
            {"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping}
        )

    @classmethod
    @override
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        from vllm.config import CompilationMode, CUDAGraphMode  # they import the platform

        # The runner of version 2 is made of Triton kernels of vLLM's, for GPUs only.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        vllm_config.scheduler_config.async_scheduling = False
        if not vllm_config.cache_config.user_specified_block_size:
            vllm_config.cache_config.block_size = BLOCK_SIZE
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "workers.plugin.vllm_npu_worker.NpuWorker"

    @classmethod
    @override
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        return attention_backend(attn_selector_config)

    @classmethod
    @override
    def get_punica_wrapper(cls) -> str:
        return "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"  # plain torch

    @classmethod
    @override
    def get_device_name(cls, device_id: int = 0) -> str:
        name: str = torch_npu.npu.get_device_name(device_id)
        return name

    @classmethod
    @override
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return int(torch_npu.npu.get_device_properties(device_id).total_memory)

    @classmethod
    @override
    def num_compute_units(cls, device_id: int = 0) -> int:
        """Matrix units of the chip."""
        return int(torch_npu.npu.get_device_properties(device_id).cube_core_num)

    @classmethod
    @override
    def get_current_memory_usage(cls, device: Any = None) -> float:
        torch_npu.npu.reset_peak_memory_stats(device)
        return float(torch_npu.npu.max_memory_allocated(device))

    @classmethod
    @override
    def set_device(cls, device: torch.device) -> None:
        torch_npu.npu.set_device(device)

    @classmethod
    @override
    def manual_seed_all(cls, seed: int) -> None:
        torch_npu.npu.manual_seed_all(seed)

    @classmethod
    @override
    def inference_mode(cls) -> Any:
        return torch.no_grad()

    @classmethod
    @override
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """All that vLLM knows."""

    @classmethod
    @override
    def check_runner_kv_caches_multi_layer(cls) -> None:
        """Layers may share a cache."""

    @classmethod
    @override
    def opaque_attention_op(cls) -> bool:
        return True

    @classmethod
    @override
    def support_hybrid_kv_cache(cls) -> bool:
        return True


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    slot_mapping: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int = 1,
    TOTAL_CP_RANK: int = 0,
    CP_KV_CACHE_INTERLEAVE_SIZE: int = 1,
    PAD_ID: int = -1,
    BLOCK_SIZE: int = 1024,
) -> None:
    """vLLM's kernel of this name: the place of each token in the KV cache, `PAD_ID` behind them."""
    if TOTAL_CP_WORLD_SIZE != 1:
        raise NotImplementedError("NPUs have no context parallelism")
    token = torch.arange(num_tokens, device=positions.device, dtype=query_start_loc.dtype)
    request = torch.searchsorted(query_start_loc[1:], token, right=True)
    position = positions[:num_tokens]
    blocks = block_table.view(-1)[request * block_table_stride + position // KV_CACHE_BLOCK_SIZE]
    slot_mapping[:num_tokens] = blocks * KV_CACHE_BLOCK_SIZE + position % KV_CACHE_BLOCK_SIZE
    slot_mapping[num_tokens:max_num_tokens] = PAD_ID
