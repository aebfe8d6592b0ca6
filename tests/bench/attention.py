"""Our attention kernel against vLLM's on the same spans: decode, prefill, verify and mixed steps.

    python -m tests.bench.attention --json attention.json

A cell is one layer's attention in one step, in float32 or with `--bf16` in bfloat16 (ours with
queries and results in float32), with blocks of `--block-size` tokens. Both sides take turns in one
process, each over caches filled by its own write from the same keys and values, after a check that
their results agree. A model has a cache for each layer, so each side has copies of the cell's cache
which together exceed the L3 cache, and takes another one at each call; with `--hot` it has one.
Both plan once a step: the time of a layer is its call and 1/num_layers of the plan. Writing the
step's keys and values is timed separately and not counted. Mixed steps are drawn from traces, with
contexts up to 8,192 tokens; cells whose cache would exceed 384 MiB are left out. Keys of the
summary: the geometric mean of `ratio`, vLLM's time over ours, for each kind of step, and its
minimum.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from random import Random
from typing import Any

import numpy as np
import torch
import vllm._custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from tests.bench.report import make_parser, publish, say, say_row
from tests.bench.timing import COLD_BYTES, geomeans, interleaved, set_threads
from tests.workload import TRACES, Span, has_traces, mixed_step, trace_lengths
from workers.kernels import native
from workers.kernels.attention import attend, plan_attention, write_kv
from workers.kernels.shapes import AttentionShape
from workers.kernels.tiles import cut_spans

BLOCK_SIZE = 128
"""vLLM's default on CPUs."""
MAX_SEQ_LEN = 8192
MAX_KV_BYTES = 384 * 2**20
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest difference between the two results, relative or absolute."""

KINDS = ("decode", "prefill", "verify", "mixed")


@dataclass(frozen=True, slots=True)
class Model:
    """The attention of a model."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    num_layers: int

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token's keys and values in one layer."""
        return 2 * dtype.itemsize * self.num_kv_heads * self.head_size


MODELS = {
    "SmolLM2-135M": Model(9, 3, 64, 30),
    "Qwen2.5-0.5B": Model(14, 2, 64, 24),
    "Llama-3.2-1B": Model(32, 8, 64, 16),
    "Llama-3-8B": Model(32, 8, 128, 32),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which cells to measure."""

    decode_batches: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    prefill_chunks: tuple[int, ...]
    prefill_prefixes: tuple[int, ...]
    verify_drafts: tuple[int, ...]
    verify_batches: tuple[int, ...]
    verify_contexts: tuple[int, ...]
    mixed_budgets: tuple[int, ...]
    mixed_draws: int


FULL = Grid(
    decode_batches=(1, 4, 8, 16, 32, 64),
    decode_contexts=(128, 512, 1024, 2048, 4096),
    prefill_chunks=(512, 2048),
    prefill_prefixes=(0, 1024, 2048, 4096),
    verify_drafts=(2, 4, 8),
    verify_batches=(4, 8, 16),
    verify_contexts=(512, 2048),
    mixed_budgets=(512, 2048),
    mixed_draws=2,
)
SUBSET = Grid(
    decode_batches=(1, 8, 32),
    decode_contexts=(512, 2048),
    prefill_chunks=(512,),
    prefill_prefixes=(0, 2048),
    verify_drafts=(2, 4, 8),
    verify_batches=(4, 16),
    verify_contexts=(1024,),
    mixed_budgets=(512,),
    mixed_draws=1,
)
QUICK = replace(SUBSET, decode_contexts=(128, 1024), verify_drafts=(4,))
FULL_MODEL = "SmolLM2-135M"


@dataclass(frozen=True, slots=True)
class Case:
    """The spans of one step."""

    kind: str
    name: str
    spans: list[Span]


def cases(grid: Grid, max_kv_tokens: int) -> Iterator[Case]:
    """The steps of a grid that fit `max_kv_tokens`."""
    for case in (*_uniform_cases(grid), *_mixed_cases(grid, max_kv_tokens)):
        if sum(span.seq_len for span in case.spans) <= max_kv_tokens:
            yield case


class Step:
    """The inputs of one step, the same for both sides."""

    def __init__(
        self,
        model: Model,
        spans: list[Span],
        rng: np.random.Generator,
        block_size: int = BLOCK_SIZE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        num_tokens = [span.num_tokens for span in spans]
        num_blocks = [-(-span.seq_len // block_size) for span in spans]
        self.model = model
        self.block_size = block_size
        self.dtype = dtype
        self.query_start_loc = np.cumsum([0, *num_tokens], dtype=np.int32)
        self.seq_lens = np.array([span.seq_len for span in spans], dtype=np.int32)
        self.num_blocks = sum(num_blocks)
        self.block_table = np.zeros((len(spans), max(num_blocks)), dtype=np.int32)
        blocks = np.split(rng.permutation(self.num_blocks), np.cumsum(num_blocks)[:-1])
        for row, own in zip(self.block_table, blocks, strict=True):
            row[: len(own)] = own
        self.query = self.random(rng, sum(num_tokens), model.num_heads)

    def random(self, rng: np.random.Generator, num_tokens: int, num_heads: int) -> np.ndarray:
        """Random rows of the size of a head, [num_tokens, num_heads, head_size]."""
        size = (num_tokens, num_heads, self.model.head_size)
        return rng.standard_normal(size, dtype=np.float32)

    def slots(self, row: int, start: int) -> np.ndarray:
        """Where the tokens from `start` of a request are in the cache."""
        position = np.arange(start, self.seq_lens[row])
        block, offset = np.divmod(position, self.block_size)
        slots = self.block_table[row, block] * self.block_size + offset
        numbers: np.ndarray = slots.astype(np.int64)
        return numbers

    def query_slots(self) -> np.ndarray:
        """Where the step's own tokens are in the cache."""
        starts = self.seq_lens - np.diff(self.query_start_loc)
        return np.concatenate([self.slots(row, int(start)) for row, start in enumerate(starts)])

    @property
    def gflop(self) -> float:
        """Billions of operations of the two products over the keys that each query sees."""
        queries = np.diff(self.query_start_loc).astype(np.int64)
        pairs = int((queries * self.seq_lens - queries * (queries - 1) // 2).sum())
        return 4 * pairs * self.model.num_heads * self.model.head_size / 1e9


class Ours:
    """Our kernel over caches of its own."""

    def __init__(self, step: Step) -> None:
        model = step.model
        self.step = step
        self.shape = AttentionShape(
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_size=model.head_size,
            block_size=step.block_size,
            scale=model.head_size**-0.5,
            kv_bf16=step.dtype is torch.bfloat16,
        )
        self.cache = _empty_cache(step)
        self.copies = cycle([self._elements(self.cache)])
        self.planned = self.plan()
        self.out = torch.full(step.query.shape, torch.nan).numpy()

    def plan(self) -> Any:
        """Plan the step; a decode step seldom differs from the one before, others do."""
        if np.diff(self.step.query_start_loc).max() > 1:
            cut_spans.cache_clear()
        return plan_attention(self.shape, self.step.query_start_loc, self.step.seq_lens)

    def write(self, key: np.ndarray, value: np.ndarray, slots: np.ndarray) -> None:
        """Write keys and values into the next cache."""
        write_kv(self.shape, next(self.copies), key, value, slots)

    def attend(self) -> None:
        """Attend over the next cache."""
        table = self.step.block_table
        attend(self.planned, self.step.query, next(self.copies), table, self.out)

    def copy(self, copies: int) -> None:
        """Have `copies` equal caches."""
        self.copies = cycle([self._elements(cache) for cache in _equal(self.cache, copies)])

    def _elements(self, cache: torch.Tensor) -> np.ndarray:
        """A cache as numpy sees it: numpy has no bf16."""
        if self.shape.kv_bf16:
            cache = cache.view(torch.uint16)
        elements: np.ndarray = cache.numpy()
        return elements


class Stock:
    """vLLM's CPU attention over caches of its own, called as its backend calls it."""

    def __init__(self, step: Step) -> None:
        model = step.model
        self.step = step
        self.isa = _get_attn_isa(step.dtype, step.block_size, model.head_size, "auto")
        self.query_start_loc = torch.from_numpy(step.query_start_loc)
        self.seq_lens = torch.from_numpy(step.seq_lens)
        self.block_table = torch.from_numpy(step.block_table)
        self.query = torch.from_numpy(step.query).to(step.dtype)
        self.cache = _empty_cache(step)
        self.copies = cycle([self.cache])
        self.planned = self.plan()
        self.out = torch.full_like(self.query, torch.nan)

    def plan(self) -> torch.Tensor:
        """Make the metadata of the step."""
        model = self.step.model
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(self.seq_lens),
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_size,
            seq_lens=self.seq_lens,
            dtype=self.step.dtype,
            query_start_loc=self.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )

    def write(self, key: np.ndarray, value: np.ndarray, slots: np.ndarray) -> None:
        """Write keys and values into the next cache."""
        ops.cpu_attn_reshape_and_cache(
            torch.from_numpy(key).to(self.step.dtype),
            torch.from_numpy(value).to(self.step.dtype),
            *self._halves(),
            torch.from_numpy(slots),
            self.isa,
        )

    def attend(self) -> None:
        """Attend over the next cache."""
        key_cache, value_cache = self._halves()
        ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=self.out,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            scale=self.step.model.head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=0.0,
            scheduler_metadata=self.planned,
            s_aux=None,
        )

    def copy(self, copies: int) -> None:
        """Have `copies` equal caches."""
        self.copies = cycle(_equal(self.cache, copies))

    def _halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next cache as the backend splits it."""
        cache = next(self.copies)
        num_blocks, num_kv_heads, block_size, _ = cache.shape
        key, value = cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
        return key, value


def measure(
    name: str, case: Case, threads: int, hot: bool, block_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Check one cell and measure its row of figures."""
    rng = np.random.default_rng(0)
    model = MODELS[name]
    step = Step(model, case.spans, rng, block_size, dtype)
    ours, stock = Ours(step), Stock(step)
    for row, seq_len in enumerate(step.seq_lens):
        key, value = (step.random(rng, seq_len, model.num_kv_heads) for _ in range(2))
        for side in (ours, stock):
            side.write(key, value, step.slots(row, 0))
    for side in (ours, stock):
        side.attend()
    expected, tolerance = stock.out.float().numpy(), TOLERANCES[dtype]
    if not np.allclose(ours.out, expected, rtol=tolerance, atol=tolerance):
        raise SystemExit(f"{name}, {case.name}: off by {np.abs(ours.out - expected).max():.1e}")
    copies = 1 if hot else -(-COLD_BYTES // ours.cache.nbytes)
    for side in (ours, stock):
        side.copy(copies)
    attend_s = _in_turns(ours.attend, stock.attend, threads)
    plan_s = _in_turns(ours.plan, stock.plan, threads)
    write_s = _in_turns(*_writes(step, ours, stock, rng), threads)
    layer_s = {side: attend_s[side] + plan_s[side] / model.num_layers for side in attend_s}
    return {
        "model": name,
        "kind": case.kind,
        "spans": case.name,
        **{f"{side} ms": 1000 * s for side, s in layer_s.items()},
        "ratio": layer_s["stock"] / layer_s["ours"],
        "GFLOP/s": step.gflop / layer_s["ours"],
        **{f"{side} plan us": round(1e6 * s) for side, s in plan_s.items()},
        **{f"{side} write us": round(1e6 * s) for side, s in write_s.items()},
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cells")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="only these")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hot", action="store_true", help="one copy of the cache")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16")
    parser.add_argument("--block-size", type=int, default=BLOCK_SIZE, help="tokens in a block")
    options = parser.parse_args()
    set_threads(options.threads)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    rows = []
    for model in options.models or ([FULL_MODEL] if options.quick else MODELS):
        grid = QUICK if options.quick else FULL if model == FULL_MODEL else SUBSET
        for case in cases(grid, MAX_KV_BYTES // MODELS[model].kv_bytes(dtype)):
            if case.kind in options.kinds:
                settings = (options.threads, options.hot, options.block_size, dtype)
                rows.append(measure(model, case, *settings))
                say_row(rows[-1])
    publish(
        f"Attention in {dtype}, {options.threads} thread(s), {native.isa()}, "
        f"{'hot' if options.hot else 'cold'} caches",
        rows,
        geomeans(rows, {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}),
        options.json,
    )


def _uniform_cases(grid: Grid) -> Iterator[Case]:
    """Decode, prefill and verify steps of spans of one size."""
    for batch in grid.decode_batches:
        for context in grid.decode_contexts:
            yield Case("decode", f"{batch} of 1 at {context}", [Span(1, context)] * batch)
    for chunk in grid.prefill_chunks:
        for prefix in grid.prefill_prefixes:
            yield Case("prefill", f"{chunk} after {prefix}", [Span(chunk, prefix + chunk)])
    for batch in grid.verify_batches:
        for drafts in grid.verify_drafts:
            for context in grid.verify_contexts:
                spans = [Span(1 + drafts, context + drafts)] * batch
                yield Case("verify", f"{batch} of 1+{drafts} at {context}", spans)


def _mixed_cases(grid: Grid, max_kv_tokens: int) -> Iterator[Case]:
    """Mixed steps from each trace, the same in every run; none without the traces."""
    if not has_traces():
        say("There are no traces (see XYSERVE_DATA in tests/README.md), so no mixed steps.")
        return
    for trace in TRACES:
        lengths = trace_lengths(trace)
        for budget in grid.mixed_budgets:
            for draw in range(grid.mixed_draws):
                random = Random(f"{trace} {budget} {draw}")
                spans = mixed_step(lengths, random, budget, MAX_SEQ_LEN, max_kv_tokens)
                yield Case("mixed", f"{trace.replace('_', ' ')}, {budget} #{draw}", spans)


def _empty_cache(step: Step) -> torch.Tensor:
    """An empty cache with room for the step, in the view that vLLM gives each layer."""
    model = step.model
    size = (step.num_blocks, model.num_kv_heads, step.block_size, 2 * model.head_size)
    return torch.zeros(size, dtype=step.dtype)


def _equal(cache: torch.Tensor, copies: int) -> list[torch.Tensor]:
    """The cache and copies of it."""
    return [cache, *(cache.clone() for _ in range(copies - 1))]


def _in_turns(ours: Callable[[], Any], stock: Callable[[], Any], threads: int) -> dict[str, float]:
    """Median seconds per call of the two."""
    return interleaved({"ours": ours, "stock": stock}, threads)


def _writes(
    step: Step, ours: Ours, stock: Stock, rng: np.random.Generator
) -> tuple[Callable[[], None], Callable[[], None]]:
    """For each side, the call that writes the step's own keys and values."""
    slots = step.query_slots()
    key, value = (step.random(rng, len(slots), step.model.num_kv_heads) for _ in range(2))
    return lambda: ours.write(key, value, slots), lambda: stock.write(key, value, slots)


if __name__ == "__main__":
    main()
