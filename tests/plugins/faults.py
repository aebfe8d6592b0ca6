"""Faults that a test orders with a request: its worker's engine fails, hangs or slows down.

A logits processor of vLLM, which an app loads by `logits_processors` in
`worker.engine.extra_args`, as users load theirs: the engine, and the step that fails, are real.
"""

import time
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

NAME = "faults:Faults"
"""Name of the processor in a config, if this folder is in PYTHONPATH."""
FOLDER = Path(__file__).parent
HANG_S = 3600.0


def order(fault: str) -> dict[str, Any]:
    """The parameters of a request that orders `fault`: "fail", "hang", or seconds per step."""
    return {"vllm_xargs": {"fault": fault}}


class Faults(LogitsProcessor):
    """Does what the requests in the step order."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._orders: dict[int, str] = {}

    def is_argmax_invariant(self) -> bool:
        """It leaves the logits alone."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called in each step."""
        process_dict_updates(self._orders, batch_update, _ordered)
        for fault in self._orders.values():
            if fault == "fail":
                raise RuntimeError("a test ordered this step to fail")
            time.sleep(HANG_S if fault == "hang" else float(fault))


def _ordered(params: SamplingParams, *_: object) -> str | None:
    return (params.extra_args or {}).get("fault")
