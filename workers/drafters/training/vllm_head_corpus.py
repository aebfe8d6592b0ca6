"""The examples that a draft head is trained on, as rows."""

import random

import numpy as np
import torch
from torch import Tensor

from workers.drafters.training.example import Example

PROMPT_WEIGHT = 0.2
"""Weight of a row inside a prompt, where no guesses are needed: it still teaches something."""


class Corpus:
    """Examples end to end, and which rows of them to learn from."""

    def __init__(self, examples: list[Example], window: int) -> None:
        """Row i is the token at i + 1 with the state at i; its target is the state at i + 1."""
        pad = np.zeros((1, examples[0].states.shape[1]), np.float16)
        self.token_ids = torch.tensor(np.concatenate([e.token_ids for e in examples])).long()
        self.states = torch.tensor(
            np.concatenate([part for e in examples for part in (e.states, pad)])
        )
        starts = np.cumsum([0, *(len(e.token_ids) for e in examples)])
        # Long prompts: only the rows that the first tokens of the answer attend to.
        self.spans = [
            torch.arange(start + max(0, e.num_prompt_tokens - window), start + len(e.states) - 1)
            for start, e in zip(starts, examples, strict=False)
        ]
        self.weights = torch.full((len(self.token_ids),), PROMPT_WEIGHT)
        for start, example in zip(starts, examples, strict=False):
            # The row that ends with the last token of the prompt predicts the first of the answer.
            self.weights[start + example.num_prompt_tokens - 2 : start + len(example.states)] = 1

    def chunks(self, num_rows: int, order: random.Random) -> list[tuple[Tensor, Tensor]]:
        """Rows in chunks of `num_rows`, with the example of each row; a rest is left out."""
        spans = list(enumerate(self.spans))
        order.shuffle(spans)
        rows = torch.cat([span for _, span in spans])
        owners = torch.cat([torch.full_like(span, number) for number, span in spans])
        end = len(rows) // num_rows * num_rows
        chunks = list(zip(rows[:end].split(num_rows), owners[:end].split(num_rows), strict=True))
        order.shuffle(chunks)
        return chunks
