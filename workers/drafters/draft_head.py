"""A draft head: one decoder layer that predicts the target model's next hidden state.

Its input, a row, is a token and the target's final state before it; its output approximates the
target's final state at that token. So it predicts the next token, and with it forms the next row.
Embeddings and LM head are the target's. `training/vllm_head_module.py` is the same in torch.
"""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from workers.kernels.gemm import Floats, Weight, linear

DEFAULT_HEAD = Path(__file__).parent / "data" / "smollm2-135m-instruct.head.safetensors"
"""The head of the default model, which comes with this package."""

METADATA_KEY = "draft_head"
EMBEDDING = "model.embed_tokens.weight"
FINGERPRINT_ROWS = 512
"""Rows of the embedding that identify a model: enough to differ after any training, and quick to
read from a large file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Sizes of a head, and its target model."""

    target: str
    """Fingerprint of the checkpoint that it was trained for."""
    vocab_size: int
    """Vocabulary of the target."""
    num_guessed: int
    """Number of tokens that the head can guess, the most frequent ones."""
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    window: int
    """Newest rows that a row attends to, itself included."""
    temperature: float = 1.0
    """Divisor of the logits that calibrates the probabilities."""


class Rows(NamedTuple):
    """Rows, projected for the attention of the layer."""

    residual: Floats
    """`[num_rows, hidden_size]`."""
    query: Floats
    """`[num_rows, num_heads, head_dim]`."""
    key: Floats
    """`[num_rows, num_kv_heads, head_dim]`."""
    value: Floats


class DraftHead:
    """The forward pass of a head, except the attention: the caller keeps keys and values."""

    def __init__(self, file: Path, model: Path) -> None:
        """Load a head, and the embeddings of its target from the folder `model`.

        ValueError if the head was trained for another model, or the file is not a head.
        """
        self.config = config = read_config(file)
        if (found := fingerprint(model)) != config.target:
            raise ValueError(
                f"draft head {file} was trained for model {config.target}, but {model} is "
                f"{found}; train one for it with: xyserve draft-head train"
            )
        self._embedding = _open_tensor(model, EMBEDDING)
        self._norms = {
            name: read_tensor(file, f"{name}.weight")
            for name in ("embed_norm", "input_norm", "post_attention_norm", "norm")
        }
        self._fc = Weight.pack(read_tensor(file, "fc.weight"))
        self._qkv = Weight.pack(read_tensor(file, "qkv.weight"))
        self._o = Weight.pack(read_tensor(file, "o.weight"))
        self._gate_up = Weight.pack(read_tensor(file, "gate_up.weight"), gate_up=True)
        self._down = Weight.pack(read_tensor(file, "down.weight"))
        self.vocabulary: NDArray[np.int32] = _open_tensor(file, "vocabulary").astype(np.int32)
        """The tokens that can be guessed."""
        lm_head = _open_tensor(model, lm_head_name(model))
        self._lm_head = Weight.pack(_floats(lm_head[self.vocabulary]))
        half = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
        self._inverse_frequency = (config.rope_theta**-half).astype(np.float32)

    def project(self, token_ids: list[int], states: Floats, positions: list[int]) -> Rows:
        """Project tokens and the states before them, `[num_rows, hidden_size]`."""
        config = self.config
        embedded = self._norm(_floats(self._embedding[token_ids]), "embed_norm")
        residual = linear(np.concatenate([embedded, states], axis=1), self._fc)
        qkv = linear(self._norm(residual, "input_norm"), self._qkv)
        heads = qkv.reshape(len(token_ids), -1, config.head_dim)
        rotated = config.num_heads + config.num_kv_heads
        angle = np.asarray(positions, np.float32)[:, None, None] * self._inverse_frequency
        cos, sin = np.cos(angle), np.sin(angle)
        first, second = np.split(heads[:, :rotated], 2, axis=2)
        heads[:, :rotated] = np.concatenate(
            [first * cos - second * sin, second * cos + first * sin], axis=2
        )
        query, key, value = np.split(heads, [config.num_heads, rotated], axis=1)
        return Rows(residual, query, key, value)

    def finish(self, residual: Floats, attended: Floats) -> tuple[Floats, Floats]:
        """The rows' output states, and logits over the head's vocabulary.

        `attended` is `[num_rows, num_heads * head_dim]`; `residual` is overwritten.
        """
        linear(attended, self._o, out=residual, add=True)
        gated = linear(self._norm(residual, "post_attention_norm"), self._gate_up)
        linear(gated, self._down, out=residual, add=True)
        states = self._norm(residual, "norm")
        return states, linear(states, self._lm_head) / np.float32(self.config.temperature)

    def _norm(self, x: Floats, name: str) -> Floats:
        mean_square = np.square(x).mean(axis=1, keepdims=True)
        normed: Floats = x / np.sqrt(mean_square + self.config.rms_norm_eps) * self._norms[name]
        return normed.astype(np.float32, copy=False)


def attend(
    query: Floats, keys: Floats, values: Floats, visible: NDArray[np.bool_] | None = None
) -> Floats:
    """Attention of rows of one request, `[num_rows, num_heads * head_dim]`.

    `query` is `[num_rows, num_heads, head_dim]`, `keys` and `values` are
    `[num_kv_heads, num_keys, head_dim]`, and `visible`, all if None, is `[num_rows, num_keys]`.
    """
    num_rows, num_heads, head_dim = query.shape
    groups = query.reshape(num_rows, len(keys), -1, head_dim).transpose(1, 2, 0, 3)
    scores = groups.reshape(len(keys), -1, head_dim) @ keys.transpose(0, 2, 1)
    scores *= np.float32(head_dim**-0.5)
    scores = scores.reshape(len(keys), -1, num_rows, keys.shape[1])
    if visible is not None:
        scores = np.where(visible, scores, np.float32(-np.inf))
    scores -= scores.max(axis=3, keepdims=True)
    weights = np.exp(scores)
    weights /= weights.sum(axis=3, keepdims=True)
    out = weights.reshape(len(keys), -1, keys.shape[1]) @ values
    out = out.reshape(len(keys), -1, num_rows, head_dim).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(out.reshape(num_rows, num_heads * head_dim))


def read_config(file: Path) -> HeadConfig:
    """Config of the head in a file; ValueError if it holds none."""
    metadata = _read_header(file)[0].get("__metadata__", {})
    if METADATA_KEY not in metadata:
        raise ValueError(f"{file} holds no draft head; make one with: xyserve draft-head train")
    return HeadConfig(**json.loads(metadata[METADATA_KEY]))


def metadata(config: HeadConfig) -> dict[str, str]:
    """Metadata for the header of a safetensors file, from which `read_config` reads the config."""
    return {METADATA_KEY: json.dumps(asdict(config))}


def fingerprint(model: Path) -> str:
    """Short hash of a checkpoint's values, independent of its folder."""
    embedding, norm = _open_tensor(model, EMBEDDING), read_tensor(model, "model.norm.weight")
    digest = sha256(repr(embedding.shape).encode())
    digest.update(_floats(embedding[:FINGERPRINT_ROWS]).tobytes() + norm.tobytes())
    return digest.hexdigest()[:16]


def lm_head_name(model: Path) -> str:
    """Name of the LM head's tensor, which in many checkpoints is the embedding."""
    return "lm_head.weight" if _find_tensor(model, "lm_head.weight") else EMBEDDING


def read_tensor(path: Path, name: str) -> Floats:
    """A tensor of a safetensors file, or of a folder of them, as float32."""
    return _floats(_open_tensor(path, name))


def _open_tensor(path: Path, name: str) -> NDArray[Any]:
    """Map a tensor into memory; bf16, which numpy lacks, becomes uint16."""
    if (found := _find_tensor(path, name)) is None:
        raise ValueError(
            f"{path} has no tensor {name}; it must be a llama-like checkpoint in safetensors"
        )
    file, tensor, start = found
    dtype = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4"}[tensor["dtype"]]
    return np.memmap(file, dtype, "r", start + tensor["data_offsets"][0], tuple(tensor["shape"]))


def _find_tensor(path: Path, name: str) -> tuple[Path, dict[str, Any], int] | None:
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        tensors, start = _read_header(file)
        if name in tensors:
            return file, tensors[name], start
    return None


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Tensors of a safetensors file by name, and the offset of their data."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > file.stat().st_size:
            raise ValueError(f"{file} is not a safetensors file")
        return json.loads(opened.read(size)), 8 + size


def _floats(values: NDArray[Any]) -> Floats:
    if values.dtype == np.uint16:  # bf16 is the upper half of float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
