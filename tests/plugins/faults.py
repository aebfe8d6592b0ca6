"""Faults that a test orders with a request: its worker's engine fails, hangs or slows down.

A logits processor of vLLM, which an app loads by `logits_processors` in
`worker.engine.extra_args`, as users load theirs: the engine, and the step that fails, are real.
"""

import os
import signal
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


def order(fault: str, num_tokens: int = 0) -> dict[str, Any]:
    """The parameters of a request that orders `fault` once it has `num_tokens` output tokens.

    Faults are "fail", "hang", "kill", or seconds per step.
    """
    return {"vllm_xargs": {"fault": fault, "num_tokens": num_tokens}}


class Faults(LogitsProcessor):
    """Does what the requests in the step order."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._orders: dict[int, tuple[str, int, list[int]]] = {}
        """Fault, number of tokens before it, and the output tokens so far, by row."""

    def is_argmax_invariant(self) -> bool:
        """It leaves the logits alone."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called in each step."""
        process_dict_updates(self._orders, batch_update, _ordered)
        for fault, num_tokens, output_token_ids in self._orders.values():
            if len(output_token_ids) < num_tokens:
                continue
            if fault == "fail":
                raise RuntimeError("a test ordered this step to fail")
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(HANG_S if fault == "hang" else float(fault))


def _ordered(
    params: SamplingParams, prompt: list[int] | None, output_token_ids: list[int]
) -> tuple[str, int, list[int]] | None:
    args = params.extra_args or {}
    if "fault" not in args:
        return None
    return args["fault"], args.get("num_tokens", 0), output_token_ids
