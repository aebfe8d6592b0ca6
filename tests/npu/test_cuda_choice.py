"""What vLLM makes of deploy/cuda.yaml on a GPU, asked where there is none."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from cluster.config.app_config import parse_args
from cluster.models.model import resolve_model
from tests.workers.engine_process import EngineProcesses
from workers.config import WorkerConfig

CONFIG = Path(__file__).parents[2] / "deploy" / "cuda.yaml"
FITTING: dict[str, Any] = {"head_size": 128, "kv_cache_dtype": "auto", "block_size": 16}


def choice(**layer: Any) -> str:
    """The backend that vLLM chooses on a GPU for a layer if ours is asked for, or why it is not."""
    import torch

    for name in ("vllm._C_stable_libtorch", "vllm._C"):  # CUDA's, which are not here
        sys.modules[name] = ModuleType(name)
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from workers.plugin.vllm_plugin import register

    class Hopper(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

    register()
    layer = {"dtype": torch.bfloat16} | FITTING | layer
    try:
        return Hopper.get_attn_backend_cls(
            AttentionBackendEnum.CUSTOM, AttentionSelectorConfig(**layer)
        )
    except ValueError as error:
        return str(error)


def config_of(model: str, worker: WorkerConfig) -> dict[str, str]:
    from workers.engine.vllm_engine import engine_args

    config = engine_args(model, worker).create_engine_config()
    return {
        "backend": str(config.attention_config.backend),
        "quantization": type(config.quant_config).__name__,
        "dtype": str(config.model_config.dtype),
    }


@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"head_size": 64},
        {"head_size": 256, "has_sliding_window": True},
        {"block_size": 128},
        {"use_batch_invariant": True},
    ],
)
def test_our_attention_is_chosen(npu_processes: EngineProcesses, layer: dict[str, Any]) -> None:
    assert npu_processes.call(choose, layer).endswith("TritonAttentionBackend")


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"head_size": 512}, "head_size not supported"),
        ({"has_sink": True}, "sink"),
        ({"use_mla": True}, "MLA"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"use_non_causal": True}, "causal"),
        ({"use_dcp": True}, ""),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(
    npu_processes: EngineProcesses, layer: dict[str, Any], words: str
) -> None:
    refused = npu_processes.call(choose, layer)

    assert "CUSTOM is not valid for this configuration" in refused
    assert words.lower() in refused.lower()


def choose(layer: dict[str, Any]) -> str:
    return choice(**layer)


@pytest.mark.parametrize(("kernels", "backend"), [("xyserve", "CUSTOM"), ("vllm", "None")])
def test_cuda_yaml_asks_for_our_kernels_and_one_key_for_vllms(
    npu_processes: EngineProcesses, kernels: str, backend: str
) -> None:
    [app] = yaml.safe_load(CONFIG.read_text())["applications"]
    app["args"]["worker"]["kernels"] = kernels

    found = npu_processes.call(
        config_of, str(resolve_model("smollm2-135m-instruct")), parse_args(app["args"]).worker
    )

    assert found["backend"].endswith(backend)
    assert (found["quantization"] == "TritonKernelConfig") == (kernels == "xyserve")
    assert found["dtype"] == "torch.bfloat16"
