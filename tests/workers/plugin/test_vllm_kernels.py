"""vLLM on our kernels: real engines on tiny random checkpoints."""

import dataclasses
import random
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.workers.engine_process import (
    NUM_LIKELIEST,
    Batch,
    EngineFailed,
    EngineProcesses,
    Output,
    Prompt,
    Run,
    run_engine,
)
from tests.workers.tiny_models import MAX_MODEL_LEN, VOCAB_SIZE, write_checkpoint
from workers.config import EngineConfig, WorkerConfig
from workers.kernels.tile_table import Inputs, fastest

NATIVE = {
    "llama": "NativeLlamaForCausalLM",
    "mistral": "NativeMistralForCausalLM",
    "qwen2": "NativeQwen2ForCausalLM",
    "qwen3": "NativeQwen3ForCausalLM",
}
"""Models whose layers run in one call, and the classes that do so."""

OTHERS = ("gemma2", "gemma3n", "bloom")
"""Models that run operator by operator."""

NO_PLUGIN = {"VLLM_PLUGINS": "none"}
NOT_ASKED = "the engine's quantization is not xyserve"
DRAW = random.Random(0)


def make_prompt(length: int) -> Prompt:
    return [DRAW.randrange(VOCAB_SIZE) for _ in range(length)]


PROMPTS = [make_prompt(length) for length in (1, 7, 33, 64, 129, 200)]
PROBE = make_prompt(100)
CROWD = [make_prompt(length) for length in (5, 90, 1, 47, 32, 150, 64)]
REPEATING = [[*make_prompt(length)] * 4 for length in (3, 8, 13)]

# The same prompts under all that must not matter to them.
SETTINGS = [
    Batch([PROBE]),
    Batch([PROBE, *CROWD]),
    Batch([*reversed(CROWD), PROBE]),
    Batch([PROBE], max_step_tokens=16),
    Batch([*CROWD[:4], PROBE, *CROWD[4:]], max_step_tokens=61),
    Batch([PROBE], num_threads=2),
    Batch([*CROWD[:2], PROBE, *CROWD[2:]], num_threads=2),
    Batch([*CROWD[5:], PROBE, *CROWD[:5]], max_step_tokens=75, num_threads=2),
]


FORMATS: dict[str, dict[str, Any]] = {
    "exact": {},
    "bf16": {"activation_format": "bf16"},
    "bf16 kv": {"kv_cache_format": "bf16"},
    "bf16 exact kv": {"activation_format": "bf16", "kv_cache_format": "float32"},
    "int8 head": {"lm_head_format": "int8"},
    "int8": {"weight_format": "int8"},
    "int4": {"weight_format": "int4"},
    "int8 int8": {"weight_format": "int8", "activation_format": "int8"},
    "int4 int8": {"weight_format": "int4", "activation_format": "int8"},
}
"""Formats of weights, activations and KV cache."""


class Engines:
    """Runs of engines on the tiny models; what several tests look at is run once."""

    def __init__(self, processes: EngineProcesses, folder: Path) -> None:
        self._processes = processes
        self._folder = folder
        self._checkpoint = cache(self._write_checkpoint)
        self.stock = cache(self._stock)
        self.ours = cache(self._ours)
        self.settings = cache(self._settings)

    def run(
        self,
        name: str,
        batches: Sequence[Batch] = (Batch(PROMPTS),),
        *,
        env: dict[str, str] | None = None,
        kernels: Literal["xyserve", "vllm"] = "xyserve",
        weight_format: Literal["auto", "int8", "int4"] = "auto",
        activation_format: Literal["auto", "float32", "bf16", "int8"] = "float32",
        kv_cache_format: Literal["auto", "float32", "bf16"] = "auto",
        lm_head_format: Literal["auto", "int8"] = "auto",
        spoilt: str | None = None,
        extra_args: dict[str, Any] | None = None,
        **engine: Any,
    ) -> Run:
        """Run batches on a new engine."""
        limits: dict[str, Any] = {
            "dtype": "float32",
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "max_model_len": MAX_MODEL_LEN,
            "kv_cache_gib": 0.02,
            "block_size": 32,
            "extra_args": {"skip_tokenizer_init": True} | (extra_args or {}),
        }
        config = WorkerConfig(
            kernels=kernels,
            weight_format=weight_format,
            activation_format=activation_format,
            kv_cache_format=kv_cache_format,
            lm_head_format=lm_head_format,
            engine=EngineConfig(**limits | engine),
        )
        run: Run = self._processes.call(
            run_engine, self._checkpoint(name, spoilt), config, batches, env=env
        )
        return run

    def _write_checkpoint(self, name: str, spoilt: str | None) -> str:
        folder = self._folder / f"{name}-{spoilt}"
        # One has values that bf16 would round.
        dtype = "float32" if name == "qwen2" else "bfloat16"
        self._processes.call(write_checkpoint, name, folder, dtype, spoilt)
        return str(folder)

    def _stock(self, name: str) -> Run:
        """vLLM without us."""
        return self.run(name, kernels="vllm", env=NO_PLUGIN)

    def _ours(self, name: str) -> Run:
        """Our kernels, the layers first in one call if they can be, then by operators."""
        return self.run(name, [Batch(PROMPTS), Batch(PROMPTS, by_operators=True)])

    def _settings(self, format: str) -> Run:
        """`SETTINGS` in one call, then by operators, in a format of `FORMATS`."""
        by_operators = [dataclasses.replace(batch, by_operators=True) for batch in SETTINGS]
        return self.run("llama", [*SETTINGS, *by_operators], **FORMATS[format])


@pytest.fixture(scope="module")
def engines(processes: EngineProcesses, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(processes, tmp_path_factory.mktemp("tiny"))


def tokens(outputs: Sequence[Output]) -> list[list[int]]:
    return [output.tokens for output in outputs]


def largest_gap(found: Sequence[Output], expected: Sequence[Output]) -> float:
    """The largest difference of two log probabilities of one token at one place."""
    pairs: list[tuple[float, float]] = []
    for one, other in zip(found, expected, strict=True):
        pairs += zip(one.prompt, other.prompt, strict=True)
        for ours, theirs in zip(one.likeliest, other.likeliest, strict=True):
            shared = ours.keys() & theirs.keys()
            assert len(shared) >= NUM_LIKELIEST - 1  # the last of them may be a tie
            pairs += [(ours[token], theirs[token]) for token in shared]
    return max(abs(one - other) for one, other in pairs)


def mean_prompt_gap(found: Sequence[Output], expected: Sequence[Output]) -> float:
    """The mean difference of the log probabilities of prompt tokens."""
    return statistics.fmean(
        abs(a - b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one.prompt, other.prompt, strict=True)
    )


@pytest.mark.parametrize("name", [*NATIVE, *OTHERS])
def test_our_kernels_give_what_stock_vllm_gives(engines: Engines, name: str) -> None:
    [expected] = engines.stock(name).outputs
    found, by_operators = engines.ours(name).outputs

    assert tokens(found) == tokens(by_operators) == tokens(expected)
    assert largest_gap(found, expected) < 1e-4
    assert largest_gap(by_operators, expected) < 1e-4


@pytest.mark.parametrize("name", NATIVE)
def test_one_call_gives_what_the_operators_give(engines: Engines, name: str) -> None:
    found, by_operators = engines.ours(name).outputs

    assert found != by_operators  # or the same code ran twice
    assert largest_gap(found, by_operators) < 5e-5


@pytest.mark.parametrize("name", NATIVE)
def test_the_layers_of_llama_like_models_run_in_one_call(engines: Engines, name: str) -> None:
    facts = engines.ours(name).facts

    assert facts.model_class == NATIVE[name]
    assert facts.forward_refusal is None
    assert facts.attention_refusals == {None}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_run_on_each_kernel_that_can_serve_them(engines: Engines, name: str) -> None:
    facts = engines.ours(name).facts

    refusal = "it has ALiBi slopes or attention sinks" if name == "bloom" else None
    assert facts.attention_refusals == {refusal}
    packed = [layer.rpartition(".")[2] for layer in facts.packed]
    layers = {"o_proj", "gate_up_proj", "down_proj"}
    if name == "bloom":
        layers = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    num_layers = 4 if name == "gemma3n" else 2
    assert {layer: packed.count(layer) for layer in layers} == dict.fromkeys(layers, num_layers)
    # All three make logits with their embedding, and only this one lets us choose how.
    assert packed.count("embed_tokens") == (name == "gemma3n")


@pytest.mark.parametrize(
    ("name", "format"), [("mistral", "bf16"), ("qwen2", "fp32")], ids=["bf16", "fp32"]
)
def test_auto_keeps_the_weights_as_the_checkpoint_has_them(
    engines: Engines, name: str, format: str
) -> None:
    packed = engines.ours(name).facts.packed

    assert len(packed) == 4 * 2 + 1
    assert set(packed.values()) == {format}


@pytest.mark.parametrize(
    ("format", "of_body", "of_head", "of_kv"),
    [
        ("exact", "bf16", "bf16", "float32"),
        ("bf16", "bf16_pairs", "bf16_pairs", "bfloat16"),
        ("bf16 kv", "bf16", "bf16", "bfloat16"),
        ("bf16 exact kv", "bf16_pairs", "bf16_pairs", "float32"),
        ("int8 head", "bf16", "int8", "float32"),
        ("int8", "int8", "int8", "float32"),
        ("int4", "int4", "int8", "float32"),
        ("int8 int8", "int8_quads", "int8_quads", "bfloat16"),
        ("int4 int8", "int4_quads", "int8_quads", "bfloat16"),
    ],
)
def test_the_model_is_in_the_formats_of_the_config(
    engines: Engines, format: str, of_body: str, of_head: str, of_kv: str
) -> None:
    facts = engines.settings(format).facts
    packed = dict(facts.packed)

    assert packed.pop("lm_head") == of_head
    assert len(packed) == 4 * 2
    assert set(packed.values()) == {of_body}
    assert facts.kv_dtypes == {f"torch.{of_kv}"}
    assert facts.forward_refusal is None


@pytest.mark.parametrize("name", ["llama", *OTHERS, "qwen2"])
def test_auto_rounds_where_the_cpu_has_instructions_for_it(engines: Engines, name: str) -> None:
    run = engines.run(name, activation_format="auto")
    rounds = fastest(Inputs.FLOAT32, Inputs.BF16) is Inputs.BF16
    is_float32 = name == "qwen2"

    assert set(run.facts.packed.values()) == {
        "fp32" if is_float32 else "bf16_pairs" if rounds else "bf16"
    }
    is_rounded = rounds and not is_float32 and name != "bloom"  # whose layers are vLLM's
    assert run.facts.kv_dtypes == {"torch.bfloat16" if is_rounded else "torch.float32"}
    assert mean_prompt_gap(run.outputs[0], engines.stock(name).outputs[0]) < 0.05


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_auto_rounds_to_int8_for_integer_weights(
    engines: Engines, weight_format: Literal["int8", "int4"]
) -> None:
    packed = engines.run(
        "llama", weight_format=weight_format, activation_format="auto"
    ).facts.packed
    rounds = fastest(Inputs.FLOAT32, Inputs.INT8) is Inputs.INT8

    assert all(format.endswith("_quads") == rounds for format in packed.values())


def test_fewer_bits_give_nearly_the_same(engines: Engines) -> None:
    exact = engines.settings("exact").outputs[1]
    gap = {name: mean_prompt_gap(engines.settings(name).outputs[1], exact) for name in FORMATS}

    assert 0 < gap["bf16 kv"] < 2 * gap["bf16 exact kv"]
    assert 0 < 2 * gap["bf16 exact kv"] < gap["int8"]
    assert 0 < gap["int8 head"] < gap["int8"]
    assert 0 < gap["bf16"] < gap["int8"] < gap["int8 int8"] < 3 * gap["int8"]
    assert 0 < 4 * gap["int8"] < gap["int4"] < 1.5
    assert 0 < 4 * gap["int8"] < gap["int4 int8"] < 1.5


@pytest.mark.parametrize("by_operators", [False, True], ids=["one call", "operators"])
@pytest.mark.parametrize("format", FORMATS)
def test_no_bit_depends_on_company_order_chunks_or_threads(
    engines: Engines, format: str, by_operators: bool
) -> None:
    run = engines.settings(format)
    half = slice(len(SETTINGS), None) if by_operators else slice(len(SETTINGS))

    found: dict[tuple[int, ...], list[Output]] = {}
    for batch, outputs in zip(SETTINGS, run.outputs[half], strict=True):
        for prompt, output in zip(batch.prompts, outputs, strict=True):
            found.setdefault(tuple(prompt), []).append(output)

    assert len(found) == 1 + len(CROWD)
    assert all(output == outputs[0] for outputs in found.values() for output in outputs)
    # Those with chunks took more steps.
    alone, eight, _, chunks, eight_chunks, *_ = run.num_steps[half]
    assert chunks > alone
    assert eight_chunks > eight


def test_chunked_prefill_changes_no_bit(engines: Engines) -> None:
    chunked = engines.run("llama", max_num_batched_tokens=48)

    whole = engines.ours("llama")
    assert chunked.facts == whole.facts
    assert chunked.num_steps[0] >= sum(map(len, PROMPTS)) / 48 > whole.num_steps[0]
    assert chunked.outputs[0] == whole.outputs[0]


def test_cached_prefixes_change_no_bit(engines: Engines) -> None:
    batch = Batch([PROMPTS[5], REPEATING[2]], prompt_logprobs=False)

    first, second = engines.run("llama", [batch, batch]).outputs

    assert [output.num_cached_tokens for output in first] == [0, 0]
    assert [output.num_cached_tokens for output in second] == [192, 32]
    assert [dataclasses.replace(output, num_cached_tokens=0) for output in second] == first


def test_speculation_changes_no_token(engines: Engines) -> None:
    alone = [Batch([prompt], max_tokens=40, prompt_logprobs=False) for prompt in REPEATING]
    batches = [*alone, Batch([*REPEATING, *PROMPTS], max_tokens=40, prompt_logprobs=False)]
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }

    plain = engines.run("llama", batches, block_size=None)
    speculating = engines.run(
        "llama", batches, block_size=None, extra_args={"speculative_config": ngram}
    )

    assert speculating.facts == plain.facts
    assert plain.num_steps[:3] == [40, 40, 40]
    assert sum(speculating.num_steps[:3]) < 120  # some drafts were right
    assert [*map(tokens, speculating.outputs)] == [*map(tokens, plain.outputs)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_does_not_ask_runs_vllms_own_path(engines: Engines, dtype: str) -> None:
    found = engines.run("llama", kernels="vllm", dtype=dtype)

    if dtype == "float32":
        expected = engines.stock("llama")
    else:
        expected = engines.run("llama", kernels="vllm", dtype=dtype, env=NO_PLUGIN)
    assert found.facts.attention_refusals == {NOT_ASKED}
    assert found.facts.forward_refusal is not None
    assert found.facts.packed == {}
    assert found.outputs == expected.outputs


def test_an_engine_that_asks_must_compute_in_float32(engines: Engines) -> None:
    with pytest.raises(EngineFailed, match=r"bfloat16 is not supported for quantization .*xyserve"):
        engines.run("llama", extra_args={"dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("spoilt", "layer"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_up_proj"),
        ("lm_head.weight", "lm_head"),
    ],
    ids=["a layer", "the LM head"],
)
def test_a_checkpoint_with_a_nan_is_refused_by_the_name_of_its_layer(
    engines: Engines, spoilt: str, layer: str
) -> None:
    with pytest.raises(EngineFailed, match=rf"ValueError: {layer}: weight\[\d+, 5\] is nan"):
        engines.run("mistral", spoilt=spoilt)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_our_cpu_kernels_compute_in_float32_only(
    dtype: Literal["bfloat16", "float16"],
) -> None:
    engine = EngineConfig(dtype=dtype)

    with pytest.raises(ValueError, match=rf"engine.dtype \({dtype}\).* set kernels: vllm"):
        WorkerConfig(engine=engine)
    assert not WorkerConfig(engine=engine, kernels="vllm").uses_cpu_kernels
    assert not WorkerConfig(engine=engine, device="cuda").uses_cpu_kernels
