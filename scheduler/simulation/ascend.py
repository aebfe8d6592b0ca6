"""Time of our kernels on an Ascend 910B, tile by tile, and the profiles that follow from it.

    python -m scheduler.simulation.ascend

writes a profile into `profiles/` for each model below. A kernel is a few programs, one per core,
which go through a table of tiles; its time is that of the core that is done last, or that of
reading its data from memory, if that is longer. Nothing here was measured by this project:
constants are from the sources that they name, or assumed.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scheduler.cost_fit import fit
from scheduler.cost_model import CostModel, StepShape
from scheduler.simulation.device import PROFILES, DeviceProfile
from scheduler.simulation.roofline import ACCELERATORS, BYTES, MODELS, Model, num_kv_blocks
from scheduler.task import Limits

Cycles = npt.NDArray[np.float64]

FRACTAL = 16
"""The cube unit multiplies 16 x 16 by 16 x 16 in a cycle (Huawei, Hot Chips 2019: 4096 MACs)."""
FP32 = 4
"""Bytes of a sum or a score."""
LANES = 64
"""fp32 numbers that a vector instruction takes at once: 256 bytes (PTO ISA, `REPEAT_BYTE`)."""
HEIGHTS = (16, 64, 128)
"""Rows of our tiles, as in `workers/kernels/triton_gemm.py`."""
CHUNK_KEYS = 2048
"""Keys after which a long context may be split, as in `workers/kernels/triton_attention.py`."""
TILES_PER_CORE = 4
"""Tiles for each core at which contexts are no longer split, as in `workers/kernels/tiles.py`."""
PAGE = 128
"""Tokens of a KV block: the default of vLLM on Ascend, and the keys of one step of our kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Npu:
    """An Ascend 910B1. Rates are bytes per cycle of one core; a core has one cube unit and two
    vector units, which exchange data through the L2 cache only (paper, section 3).

    "Platform" is CANN's `data/platform_config/Ascend910B1.ini`, as quoted in public. "PTO ISA" is
    Huawei's own cost model (`include/pto/costmodel/` of pto-isa), measured on a 910B3.
    """

    num_cores: int = 24
    """Platform: `cube_core_cnt`; 24 in a B1 and B2, 20 in a B3 and B4."""
    clock_hz: float = 1.85e9
    """Platform: `cube_freq`. So 24 cores reach 364 TFLOP/s; the 376 of the data sheet take 25."""
    l0c_bytes: int = 128 * 2**10
    """Platform: `l0_c_size`, the sums of a cube unit."""
    l2_bytes: int = 192 * 2**20
    """Platform: `l2_size`; half of it in a B4."""
    l1_to_l0a: float = 512
    """Platform: `l1_to_l0_a_rate`."""
    l1_to_l0b: float = 256
    """Half of the rate of L0A, as PTO ISA measured."""
    cube_read: float = 110
    """Platform: `l2_read_rate`. PTO ISA measured 78, with which no product could reach the 328
    TFLOP/s measured on 910B in public (gameofdimension/limulidae)."""
    cube_write: float = 86
    """Platform: `l2_write_rate`."""
    vector_read: float = 2 * 58.6
    """PTO ISA: 100.9 GiB/s for each of the two vector units."""
    vector_write: float = 2 * 109.4
    """PTO ISA: 188.46 GiB/s for each of the two vector units."""
    memory_read: float = 32
    """Platform: `ddr_rate`. 1.42 TB/s for all cores, 89% of the 1.6 TB/s of the data sheet; the
    cores share it, so one alone may have more."""
    pass_cycles: float = 2
    """PTO ISA: cycles in which a vector unit adds, multiplies or exponentiates LANES numbers."""
    chain_cycles: float = 30
    """PTO ISA: cycles until the first result of a chain of vector instructions."""
    sync_cycles: float = 500
    """Until a tile is looked up in the table and its cube and vector units have met. Assumed."""
    launch_s: float = 6e-6
    """Seconds between two kernels. Assumed, near what small products of Qwen3-14B show that were
    timed in public on a die of a 910C: 14 us in the median for 11.9 MB, which take 8.4 us to
    read."""

    @property
    def flops(self) -> float:
        """Peak of all cube units, in operations per second."""
        return 2 * FRACTAL**3 * self.num_cores * self.clock_hz

    def cube_cycles(self, rows: int, columns: int, inputs: int) -> int:
        """Cycles of a product `[rows, inputs]` by `[inputs, columns]`, in whole fractals."""
        return math.prod(-(-size // FRACTAL) for size in (rows, columns, inputs))

    def kernel_s(self, tiles: Cycles, memory_bytes: float, *, deals_back: bool = False) -> float:
        """Seconds of a kernel by the cycles of its tiles, in the order of its table.

        Core i takes tiles i, i + num_cores, ...; with `deals_back` every second round is dealt in
        reverse.
        """
        rounds = np.zeros((-(-len(tiles) // self.num_cores), self.num_cores))
        rounds.flat[: len(tiles)] = tiles
        if deals_back:
            rounds[1::2] = rounds[1::2, ::-1]
        reading = memory_bytes / (self.memory_read * self.num_cores)
        return self.launch_s + max(float(rounds.sum(axis=0).max()), reading) / self.clock_hz

    def vector_kernel_s(self, num_bytes: float) -> float:
        """Seconds of a kernel that takes `num_bytes` through the vector units of all cores."""
        return self.launch_s + num_bytes / (self.vector_read * self.num_cores) / self.clock_hz


@dataclass(frozen=True, slots=True)
class GemmTile:
    """How a product is cut."""

    rows: int
    """Of the tallest tile; what it leaves is taken by the lowest of HEIGHTS that fits."""
    columns: int
    inputs: int = 64
    """Input features of one step of a sum."""


COLUMNS_TOGETHER = 8
"""Blocks of output features that row tiles go through before the next ones, as in
`workers/kernels/triton_gemm.py`."""
GEMM_TILES = tuple(GemmTile(rows, columns) for rows in (64, 128) for columns in (64, 128, 256))
"""Cuts of which each product takes the fastest: its tiles are chosen offline, by its shape."""


def gemm_tile_cycles(
    npu: Npu, tile: GemmTile, height: int, num_rows: int, num_inputs: int
) -> float:
    """Cycles of a tile of `height` rows, of which `num_rows` are there.

    Two buffers let each step's inputs come in while the last step's are multiplied. The sums go out
    while the next tile is computed, if those of both fit into L0C.
    """
    load = (num_rows + tile.columns) * tile.inputs * BYTES / npu.cube_read
    step = max(
        npu.cube_cycles(height, tile.columns, tile.inputs),
        height * tile.inputs * BYTES / npu.l1_to_l0a,
        tile.columns * tile.inputs * BYTES / npu.l1_to_l0b,
        load,
    )
    sums = -(-num_inputs // tile.inputs) * step
    store = num_rows * tile.columns * BYTES / npu.cube_write
    hides_store = 2 * height * tile.columns * FP32 <= npu.l0c_bytes
    return npu.sync_cycles + load + (max(sums, store) if hides_store else sums + store)


def row_tiles(num_rows: int, tallest: int) -> list[tuple[int, int]]:
    """Height of each row tile, and how many of its rows are there; the others are virtual."""
    whole, rest = divmod(num_rows, tallest)
    tiles = [(tallest, tallest)] * whole
    return [*tiles, (min(h for h in HEIGHTS if h >= rest), rest)] if rest else tiles


def gemm_memory_bytes(npu: Npu, num_rows: int, num_features: int, num_inputs: int) -> int:
    """Bytes of memory that a product moves: its weights, and inputs and outputs too large for L2,
    where they are else found."""
    activations = num_rows * (num_features + num_inputs) * BYTES
    return num_features * num_inputs * BYTES + (activations if activations > npu.l2_bytes else 0)


def gemm_table(cycles: Sequence[float], num_blocks: int) -> Cycles:
    """The cycles of a product's tiles, given those of its row tiles, in the order in which they are
    dealt: all row tiles of COLUMNS_TOGETHER blocks of output features, then of the next."""
    whole, rest = divmod(num_blocks, COLUMNS_TOGETHER)
    together = np.repeat(cycles, COLUMNS_TOGETHER)
    return np.concatenate([np.tile(together, whole), np.repeat(cycles, rest)])


@lru_cache(maxsize=1 << 14)
def gemm_s(npu: Npu, num_rows: int, num_features: int, num_inputs: int) -> float:
    """Seconds of our product `[num_rows, num_inputs]` by `[num_inputs, num_features]`."""
    memory_bytes = gemm_memory_bytes(npu, num_rows, num_features, num_inputs)
    seconds = []
    for tile in GEMM_TILES:
        cycles = [
            gemm_tile_cycles(npu, tile, height, rows, num_inputs)
            for height, rows in row_tiles(num_rows, tile.rows)
        ]
        table = gemm_table(cycles, -(-num_features // tile.columns))
        seconds.append(npu.kernel_s(table, memory_bytes))
    return min(seconds)


@dataclass(frozen=True, slots=True)
class Span:
    """The last `num_tokens` of `seq_len` tokens of a request."""

    num_tokens: int
    seq_len: int


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int = 128

    @property
    def group(self) -> int:
        """Rows of a tile for each token: its query heads per KV head, up to a power of two."""
        return 1 << (self.num_heads // self.num_kv_heads - 1).bit_length()

    def kv_bytes(self, spans: Sequence[Span]) -> int:
        """Bytes of the keys and values that spans see."""
        return 2 * self.num_kv_heads * self.head_dim * BYTES * sum(s.seq_len for s in spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """What an attention kernel does for each block of keys that a tile sees."""

    block_keys: int
    score_passes: int
    """Vector instructions over all scores, which are fp32."""
    rescales: bool
    """Whether each block's product goes to the vector units, which rescale the sum of all earlier
    ones and add it; else the products are summed in L0C."""
    mask_bytes: int = 0
    """Of the mask that is read for each score."""
    packed_rows: float = math.inf
    """Rows of a span, over all query heads of a KV head, up to which these share tiles; in longer
    ones each has its own."""
    splits_keys: bool = True
    """Whether long contexts are split when there are few tiles."""
    overlaps_tiles: bool = True
    """Whether a tile's first block is computed while the last tile's last ones are. Assumed for the
    kernels of others: see `ascend_library.py`."""


@lru_cache(maxsize=1 << 16)
def attention_tile_cycles(
    npu: Npu, kernel: AttentionKernel, rows: int, num_keys: int, head_dim: int
) -> float:
    """Cycles of a tile of `rows` rows that sees `num_keys` keys, in whole pages. Its stages work on
    different blocks at the same time, so the slowest decides, and the others are seen at a first
    block only."""
    scores = rows * kernel.block_keys
    product = rows * head_dim if kernel.rescales else 0
    weights_bytes = scores * BYTES
    kv_bytes = 2 * kernel.block_keys * head_dim * BYTES
    num_passes = (kernel.score_passes * scores + 2 * product) / (2 * LANES)
    stages = (
        2 * npu.cube_cycles(rows, kernel.block_keys, head_dim),
        (kv_bytes + weights_bytes) / npu.cube_read,
        (scores + product) * FP32 / npu.cube_write,
        ((scores + product) * FP32 + scores * kernel.mask_bytes) / npu.vector_read,
        npu.chain_cycles + num_passes * npu.pass_cycles,
        weights_bytes / npu.vector_write,
    )
    num_blocks = -(-num_keys // PAGE) * PAGE / kernel.block_keys
    fill = 0.0 if kernel.overlaps_tiles else sum(stages) - max(stages)
    return npu.sync_cycles + fill + num_blocks * max(stages)


OURS = AttentionKernel(block_keys=PAGE, score_passes=8, rescales=True, overlaps_tiles=False)
"""`triton_attention.py`: scores are scaled, compared, selected, compared with the largest, reduced
by it, exponentiated, summed and cast."""


def attention_s(npu: Npu, kernel: AttentionKernel, heads: Heads, spans: Sequence[Span]) -> float:
    """Seconds of one launch over all spans: tiles of up to 128 rows, each a few tokens of one KV
    head, long ones split, costliest first; and of the launch that merges what was split."""
    tiles = [
        (min(h for h in HEIGHTS if h >= rows), keys, copies)
        for span in spans
        for rows, keys, copies in _query_tiles(kernel, heads, span)
    ]
    pairs = sum(rows * keys * copies for rows, keys, copies in tiles)
    even = pairs / (npu.num_cores * TILES_PER_CORE)
    table: list[float] = []
    num_partial_rows = 0
    for rows, keys, copies in tiles:
        pieces = 1
        if kernel.splits_keys:
            pieces = min(-(-keys // CHUNK_KEYS), math.ceil(rows * keys / even))
        tile = attention_tile_cycles(npu, kernel, rows, -(-keys // pieces), heads.head_dim)
        table += [tile] * (pieces * copies)
        num_partial_rows += rows * pieces * copies if pieces > 1 else 0
    costliest_first = np.sort(table)[::-1]
    seconds = npu.kernel_s(costliest_first, heads.kv_bytes(spans), deals_back=True)
    if num_partial_rows:
        seconds += npu.vector_kernel_s(num_partial_rows * heads.head_dim * FP32)
    return seconds


def _query_tiles(
    kernel: AttentionKernel, heads: Heads, span: Span
) -> Iterator[tuple[int, int, int]]:
    """Rows of each tile of a span, the keys that it sees, and how many heads have one like it."""
    is_packed = span.num_tokens * heads.group <= kernel.packed_rows
    group, copies = (heads.group, heads.num_kv_heads) if is_packed else (1, heads.num_heads)
    most, context = HEIGHTS[-1] // group, span.seq_len - span.num_tokens
    for first in range(0, span.num_tokens, most):
        count = min(most, span.num_tokens - first)
        yield count * group, context + first + count, copies


def step_s(npu: Npu, model: Model, spans: Sequence[Span], num_logits: int) -> float:
    """Seconds of a step of `model`: its layers' products, attention and operators in between, the
    LM head, and what the engine needs for a step besides."""
    rows = sum(span.num_tokens for span in spans)
    hidden, inner = model.hidden_size, model.intermediate_size
    heads = Heads(model.num_heads, model.num_kv_heads, model.head_dim)
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer_s = (
        gemm_s(npu, rows, queries + 2 * keys, hidden)
        + gemm_s(npu, rows, hidden, queries)
        + gemm_s(npu, rows, 2 * inner, hidden)
        + gemm_s(npu, rows, hidden, inner)
        + attention_s(npu, OURS, heads, spans)
        # Two norms read a residual and what is added to it; then rotation, and gate by up.
        + 2 * npu.vector_kernel_s(2 * rows * hidden * BYTES)
        + npu.vector_kernel_s(rows * (queries + 2 * keys) * BYTES)
        + npu.vector_kernel_s(2 * rows * inner * BYTES)
    )
    head_s = gemm_s(npu, num_logits, model.vocabulary, hidden)
    return ACCELERATORS["ascend-910b"].launch_s + model.num_layers * layer_s + head_s


def grid() -> Iterator[tuple[list[Span], int]]:
    """Steps to fit a cost model to, with their numbers of logits: decodes, chunks of prompts after
    a history, both together, and drafts being verified."""
    for context in (128, 1024, 4096, 16384):
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            yield [Span(1, context)] * batch, batch
    for history in (0, 2048, 8192):
        for tokens in (16, 32, 64, 128, 256, 512, 1024, 2048, 3000, 4096, 8192):
            yield [Span(tokens, history + tokens)], 1
            decodes = [Span(1, 1024)] * 32
            yield [Span(tokens, history + tokens), *decodes], 33
    for drafts in (2, 4, 8):
        for batch in (1, 4, 16, 64):
            yield [Span(drafts, 1024)] * batch, drafts * batch


def tile_profile(npu: Npu, model: Model, *, name: str) -> DeviceProfile:
    """The profile of a model whose cost model is fitted to the steps of `grid`."""
    query_tile = HEIGHTS[-1] // Heads(model.num_heads, model.num_kv_heads).group
    steps = [
        (_shape(spans, num_logits, query_tile), step_s(npu, model, spans, num_logits))
        for spans, num_logits in grid()
    ]
    cost_model = fit(steps, token_tile=HEIGHTS[0])
    errors = [abs(cost_model.predict(shape) / seconds - 1) for shape, seconds in steps]
    # Other machines differ in the last digits of least squares.
    state = cost_model.to_dict()
    state["weights"] = [float(f"{weight:.4g}") for weight in state["weights"]]
    return DeviceProfile(
        name=name,
        source=f"Tile model of {model.name} in 16 bits with the kernels of this project on an "
        f"Ascend 910B1 ({npu.num_cores} cores at {npu.clock_hz / 1e9:g} GHz, "
        f"{npu.flops / 1e12:.0f} TFLOP/s, memory read at "
        f"{npu.memory_read * npu.num_cores * npu.clock_hz / 1e12:.2f} TB/s); sources of the "
        f"constants in scheduler/simulation/ascend.py. Fitted to {len(steps)} modelled steps with "
        f"a mean error of {float(np.mean(errors)):.1%}. Not measured.",
        modelled=True,
        cost_model=CostModel.from_dict(state),
        limits=Limits(
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            kv_block_size=PAGE,
            num_kv_blocks=num_kv_blocks(ACCELERATORS["ascend-910b"], model, PAGE),
        ),
    )


def _shape(spans: Sequence[Span], num_logits: int, query_tile: int) -> StepShape:
    shape = StepShape(query_tile)
    for span in spans:
        shape.add(span.num_tokens, span.seq_len, num_logits // len(spans))
    return shape


def tile_profiles() -> Iterator[DeviceProfile]:
    """A profile of each model that fits into the memory of a 910B."""
    for name in ("llama-3-8b", "qwen2.5-7b"):
        yield tile_profile(Npu(), MODELS[name], name=f"ascend-910b-tiles-{name}")


def write_profiles(folder: Path) -> None:
    """Write the profiles as JSON files of their names."""
    for profile in tile_profiles():
        text = json.dumps(profile.to_dict(), indent=2) + "\n"
        (folder / f"{profile.name}.json").write_text(text)


if __name__ == "__main__":
    write_profiles(PROFILES)
