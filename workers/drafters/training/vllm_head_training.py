"""Trains a draft head on text written by its target model, with the target's hidden states.

python -m workers.drafters.training.vllm_head_training '{"model": ..., "prompts": ..., ...}'
"""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workers.drafters.training.config import HeadTraining, head_config
from workers.drafters.training.example import Example, Message
from workers.drafters.training.vllm_head_corpus import Corpus
from workers.drafters.training.vllm_head_trainer import Evaluation, Trainer

REPORT_INTERVAL_S = 10.0
"""Interval of progress lines."""
HELD_OUT = 0.03
"""Fraction of the examples that the head is evaluated on instead of trained."""
TEMPERATURES = [0.7 + 0.1 * i for i in range(9)]
"""Candidates for the head's temperature, around the 1 of a calibrated head."""


def train_head(training: HeadTraining, say: Callable[[str], None]) -> Evaluation:
    """Let the target write, train a head on that, and save it to `training.out`."""
    # It imports vLLM, which takes ten seconds.
    from workers.drafters.training.vllm_head_examples import generate

    prompts = read_prompts(training.prompts)
    random.Random(training.seed).shuffle(prompts)
    examples: list[Example] = []
    num_tokens, said = 0, time.monotonic()
    for example in generate(training.model, prompts, training.max_tokens, training.cpus):
        examples.append(example)
        num_tokens += len(example.token_ids) - example.num_prompt_tokens
        if num_tokens >= training.num_tokens:
            break
        if time.monotonic() > said + REPORT_INTERVAL_S:
            said = time.monotonic()
            say(f"writing: {num_tokens} of {training.num_tokens} tokens")
    say(f"written: {num_tokens} tokens from {len(examples)} of {len(prompts)} prompts")
    if len(examples) < 2:
        raise ValueError(f"{training.prompts} has fewer than two prompts that fit the model")
    return fit(training, examples, say)


def fit(training: HeadTraining, examples: list[Example], say: Callable[[str], None]) -> Evaluation:
    """Train a head on examples, evaluate it and save it."""
    num_held_out = max(1, int(HELD_OUT * len(examples)))
    corpus = Corpus(examples[num_held_out:], training.window)
    config = head_config(Path(training.model), training.window, training.num_guessed)
    trainer = Trainer(training, config, corpus)
    said = start = time.monotonic()
    losses: list[float] = []
    for share, loss in trainer.train():
        losses.append(loss)
        if share == 1 or time.monotonic() > said + REPORT_INTERVAL_S:
            said = time.monotonic()
            say(f"training: {share:.0%}, loss {np.mean(losses):.3f}, {said - start:.0f} s")
            losses.clear()
    held_out = Corpus(examples[:num_held_out], training.window)
    evaluation = trainer.evaluate(held_out, TEMPERATURES)
    trainer.save(training.out, evaluation.temperature)
    return evaluation


def read_prompts(file: Path) -> list[list[Message]]:
    """Read chats: each line is JSON with `prompt` or `messages`, or plain text."""
    chats: list[list[Message]] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line) if line.startswith("{") else {"prompt": line}
            chats.append(row.get("messages") or [{"role": "user", "content": row["prompt"]}])
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{file}:{number} has neither `prompt` nor `messages`, or is not JSON: {error!r}"
            ) from None
    return chats


def main() -> None:
    """Train with the options in the first argument: JSON of the fields of `HeadTraining`."""
    options = json.loads(sys.argv[1])
    paths = {name: Path(options[name]) for name in ("prompts", "out")}
    training = HeadTraining(**options | paths)
    torch.set_num_threads(training.cpus)
    evaluation = train_head(training, lambda line: print(line, flush=True))
    right = ", ".join(f"{share:.1%}" for share in evaluation.right)
    print(f"right guesses in held-out answers, by depth: {right}\nwritten to {training.out}")


if __name__ == "__main__":
    main()
