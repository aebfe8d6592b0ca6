"""The virtual-padding GEMM in vLLM: the quantization method `xyserve`."""

import contextlib
import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.utils.torch_utils import direct_register_custom_op

from workers.kernels import gemm, native
from workers.kernels.gemm import Weight
from workers.kernels.tile_table import Inputs, inputs_of
from workers.plugin.names import QUANTIZATION
from workers.plugin.vllm_packed_weights import PackedWeights
from workers.plugin.vllm_quantization import OwnKernelConfig, kernel_options

# A torch operator takes numbers and tensors only, so a packed weight is passed by its number.
_numbers = itertools.count()
_weights: weakref.WeakValueDictionary[int, Weight] = weakref.WeakValueDictionary()


def _linear(x: torch.Tensor, number: int, bias: torch.Tensor | None) -> torch.Tensor:
    weight = _weights[number]
    rows = x.reshape(-1, weight.k)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(rows.shape[0], weight.n)
    gemm.run(
        weight,
        rows.shape[0],
        rows.data_ptr(),
        rows.stride(0),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        weight.n,
    )
    return out.view(*x.shape[:-1], weight.n)


def _linear_fake(x: torch.Tensor, number: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], _weights[number].n)


direct_register_custom_op("xyserve_linear", _linear, fake_impl=_linear_fake)


@register_quantization_config(QUANTIZATION)
class KernelConfig(OwnKernelConfig):
    """Serves every linear layer and the LM head.

    The engine's `additional_config["xyserve"]` holds `weight_format`, `lm_head_format`,
    `activation_format`, `kv_cache_format` and `keep_packed_weights` (as in `WorkerConfig`) and
    `num_threads`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.packed_weights: PackedWeights | None = None
        """Of the engine's model; None until its first layer is made."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Only float32, so that results are exact; weights may be narrower."""
        return [torch.float32]

    @classmethod
    @override
    def get_min_capability(cls) -> int:
        return -1  # no CUDA device is needed

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our GEMM for linear layers and the LM head; None, which is vLLM's own, for the rest."""
        options = kernel_options()
        if isinstance(layer, Attention):
            keep_in_bf16(layer, options)
        if not isinstance(layer, LinearBase | VocabParallelEmbedding):
            return None
        vllm_config = get_current_vllm_config()
        native.set_num_threads(options.get("num_threads", torch.get_num_threads()))
        body, lm_head = formats_of(options), lm_head_formats_of(options)
        self.inputs = body.inputs
        if self.packed_weights is None:
            keep = options.get("keep_packed_weights", False)
            name = str(body) if lm_head == body else f"{body}-{lm_head}"
            self.packed_weights = PackedWeights(vllm_config, name, keep)
        if isinstance(layer, LinearBase):
            return KernelLinearMethod(body, prefix, self.packed_weights)
        return KernelEmbeddingMethod(lm_head, prefix, self.packed_weights)


@dataclass(frozen=True, slots=True)
class Formats:
    """In what formats products are computed."""

    weights: str
    """auto, int8 or int4, as `Weight.pack` takes it."""
    inputs: Inputs

    def __str__(self) -> str:
        return f"{self.weights}-{self.inputs}"


def formats_of(options: Mapping[str, Any]) -> Formats:
    """The formats that an engine's options name."""
    weights = options.get("weight_format", "auto")
    return Formats(weights, inputs_of(weights, options.get("activation_format", "auto")))


def lm_head_formats_of(options: Mapping[str, Any]) -> Formats:
    """Those of the LM head: eight bits or more, as its errors go straight into the logits."""
    formats = formats_of(options)
    if formats.weights != "int4" and options.get("lm_head_format", "auto") == "auto":
        return formats
    activations = options.get("activation_format", "auto")
    if formats.weights == "auto" and activations == "bf16":
        activations = "auto"  # there are no products of bf16 and int8
    return Formats("int8", inputs_of("int8", activations))


def keep_in_bf16(layer: Any, options: Mapping[str, Any]) -> None:
    """Let a layer's keys and values be kept in bf16, if our attention kernel serves it and the
    options say so; with `auto` they do where activations are rounded, but not if what is rounded
    would be a float32 checkpoint's."""
    format = options.get("kv_cache_format", "auto")
    if format == "auto":
        formats = formats_of(options)
        checkpoint_dtype = get_current_vllm_config().model_config.hf_config.dtype
        is_exact = formats.inputs is Inputs.FLOAT32 or (
            formats.weights == "auto" and checkpoint_dtype is torch.float32
        )
        format = "float32" if is_exact else "bf16"
    if format == "bf16" and getattr(layer.impl, "refusal", "") is None:
        layer.kv_cache_torch_dtype = torch.bfloat16


def pack(layer: Any, formats: Formats, prefix: str, packed_weights: PackedWeights) -> None:
    """Pack `layer.weight` into `layer.packed`, or find it; ValueError names the layer."""
    n, k = layer.weight.shape
    packed = packed_weights.find(prefix, n, k, gate_up=_is_gate_up(layer))
    if packed is None:
        try:
            weight = layer.weight.detach().contiguous().numpy()
            packed = Weight.pack(
                weight, formats.weights, gate_up=_is_gate_up(layer), inputs=formats.inputs
            )
        except ValueError as error:
            raise ValueError(f"{prefix or type(layer).__name__}: {error}") from None
        packed_weights.add(prefix, packed)
    layer.packed = packed
    layer.packed_number = next(_numbers)
    _weights[layer.packed_number] = layer.packed


def _is_gate_up(layer: Any) -> bool:
    return isinstance(layer, MergedColumnParallelLinear) and (
        len(layer.output_sizes) == 2 and layer.output_sizes[0] == layer.output_sizes[1]
    )


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Load nothing into a weight that is packed already."""


@register_weight_loader_v2_supported_method
class KernelLinearMethod(UnquantizedLinearMethod):
    """A linear layer that uses the virtual-padding GEMM."""

    def __init__(self, formats: Formats, prefix: str, packed_weights: PackedWeights) -> None:
        """Keep the formats for when the weights are loaded."""
        super().__init__()
        self._formats, self._prefix = formats, prefix
        self._packed_weights = packed_weights
        self._is_found = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Make the weight; without memory if it is packed already, and what is loaded is ignored.

        Whoever reads such a weight gets an error, or a tensor without memory.
        """
        n, k = sum(output_partition_sizes), input_size_per_partition
        gate_up = _is_gate_up(layer)
        self._is_found = self._packed_weights.find(self._prefix, n, k, gate_up=gate_up) is not None
        if self._is_found:
            kwargs["weight_loader"] = _ignore
        with torch.device("meta") if self._is_found else contextlib.nullcontext():
            super().create_weights(
                layer, input_size_per_partition, output_partition_sizes, *args, **kwargs
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight and free the loaded one."""
        is_elsewhere = layer.weight.is_meta and not self._is_found
        if is_elsewhere or getattr(layer, "_cpu_skip_gemm_dispatch", False):
            super().process_weights_after_loading(layer)
            return
        pack(layer, self._formats, self._prefix, self._packed_weights)
        layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute `x W^T + bias`."""
        if not hasattr(layer, "packed"):
            return super().apply(layer, x, bias)
        out: torch.Tensor = torch.ops.vllm.xyserve_linear(x, layer.packed_number, bias)
        return out


class KernelEmbeddingMethod(UnquantizedEmbeddingMethod):
    """An embedding, packed only if it is also an LM head; look-ups use the plain weight."""

    def __init__(self, formats: Formats, prefix: str, packed_weights: PackedWeights) -> None:
        """Keep the formats for when the weights are loaded."""
        super().__init__()
        self._packed_weights = packed_weights
        self._formats, self._prefix = formats, prefix

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack an LM head."""
        if isinstance(layer, ParallelLMHead) and not layer.weight.is_meta:
            pack(layer, self._formats, self._prefix, self._packed_weights)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute `x W^T + bias`."""
        if not hasattr(layer, "packed"):  # the model uses its embedding as LM head
            pack(layer, self._formats, self._prefix, self._packed_weights)
        out: torch.Tensor = torch.ops.vllm.xyserve_linear(x, layer.packed_number, bias)
        return out
