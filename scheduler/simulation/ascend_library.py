"""The platform's own kernels on an Ascend 910B, and how our gain over them compares with what the
paper measured.

    python -m scheduler.simulation.ascend_library

prints the comparison. No constant is fitted to the paper's figures, but two choices were made with
them in view: that tiles overlap in the library's and the paper's kernels (`overlaps_tiles`), as
else the library would use the cube units for 32% of the time in whole prompts, where the paper
measured 53%; and that query heads share tiles in short spans of the paper's kernel.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from scheduler.simulation.ascend import (
    OURS,
    AttentionKernel,
    GemmTile,
    Heads,
    Npu,
    Span,
    attention_s,
    attention_tile_cycles,
    gemm_memory_bytes,
    gemm_s,
    gemm_tile_cycles,
)

LIBRARY_TILE = GemmTile(128, 256)
"""The usual base tile of the platform's products (ATB's `pp_matmul`, aclnnMatmul); rows are padded
to whole tiles."""
MAX_VERIFIED = 64
"""Tokens of the longest span of drafts; longer spans are prompts."""

PREFILL = AttentionKernel(block_keys=512, score_passes=6, rescales=True)
"""The library's kernel for whole prompts (PFA): its blocks are longer than our pages, and only
blocks on the diagonal are masked."""
MASKED_PREFILL = AttentionKernel(block_keys=512, score_passes=7, rescales=True, mask_bytes=1)
"""The same for a span after a history, for which it reads a full mask (paper, section 2)."""
DECODE = AttentionKernel(block_keys=512, score_passes=6, rescales=True)
"""The library's kernel for decodes (IFA)."""
PAPER = AttentionKernel(
    block_keys=512, score_passes=6, rescales=False, packed_rows=128, splits_keys=False
)
"""The paper's three-stage pipeline: no mask tensor, and softmax over all keys at once, so that
nothing is rescaled. Its pipelines for long contexts and for pure decodes are left out. It does not
say whether query heads share tiles; assumed for spans that do not fill a tile alone."""


def library_gemm_s(npu: Npu, num_rows: int, num_features: int, num_inputs: int) -> float:
    """Seconds of the library's product."""
    tile = LIBRARY_TILE
    padded_rows = -(-num_rows // tile.rows) * tile.rows
    num_tiles = padded_rows // tile.rows * -(-num_features // tile.columns)
    cycles = gemm_tile_cycles(npu, tile, tile.rows, tile.rows, num_inputs)
    memory_bytes = gemm_memory_bytes(npu, num_rows, num_features, num_inputs)
    return npu.kernel_s(np.full(num_tiles, cycles), memory_bytes)


def library_attention_s(npu: Npu, heads: Heads, spans: Sequence[Span]) -> float:
    """Seconds of the library's launches, one for each stage that there is: prompts, drafts being
    verified, decodes. Tiles are dealt in the order of the spans, whatever they cost."""
    decodes = [span for span in spans if span.num_tokens == 1]
    verifies = [span for span in spans if 1 < span.num_tokens <= MAX_VERIFIED]
    prefills = [span for span in spans if span.num_tokens > MAX_VERIFIED]
    seconds = 0.0
    if decodes:
        # A tile is the query heads of one KV head.
        tiles = [
            attention_tile_cycles(npu, DECODE, 16, span.seq_len, heads.head_dim) for span in decodes
        ]
        seconds += npu.kernel_s(np.repeat(tiles, heads.num_kv_heads), heads.kv_bytes(decodes))
    for stage in (prefills, verifies):
        if stage:
            tiles = [
                attention_tile_cycles(npu, kernel, 128, keys, heads.head_dim)
                for span in stage
                for kernel, keys in _library_tiles(span)
            ]
            # A tile is tokens of one query head.
            seconds += npu.kernel_s(np.repeat(tiles, heads.num_heads), heads.kv_bytes(stage))
    return seconds


def _library_tiles(span: Span) -> Iterator[tuple[AttentionKernel, int]]:
    """Kernel of each 128 tokens of a span, and the keys that they see."""
    context = span.seq_len - span.num_tokens
    for first in range(0, span.num_tokens, 128):
        end = context + min(first + 128, span.num_tokens)
        yield MASKED_PREFILL if context else PREFILL, end


@dataclass(frozen=True, slots=True)
class Comparison:
    """A gain over the platform's library: its time divided by the other's, less 1."""

    what: str
    paper: float
    """As the paper measured it (section 7)."""
    papers_kernel: float
    """As modelled for the paper's kernel."""
    ours: float
    """As modelled for ours."""


LLAMA_2_7B = Heads(32, 32)
QWEN2_7B = Heads(28, 4)
QWEN2_72B_TP8 = Heads(8, 1)

LINEAR_LAYERS = (
    # Features and inputs of QKV, output, gate and up, down: Llama-2-7B; 13B on two devices; the
    # sizes of Qwen2.5-32B on four and 72B on eight.
    *((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    *((7680, 5120), (5120, 2560), (13824, 5120), (5120, 6912)),
    *((1792, 5120), (5120, 1280), (13824, 5120), (5120, 6912)),
    *((1280, 8192), (8192, 1024), (7392, 8192), (8192, 3696)),
)
"""Those of the paper: M of 1 to 4096 rows by each of them."""
LINEAR_ROWS = (1, 16, 32, 64, 100, 128, 200, 256, 417, 512, 700, 1024, 1500, 2048, 3000, 4096)


def attention_cases() -> dict[str, tuple[float, list[tuple[Heads, list[Span]]]]]:
    """The paper's figure for each of its experiments, and steps like those that it describes."""
    lengths = (512, 1024, 2048, 4096)
    decodes = [Span(1, 256 * (1 + i % 8)) for i in range(32)]
    models = (LLAMA_2_7B, QWEN2_7B, QWEN2_72B_TP8)
    return {
        "mixed stages, long prompts and few decodes (coding)": (
            0.11,
            [(heads, [Span(2000, 2000), Span(1900, 3900), *decodes[:8]]) for heads in models],
        ),
        "mixed stages, short prompts and many decodes (conversation)": (
            0.26,
            [
                (heads, [*(Span(n, 2 * n) for n in (150, 362, 700, 1100)), *decodes * 2])
                for heads in models
            ],
        ),
        "prefill after a cached prefix": (
            0.224,
            [
                (heads, [Span(total - prefix, total)])
                for heads in (LLAMA_2_7B, QWEN2_7B)
                for total in (4096, 8192)
                for prefix in (0, 1024, 2048, 3072)
            ],
        ),
        "chunked prefill (the paper: at most)": (
            0.222,
            [
                (QWEN2_7B, [Span(chunk, total)])
                for chunk in (4096, 8192)
                for total in (8192, 16384, 32768, 65536)
            ],
        ),
        "verify": (
            0.286,
            [
                (LLAMA_2_7B, [Span(tokens, length + tokens)] * batch)
                for batch, tokens in ((4, 32), (8, 16))
                for length in lengths
            ],
        ),
        "decode": (
            0.129,
            [
                (LLAMA_2_7B, [Span(1, length)] * batch)
                for batch in (8, 16, 32, 64, 128)
                for length in (128, *lengths)
            ],
        ),
    }


def compare_attention(npu: Npu) -> list[Comparison]:
    """The gains of attention in the paper's experiments, and their mean."""

    def gain(kernel: AttentionKernel, steps: list[tuple[Heads, list[Span]]]) -> float:
        return mean(
            library_attention_s(npu, *step) / attention_s(npu, kernel, *step) - 1 for step in steps
        )

    rows = [
        Comparison(what, paper, gain(PAPER, steps), gain(OURS, steps))
        for what, (paper, steps) in attention_cases().items()
    ]
    means = (mean(row.papers_kernel for row in rows), mean(row.ours for row in rows))
    return [*rows, Comparison("all attention", 0.215, *means)]


def compare_gemm(npu: Npu) -> Comparison:
    """The mean gain of products. The paper's and ours are cut by the same rule."""
    gain = mean(
        library_gemm_s(npu, rows, *layer) / gemm_s(npu, rows, *layer) - 1
        for layer in LINEAR_LAYERS
        for rows in LINEAR_ROWS
    )
    return Comparison("linear layers, M = 1 to 4096", 0.146, gain, gain)


def report(npu: Npu, write: Callable[[str], object] = print) -> None:
    """Write the comparison as a table."""
    write("| | paper measured | its kernel, modelled | ours, modelled |")
    write("|---|---:|---:|---:|")
    for row in (*compare_attention(npu), compare_gemm(npu)):
        write(f"| {row.what} | {row.paper:+.1%} | {row.papers_kernel:+.0%} | {row.ours:+.0%} |")


if __name__ == "__main__":
    report(Npu())
