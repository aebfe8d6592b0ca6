"""The config of a draft head's training."""

import json
from dataclasses import dataclass
from pathlib import Path

from workers.drafters.draft_head import HeadConfig, fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTraining:
    """What to train on, for how long, and the size of the head."""

    model: str
    """Folder of the target: a llama-like checkpoint in safetensors."""
    prompts: Path
    """JSON lines with a `prompt` or `messages` each, or lines of text."""
    out: Path
    num_tokens: int = 400_000
    """Tokens that the target writes."""
    max_tokens: int = 224
    """Max tokens of one answer."""
    epochs: int = 6
    depth: int = 4
    """Max passes over a batch, each on the states that the one before guessed."""
    num_guessed: int = 8192
    """Number of tokens that the head can guess, the most frequent ones."""
    window: int = 128
    batch_rows: int = 1024
    learning_rate: float = 4e-3
    seed: int = 0
    cpus: int = 2


def head_config(model: Path, window: int, num_guessed: int) -> HeadConfig:
    """Config of a head as large as one layer of the target."""
    target = json.loads((model / "config.json").read_text())
    size, num_heads = target["hidden_size"], target["num_attention_heads"]
    return HeadConfig(
        target=fingerprint(model),
        vocab_size=target["vocab_size"],
        num_guessed=min(num_guessed, target["vocab_size"]),
        hidden_size=size,
        intermediate_size=target["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=target.get("num_key_value_heads", num_heads),
        head_dim=target.get("head_dim") or size // num_heads,
        rms_norm_eps=target.get("rms_norm_eps", 1e-5),
        rope_theta=target.get("rope_theta", 1e4),
        window=window,
    )
