"""Converts a GGUF file of the llama architecture into a Hugging Face checkpoint in bf16."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gguf import ReaderTensor

_TENSORS = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_checkpoint(
    gguf_path: Path,
    directory: Path,
    chat_template: str,
    generation: Mapping[str, Any],
    report: Callable[[int, int], None],
) -> None:
    """Write weights, configuration, tokenizer and chat template into an existing directory.

    `generation` has the defaults of sampling. `report` is called with the bytes of weights written
    and their total. KeyError: the file is not a llama model with tied embeddings and SmolLM's kind
    of tokenizer.
    """
    # Only this build needs it, and importing it takes most of a second.
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(metadata)
    _write_weights(reader.tensors, config, directory / "model.safetensors", report)
    _write_json(directory / "config.json", config)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", {**tokens, **generation})
    _write_tokenizer(metadata, directory)
    (directory / "chat_template.jinja").write_text(chat_template)


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    hidden_size = metadata["llama.embedding_length"]
    num_heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": metadata["llama.context_length"],
        # GGUF stores it as a float32; six digits restore the number that the author wrote.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def _write_weights(
    tensors: Sequence[ReaderTensor],
    config: Mapping[str, Any],
    path: Path,
    report: Callable[[int, int], None],
) -> None:
    from gguf.quants import dequantize

    num_heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    header = _safetensors_header(tensors)
    done, total = 0, sum(2 * tensor.n_elements for tensor in tensors)
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            weights = dequantize(tensor.data, tensor.tensor_type)
            part = tensor.name.split(".")[-2]
            if part in num_heads:
                weights = _halves_from_pairs(weights, num_heads[part])
            file.write(to_bf16(weights).astype("<u2", copy=False).tobytes())
            done += 2 * weights.size
            report(done, int(total))


def _safetensors_header(tensors: Sequence[ReaderTensor]) -> bytes:
    """The header, written by hand so that no library version changes the pinned checksum."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        end = offset + 2 * math.prod(shape)
        entries[_hf_name(tensor.name)] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _hf_name(name: str) -> str:
    match name.split("."):
        case ["blk", layer, part, "weight"]:
            return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight"
        case [part, "weight"]:
            return f"model.{_TENSORS[part]}.weight"
    raise KeyError(name)


def _halves_from_pairs(weights: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Reorder the rows `[num_heads * head_dim, hidden_size]` of a q or k projection.

    llama.cpp rotates the pairs (2i, 2i + 1), Hugging Face's llama (i, i + head_dim / 2).
    """
    pairs = weights.reshape(num_heads, -1, 2, weights.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def to_bf16(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of finite float32 values, rounded to nearest, ties to even."""
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> None:
    """Write SmolLM's tokenizer: byte-level BPE in which each digit is a token."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise KeyError(kind)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == TokenType.CONTROL
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))

    special = {
        name: tokens[metadata[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        ]
    }
    _write_json(
        directory / "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": metadata["llama.context_length"],
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
