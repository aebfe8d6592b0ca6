"""vLLM's worker for GPUs, on an Ascend NPU: torch_npu has what it asks of torch.cuda."""

import torch
import torch_npu
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.utils import request_memory

STREAMS = ("Event", "Stream", "current_stream", "default_stream", "set_stream", "stream")


class NpuModelRunner(GPUModelRunner):
    """vLLM's model runner, whose streams and events are an NPU's."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Lead torch.cuda's streams and events to the NPU for the rest of the process."""
        for name in STREAMS:
            setattr(torch.cuda, name, getattr(torch_npu.npu, name))
        super().__init__(vllm_config, device)


class NpuWorker(Worker):
    """One NPU."""

    def init_device(self) -> None:
        """Take the NPU of this rank, meet the other ranks, and make the model runner."""
        index = current_platform.logical_device_id_to_visible_device_id(self.local_rank)
        self.device = torch.device(f"npu:{index}")
        torch.accelerator.set_device_index(self.device)
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        set_random_seed(self.model_config.seed)
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        self._init_workspace_and_model_runner()

    def _make_model_runner(self) -> GPUModelRunner:
        assert self.device
        return NpuModelRunner(self.vllm_config, self.device)
