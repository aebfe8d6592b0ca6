"""The app of deploy/npu-emulated.yaml as a user starts it: two workers with emulated NPUs."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.client import XYServe
from cluster.models.model import resolve_model
from cluster.observe.explanation import Explanation
from tests.e2e.conftest import Server, free_port, running

CONFIG = Path(__file__).parents[2] / "deploy" / "npu-emulated.yaml"
MODEL = "smollm2-135m-instruct"
NUM_TOKENS, TIMEOUT_S = 8, 240
QUESTIONS = ("What is the capital of France?", "Say hello.")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The app, with another port for HTTP."""
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = free_port()
    file = tmp_path_factory.mktemp("npu") / "app.yaml"
    file.write_text(yaml.safe_dump(config))
    with running(file) as server:
        yield server


@cache
@torch.no_grad()
def expected(question: str) -> str:
    """The answer by Hugging Face, greedily."""
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float32)
    chat = [{"role": "user", "content": question}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    prompt_length = len(tokens)
    while len(tokens) < prompt_length + NUM_TOKENS and tokens[-1:] != [tokenizer.eos_token_id]:
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    answer: str = tokenizer.decode(tokens[prompt_length:], skip_special_tokens=True)
    return answer


def ask(server: Server, question: str) -> tuple[str, str]:
    """The answer over HTTP, and the request's id."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}]}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json=body | {"max_tokens": NUM_TOKENS, "temperature": 0},
        timeout=TIMEOUT_S,
    )
    assert answer.status_code == httpx.codes.OK, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text, answer.json()["id"]


def workers_of(server: Server, request_ids: list[str]) -> set[str]:
    """The workers on which requests were placed."""
    with XYServe.connect(server.ray_address) as handle:
        explanations = [one for name in request_ids for one in handle.explain(name)]
    ray.shutdown()
    used = set()
    for explanation in explanations:
        assert isinstance(explanation, Explanation)
        for trace in explanation.attempt_traces:
            assert trace.placement
            used.add(trace.placement.chosen.worker_id)
    return used


def test_two_workers_answer_as_hugging_face_does(server: Server) -> None:
    used: set[str] = set()
    for _ in range(4):  # until each worker has answered
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda question: ask(server, question), QUESTIONS))
        assert [text for text, _ in answers] == [expected(question) for question in QUESTIONS]
        used |= workers_of(server, [request_id for _, request_id in answers])
        if len(used) == 2:
            return
    raise AssertionError(f"all requests went to {used}")


def test_doctor_finds_all_that_it_needs() -> None:
    command = [sys.executable, "-m", "cluster.cli.main", "doctor", str(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIG.parents[1])

    assert "triton-ascend 3.2.0" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
