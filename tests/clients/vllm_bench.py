"""`vllm bench serve`, from the project's own environment, by each API that it knows."""

import json
import os
import subprocess
from pathlib import Path
from sysconfig import get_path

import pytest

from tests.clients.job import MODEL, MODEL_FOLDER, URL

NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 8, 64, 16
PATHS = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
    "openai-responses": "/v1/responses",
}


@pytest.mark.parametrize("backend", PATHS)
def test_every_request_of_a_benchmark_is_answered_in_full(tmp_path: Path, backend: str) -> None:
    options = {
        "backend": backend,
        "base-url": URL,
        "endpoint": PATHS[backend],
        "model": MODEL,
        "tokenizer": MODEL_FOLDER,
        "dataset-name": "random",
        "random-input-len": NUM_PROMPT_TOKENS,
        "random-output-len": NUM_OUTPUT_TOKENS,
        "num-prompts": NUM_REQUESTS,
        "max-concurrency": 4,
        "temperature": 0,
        "result-dir": tmp_path,
        "result-filename": "result.json",
    }
    command = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    subprocess.run(
        [
            f"{get_path('scripts')}/vllm",
            "bench",
            "serve",
            *command,
            "--ignore-eos",
            "--save-result",
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
    )

    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (NUM_REQUESTS, 0)
    assert result["total_output_tokens"] == NUM_REQUESTS * NUM_OUTPUT_TOKENS
    assert min(result["median_ttft_ms"], result["median_tpot_ms"]) > 0
