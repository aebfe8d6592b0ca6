"""Ascend NPUs as a platform of vLLM: real ones, and one that is emulated on the CPU."""

from typing import Any

from typing_extensions import override
from vllm.platforms.cpu import CpuPlatform

BACKEND = "workers.plugin.vllm_triton_attention.TritonAttentionBackend"


class EmulatedNpuPlatform(CpuPlatform):
    """A CPU whose linear layers and attention are the NPU's form of our kernels.

    Everything else of a step is vLLM's for CPUs.
    """

    @classmethod
    @override
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if attn_selector_config.use_mla or attn_selector_config.use_sparse:
            raise NotImplementedError("our kernels for NPUs have no latent or sparse attention")
        return BACKEND
