"""What each format costs in quality: perplexity of the default model on real text.

    python -m tests.bench.perplexity --json perplexity.json

Contestants: our kernels with bf16 (the checkpoint's own type, so lossless), int8 and int4 weights,
each with activations and KV cache in float32 and rounded (to bf16, or int8 for integer weights; the
KV cache to bf16), and stock vLLM in float32 as the reference. Each is a process of its own, one
after another, and computes the log probability of every token except the first in the same windows
of 512 tokens, one from each of a seeded choice of Python Enhancement Proposals. With int4 the LM
head is int8.

The checkpoint was made from a Q4_1 file, whose grid int4 reproduces nearly exactly. With
`--rotated` the same model has weights on no grid: the residual stream is turned by a random
orthogonal matrix, which the matrices before and after it take back (as in QuaRot, S. Ashkboos et
al., 2024), and what comes out is rounded to bf16 once.

MB: size in memory of the packed matrices, including the LM head. `ratio`: perplexity relative to
stock. Keys of the summary: `ppl_vllm` and `ppl_` with the name of each of ours.
"""

import argparse
import gzip
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tokenizers import Tokenizer

from cluster.models.default_model import DEFAULT_MODEL
from cluster.models.model import resolve_model
from tests.bench.report import make_parser, publish, say
from tests.workload import DATA
from workers.config import EngineConfig, WorkerConfig

STOCK = "vllm"
FORMATS: dict[str, dict[str, Any]] = {
    STOCK: {},
    "bf16": {"activation_format": "float32"},
    "bf16_kv": {"activation_format": "float32", "kv_cache_format": "bf16"},
    "bf16_rounded": {"activation_format": "bf16"},
    "int8": {"weight_format": "int8", "activation_format": "float32"},
    "int8_rounded": {"weight_format": "int8", "activation_format": "int8"},
    "int4": {"weight_format": "int4", "activation_format": "float32"},
    "int4_rounded": {"weight_format": "int4", "activation_format": "int8"},
}
"""What each contestant is configured with, stock first."""

TEXT = DATA / "text" / "python_peps.jsonl.gz"

WINDOW_TOKENS = 512
WINDOWS_AT_ONCE = 4

Windows = list[list[int]]
"""Token ids of each window."""


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one contestant."""

    logprobs: list[float]
    """Log probability of each token except the first of each window."""
    weight_bytes: int
    """Size of the weights that our kernels packed."""


def read_windows(tokenizer: Tokenizer, count: int) -> Windows:
    """A window from each of `count` documents; documents and positions are drawn with a seed."""
    with gzip.open(TEXT, "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    draw = random.Random(0)
    draw.shuffle(texts)
    windows: Windows = []
    for text in texts:
        if len(windows) == count:
            break
        ids = tokenizer.encode(text).ids
        if len(ids) >= WINDOW_TOKENS:
            start = draw.randrange(len(ids) - WINDOW_TOKENS + 1)
            windows.append(ids[start : start + WINDOW_TOKENS])
    return windows


def worker_config(name: str, threads: int) -> WorkerConfig:
    """The settings of one contestant."""
    return WorkerConfig(
        cpus=threads,
        kernels="vllm" if name == STOCK else "xyserve",
        **FORMATS[name],
        engine=EngineConfig(
            dtype="float32",
            max_model_len=2 * WINDOW_TOKENS,
            max_num_seqs=WINDOWS_AT_ONCE,
            max_num_batched_tokens=WINDOWS_AT_ONCE * WINDOW_TOKENS,
            kv_cache_gib=0.25,
            enable_prefix_caching=False,
        ),
    )


def score(name: str, model: str, threads: int, windows: Windows) -> Score:
    """Run one contestant over all windows, in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    config = worker_config(name, threads)
    os.environ.update(config.env)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.v1.engine.llm_engine import LLMEngine

    from workers.engine.vllm_engine import engine_args

    say(f"{name}: starting")
    engine = LLMEngine.from_engine_args(engine_args(model, config))
    logprobs: list[float] = []
    for begin in range(0, len(windows), WINDOWS_AT_ONCE):
        batch = windows[begin : begin + WINDOWS_AT_ONCE]
        logprobs += token_logprobs(engine, batch)
        done = begin + len(batch)
        say(f"{name}: {done} of {len(windows)} windows, {perplexity(logprobs):.4f} so far")
    return Score(logprobs, sum(engine.apply_model(packed_bytes)))


def token_logprobs(engine: Any, windows: Windows) -> list[float]:
    """Log probability of each token except the first of each window, given those before it."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    for index, window in enumerate(windows):
        engine.add_request(str(index), {"prompt_token_ids": window}, params)
    found: dict[str, list[float]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                entries = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
                found[output.request_id] = [entry[token].logprob for token, entry in entries]
    return [logprob for index in range(len(windows)) for logprob in found[str(index)]]


def packed_bytes(model: Any) -> int:
    """Size of the weights that our kernels packed."""
    packed = (getattr(module, "packed", None) for module in model.modules())
    return sum(weight.nbytes for weight in packed if weight is not None)


def float32_bytes(model: str) -> int:
    """Size of the checkpoint's matrices in float32."""
    with safe_open(Path(model) / "model.safetensors", "np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return sum(4 * math.prod(shape) for shape in shapes if len(shape) == 2)


def perplexity(logprobs: list[float]) -> float:
    """Perplexity of tokens with these natural log probabilities."""
    return math.exp(-statistics.fmean(logprobs))


def run(name: str, model: str, threads: int, windows: Windows) -> Score:
    """`score` in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        try:
            return process.submit(score, name, model, threads, windows).result()
        except BrokenProcessPool:
            raise SystemExit(f"{name} ended; its own messages are above") from None


def make_rows(scores: dict[str, Score], float32: int) -> list[dict[str, Any]]:
    """One row for each contestant."""
    reference = perplexity(scores[STOCK].logprobs)
    return [
        {
            "format": f"{name} float32" if name == STOCK else name,
            "MB": (float32 if name == STOCK else score.weight_bytes) / 1e6,
            "perplexity": (found := perplexity(score.logprobs)),
            "ratio": found / reference,
        }
        for name, score in scores.items()
    ]


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens (default: 40)")
    parser.add_argument("--rotated", action="store_true", help="the model with turned weights")
    parser.add_argument("--threads", type=int, default=1, help="each on its own core (default: 1)")
    options = parser.parse_args()
    if options.windows < 1:
        parser.error(f"--windows {options.windows} must be at least 1")
    if not 1 <= options.threads <= (cores := len(os.sched_getaffinity(0))):
        parser.error(f"--threads {options.threads} must be 1 to {cores}, the number of cores")
    if not TEXT.exists():
        parser.error(f"there is no {TEXT}; set XYSERVE_DATA to a folder with the data sets")
    return options


def write_rotated(model: Path, folder: Path) -> None:
    """Write a llama-like model, with its residual stream turned, as another checkpoint in bf16."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {name: t.double() for name, t in load_file(model / "model.safetensors").items()}
    embedding, final_norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    size = embedding.shape[1]
    random_numbers = torch.Generator().manual_seed(0)
    normal = torch.randn(size, size, generator=random_numbers, dtype=torch.float64)
    turn = torch.linalg.qr(normal).Q
    turned = {
        "model.embed_tokens.weight": embedding @ turn,
        "lm_head.weight": embedding * final_norm @ turn,
        "model.norm.weight": torch.ones_like(final_norm),
    }
    # RMSNorm of a turned row is the turned RMSNorm, once its weights are the next matrix's.
    for name in tensors.keys() - turned.keys():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        layer = layer.rpartition(".")[0] if part.endswith("_proj") else layer
        if part in ("o_proj", "down_proj"):
            turned[name] = turn.T @ tensors[name]
        elif part.endswith("_proj"):
            norm = "input_layernorm" if part[0] in "qkv" else "post_attention_layernorm"
            turned[name] = tensors[name] * tensors[f"{layer}.{norm}.weight"] @ turn
        else:
            turned[name] = torch.ones_like(tensors[name])
    saved = {name: tensor.bfloat16().contiguous() for name, tensor in turned.items()}
    save_file(saved, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    for file in model.glob("*token*"):
        shutil.copy(file, folder)


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    model = resolve_model(DEFAULT_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        if options.rotated:
            write_rotated(Path(model), Path(folder))
            model = folder
        compare(options, model)


def compare(options: argparse.Namespace, model: str) -> None:
    """Let all contestants run a model, and publish what they found."""
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    windows = read_windows(tokenizer, options.windows)
    if len(windows) < options.windows:
        raise SystemExit(f"{TEXT} has {len(windows)} documents long enough for a window")
    scores = {name: run(name, model, options.threads, windows) for name in FORMATS}
    num_tokens = len(windows) * (WINDOW_TOKENS - 1)
    publish(
        f"Perplexity of {DEFAULT_MODEL}{' rotated' * options.rotated} over {num_tokens} tokens",
        make_rows(scores, float32_bytes(model)),
        {f"ppl_{name}": perplexity(score.logprobs) for name, score in scores.items()},
        options.json,
    )


if __name__ == "__main__":
    main()
