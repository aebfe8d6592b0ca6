"""What a draft head learns from: chats, and what the target wrote and had in mind."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and what the target wrote after it."""

    num_prompt_tokens: int
    token_ids: NDArray[np.int32]
    states: NDArray[np.float16]
    """`[num_tokens - 1, hidden_size]`: the target's final states at all tokens but the last."""
