"""vLLM's verification of drafts, switched on for drafts that come from elsewhere."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker import gpu_model_runner

from workers.draft_worker import DraftConfig

MAX_HIDDEN_STATES = 256
"""The hidden states of so many of a request's last tokens go to the draft worker at most."""

# The runner, its samplers and its metadata are vLLM's own affair: looked at, not declared.
Runner = Any


class NoDrafts:
    """What vLLM asks for drafts after each step; ours come through the scheduler."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Nothing to set up."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """No drafts for any row of the batch."""
        return [[] for _ in sampled_token_ids]


def speculative_config(config: DraftConfig, device: str) -> dict[str, Any]:
    """vLLM's argument of this name."""
    args: dict[str, Any] = {"num_speculative_tokens": config.num_speculative_tokens}
    if device == "npu":  # whose runner knows no class of one's own; its drafts are ignored
        return args | {"method": "ngram", "prompt_lookup_max": 2}
    return args | {"method": "custom_class", "model": f"{__name__}.{NoDrafts.__name__}"}


@contextmanager
def all_logits_processors() -> Iterator[None]:
    """Have an engine that is made meanwhile keep what it would drop for speculation.

    vLLM's verification knows nothing of `min_p`, `logit_bias` and custom processors, and so it
    loads none. But a request without drafts is sampled as ever, and those requests get none.
    """
    runner: Any = gpu_model_runner
    build = runner.build_logitsprocs

    def build_all(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return build(plain, *args, **kwargs)

    runner.build_logitsprocs = build_all
    try:
        yield
    finally:
        runner.build_logitsprocs = build


def runner_of(core: EngineCore) -> Runner:
    """The model runner of an engine whose executor is in this process."""
    return core.model_executor.driver_worker.worker.model_runner


def sample_plainly_without_drafts(runner: Runner) -> None:
    """Have a step without drafts sampled as without speculation, which is much cheaper."""
    verify = runner.rejection_sampler

    def sample(metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        if metadata.max_spec_len == 0:
            return runner.sampler(logits=logits, sampling_metadata=sampling_metadata)
        return verify(metadata, draft_probs, logits, sampling_metadata)

    runner.rejection_sampler = sample


class HiddenStates:
    """The final hidden states of a model's last forward pass."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Watch `model`."""
        self._states: torch.Tensor | None = None
        model.register_forward_hook(self._keep)

    def _keep(self, model: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._states = output[0] if isinstance(output, tuple) else output

    def rows(self, begin: int, end: int) -> list[bytes]:
        """Those of the last tokens in `[begin, end)` of the step, as float16 `[hidden_size]`."""
        if self._states is None:
            return []
        begin = max(begin, end - MAX_HIDDEN_STATES)
        return [row.tobytes() for row in self._states[begin:end].to(torch.float16).cpu().numpy()]
