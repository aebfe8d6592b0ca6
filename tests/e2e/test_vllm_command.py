"""vLLM's own command, as the installer leaves it, against the running app."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.models.model import resolve_model
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL, Server
from tests.programs import load_script


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment in which vLLM has the metadata that the installer writes."""
    load_script("install").write_vllm_metadata(tmp_path, "0.32.0")
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": f"{tmp_path}:{path}".rstrip(":")}


def vllm(env: dict[str, str], *arguments: str) -> str:
    command = [shutil.which("vllm", path=str(Path(sys.executable).parent)) or "vllm", *arguments]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=2 * ANSWER_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_command_has_a_version(env: dict[str, str]) -> None:
    assert "0.32.0" in vllm(env, "--version")


def test_bench_serve_measures_the_app(server: Server, env: dict[str, str], tmp_path: Path) -> None:
    vllm(
        env, "bench", "serve", "--backend", "openai-chat", "--base-url", server.url,
        "--endpoint", "/v1/chat/completions", "--model", MODEL,
        "--tokenizer", resolve_model(MODEL), "--dataset-name", "random",
        "--random-input-len", "16", "--random-output-len", "8", "--num-prompts", "4",
        "--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json",
    )  # fmt: skip

    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (4, 0)
    assert result["total_output_tokens"] > 0
