"""What a simulated worker is: the seconds of its steps and the room it has."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scheduler.cost_model import CostModel
from scheduler.task import Limits
from scheduler.work import ModelWork

PROFILES = Path(__file__).parent / "profiles"
"""Profiles by name, as JSON."""

TOKENS_OF_A_BLOCK = 16
RESERVED_SHARE = 0.1
"""Of the memory, for activations and the runtime; vLLM leaves as much by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A model on an accelerator, as far as scheduling sees it."""

    name: str
    source: str
    """Where the numbers come from."""
    modelled: bool
    """Whether they are computed from data sheets; else they were measured."""
    cost_model: CostModel
    """Seconds of a step."""
    limits: Limits
    """What a step and the KV cache can hold."""
    crowded_cost_model: CostModel | None = None
    """Seconds of a step while all other workers compute too, where they share a machine: its
    memory, caches and cores' clock. Between, time is in proportion to how many do."""

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.limits.num_kv_blocks * self.limits.kv_block_size

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `DeviceProfile.from_dict` gives it back."""
        return {
            "name": self.name,
            "source": self.source,
            "modelled": self.modelled,
            "limits": asdict(self.limits),
            "cost_model": self.cost_model.to_dict(),
            "crowded_cost_model": self.crowded_cost_model and self.crowded_cost_model.to_dict(),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "DeviceProfile":
        """The profile that `to_dict` described; ValueError, TypeError or KeyError if malformed."""
        return cls(
            name=state["name"],
            source=state["source"],
            modelled=state["modelled"],
            limits=Limits(**state["limits"]),
            cost_model=CostModel.from_dict(state["cost_model"]),
            crowded_cost_model=(crowded := state.get("crowded_cost_model"))
            and CostModel.from_dict(crowded),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """A chip by its data sheet, and how much of that a serving engine gets out of it."""

    name: str
    flops: float
    """Peak of dense bf16 or fp16 matrix products, per second."""
    bandwidth: float
    """Peak of reading memory, bytes per second."""
    memory_bytes: float
    source: str
    flops_efficiency: float = 0.55
    """Share of the peak that large matrix products reach."""
    bandwidth_efficiency: float = 0.75
    """Share of the peak that reading weights and the KV cache reaches."""
    launch_s: float = 0.002
    """Fixed seconds of a step: scheduling, launching, sampling."""
    tile_rows: int = 16
    """Rows that a matrix product is computed in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder of the Llama kind with 16-bit weights, by its config."""

    name: str
    num_parameters: float
    """All, the embedding and the LM head included."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    ties_embedding: bool = False
    """Whether the LM head is the embedding."""

    @property
    def num_body_parameters(self) -> float:
        """Those that each token is multiplied with, without the LM head."""
        return self.num_parameters - (2 - self.ties_embedding) * self.num_head_parameters

    @property
    def num_head_parameters(self) -> int:
        """Those of the LM head."""
        return self.vocabulary * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, in 16 bits."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES

    @property
    def work(self) -> ModelWork:
        """What its parts take."""
        return ModelWork(
            body_flops_per_token=2 * self.num_body_parameters,
            head_flops_per_logit=2 * self.num_head_parameters,
            flops_per_pair=4 * self.head_dim * self.num_heads * self.num_layers,
            body_bytes=self.num_body_parameters * BYTES,
            head_bytes=self.num_head_parameters * BYTES,
            kv_bytes_per_token=self.kv_bytes_per_token,
        )


BYTES = 2
"""Of a 16-bit number."""

ACCELERATORS = {
    "ascend-910b": Accelerator(
        name="Ascend 910B",
        flops=376e12,
        bandwidth=1.6e12,
        memory_bytes=64 * 2**30,
        source="Ascend 910B (B1): 376 TFLOP/s fp16, 64 GB HBM2e at 1.6 TB/s",
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
    """The profile that follows from data sheets: each part as slow as its bound.

    The matrix products take the longer of reading the weights and of the arithmetic of the rows.
    Of attention, reading the KV cache and the arithmetic of the pairs are added up, and so is the
    LM head over the sampled rows. ValueError if the model does not fit into the memory.
    """
    flops = accelerator.flops * accelerator.flops_efficiency
    bandwidth = accelerator.bandwidth * accelerator.bandwidth_efficiency
    work = model.work
    body_s, body_row_s = work.body_bytes / bandwidth, work.body_flops_per_token / flops
    head_s, head_row_s = work.head_bytes / bandwidth, work.head_flops_per_logit / flops
    ridge, head_ridge = round(body_s / body_row_s), round(head_s / head_row_s)
    weights = [
        accelerator.launch_s + body_s + head_s,
        *(0.0, body_row_s),
        *(0.0, head_row_s),
        0.0,
        work.kv_bytes_per_token / bandwidth,
        work.flops_per_pair / flops,
    ]
    room_bytes = accelerator.memory_bytes * (1 - RESERVED_SHARE) - model.num_parameters * BYTES
    num_kv_blocks = int(room_bytes // (work.kv_bytes_per_token * TOKENS_OF_A_BLOCK))
    if num_kv_blocks < 1:
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
            query_tile=128,
        ),
        limits=Limits(max_num_seqs, max_num_batched_tokens, TOKENS_OF_A_BLOCK, num_kv_blocks),
    )


def device_names() -> list[str]:
    """The profiles that come with the package, by name."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def read_device(name: str | Path) -> DeviceProfile:
    """Read a profile that comes with the package, by name, or one's own, by the path of its file.

    ValueError if there is none, or if it cannot be used.
    """
    path = Path(name) if str(name).endswith(".json") else PROFILES / f"{name}.json"
    if not path.is_file():
        raise ValueError(
            f"no device profile {str(name)!r}; use one of {', '.join(device_names())}, or the path "
            "of a .json file of the same form"
        )
    try:
        return DeviceProfile.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no device profile: {error!r}") from error
