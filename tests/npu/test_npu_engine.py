"""vLLM on an emulated NPU: whole models whose linear layers and attention are our kernels."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.workers.engine_process import Batch, EngineProcesses, Output, Run, run_engine
from tests.workers.tiny_models import VOCAB_SIZE, write_checkpoint
from workers.config import EngineConfig, WorkerConfig

MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
NUM_TOKENS = 6
DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (1, 17, 70, 5, 130)]
TOGETHER = Batch(PROMPTS, NUM_TOKENS, prompt_logprobs=False)
IN_CHUNKS = Batch(PROMPTS, NUM_TOKENS, prompt_logprobs=False, max_step_tokens=48)
ALONE = [Batch([prompt], NUM_TOKENS, prompt_logprobs=False) for prompt in PROMPTS]


def config(**worker: Any) -> WorkerConfig:
    engine: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
    }
    engine |= {"block_size": 16, "kv_cache_gib": 0.02, "enable_prefix_caching": False}
    engine |= {"extra_args": {"skip_tokenizer_init": True}} | worker.pop("engine", {})
    return WorkerConfig(
        device="npu-emulated", calibrate_at_start=False, engine=EngineConfig(**engine), **worker
    )


@pytest.fixture(scope="module")
def play(processes: EngineProcesses, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of a model, each once."""
    folder = tmp_path_factory.mktemp("tiny")

    @cache
    def checkpoint(name: str) -> Path:
        processes.call(write_checkpoint, name, folder / name)
        return folder / name

    @cache
    def run(name: str, dtype: str = "float32", weight_format: Any = "auto") -> Run:
        worker = config(engine={"dtype": dtype}, weight_format=weight_format)
        batches = [TOGETHER, IN_CHUNKS, *ALONE]
        found: Run = processes.call(run_engine, str(checkpoint(name)), worker, batches)
        return found

    run.checkpoint = checkpoint  # type: ignore[attr-defined]
    return run


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens and their log probabilities, by Hugging Face."""
    tokens, logprobs = list(prompt), []
    for _ in range(NUM_TOKENS):
        scores = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return tokens[len(prompt) :], logprobs


# The tiny Qwen2 rotates half of each head, which Hugging Face's does not.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen2"])
def test_tokens_are_those_of_hugging_face(play: Any, name: str) -> None:
    outputs = play(name).outputs[0]
    model = AutoModelForCausalLM.from_pretrained(
        play.checkpoint(name), dtype=torch.float32, attn_implementation="eager"
    )

    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens, logprobs = greedy(model, prompt)
        assert output.tokens == tokens
        found = [
            likeliest[token] for likeliest, token in zip(output.likeliest, tokens, strict=True)
        ]
        assert found == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_depends_on_the_batch(play: Any, name: str, dtype: str) -> None:
    together, in_chunks, *alone = play(name, dtype).outputs

    assert in_chunks == together
    assert [output for [output] in alone] == together


def test_the_kernels_serve_all_layers(play: Any) -> None:
    facts = play("llama").facts

    assert facts.model_class == "LlamaForCausalLM"  # vLLM's own, of our layers
    assert facts.linear_methods == {"TritonLinearMethod", "TritonEmbeddingMethod"}
    assert facts.attention_impls == {"TritonAttentionImpl"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights_are_about_as_good(play: Any, dtype: str) -> None:
    exact, quantised = play("llama", dtype), play("llama", dtype, "int8")

    first, second = first_logprobs(exact.outputs[0]), first_logprobs(quantised.outputs[0])
    differences = [abs(second[t] - p) for t, p in first.items() if t in second]
    assert 0 < max(differences) < 0.5


def first_logprobs(outputs: list[Output]) -> dict[int, float]:
    return outputs[2].likeliest[0]
