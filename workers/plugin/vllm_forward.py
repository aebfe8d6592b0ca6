"""The forward pass of llama-like models as one call of the native library."""

import ctypes
import logging
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models import llama, mistral, qwen2, qwen3
from vllm.sequence import IntermediateTensors

from workers.kernels import native
from workers.kernels.attention import shape_struct
from workers.kernels.gemm import Weight, plan_struct
from workers.plugin.vllm_attention import MetaAttentionMetadata

logger = logging.getLogger(__name__)

# torch does not declare what the modules of a model contain.
Module = Any

# Layers that do exactly what `DecoderStack` runs. A class derived from one of these may do more.
LAYERS = {
    llama.LlamaDecoderLayer,
    mistral.MistralDecoderLayer,
    qwen2.Qwen2DecoderLayer,
    qwen3.Qwen3DecoderLayer,
}
ATTENTIONS = {
    llama.LlamaAttention,
    mistral.MistralAttention,
    qwen2.Qwen2Attention,
    qwen3.Qwen3Attention,
}


class DecoderStack:
    """Decoder layers and final norm of a loaded model, as C++ sees them."""

    def __init__(self, model: Module) -> None:
        """Collect pointers to the layers' weights; `refusal(model, ...)` must be None."""
        first = model.layers[0].self_attn
        self._layer_name = first.attn.layer_name
        self._kv_cache = first.attn.kv_cache
        self.shape = first.attn.impl.shape(self._kv_cache)
        self._tensors: list[torch.Tensor] = []  # memory that the structures point into
        layers = [self._layer(layer) for layer in model.layers]
        self._weights: tuple[Weight, ...] = tuple(
            linear.packed
            for linear in (
                first.qkv_proj, first.o_proj,
                model.layers[0].mlp.gate_up_proj, model.layers[0].mlp.down_proj,
            )
        )  # fmt: skip
        cos_sin = first.rotary_emb.cos_sin_cache.float().contiguous()
        self._layers = (native.LayerStruct * len(layers))(*layers)
        self._struct = native.ModelStruct(
            len(layers),
            self._weights[0].k,
            self._weights[3].k,
            cos_sin.shape[1],
            model.norm.variance_epsilon,
            cos_sin.shape[0],
            self._pointer(cos_sin),
            self._pointer(model.norm.weight),
            ctypes.addressof(self._layers),
            shape_struct(self.shape),
        )

    def _pointer(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def _layer(self, layer: Module) -> native.LayerStruct:
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        return native.LayerStruct(
            self._pointer(layer.input_layernorm.weight),
            self._pointer(layer.post_attention_layernorm.weight),
            *(
                self._pointer(getattr(getattr(attention, norm, None), "weight", None))
                for norm in ("q_norm", "k_norm")
            ),
            *(ctypes.addressof(linear.packed.struct) for linear in linears),
            *(self._pointer(linear.bias) for linear in linears),
            self._pointer(attention.attn.kv_cache),
        )

    def is_current(self, model: Module) -> bool:
        """Whether the model still uses the same KV cache."""
        return self._kv_cache is model.layers[0].self_attn.attn.kv_cache

    def run(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Replace embeddings `[num_tokens, hidden_size]` by the final, normed states."""
        of_layers = get_forward_context().attn_metadata
        assert isinstance(of_layers, dict)
        metadata = of_layers[self._layer_name]
        assert isinstance(metadata, MetaAttentionMetadata)
        plan = metadata.plan(self.shape)
        gemms = [weight.plan(plan.num_tokens) for weight in self._weights]
        block_table, slots = metadata.block_table, metadata.slot_mapping
        step = native.StepStruct(
            plan.num_tokens,
            positions.data_ptr(),
            slots.data_ptr(),
            block_table.data_ptr(),
            block_table.stride(0),
            ctypes.addressof(plan.struct),
            *map(plan_struct, gemms),
            hidden.data_ptr(),
        )
        native.kernels().forward(ctypes.byref(self._struct), ctypes.byref(step))
        return hidden


def refusal(model: Module, config: VllmConfig) -> str | None:
    """Why a loaded model's layers cannot run in one call; None if they can."""
    if config.parallel_config.world_size > 1:
        return "the model is split over several processes"
    if config.lora_config is not None or config.kv_transfer_config is not None:
        return "LoRA and KV connectors need each layer run by itself"
    if getattr(model, "aux_hidden_state_layers", ()):
        return "a drafter reads hidden states between layers"
    shapes = set()
    for layer in model.layers:
        attention = layer.self_attn.attn
        if problem := attention.impl.refusal or _layer_refusal(layer):
            return str(problem)
        shapes.add(attention.impl.shape(attention.kv_cache))
    return "its layers differ in the shape of their attention" if len(shapes) > 1 else None


def _layer_refusal(layer: Module) -> str | None:
    attention, mlp = layer.self_attn, layer.mlp
    if type(layer) not in LAYERS or type(attention) not in ATTENTIONS:
        return f"{type(layer).__name__} with {type(attention).__name__} may do more"
    rotary = attention.rotary_emb
    same_rotation = type(rotary).forward_native is RotaryEmbedding.forward_native
    if not same_rotation or not rotary.is_neox_style:
        return f"{type(rotary).__name__} rotates queries and keys in another way"
    if getattr(attention, "do_llama_4_scaling", False):
        return "queries are scaled by their position"
    if getattr(attention, "dual_chunk_attention_config", None):
        return "it uses dual chunk attention"
    if getattr(layer, "ada_rms_norm_t_cond", None) is not None:
        return "its norms are conditioned"
    if type(mlp.act_fn) is not SiluAndMul:
        return f"{type(mlp.act_fn).__name__} is not SiLU"
    linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    if not all(hasattr(linear, "packed") for linear in linears):
        return "a linear layer is not packed"
    return None


class NativeForward(torch.nn.Module):
    """A mixin for vLLM's class of a model: one call for all layers if they are supported."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        """Build the model as vLLM does."""
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self._vllm_config = vllm_config
        self._stack: DecoderStack | None = None
        self._refusal: str | None = None

    def _find_stack(self) -> DecoderStack | None:
        """The stack for the current KV cache, made at the first step; None if not supported."""
        if self._refusal is None and (
            self._stack is None or not self._stack.is_current(self.model)
        ):
            self._refusal = refusal(self.model, self._vllm_config)
            if self._refusal is None:
                self._stack = DecoderStack(self.model)
            else:
                logger.info("the model runs operator by operator", extra={"reason": self._refusal})
        return self._stack if self._refusal is None else None

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Final hidden states `[num_tokens, hidden_size]`."""
        if get_forward_context().attn_metadata is not None:  # else vLLM is only warming up
            stack = self._find_stack()
            if stack is not None:
                if inputs_embeds is None:
                    inputs_embeds = self.model.embed_input_ids(input_ids)
                return stack.run(inputs_embeds, positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)


class NativeLlamaForCausalLM(NativeForward, llama.LlamaForCausalLM):
    """Llama, SmolLM and similar models."""


class NativeMistralForCausalLM(NativeForward, mistral.MistralForCausalLM):
    """Mistral."""


class NativeQwen2ForCausalLM(NativeForward, qwen2.Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5, which have a bias in the QKV projection."""


class NativeQwen3ForCausalLM(NativeForward, qwen3.Qwen3ForCausalLM):
    """Qwen3, which norms queries and keys per head."""
