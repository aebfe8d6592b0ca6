"""Counts the work of a step on the modules of a loaded model."""

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
from workers.engine.vllm_sampling import Runner, on_each_rank

# torch does not declare what the modules of a model contain.
Module = Any


def model_work(core: EngineCore) -> ModelWork:
    """Work of an engine's language model, on one of the devices that it is split over.

    Bytes are those of the weights in memory, packed or not. Some figures are upper bounds: a
    mixture of experts counts the bytes of all experts, a sliding window the whole context, and
    layers that share a KV cache each count it. An embedding that is also the LM head may be packed
    only in the engine's first step, so call this after it.
    """
    works: list[ModelWork] = on_each_rank(core, _work_of_rank)
    return works[0]


def _work_of_rank(runner: Runner) -> ModelWork:
    vllm_config, model = runner.vllm_config, runner.get_model()
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
    """The module that computes logits: the LM head, or the embedding if there is none."""
    heads = [module for module in modules if isinstance(module, ParallelLMHead)]
    embeddings = [
        module
        for module in modules
        if isinstance(module, VocabParallelEmbedding) and module.embedding_dim == hidden_size
    ]
    return next(iter(heads or embeddings), None)


def _num_multiplied(module: Module) -> float:
    """Number of a module's own parameters that one token is multiplied with.

    Computed from the module's sizes: its weight may be packed, quantized or freed.
    """
    if isinstance(module, VocabParallelEmbedding):
        return float(module.shard_indices.num_org_elements * module.embedding_dim)
    if isinstance(module, LinearBase):
        return float(_linear_size(module))
    if isinstance(module, RoutedExperts):
        num_matrices = 3 if module.moe_config.is_act_and_mul else 2
        of_expert = num_matrices * module.hidden_size * module.intermediate_size_per_partition
        # A token is sent to top_k experts, of which this device holds its share on average.
        return of_expert * module.top_k * module.local_num_experts / module.global_num_experts
    return float(sum(weight.numel() for weight in _own_weights(module) if weight.ndim > 1))


def _weight_bytes(module: Module) -> int:
    """Bytes of a module's own weights that its products read."""
    packed = getattr(module, "packed", None)
    if packed is not None and isinstance(module, VocabParallelEmbedding):
        return int(packed.nbytes)  # the plain weight is for look-ups only
    num_bytes = sum(weight.nbytes for weight in _own_weights(module))
    if packed is not None:
        num_bytes += packed.nbytes
    elif isinstance(module, LinearBase) and _is_elsewhere(module):
        num_bytes += _linear_size(module) * module.params_dtype.itemsize
    return num_bytes


def _own_weights(module: Module) -> list[torch.nn.Parameter]:
    return list(module.parameters(recurse=False))


def _linear_size(layer: Module) -> int:
    """Elements of a linear layer's weight on this device."""
    num_inputs: int = getattr(layer, "input_size_per_partition", layer.input_size)
    num_outputs: int = getattr(layer, "output_size_per_partition", layer.output_size)
    return num_inputs * num_outputs


def _is_elsewhere(layer: Module) -> bool:
    """Whether vLLM freed the loaded weight, after packing it with the same data type."""
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.numel() == 0
