"""Device profiles computed from data sheets, for accelerators without measurements.

    python -m scheduler.simulation.roofline

writes one into `profiles/` for each accelerator below and each model that fits its memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scheduler.cost_model import CostModel
from scheduler.simulation.device import PROFILES, DeviceProfile
from scheduler.task import Limits
from scheduler.work import ModelWork

KV_BLOCK_SIZE = 16
"""Tokens in a block of the KV cache, vLLM's default."""
RESERVED_SHARE = 0.1
"""Share of the memory for activations and the runtime. Assumed; vLLM leaves 8% by default."""
QUERY_TILE = 128
"""Query tokens that read the KV cache together: the row tile of FlashAttention-2 on GPUs (Dao,
arXiv:2307.08691), and of the paper's kernel for prompts on a 910B."""
BYTES = 2
"""Bytes of a 16-bit number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """A chip by its data sheet, and the shares of its peaks that a serving engine reaches.

    The defaults are assumptions, the same for all chips: usual figures for well-tuned engines. For
    a 910B `ascend.py` derives its own, tile by tile.
    """

    name: str
    flops: float
    """Peak of dense bf16 or fp16 matrix products, in operations per second."""
    bandwidth: float
    """Peak of reading memory, in bytes per second."""
    memory_bytes: float
    source: str
    """Name and figures of the data sheet."""
    flops_efficiency: float = 0.55
    """Share of the peak that large matrix products reach."""
    bandwidth_efficiency: float = 0.75
    """Share of the peak that reading weights and the KV cache reaches."""
    launch_s: float = 0.002
    """Fixed seconds of a step: scheduling, launching, sampling."""
    tile_rows: int = 16
    """Rows of a tile of matrix products, to which a step is rounded up: the smallest that a matrix
    unit takes on these chips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder like Llama with 16-bit weights: sizes by the `config.json` that is published with
    it, number of parameters by its model card."""

    name: str
    num_parameters: float
    """Number of all parameters, embedding and LM head included."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the feed-forward layers, of their gate and of their up projection each."""
    vocabulary: int
    ties_embedding: bool = False
    """Whether the LM head shares its weights with the embedding."""

    @property
    def num_body_parameters(self) -> float:
        """Parameters that each token is multiplied with, without the LM head."""
        return self.num_parameters - (2 - self.ties_embedding) * self.num_head_parameters

    @property
    def num_head_parameters(self) -> int:
        """Parameters of the LM head."""
        return self.vocabulary * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers, in 16 bits."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES

    @property
    def work(self) -> ModelWork:
        """Operations and bytes of the model's parts."""
        return ModelWork(
            body_flops_per_token=2 * self.num_body_parameters,
            head_flops_per_logit=2 * self.num_head_parameters,
            flops_per_pair=4 * self.head_dim * self.num_heads * self.num_layers,
            body_bytes=self.num_body_parameters * BYTES,
            head_bytes=self.num_head_parameters * BYTES,
            kv_bytes_per_token=self.kv_bytes_per_token,
        )


ACCELERATORS = {
    "ascend-910b": Accelerator(
        name="Ascend 910B",
        flops=376e12,
        bandwidth=1.6e12,
        memory_bytes=64 * 2**30,
        source="Ascend 910B (B1): 376 TFLOP/s fp16 (Huawei's white paper of the Atlas 800T A2), "
        "64 GB HBM2e at 1.6 TB/s (as quoted in public)",
    ),
    "a800": Accelerator(
        name="NVIDIA A800 80GB",
        flops=312e12,
        bandwidth=2.039e12,
        memory_bytes=80e9,
        source="NVIDIA A800 80GB SXM data sheet: 312 TFLOP/s bf16, 80 GB HBM2e at 2.039 TB/s",
    ),
    "h200": Accelerator(
        name="NVIDIA H200",
        flops=989e12,
        bandwidth=4.8e12,
        memory_bytes=141e9,
        source="NVIDIA H200 SXM data sheet: 989 TFLOP/s bf16 dense, 141 GB HBM3e at 4.8 TB/s",
    ),
}

MODELS = {
    "llama-3-8b": Model(
        name="Llama-3-8B",
        num_parameters=8.03e9,
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocabulary=128256,
    ),
    "qwen2.5-7b": Model(
        name="Qwen2.5-7B",
        num_parameters=7.62e9,
        num_layers=28,
        hidden_size=3584,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        vocabulary=152064,
    ),
    "qwen2.5-32b": Model(
        name="Qwen2.5-32B",
        num_parameters=32.76e9,
        num_layers=64,
        hidden_size=5120,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=27648,
        vocabulary=152064,
    ),
}


def roofline(
    accelerator: Accelerator,
    model: Model,
    *,
    name: str,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
) -> DeviceProfile:
    """The profile that follows from data sheets.

    Matrix products take the longer of reading the weights and computing the rows, those of the LM
    head only for the sampled rows. Attention takes the sum of reading the KV cache and computing
    the query-key pairs. ValueError if the model does not fit into the memory.
    """
    flops = accelerator.flops * accelerator.flops_efficiency
    bandwidth = accelerator.bandwidth * accelerator.bandwidth_efficiency
    work = model.work
    body_s, body_row_s = work.body_bytes / bandwidth, work.body_flops_per_token / flops
    head_s, head_row_s = work.head_bytes / bandwidth, work.head_flops_per_logit / flops
    ridge, head_ridge = round(body_s / body_row_s), round(head_s / head_row_s)
    weights = [
        accelerator.launch_s + body_s + head_s,
        0.0,  # rows below the ridge are free: the time is that of reading the weights
        body_row_s,
        0.0,
        head_row_s,
        0.0,
        work.kv_bytes_per_token / bandwidth,
        work.flops_per_pair / flops,
    ]
    num_blocks = num_kv_blocks(accelerator, model, KV_BLOCK_SIZE)
    if num_blocks < 1:
        raise ValueError(
            f"{model.name} does not fit into the memory of {accelerator.name}; take a smaller model"
        )
    return DeviceProfile(
        name=name,
        source=f"Roofline of {model.name} in 16 bits. {accelerator.source}; assumed to reach "
        f"{accelerator.flops_efficiency:.0%} of the arithmetic, "
        f"{accelerator.bandwidth_efficiency:.0%} of the bandwidth, and "
        f"{accelerator.launch_s * 1e3:g} ms for each step besides. Not measured.",
        modelled=True,
        cost_model=CostModel(
            weights,
            token_knots=(0, ridge),
            sample_knots=(0, head_ridge),
            token_tile=accelerator.tile_rows,
            query_tile=QUERY_TILE,
        ),
        limits=Limits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_block_size=KV_BLOCK_SIZE,
            num_kv_blocks=num_blocks,
        ),
    )


def num_kv_blocks(accelerator: Accelerator, model: Model, kv_block_size: int) -> int:
    """KV blocks that fit next to the weights; negative if not even those fit."""
    room_bytes = accelerator.memory_bytes * (1 - RESERVED_SHARE) - model.num_parameters * BYTES
    return int(room_bytes // (model.kv_bytes_per_token * kv_block_size))


def modelled_profiles() -> Iterator[DeviceProfile]:
    """A profile of each accelerator with each model that fits its memory."""
    for accelerator_name, accelerator in ACCELERATORS.items():
        for model_name, model in MODELS.items():
            if num_kv_blocks(accelerator, model, KV_BLOCK_SIZE) > 0:
                yield roofline(accelerator, model, name=f"{accelerator_name}-{model_name}")


def write_profiles(folder: Path) -> None:
    """Write the modelled profiles as JSON files of their names."""
    for profile in modelled_profiles():
        text = json.dumps(profile.to_dict(), indent=2) + "\n"
        (folder / f"{profile.name}.json").write_text(text)


if __name__ == "__main__":
    write_profiles(PROFILES)
