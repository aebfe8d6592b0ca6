"""What a loaded model asks of its device, against the checkpoint that it was loaded from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scheduler.work import ModelWork
from tests.workers.engine_process import EngineProcesses
from tests.workers.tiny_models import CONFIGS, VOCAB_SIZE, write_checkpoint
from workers.config import EngineConfig, WorkerConfig
from workers.kernels import native
from workers.kernels.gemm import Format

HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 96, 2, 6, 2, 32
"""Sizes of the tiny llama."""
LINEARS = {"qkv_proj": (320, 96), "o_proj": (96, 192), "gate_up_proj": (272, 96),
           "down_proj": (96, 136)}  # fmt: skip
"""Rows and columns of its linear layers."""
PADDED_VOCAB_SIZE = 320
FLOAT_BYTES = 4
LOOKED_UP_OR_HEAD = ("embed_tokens", "word_embeddings.", "lm_head")
"""Parts of the names of what is not multiplied with for each token."""

MOE = CONFIGS["qwen3"] | {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
EXPERTS_SIZE = NUM_LAYERS * 8 * 3 * 128 * 64


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was counted of a model, and what its checkpoint holds."""

    work: ModelWork
    body_size: int
    """Elements of its matrices, without embeddings and LM head."""
    vectors_size: int
    """Elements of norms and biases."""


def load(name: str, folder: Path, config: WorkerConfig) -> Loaded:
    """Write a checkpoint, start an engine on it, and count."""
    import safetensors.torch

    from workers.profiling.vllm_calibrated_engine import make_engine
    from workers.profiling.vllm_work import model_work

    CONFIGS["moe"] = MOE
    write_checkpoint(name, folder)
    engine = make_engine(str(folder), config)
    work = model_work(engine.core)
    assert engine._planned is not None
    assert engine._planned.planner._work == work
    [file] = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    return Loaded(
        work,
        sum(
            tensor.numel()
            for key, tensor in tensors.items()
            if tensor.ndim > 1 and not any(name in key for name in LOOKED_UP_OR_HEAD)
        ),
        sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 1),
    )


def loaded(processes: EngineProcesses, name: str, folder: Path, **config: Any) -> Loaded:
    engine = EngineConfig(
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kv_cache_gib=0.02,
        block_size=32,
        dtype="float32",
        extra_args={"skip_tokenizer_init": True},
    )
    found: Loaded = processes.call(
        load,
        name,
        folder / name,
        WorkerConfig(engine=engine, calibrate_at_start=False, keep_packed_weights=False, **config),
    )
    return found


def packed_bytes(rows: int, columns: int, weight_format: Format, gate_up: bool = False) -> int:
    """Bytes of panels, and of a scale for each of their rows."""
    kernels = native.kernels()
    panel = 2 * kernels.lanes
    padded = 2 * (-(-rows // 2 // panel) * panel) if gate_up else -(-rows // panel) * panel
    scales = padded * FLOAT_BYTES if weight_format.has_scales else 0
    return int(kernels.packed_bytes(rows, columns, weight_format, gate_up)) + scales


@pytest.mark.parametrize(
    ("formats", "of_body", "of_head", "of_kv"),
    [
        ("auto float32", Format.BF16, Format.BF16, 4),
        ("auto bf16", Format.BF16_PAIRS, Format.BF16_PAIRS, 2),
        ("int8 float32", Format.INT8, Format.INT8, 4),
        ("int4 int8", Format.INT4_QUADS, Format.INT8_QUADS, 2),
    ],
)
def test_bytes_are_those_of_the_packed_weights(
    processes: EngineProcesses,
    tmp_path: Path,
    formats: str,
    of_body: Format,
    of_head: Format,
    of_kv: int,
) -> None:
    of_weights, of_activations = formats.split()
    found = loaded(
        processes,
        "llama",
        tmp_path,
        weight_format=of_weights,
        activation_format=of_activations,
    )

    body_bytes = NUM_LAYERS * sum(
        packed_bytes(*shape, of_body, gate_up=name == "gate_up_proj")
        for name, shape in LINEARS.items()
    )
    assert found.work == ModelWork(
        body_flops_per_token=2 * found.body_size,
        head_flops_per_logit=2 * VOCAB_SIZE * HIDDEN_SIZE,
        flops_per_pair=4 * HEAD_SIZE * NUM_HEADS * NUM_LAYERS,
        body_bytes=body_bytes + found.vectors_size * FLOAT_BYTES,
        head_bytes=packed_bytes(PADDED_VOCAB_SIZE, HIDDEN_SIZE, of_head),
        kv_bytes_per_token=2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_SIZE * of_kv,
    )


def test_weights_that_vllm_packs_are_counted_too(
    processes: EngineProcesses, tmp_path: Path
) -> None:
    found = loaded(processes, "llama", tmp_path, kernels="vllm")

    assert found.work.body_flops_per_token == 2 * found.body_size
    assert found.work.body_bytes == (found.body_size + found.vectors_size) * FLOAT_BYTES
    assert found.work.head_bytes == PADDED_VOCAB_SIZE * HIDDEN_SIZE * FLOAT_BYTES


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3n", "bloom"])
def test_parameters_are_those_of_the_checkpoint(
    processes: EngineProcesses, tmp_path: Path, name: str
) -> None:
    found = loaded(processes, name, tmp_path)

    hidden_size = CONFIGS[name]["hidden_size"]
    assert found.work.head_flops_per_logit == 2 * VOCAB_SIZE * hidden_size
    assert found.work.body_flops_per_token == pytest.approx(2 * found.body_size, rel=1e-12)


def test_of_experts_the_active_ones_compute_and_all_have_bytes(
    processes: EngineProcesses, tmp_path: Path
) -> None:
    found = loaded(processes, "moe", tmp_path, kernels="vllm")

    num_active = found.body_size - EXPERTS_SIZE * 3 // 4
    assert found.work.body_flops_per_token == 2 * num_active
    assert found.work.body_bytes == (found.body_size + found.vectors_size) * FLOAT_BYTES
