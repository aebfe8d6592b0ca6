"""What a step of a loaded model asks of its device, counted on the modules of the model."""

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.v1.engine.core import EngineCore

from scheduler.work import ModelWork
from workers.engine.vllm_sampling import runner_of

# torch does not say what a module of a model holds.
Module = Any


def model_work(core: EngineCore) -> ModelWork:
    """What the parts of an engine's language model take, on one device of those it is split over.

    Bytes are those of the weights as they lie in memory, packed or not. Upper bounds: of a
    mixture of experts the bytes of all experts, of sliding windows all pairs and all of the
    context; layers that share a KV cache read it each. An embedding that is also the LM head may
    be packed by the engine's first step only: count after it.
    """
    vllm_config = core.vllm_config
    model = runner_of(core).get_model()
    if getattr(model, "supports_multimodal", False):
        model = model.get_language_model()
    modules = list(model.modules())
    head = _head(modules, vllm_config.model_config.get_hidden_size())
    body = [
        module
        for module in modules
        if not isinstance(module, VocabParallelEmbedding | torch.nn.Embedding)
    ]
    attentions = [module for module in modules if isinstance(module, Attention | MLAAttention)]
    kv_specs = [attention.get_kv_cache_spec(vllm_config) for attention in attentions]
    return ModelWork(
        body_flops_per_token=2.0 * sum(map(_num_multiplied, body)),
        head_flops_per_logit=2.0 * _num_multiplied(head) if head else 0.0,
        flops_per_pair=4.0 * sum(layer.head_size * layer.num_heads for layer in attentions),
        body_bytes=float(sum(map(_weight_bytes, body))),
        head_bytes=float(_weight_bytes(head)) if head else 0.0,
        kv_bytes_per_token=sum(spec.page_size_bytes / spec.block_size for spec in kv_specs if spec),
    )


def _head(modules: list[Module], hidden_size: int) -> Module | None:
    """What makes logits: the LM head, or the embedding of a model that has no such layer."""
    heads = [module for module in modules if isinstance(module, ParallelLMHead)]
    embeddings = [
        module
        for module in modules
        if isinstance(module, VocabParallelEmbedding) and module.embedding_dim == hidden_size
    ]
    return next(iter(heads or embeddings), None)


def _num_multiplied(module: Module) -> float:
    """Parameters of a module itself that one token is multiplied with.

    By the module's sizes: its weight may be packed, or quantized, or elsewhere.
    """
    if isinstance(module, VocabParallelEmbedding):
        return float(module.shard_indices.num_org_elements * module.embedding_dim)
    if isinstance(module, LinearBase):
        return float(_linear_size(module))
    if isinstance(module, RoutedExperts):
        num_matrices = 3 if module.moe_config.is_act_and_mul else 2
        of_expert = num_matrices * module.hidden_size * module.intermediate_size_per_partition
        # Of the experts that a token is sent to, as many as are here on average.
        return of_expert * module.top_k * module.local_num_experts / module.global_num_experts
    return float(sum(weight.numel() for weight in _own_weights(module) if weight.ndim > 1))


def _weight_bytes(module: Module) -> int:
    """Bytes of a module's own weights that a product reads."""
    packed = getattr(module, "packed", None)
    if packed is not None and isinstance(module, VocabParallelEmbedding):
        return int(packed.nbytes)  # the plain weight is there for looking up only
    num_bytes = sum(weight.nbytes for weight in _own_weights(module))
    if packed is not None:
        num_bytes += packed.nbytes
    elif isinstance(module, LinearBase) and _is_elsewhere(module):
        num_bytes += _linear_size(module) * module.params_dtype.itemsize
    return num_bytes


def _own_weights(module: Module) -> list[torch.nn.Parameter]:
    return list(module.parameters(recurse=False))


def _linear_size(layer: Module) -> int:
    """Of a linear layer's weight, as far as it is on this device."""
    num_inputs: int = getattr(layer, "input_size_per_partition", layer.input_size)
    num_outputs: int = getattr(layer, "output_size_per_partition", layer.output_size)
    return num_inputs * num_outputs


def _is_elsewhere(layer: Module) -> bool:
    """Whether vLLM let go of the loaded weight, after packing it in the same type."""
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.numel() == 0
