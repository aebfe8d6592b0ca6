"""An Ascend NPU that is emulated on the CPU, as a platform of vLLM."""

from typing import Any

from typing_extensions import override
from vllm.platforms.cpu import CpuPlatform

from workers.plugin.names import attention_backend


class EmulatedNpuPlatform(CpuPlatform):
    """A CPU whose linear layers and attention are the NPU's form of our kernels.

    Everything else of a step is vLLM's for CPUs.
    """

    @classmethod
    @override
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        return attention_backend(attn_selector_config)
