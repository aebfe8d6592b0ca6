"""A worker whose model is split over two processes, behind HTTP."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import ANSWER_TIMEOUT_S, Server, serving
from tests.e2e.test_reference import greedy
from tests.workers.planned_engine import write_tokenizer
from tests.workers.tiny_models import MAX_MODEL_LEN, write_checkpoint

PROMPTS = [[5, 9, 30, 41, 8], [200, 100, 50], list(range(3, 60))]
NUM_TOKENS = 12
RESTORED_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    write_checkpoint("llama", folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    """An app of one worker, whose two processes have a core each."""
    engine = {"max_model_len": MAX_MODEL_LEN, "kv_cache_gib": 0.1, "max_num_seqs": 8}
    worker = {"cpus": 2, "tensor_parallel_size": 2, "activation_format": "float32"}
    worker |= {"calibrate_at_start": False, "engine": engine}
    args: dict[str, Any] = {"model": str(model), "num_workers": 1, "worker": worker, "draft": None}
    with serving(tmp_path_factory.mktemp("split"), **args) as server:
        yield server


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """The answers by Hugging Face."""
    reference = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    return [greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]


def ask(server: Server, model: Path, prompt: list[int]) -> list[int]:
    body = {"model": str(model), "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json=body | {"ignore_eos": True, "return_token_ids": True},
        timeout=ANSWER_TIMEOUT_S,
    )
    assert answer.status_code == httpx.codes.OK, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def processes(server: Server) -> list[psutil.Process]:
    """The worker's actor and its ranks."""
    workers = [psutil.Process(p) for p, name in server.replicas().items() if name == "Worker"]
    children = [child for worker in workers for child in worker.children(recursive=True)]
    return [*workers, *(child for child in children if child.name().startswith("VLLM::"))]


def test_two_ranks_answer_as_hugging_face_does(
    split: Server, model: Path, expected: list[list[int]]
) -> None:
    assert [ask(split, model, prompt) for prompt in PROMPTS] == expected


@pytest.mark.parametrize("lost", [0, 2], ids=["its actor", "a rank"])
def test_a_worker_that_loses_a_process_is_replaced_and_nothing_is_left(
    split: Server, model: Path, expected: list[list[int]], lost: int
) -> None:
    before = processes(split)
    assert len(before) == 3

    os.kill(before[lost].pid, signal.SIGKILL)

    answer = ask(split, model, PROMPTS[0])  # waits for the new worker
    assert answer == expected[0]
    psutil.wait_procs(before, RESTORED_TIMEOUT_S)
    assert not any(process.is_running() for process in before)
    give_up_s = time.monotonic() + RESTORED_TIMEOUT_S
    while len(after := processes(split)) != 3:
        assert time.monotonic() < give_up_s, after
        time.sleep(0.5)
