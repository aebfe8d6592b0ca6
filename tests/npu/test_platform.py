"""Our platform for NPUs in vLLM, on the real torch_npu, as far as one gets without an NPU.

Tensors are without memory (`meta`), CANN's libraries are empty, and ranks meet by gloo.
"""

import tempfile
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_npu
import yaml
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from cluster.config.app_config import parse_args
from cluster.models.model import resolve_model
from workers.config import WorkerConfig
from workers.engine.vllm_engine import engine_args
from workers.engine.vllm_scheduler import PlannedScheduler
from workers.kernels.triton_attention import AttentionPlan
from workers.plugin.vllm_npu_platform import NpuPlatform, compute_slot_mapping
from workers.plugin.vllm_npu_worker import STREAMS, NpuModelRunner, NpuWorker
from workers.plugin.vllm_seams import check_seams
from workers.plugin.vllm_triton_attention import TritonAttentionBackend, TritonAttentionImpl
from workers.plugin.vllm_triton_device import triton_device
from workers.plugin.vllm_triton_linear import TritonEmbeddingMethod, TritonLinearMethod

CONFIG = Path(__file__).parents[2] / "deploy" / "npu.yaml"
NUM_CORES = 24
MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 10


@pytest.fixture(scope="module", autouse=True)
def chip() -> Iterator[None]:
    """What the chip would say of itself."""
    triton_device.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NpuPlatform, "num_compute_units", lambda self: NUM_CORES)
        yield


@pytest.fixture(scope="module")
def worker() -> WorkerConfig:
    """The worker of deploy/npu.yaml."""
    [app] = yaml.safe_load(CONFIG.read_text())["applications"]
    return parse_args(app["args"]).worker


@pytest.fixture(scope="module")
def config(worker: WorkerConfig) -> VllmConfig:
    config = engine_args(str(resolve_model(MODEL)), worker).create_engine_config()
    config.scheduler_config.scheduler_cls = PlannedScheduler
    return config


@pytest.fixture(scope="module")
def model(config: VllmConfig) -> Iterator[Any]:
    """The default model without memory, ready to run."""
    before = torch.get_default_dtype()
    with set_current_vllm_config(config):
        store = f"file://{tempfile.mktemp()}"
        init_distributed_environment(1, 0, store, 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            model = initialize_model(config)
        process_weights_after_loading(model, config.model_config, torch.device("meta"))
        yield model
    torch.set_default_dtype(before)


def test_vllm_finds_our_platform() -> None:
    assert isinstance(current_platform, NpuPlatform)
    assert not HAS_TRITON  # vLLM 0.32 needs a newer one than the NPU's
    assert torch_npu.npu.is_available() is False
    assert triton_device().num_programs == NUM_CORES
    assert triton_device().is_npu


def test_all_seams_are_there() -> None:
    check_seams("npu")


def test_an_engine_of_npu_yaml_gets_our_worker_and_scheduler(config: VllmConfig) -> None:
    assert config.parallel_config.worker_cls.endswith(NpuWorker.__qualname__)
    assert config.scheduler_config.get_scheduler_cls() is PlannedScheduler
    assert config.device_config.device_type == "npu"
    assert config.cache_config.block_size == 128
    assert not config.use_v2_model_runner
    assert not config.scheduler_config.async_scheduling


def test_every_layer_is_on_our_kernels(model: Any) -> None:
    methods = {type(m.quant_method) for m in model.modules() if hasattr(m, "quant_method")}
    layers = [m for m in model.modules() if isinstance(m, Attention)]

    assert methods == {TritonLinearMethod, TritonEmbeddingMethod}
    assert {layer.get_attn_backend() for layer in layers} == {TritonAttentionBackend}
    assert {type(layer.impl) for layer in layers} == {TritonAttentionImpl}


def test_a_whole_forward_pass_has_the_right_shapes(model: Any, config: VllmConfig) -> None:
    tokens = torch.zeros(NUM_TOKENS, dtype=torch.long, device="meta")
    # vLLM's operator around the attention has no form for tensors without memory.
    library = torch.library.Library("vllm", "FRAGMENT")
    library.impl("unified_attention_with_output", lambda *args, **kwargs: None, "Meta")

    with set_forward_context(None, config, num_tokens=NUM_TOKENS):
        states = model(tokens, tokens)
    logits = model.compute_logits(states)

    sizes = config.model_config.hf_config
    assert states.shape == (NUM_TOKENS, sizes.hidden_size)
    assert logits.shape == (NUM_TOKENS, sizes.vocab_size)
    assert {states.dtype, logits.dtype} == {torch.bfloat16}


def test_the_metadata_of_a_step_has_a_plan(model: Any, config: VllmConfig) -> None:
    layers = {m.layer_name: m for m in model.modules() if isinstance(m, Attention)}
    impl = next(iter(layers.values())).impl
    assert isinstance(impl, TritonAttentionImpl)
    spec = FullAttentionSpec(
        block_size=128,
        num_kv_heads=impl.num_kv_heads,
        head_size=impl.head_size,
        dtype=torch.bfloat16,
    )
    with set_current_vllm_config(config):
        builder = TritonAttentionBackend.get_builder_cls()(
            spec, list(layers), config, torch.device("cpu")
        )
        starts, seq_lens = torch.tensor([0, 1, 9], dtype=torch.int32), torch.tensor([5000, 8])
        step = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=2,
            num_actual_tokens=9,
            max_query_len=8,
            max_seq_len=5000,
            block_table_tensor=torch.zeros((2, 64), dtype=torch.int32),
            slot_mapping=torch.zeros(9, dtype=torch.long),
        )
        metadata = builder.build(0, step)

    [plan] = metadata.plans.values()
    assert isinstance(plan, AttentionPlan)
    num_tasks, num_merges = plan.counts.tolist()
    # A decode of three chunks in each KV head, which are merged, and a short prompt.
    assert num_merges == impl.num_kv_heads
    assert num_tasks == 4 * impl.num_kv_heads
    assert np.bincount(plan.tasks[:num_tasks, 0]).tolist() == [
        3 * impl.num_kv_heads,
        impl.num_kv_heads,
    ]


def test_each_token_has_a_slot_in_a_block_of_its_request() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = [1, 300, 7, 0, 128]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    num_tokens, size = sum(lengths), 16
    positions = torch.randint(0, 400, (num_tokens,), generator=draw)
    table = torch.randint(0, 1000, (len(lengths), 32), generator=draw, dtype=torch.int32)
    slots = torch.full((num_tokens + 5,), 7)

    compute_slot_mapping(num_tokens, num_tokens + 5, starts, positions, table, 32, slots, size)

    requests = [row for row, length in enumerate(lengths) for _ in range(length)]
    expected = [
        int(table[row, position // size]) * size + position % size
        for row, position in zip(requests, positions.tolist(), strict=True)
    ]
    assert slots.tolist() == [*expected, *[-1] * 5]


def test_torch_npu_has_the_streams_that_vllms_runner_asks_of_cuda() -> None:
    assert all(hasattr(torch_npu.npu, name) for name in STREAMS)
    assert NpuModelRunner.__mro__[1].__name__ == "GPUModelRunner"
