"""Our virtual-padding GEMM against torch's and vLLM's, at the linears of four models.

    python -m tests.bench.gemm --json gemm.json

A cell is one linear at one number of rows M. Contestants take turns in one process on the same
float32 rows and the same bf16-representable weights, each first checked against float64: ours
with the weights packed as "auto", `torch.nn.functional.linear`, and the oneDNN handle which vLLM
makes for its unquantized linears. `ratio` is our speed over the better of the two others. A model
streams its weights from memory, so every contestant has copies of them which together exceed the
L3 cache, and takes another copy at each call; with `--hot` it has one. The lm_head of Llama-3-8B
is left out for its memory, and M stops at 256 for the others: only the rows which sample a token
reach an lm_head. With `--bf16` all round the rows to bf16, as `worker.activation_format: bf16`
does, and the others compute in it, as stock vLLM does with bf16 checkpoints; `by exact` is our
speed over that with rows in float32. GB/s counts the bytes of our packed weights. Keys of the
summary: the geometric mean of `ratio` over the cells of a range of M, its minimum, and the
machine's peaks.
"""

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
import vllm._custom_ops as ops

from tests.bench.report import make_parser, publish, say_row
from tests.bench.timing import COLD_BYTES, Call, geomeans, interleaved, set_threads, turn_s
from workers.kernels import native
from workers.kernels.gemm import Weight, linear
from workers.kernels.tile_table import Inputs

MODELS = {
    "SmolLM2-135M": {
        "qkv": (960, 576),
        "o": (576, 576),
        "gate_up": (3072, 576),
        "down": (576, 1536),
        "lm_head": (49152, 576),
    },
    "Qwen2.5-0.5B": {
        "qkv": (1152, 896),
        "o": (896, 896),
        "gate_up": (9728, 896),
        "down": (896, 4864),
        "lm_head": (151936, 896),
    },
    "Llama-3.2-1B": {
        "qkv": (3072, 2048),
        "o": (2048, 2048),
        "gate_up": (16384, 2048),
        "down": (2048, 8192),
        "lm_head": (128256, 2048),
    },
    "Llama-3-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
}
"""Shape [N, K] of each linear."""

ROWS = (*range(1, 9), 12, 16, 24, 31, 32, 33, 48, 64, 96, 128, 200, 256, 512, 1024)
LM_HEAD_MAX_ROWS = 256
QUICK_MODELS = ("SmolLM2-135M", "Llama-3.2-1B")
QUICK_ROWS = (1, 4, 16, 33, 128, 256)
RANGES = {
    "m1_16": (1, 16),
    "m17_128": (17, 128),
    "m1_32": (1, 32),
    "m33_128": (33, 128),
    "m129_1024": (129, 1024),
}

PRIMITIVE_CACHE_SIZE = 32
"""Size of a handle's cache, as in vLLM's `dispatch_cpu_unquantized_gemm`; larger than the number
of values of M."""

EXACT = "exact"
"""Our product with rows in float32, beside the one with rows in bf16."""
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
"""Largest error by the dtype of a result, relative to `sum |x| |w|`, the scale of the rounding
errors of a float32 sum."""


class Layer:
    """One linear with the weights of all contestants."""

    def __init__(self, n: int, k: int, rng: np.random.Generator, hot: bool, bf16: bool) -> None:
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        values = torch.from_numpy(rng.standard_normal((n, k), dtype=np.float32))
        weight = values.mul_(k**-0.5).bfloat16().float().numpy()
        inputs = Inputs.BF16 if bf16 else Inputs.FLOAT32
        first = Weight.pack(weight, inputs=inputs)
        copies = 1 if hot else -(-COLD_BYTES // first.nbytes)
        self.weight = weight
        others = (Weight.pack(weight, inputs=inputs) for _ in range(copies - 1))
        self.packed = [first, *others]
        self.exact = [Weight.pack(weight) for _ in range(copies)] if bf16 else []
        plain = torch.from_numpy(weight).to(self.dtype)
        copies = 1 if hot else -(-COLD_BYTES // plain.nbytes)
        self.plain = [plain, *(plain.clone() for _ in range(copies - 1))]
        self.handles = [ops.create_onednn_mm(w.t(), PRIMITIVE_CACHE_SIZE) for w in self.plain]

    def contestants(self, x: np.ndarray) -> dict[str, Call]:
        """One call each of `x` times the next copy of the weights."""
        packed, plain, handles = cycle(self.packed), cycle(self.plain), cycle(self.handles)
        exact = cycle(self.exact)
        rows = torch.from_numpy(x).to(self.dtype)
        return {
            "ours": lambda: linear(x, next(packed)),
            "torch": lambda: torch.nn.functional.linear(rows, next(plain)),
            "onednn": lambda: ops.onednn_mm(next(handles), rows, None),
        } | ({EXACT: lambda: linear(x, next(exact))} if self.exact else {})

    def check(self, x: np.ndarray, contestants: dict[str, Call], rng: np.random.Generator) -> None:
        """Compare a sample of each contestant's result with float64."""
        rows = rng.permutation(len(x))[:32]
        columns = rng.permutation(len(self.weight))[:256]
        seen = torch.from_numpy(x).to(self.dtype).double().numpy()
        left, right = seen[rows], self.weight[columns].astype(np.float64)
        expected, scale = left @ right.T, np.abs(left) @ np.abs(right).T
        for name, call in contestants.items():
            product = torch.as_tensor(call())
            found = product.float().numpy()[np.ix_(rows, columns)]
            error = float((np.abs(found - expected) / scale).max())
            if not error < TOLERANCES[torch.bfloat16 if name == EXACT else product.dtype]:
                raise SystemExit(f"{name} is off by {error:.1e} of sum |x||w| at M={len(x)}")

    def warm_up(self, contestants: dict[str, Call]) -> None:
        """Let oneDNN's handles plan for this M; the first one did so in `check`."""
        for _ in self.handles[1:]:
            contestants["onednn"]()


def peak_gflops() -> float:
    """float32 GFLOP/s of the best of a few large products: a lower bound of the machine's peak."""
    size = 1024
    a, b = torch.rand(size, size), torch.rand(size, size)
    best_s = min(turn_s(lambda: a @ b, 3) for _ in range(8))
    return 2 * size**3 / best_s / 1e9


def peak_read_gb_s() -> float:
    """GB/s of the best of a few sums over 1 GB."""
    values = torch.ones(2**28)
    best_s = min(turn_s(values.sum, 1) for _ in range(5))
    return 4 * values.numel() / best_s / 1e9


def measure(
    models: Sequence[str], rows_m: Sequence[int], threads: int, hot: bool, bf16: bool
) -> Iterable[dict[str, Any]]:
    """One row of figures per cell."""
    rng = np.random.default_rng(0)
    for model in models:
        for name, (n, k) in MODELS[model].items():
            layer = Layer(n, k, rng, hot, bf16)
            for m in rows_m:
                if name == "lm_head" and m > LM_HEAD_MAX_ROWS:
                    continue
                x = rng.standard_normal((m, k), dtype=np.float32)
                contestants = layer.contestants(x)
                layer.check(x, contestants, rng)
                layer.warm_up(contestants)
                took_s = interleaved(contestants, threads)
                yield {
                    "model": model,
                    "linear": name,
                    "N": n,
                    "K": k,
                    "M": m,
                    **{f"{contestant} ms": 1000 * s for contestant, s in took_s.items()},
                    **({"by exact": took_s[EXACT] / took_s["ours"]} if bf16 else {}),
                    "ratio": min(took_s["torch"], took_s["onednn"]) / took_s["ours"],
                    "GFLOP/s": 2 * m * n * k / took_s["ours"] / 1e9,
                    "GB/s": layer.packed[0].nbytes / took_s["ours"] / 1e9,
                }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer models and rows")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="only these")
    parser.add_argument("--m", type=int, nargs="+", help="only these numbers of rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hot", action="store_true", help="one copy of the weights")
    parser.add_argument("--bf16", action="store_true", help="round the rows to bf16")
    options = parser.parse_args()
    set_threads(options.threads)
    models = options.models or (QUICK_MODELS if options.quick else tuple(MODELS))
    rows_m = options.m or (QUICK_ROWS if options.quick else ROWS)
    peaks = {"peak_gflops": peak_gflops(), "peak_read_gb_s": peak_read_gb_s()}
    rows = []
    for row in measure(models, rows_m, options.threads, options.hot, options.bf16):
        say_row(row)
        rows.append(row)
    groups = {
        name: [row for row in rows if low <= row["M"] <= high]
        for name, (low, high) in RANGES.items()
    }
    publish(
        f"GEMM{' in bf16' if options.bf16 else ''}, {options.threads} thread(s), {native.isa()}, "
        f"{'hot' if options.hot else 'cold'} "
        f"weights; peaks {peaks['peak_gflops']:.0f} GFLOP/s, {peaks['peak_read_gb_s']:.1f} GB/s",
        rows,
        geomeans(rows, groups) | peaks,
        options.json,
    )


if __name__ == "__main__":
    main()
