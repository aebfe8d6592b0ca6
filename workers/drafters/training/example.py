"""What a draft head learns from: a prompt, the target's answer, and its hidden states."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Message = dict[str, str]
"""A message of a chat: its `role` and `content`."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the target's answer."""

    num_prompt_tokens: int
    token_ids: NDArray[np.int32]
    states: NDArray[np.float16]
    """`[num_tokens - 1, hidden_size]`: the target's final states at all tokens but the last."""
