"""The attention meta-kernel in vLLM on GPUs and NPUs, as an attention backend of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.config.vllm import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from workers.kernels.shapes import AttentionShape
from workers.kernels.triton_attention import (
    AttentionPlan,
    AttentionPlanner,
    attend,
    write_kv,
)
from workers.plugin.vllm_triton_device import triton_device

MAX_HEAD_SIZE = 256


class TritonAttentionBackend(AttentionBackend):
    """What the meta-kernel can do, as vLLM asks for it."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]

    @staticmethod
    @override
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    @override
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [16, 32, 64, 128]

    @classmethod
    @override
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0 and head_size <= MAX_HEAD_SIZE

    @classmethod
    @override
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    @override
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    @override
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    @override
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    @override
    def get_impl_cls() -> type["TritonAttentionImpl"]:
        return TritonAttentionImpl

    @staticmethod
    @override
    def get_builder_cls() -> type["TritonAttentionMetadataBuilder"]:
        return TritonAttentionMetadataBuilder


@dataclass(frozen=True, slots=True)
class TritonAttentionMetadata(AttentionMetadata):
    """A step; layers of the same shape share a plan."""

    plans: Mapping[AttentionShape, AttentionPlan]
    block_table: torch.Tensor


class TritonAttentionMetadataBuilder(AttentionMetadataBuilder[TritonAttentionMetadata]):
    """Plans each step for all shapes of its layers.

    Graphs with attention in them are captured of decodes and verifications; other steps have
    graphs of what is between two attentions.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Make room for the plans that captured graphs will read."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        impls = (layer.impl for layer in layers if isinstance(layer.impl, TritonAttentionImpl))
        runs_on = triton_device()
        self._planners = {
            shape: AttentionPlanner(
                shape,
                num_programs=runs_on.num_programs,
                device=device,
                max_rows=runs_on.max_rows(shape),
            )
            for shape in {impl.shape(kv_cache_spec.block_size) for impl in impls}
        }
        if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            for planner in self._planners.values():
                planner.reserve(
                    vllm_config.scheduler_config.max_num_seqs,
                    max_decode_query_len(vllm_config),
                    vllm_config.model_config.max_model_len,
                )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TritonAttentionMetadata:
        """The plans of one step; NotImplementedError if it is not causal."""
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError(
                "the attention kernel is causal only, and this model's attention is not"
            )
        starts = common.query_start_loc_cpu.numpy()
        seq_lens = self._seq_lens(common).numpy()
        plans = {shape: one.plan(starts, seq_lens) for shape, one in self._planners.items()}
        return TritonAttentionMetadata(plans, common.block_table_tensor)

    def _seq_lens(self, common: CommonAttentionMetadata) -> torch.Tensor:
        """Lengths with the new tokens. When steps overlap, only the device knows how many drafts of
        the step before were accepted."""
        vllm_config = self.vllm_config
        are_known = not (
            vllm_config.speculative_config and vllm_config.scheduler_config.async_scheduling
        )
        if are_known and common.seq_lens_cpu_upper_bound is not None:
            return common.seq_lens_cpu_upper_bound
        return common.seq_lens.cpu()


class TritonAttentionImpl(AttentionImpl[TritonAttentionMetadata]):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Take vLLM's arguments; NotImplementedError says what the kernel cannot do."""
        for name, value in (("ALiBi slopes", alibi_slopes), ("attention sinks", sinks)):
            if value is not None:
                raise NotImplementedError(f"the attention kernel has no {name}")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"the attention kernel has no {attn_type} attention")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale = head_size, scale
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window, self.logits_soft_cap = sliding_window, logits_soft_cap

    def shape(self, block_size: int) -> AttentionShape:
        """The layer's shape, as the kernel takes it."""
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            block_size=block_size,
            scale=self.scale,
            sliding_window=self.sliding_window or None,
            soft_cap=self.logits_soft_cap or None,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from `query [num_tokens, num_heads, head_size]` into `output`."""
        if attn_metadata is None:  # a run that only measures memory
            return output
        plan = attn_metadata.plans[self.shape(kv_cache.shape[2])]
        attend(
            plan,
            query[: plan.num_tokens],
            kv_cache,
            attn_metadata.block_table,
            output[: plan.num_tokens],
            is_flat=triton_device().is_npu,
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
        num_tokens = slot_mapping.numel()
        write_kv(
            self.shape(kv_cache.shape[2]),
            kv_cache,
            key[:num_tokens],
            value[:num_tokens],
            slot_mapping,
            num_programs=triton_device().num_programs,
        )
