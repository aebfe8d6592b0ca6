"""Checkpoints of two layers with random weights, small enough to run in a blink."""

from pathlib import Path
from typing import Any

VOCAB_SIZE = 307  # prime: no tile or panel divides it
MAX_MODEL_LEN = 512

_LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_MODEL_LEN,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # Every bias that there can be, scaled rotation, and the embedding is the LM head.
    "llama": _LLAMA_LIKE
    | {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": True,
    },
    # No bias, and a window that is no whole number of blocks.
    "mistral": _LLAMA_LIKE | {"model_type": "mistral", "sliding_window": 45},
    # Some biases, and only half of each head is rotated.
    "qwen2": _LLAMA_LIKE
    | {
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
        },
    },
    # Norms of queries and keys, and heads of another size than hidden_size / num_attention_heads.
    "qwen3": _LLAMA_LIKE | {"model_type": "qwen3", "num_attention_heads": 4, "head_dim": 64},
    # Scores and logits are capped, and the window of the first layer only slides.
    "gemma2": _LLAMA_LIKE
    | {
        "model_type": "gemma2",
        "sliding_window": 45,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": True,
    },
    # The last two layers share the caches of those before, and the embedding makes the logits.
    "gemma3n": _LLAMA_LIKE
    | {
        "model_type": "gemma3n_text",
        "intermediate_size": [136] * 4,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": 45,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 32,
        "laurel_rank": 16,
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": True,
    },
    # ALiBi, which our attention refuses; biases everywhere, no gate.
    "bloom": {
        "model_type": "bloom",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def write_checkpoint(
    name: str, folder: Path, dtype: str = "bfloat16", spoilt: str | None = None
) -> None:
    """Write `CONFIGS[name]` to `folder`; the weight `spoilt` gets one NaN.

    Every weight is as large as makes a difference: what is left out or taken twice shows.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIGS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("bias"):
                weight.normal_(0, 0.3)
            elif weight.ndim == 1:  # a norm
                weight.normal_(0 if name == "gemma2" else 1, 0.3)
            else:
                gain = 3 if "embed" in key or "lm_head" in key else 1.5
                weight.normal_(0, gain / weight.shape[1] ** 0.5)
            if key == spoilt:
                weight[3, 5] = float("nan")
    model.to(getattr(torch, dtype)).save_pretrained(folder)
