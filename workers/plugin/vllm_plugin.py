"""The vLLM plugin: makes our kernels available in every process of vLLM.

An engine asks for them with `quantization="xyserve"`. All other engines of the environment, and
layers that the CPU kernels do not support, use vLLM's own code.
"""

import os
from functools import cache
from importlib.util import find_spec

from workers.config import is_npu_emulated
from workers.plugin.names import TRITON_ATTENTION


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM may call it repeatedly."""
    # Imported here: vLLM raises what fails in the call, and only logs what fails on loading.
    from vllm.platforms import current_platform

    if is_npu_emulated():
        _launch_on_this_cpu()
        _register_triton_kernels()
    elif current_platform.is_cpu():
        _register_cpu_kernels()
    elif current_platform.is_cuda() or current_platform.device_type == "npu":
        _register_triton_kernels()


def npu_platform() -> str | None:
    """Entry point of the group `vllm.platform_plugins`: the platform's class, if there are NPUs."""
    if is_npu_emulated():
        return "workers.plugin.vllm_npu_emulated.EmulatedNpuPlatform"
    if find_spec("torch_npu"):
        return "workers.plugin.vllm_npu_platform.NpuPlatform"
    return None


def _register_cpu_kernels() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import workers.plugin.vllm_linear  # noqa: F401 - registers the quantization method

    register_backend(
        AttentionBackendEnum.CPU_ATTN, "workers.plugin.vllm_attention.MetaAttentionBackend"
    )
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        ModelRegistry.register_model(
            f"{name}ForCausalLM", f"workers.plugin.vllm_forward:Native{name}ForCausalLM"
        )


def _register_triton_kernels() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import workers.plugin.vllm_triton_linear  # noqa: F401 - registers the quantization method

    register_backend(AttentionBackendEnum.CUSTOM, TRITON_ATTENTION)


@cache
def _launch_on_this_cpu() -> None:
    from workers.home import home
    from workers.kernels.triton_ascend import OnX86
    from workers.kernels.triton_launch import launch_by

    folder = home() / "npu-emulated"
    folder.mkdir(parents=True, exist_ok=True)
    # Triton's own folder may have what was compiled for a real NPU under the same key.
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    launch_by(OnX86(folder))
