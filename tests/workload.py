"""Prompts for tests and benchmarks: the full sets where they are at hand, else small copies."""

import json
import os
from pathlib import Path

_COPY = Path(__file__).parent / "data"
_FULL = Path(os.environ.get("XYSERVE_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""A checkout of the data sets; see README, "Development"."""


def questions(count: int) -> list[str]:
    """Grade-school maths problems (GSM8K, MIT), in a fixed order."""
    full = _FULL / "prompts" / "gsm8k_test.jsonl"
    path = full if full.exists() else _COPY / "gsm8k_questions.jsonl"
    with path.open() as lines:
        found = [json.loads(line)["question"] for line in lines]
    if count > len(found):
        raise ValueError(f"{path} has {len(found)} questions, not {count}")
    return found[:count]
