"""vLLM's verification of drafts, switched on for drafts that come from elsewhere."""

from typing import Any

import torch
from vllm.config import VllmConfig

from workers.config import DraftConfig

MAX_HIDDEN_STATES = 256
"""Max hidden states of a request's last tokens that are sent to the draft worker: twice the window
that draft heads are trained with. All states of a long prompt would be megabytes."""


class NoDrafts:
    """The drafter that vLLM asks after each step; ours come through the scheduler."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Nothing to set up."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """No drafts for any row of the batch."""
        return [[] for _ in sampled_token_ids]


def speculative_config(config: DraftConfig) -> dict[str, Any]:
    """vLLM's argument of this name: drafts are verified, and vLLM makes none."""
    return {
        "num_speculative_tokens": config.num_speculative_tokens,
        "method": "custom_class",
        "model": f"{__name__}.{NoDrafts.__name__}",
    }


class LastHiddenStates:
    """The final hidden states of a model's last forward pass."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Watch `model`."""
        self._states: torch.Tensor | None = None
        model.register_forward_hook(self._keep)

    def _keep(self, model: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._states = output[0] if isinstance(output, tuple) else output

    def rows(self, begin: int, end: int) -> list[bytes]:
        """One float16 `[hidden_size]` for each of the step's tokens in `[begin, end)`.

        Only the last MAX_HIDDEN_STATES of them.
        """
        if self._states is None:
            return []
        begin = max(begin, end - MAX_HIDDEN_STATES)
        return [row.tobytes() for row in self._states[begin:end].to(torch.float16).cpu().numpy()]
