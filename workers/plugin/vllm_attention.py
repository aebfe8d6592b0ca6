"""The attention meta-kernel in vLLM, as its attention backend on CPUs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from typing_extensions import override
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.config.vllm import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionLayer,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from workers.kernels.attention import (
    AttentionPlan,
    attend,
    plan_attention,
    unsupported,
    write_kv,
)
from workers.kernels.shapes import AttentionShape
from workers.plugin.names import QUANTIZATION


class MetaAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend, with the meta-kernel for each layer that it supports."""

    @staticmethod
    @override
    def get_impl_cls() -> type["MetaAttentionImpl"]:
        return MetaAttentionImpl

    @staticmethod
    @override
    def get_builder_cls() -> type["MetaAttentionMetadataBuilder"]:
        return MetaAttentionMetadataBuilder


@dataclass
class MetaAttentionMetadata(CPUAttentionMetadata):
    """A step; layers of the same shape share a plan."""

    plans: dict[AttentionShape, AttentionPlan] = field(default_factory=dict)

    def plan(self, shape: AttentionShape) -> AttentionPlan:
        """The plan for layers of this shape, made when the first of them needs it."""
        if shape not in self.plans:
            self.plans[shape] = plan_attention(
                shape, self.query_start_loc.numpy(), self.seq_lens.numpy()
            )
        return self.plans[shape]


class MetaAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds vLLM's own work plan only if some layer needs it."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Collect the reasons why layers cannot use the kernel; None for those that can."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        self._refusals = {
            layer.impl.refusal
            for layer in layers.values()
            if isinstance(layer.impl, MetaAttentionImpl)
        }

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """The metadata of one step; NotImplementedError if it is not causal."""
        if None not in self._refusals:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if common_attn_metadata.causal is not True:
            raise NotImplementedError(
                "the attention kernel is causal only, and this model's attention is not; "
                "set `kernels: vllm` in the worker's config"
            )
        if len(self._refusals) > 1:
            stock = vars(super().build(common_prefix_len, common_attn_metadata, fast_build))
            return MetaAttentionMetadata(**stock)
        common = common_attn_metadata
        return MetaAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
        )


def _elements(kv_cache: torch.Tensor) -> NDArray[Any]:
    """A KV cache as numpy sees it: numpy has no bf16."""
    if kv_cache.dtype is torch.bfloat16:
        kv_cache = kv_cache.view(torch.uint16)
    return kv_cache.numpy()


class MetaAttentionImpl(CPUAttentionBackendImpl):
    """One layer, on the meta-kernel or, for the reason in `refusal`, on vLLM's own kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take vLLM's arguments and check whether the kernel supports the layer."""
        super().__init__(*args, **kwargs)
        self.refusal = self._refusal(get_current_vllm_config())

    def _refusal(self, config: VllmConfig) -> str | None:
        if config.model_config.quantization != QUANTIZATION:
            return f"the engine's quantization is not {QUANTIZATION}"
        if config.model_config.dtype != torch.float32:
            return f"the engine's dtype is {config.model_config.dtype}, not float32"
        if self.attn_type != AttentionType.DECODER:
            return f"it is {self.attn_type} attention"
        if self.alibi_slopes is not None or self.sinks is not None:
            return "it has ALiBi slopes or attention sinks"
        if self.is_fp8_kv_cache:
            return f"its KV cache is {self.kv_cache_dtype}"
        # The size may be unset yet. vLLM's default on CPUs is 128, a multiple of 32 too.
        block_size = config.cache_config.block_size or 32
        return unsupported(self.num_heads, self.num_kv_heads, self.head_size, block_size)

    def shape(self, kv_cache: torch.Tensor) -> AttentionShape:
        """The layer's shape, as the kernel takes it, with this KV cache."""
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            block_size=kv_cache.shape[2],
            scale=self.scale,
            sliding_window=self.sliding_window if self.sliding_window > 0 else None,
            soft_cap=self.logits_soft_cap or None,
            kv_bf16=kv_cache.dtype is torch.bfloat16,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from `query [num_tokens, num_heads, head_size]` into `output`."""
        if self.refusal is not None or attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        assert isinstance(attn_metadata, MetaAttentionMetadata)
        plan = attn_metadata.plan(self.shape(kv_cache))
        attend(
            plan,
            query[: plan.num_tokens].numpy(),
            _elements(kv_cache),
            attn_metadata.block_table.numpy(),
            output[: plan.num_tokens].numpy(),
        )
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values, `[num_tokens, num_kv_heads, head_size]` each, to their slots."""
        if self.refusal is not None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        num_tokens = slot_mapping.numel()
        write_kv(
            self.shape(kv_cache),
            _elements(kv_cache),
            key[:num_tokens].numpy(),
            value[:num_tokens].numpy(),
            slot_mapping.numpy(),
        )
