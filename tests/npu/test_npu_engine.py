"""vLLM on an emulated NPU: whole models whose linear layers and attention are our kernels."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.workers.drafted_engine import Call, Setting, run_calls
from tests.workers.engine_process import Batch, EngineProcesses, Output, Run, run_engine
from tests.workers.planned_engine import Job, play_scripts, write_tokenizer
from tests.workers.tiny_models import VOCAB_SIZE, write_checkpoint
from workers.config import EngineConfig, WorkerConfig

MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
NUM_TOKENS = 6
BLOCK_BYTES = 2 * 2 * 2 * 32 * 16 * 4
"""Of the tiny models: layers, keys and values, heads, size of a head, tokens, bytes."""
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
def play(npu_processes: EngineProcesses, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of a model, each once."""
    folder = tmp_path_factory.mktemp("tiny")

    @cache
    def checkpoint(name: str) -> Path:
        npu_processes.call(write_checkpoint, name, folder / name)
        return folder / name

    @cache
    def run(name: str, dtype: str = "float32", weight_format: Any = "auto") -> Run:
        worker = config(engine={"dtype": dtype}, weight_format=weight_format)
        batches = [TOGETHER, IN_CHUNKS, *ALONE]
        found: Run = npu_processes.call(run_engine, str(checkpoint(name)), worker, batches)
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


PARAMS: list[dict[str, Any]] = [
    {},
    {"seed": 7, "temperature": 1.0},
    {"seed": 8, "temperature": 1.0, "presence_penalty": 0.5, "top_p": 0.9},
    {"min_tokens": 5},
]
CALLS = [Call(prompt, params) for prompt, params in zip(PROMPTS[1:], PARAMS, strict=True)]


@pytest.fixture(scope="module")
def llama(play: Any, npu_processes: EngineProcesses) -> str:
    folder: Path = play.checkpoint("llama")
    npu_processes.call(write_tokenizer, folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_change_no_token(npu_processes: EngineProcesses, llama: str, dtype: str) -> None:
    worker = planned(dtype)

    [plain] = npu_processes.call(run_calls, llama, worker, (CALLS, Setting()))
    drafts = Setting(plain.tokens, error_rate=0.3)
    [drafted] = npu_processes.call(run_calls, llama, worker, (CALLS, drafts))

    assert drafted.tokens == plain.tokens
    assert drafted.counts.accepted > 0
    assert drafted.num_steps < plain.num_steps


def test_cached_prefixes_and_preemptions_change_no_token(
    npu_processes: EngineProcesses, llama: str
) -> None:
    shared = [Job([*PROMPTS[4][:96], *prompt], max_tokens=4) for prompt in PROMPTS]
    growing = [Job(PROMPTS[2][index : index + 30], max_tokens=40) for index in range(6)]

    roomy = npu_processes.call(play_scripts, llama, planned(), shared, growing)
    tight = planned(kv_cache_gib=20 * BLOCK_BYTES / 2**30, enable_prefix_caching=True)
    found = npu_processes.call(play_scripts, llama, tight, shared, growing)

    assert [played.tokens for played in found] == [played.tokens for played in roomy]
    assert max(found[0].num_cached) >= 96
    assert found[1].num_preemptions > 0


def test_two_ranks_with_emulated_npus_give_the_tokens_of_one(
    npu_processes: EngineProcesses, llama: str
) -> None:
    split = replace(planned(), cpus=2, tensor_parallel_size=2)

    [one], [two] = (
        npu_processes.call(run_calls, llama, worker, (CALLS, Setting()))
        for worker in (planned(), split)
    )

    assert two.tokens == one.tokens


def planned(dtype: str = "float32", **engine: Any) -> WorkerConfig:
    """With a tokenizer, for the engine of a worker."""
    return config(engine={"dtype": dtype, "extra_args": {}} | engine)


def first_logprobs(outputs: list[Output]) -> dict[int, float]:
    return outputs[2].likeliest[0]
