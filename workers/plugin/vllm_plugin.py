"""The vLLM plugin: makes our kernels available in every process of vLLM.

An engine asks for them with `quantization="xyserve"`. All other engines of the environment, and
layers that the kernels do not support, use vLLM's own code.
"""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM may call it repeatedly."""
    # Imported here: vLLM raises what fails in the call, and only logs what fails on loading.
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not current_platform.is_cpu():
        return
    import workers.plugin.vllm_linear  # noqa: F401 - registers the quantization method

    register_backend(
        AttentionBackendEnum.CPU_ATTN, "workers.plugin.vllm_attention.MetaAttentionBackend"
    )
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        ModelRegistry.register_model(
            f"{name}ForCausalLM", f"workers.plugin.vllm_forward:Native{name}ForCausalLM"
        )
