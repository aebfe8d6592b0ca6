"""What our quantization method has in common on all devices, and what an engine tells it."""

from typing import Any, Self

from typing_extensions import override
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from workers.kernels.tile_table import Inputs
from workers.plugin.names import QUANTIZATION


class OwnKernelConfig(QuantizationConfig):
    """Serves every linear layer and the LM head; nothing of it is read from the checkpoint."""

    inputs: Inputs | None = None
    """What products of the CPU kernels make of their inputs; None on other devices, and before the
    first layer is made."""

    @override
    def get_name(self) -> str:  # type: ignore[override]
        return QUANTIZATION

    @staticmethod
    @override
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    @override
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls()


def kernel_options() -> dict[str, Any]:
    """The `additional_config["xyserve"]` of the engine that is being made."""
    config = get_current_vllm_config().additional_config
    return config.get(QUANTIZATION, {}) if isinstance(config, dict) else {}
