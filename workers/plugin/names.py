"""Names shared by the plugin and the engines that ask for it."""

from typing import Any

QUANTIZATION = "xyserve"
"""vLLM's name of our quantization method."""
TRITON_ATTENTION = "workers.plugin.vllm_triton_attention.TritonAttentionBackend"


def attention_backend(selector_config: Any) -> str:
    """The class of the attention on NPUs; NotImplementedError if the model needs another kind."""
    if selector_config.use_mla or selector_config.use_sparse:
        raise NotImplementedError("our kernels for NPUs have no latent or sparse attention")
    return TRITON_ATTENTION
