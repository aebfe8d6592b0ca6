"""lm-eval: log probabilities of choices, and answers in a chat, over a task of our own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.job import API, MODEL

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Germany": "Berlin"}
NUM_QUESTIONS = len(CAPITALS)
LOCAL = {"dataset_path": "json", "test_split": "test"}
CHOICES = LOCAL | {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_text": "The capital of {{country}} is",
    "doc_to_choice": list(CAPITALS.values()),
    "doc_to_target": "capital",
    "metric_list": [{"metric": "acc"}],
}
ANSWERS = LOCAL | {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_text": "What is the capital of {{country}}?",
    "doc_to_target": "The capital of {{country}} is {{capital}}.",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 30, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}


def evaluate(folder: Path, task: dict[str, Any], model: str, *options: str) -> dict[str, Any]:
    """The metrics of a task, by the command line."""
    data = folder / "capitals.jsonl"
    lines = [{"country": country, "capital": capital} for country, capital in CAPITALS.items()]
    data.write_text("\n".join(map(json.dumps, lines)))
    task = task | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    command = ["run", "--tasks", task["task"], "--include_path", str(folder)]
    command += ["--model", model, "--output_path", str(folder / "results.json"), *options]
    env = os.environ | {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "lm_eval", *command], env=env, check=True)
    [results] = folder.glob("results*.json")
    found: dict[str, Any] = json.loads(results.read_text())
    assert found["n-samples"][task["task"]]["effective"] == NUM_QUESTIONS
    return dict(found["results"][task["task"]])


@pytest.mark.parametrize("num_concurrent", [1, 4])
def test_choices_are_ranked_by_their_log_probabilities(tmp_path: Path, num_concurrent: int) -> None:
    """The tokenizer is the server's, by `/tokenizer_info`, `/tokenize` and `/detokenize`."""
    args = f"model={MODEL},base_url={API}/completions,tokenizer_backend=remote"
    args += f",num_concurrent={num_concurrent}"

    metrics = evaluate(tmp_path, CHOICES, "local-completions", "--model_args", args)

    assert metrics["acc,none"] == 1.0


def test_answers_in_a_chat_are_compared(tmp_path: Path) -> None:
    args = f"model={MODEL},base_url={API}/chat/completions,num_concurrent=2"

    metrics = evaluate(
        tmp_path,
        ANSWERS,
        "local-chat-completions",
        *("--model_args", args, "--apply_chat_template"),
    )

    assert metrics["exact_match,none"] >= 0.75
