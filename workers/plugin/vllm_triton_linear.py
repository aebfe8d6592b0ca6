"""The virtual-padding GEMM in vLLM on GPUs and NPUs: the quantization method `xyserve` there."""

import itertools
import weakref
from functools import lru_cache
from typing import Any

import torch
from typing_extensions import override
from vllm.model_executor.layers.linear import (
    LinearBase,
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

from workers.kernels.triton_gemm import HEIGHTS, Weight, plan_linear, quantised, run, tile_costs
from workers.plugin.names import QUANTIZATION
from workers.plugin.vllm_quantization import OwnKernelConfig, kernel_options
from workers.plugin.vllm_triton_device import triton_device

KEPT_ROWS = 512
"""Rows up to which plans are kept for good: captured graphs have their addresses."""

# A torch operator takes numbers and tensors only, so a weight is passed by its number.
_numbers = itertools.count()
_weights: weakref.WeakValueDictionary[int, Weight] = weakref.WeakValueDictionary()


def _linear(x: torch.Tensor, number: int, bias: torch.Tensor | None) -> torch.Tensor:
    weight = _weights[number]
    rows = x.reshape(-1, weight.values.shape[1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(rows.shape[0], weight.out_features)
    if rows.shape[0]:
        plan = _kept_plan if rows.shape[0] <= KEPT_ROWS else _plan
        tasks, num_tasks, max_rows = plan(
            rows.shape[0], weight.out_features, weight.tiles, x.device
        )
        num_programs = triton_device().num_programs
        run(rows, weight, bias, out, tasks, num_tasks, num_programs, max_rows)
    return out.view(*x.shape[:-1], weight.out_features)


def _linear_fake(x: torch.Tensor, number: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], _weights[number].out_features)


direct_register_custom_op("xyserve_triton_linear", _linear, fake_impl=_linear_fake)


@lru_cache(maxsize=256)
def _plan(
    num_rows: int, num_features: int, tiles: Any, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The tasks of a product and their number, on the device, and the rows of the tallest tile."""
    tasks = plan_linear(num_rows, num_features, tiles, tile_costs())
    num_tasks = torch.tensor([len(tasks)], dtype=torch.int32)
    max_rows = HEIGHTS[int(tasks[:, 3].max())]
    return torch.from_numpy(tasks).to(device), num_tasks.to(device), max_rows


_kept_plan = lru_cache(maxsize=None)(_plan.__wrapped__)


@register_quantization_config(QUANTIZATION)
class TritonKernelConfig(OwnKernelConfig):
    """Serves every linear layer and the LM head.

    The engine's `additional_config["xyserve"]` holds `weight_format`: `auto`, the checkpoint's, or
    `int8`.
    """

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that the kernels compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    @override
    def get_min_capability(cls) -> int:
        return 80  # bf16

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our GEMM for linear layers and the LM head; None, which is vLLM's own, for the rest."""
        weight_format = kernel_options().get("weight_format", "auto")
        if isinstance(layer, LinearBase):
            return TritonLinearMethod(weight_format)
        if isinstance(layer, VocabParallelEmbedding):
            return TritonEmbeddingMethod()
        return None


def _keep(layer: Any, weight: Weight) -> None:
    layer.kernel_weight = weight
    layer.weight_number = next(_numbers)
    _weights[layer.weight_number] = weight


@register_weight_loader_v2_supported_method
class TritonLinearMethod(UnquantizedLinearMethod):
    """A linear layer that uses the virtual-padding GEMM."""

    def __init__(self, weight_format: str) -> None:
        """Keep the format for when the weights are loaded."""
        super().__init__()
        self._weight_format = weight_format

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the weight as it is, or in 8 bits."""
        values = layer.weight.detach().contiguous()
        tiles = triton_device().gemm_tiles(values.dtype)
        if self._weight_format == "int8":
            _keep(layer, quantised(values, tiles=tiles))
            layer.weight = torch.nn.Parameter(values.new_empty(0), requires_grad=False)
        else:
            _keep(layer, Weight(values, tiles=tiles))

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute `x W^T + bias`."""
        out: torch.Tensor = torch.ops.vllm.xyserve_triton_linear(x, layer.weight_number, bias)
        return out


class TritonEmbeddingMethod(UnquantizedEmbeddingMethod):
    """An embedding, which multiplies by our GEMM if it is also an LM head."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Take the weight of an LM head."""
        if isinstance(layer, ParallelLMHead):
            self._take(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute `x W^T + bias`."""
        if not hasattr(layer, "weight_number"):  # the model uses its embedding as LM head
            self._take(layer)
        out: torch.Tensor = torch.ops.vllm.xyserve_triton_linear(x, layer.weight_number, bias)
        return out

    def _take(self, layer: Any) -> None:
        values = layer.weight.detach().contiguous()
        _keep(layer, Weight(values, tiles=triton_device().gemm_tiles(values.dtype)))
