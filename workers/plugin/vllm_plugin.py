"""What vLLM loads into each of its processes: our kernels, for engines that ask for them.

An engine asks with `quantization="xyserve"`. In every other engine of the environment, and for
each layer that the kernels cannot serve, what is registered here steps aside for vLLM's own.
"""


def register() -> None:
    """The entry point of the group `vllm.general_plugins`; may be called any number of times."""
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
