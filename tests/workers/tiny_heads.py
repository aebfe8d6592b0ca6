"""Draft heads with random weights for the checkpoints of `tiny_models`."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.workers.tiny_models import VOCAB_SIZE
from workers.drafters.draft_head import metadata
from workers.drafters.training.config import head_config
from workers.drafters.training.vllm_head_module import HeadModule

TEMPERATURE = 1.5
NUM_GUESSED = VOCAB_SIZE // 2


def tiny_head(model: Path, window: int = 16) -> HeadModule:
    """Weights that bf16 holds, and large enough that each makes a difference."""
    torch.manual_seed(0)
    module = HeadModule(replace(head_config(model, window, NUM_GUESSED), temperature=TEMPERATURE))
    for weight in module.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.1)
    return module.bfloat16().float()


def write_head(module: HeadModule, file: Path) -> None:
    """Write a head that guesses every other token."""
    tensors = {name: value.detach().bfloat16() for name, value in module.named_parameters()}
    vocabulary = torch.arange(1, VOCAB_SIZE, 2, dtype=torch.int32)
    save_file(tensors | {"vocabulary": vocabulary}, file, metadata(module.config))
