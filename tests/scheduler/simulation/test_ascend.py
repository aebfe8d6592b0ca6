import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from scheduler.cost_model import StepShape
from scheduler.simulation.ascend import (
    OURS,
    AttentionKernel,
    GemmTile,
    Heads,
    Npu,
    Span,
    attention_s,
    attention_tile_cycles,
    gemm_s,
    gemm_table,
    gemm_tile_cycles,
    grid,
    row_tiles,
    step_s,
    tile_profiles,
    write_profiles,
)
from scheduler.simulation.device import PROFILES, read_device
from scheduler.simulation.roofline import ACCELERATORS, MODELS

NPU = Npu()
LLAMA = MODELS["llama-3-8b"]
HEADS = Heads(32, 8)
PEAK_BANDWIDTH = ACCELERATORS["ascend-910b"].bandwidth


def test_the_packages_profiles_are_what_the_tile_model_writes(tmp_path: Path) -> None:
    write_profiles(tmp_path)

    written = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    kept = {path.name: json.loads(path.read_text()) for path in PROFILES.glob("*-tiles-*.json")}
    assert written.keys() == kept.keys()
    for name, state in kept.items():
        # Machines differ in the last digits of least squares, and may round to other ones.
        weights = written[name]["cost_model"].pop("weights")
        assert weights == pytest.approx(state["cost_model"].pop("weights"), rel=2e-3)
        assert written[name] == state


def test_every_modelled_profile_is_from_the_roofline_or_the_tile_model() -> None:
    sources = [json.loads(path.read_text()) for path in PROFILES.glob("*.json")]

    assert all(
        state["modelled"] == state["source"].startswith(("Roofline", "Tile model"))
        and state["modelled"] == state["source"].endswith("Not measured.")
        for state in sources
    )


def test_a_tile_of_a_product_by_hand() -> None:
    # 128 x 128 sums over 256 inputs in 4 steps. A step loads 256 rows of 64 numbers, 32768 bytes at
    # 110 a cycle; it multiplies 8 x 8 x 4 fractals in 256 cycles, which is less.
    load = 32768 / 110
    cycles = gemm_tile_cycles(NPU, GemmTile(128, 128), 128, 128, 256)
    assert cycles == pytest.approx(500 + load + 4 * load)

    # Virtual rows are multiplied but not loaded: now the fractals take longer.
    load = (20 + 128) * 64 * 2 / 110
    cycles = gemm_tile_cycles(NPU, GemmTile(128, 128), 128, 20, 256)
    assert cycles == pytest.approx(500 + load + 4 * 256)

    # Two tiles of 128 x 256 sums do not fit into L0C, so storing one is not hidden.
    load, store = (128 + 256) * 64 * 2 / 110, 128 * 256 * 2 / 86
    cycles = gemm_tile_cycles(NPU, GemmTile(128, 256), 128, 128, 256)
    assert cycles == pytest.approx(500 + load + 4 * 512 + store)


def test_a_tile_of_attention_by_hand() -> None:
    kernel = AttentionKernel(block_keys=128, score_passes=6, rescales=True, overlaps_tiles=False)
    cube = 2 * 1 * 8 * 8
    read = (2 * 128 * 128 * 2 + 16 * 128 * 2) / 110
    write = (16 * 128 + 16 * 128) * 4 / 86
    vector_read = (16 * 128 + 16 * 128) * 4 / (2 * 58.6)
    vector = 30 + 2 * (6 * 16 * 128 + 2 * 16 * 128) / 128
    vector_write = 16 * 128 * 2 / (2 * 109.4)
    first = cube + read + write + vector_read + vector + vector_write

    # 16 rows see 300 keys, so 3 pages; reading keys and values takes longest.
    cycles = attention_tile_cycles(NPU, kernel, 16, 300, 128)
    assert cycles == pytest.approx(500 + first + 2 * read)


def test_a_tile_more_than_there_are_cores_takes_another_round() -> None:
    def rounds(num_tiles: int) -> float:
        seconds = NPU.kernel_s(np.full(num_tiles, 1000.0), 0) - NPU.launch_s
        return seconds * NPU.clock_hz / 1000

    assert [rounds(n) for n in (1, 24, 25, 48, 49)] == pytest.approx([1, 1, 2, 2, 3])


def test_reading_memory_bounds_a_kernel_of_short_tiles() -> None:
    seconds = NPU.kernel_s(np.ones(24), 1.42e9)

    assert seconds == pytest.approx(1e-3 + NPU.launch_s, rel=0.01)


def test_dealing_back_evens_out_what_was_sorted() -> None:
    tiles = np.array([1000.0 * n for n in range(48, 0, -1)])

    assert NPU.kernel_s(tiles, 0, deals_back=True) < NPU.kernel_s(tiles, 0)


def test_row_tiles_cover_the_rows_with_the_lowest_last_one() -> None:
    assert row_tiles(128, 128) == [(128, 128)]
    assert row_tiles(129, 128) == [(128, 128), (16, 1)]
    assert row_tiles(300, 128) == [(128, 128), (128, 128), (64, 44)]
    assert row_tiles(0, 128) == []


def test_all_row_tiles_of_a_few_blocks_of_features_go_before_the_next() -> None:
    assert gemm_table([1, 2], 10).tolist() == [1] * 8 + [2] * 8 + [1] * 2 + [2] * 2


def test_one_row_more_than_fits_costs_a_tile() -> None:
    fits, over = gemm_s(NPU, 2048, 28672, 4096), gemm_s(NPU, 2049, 28672, 4096)
    assert over > fits * 1.001

    heads = Heads(1, 1)
    fits, over = (attention_s(NPU, OURS, heads, [Span(n, 2000)] * 24) for n in (128, 129))
    assert over > fits * 1.15
    assert fits == pytest.approx(attention_s(NPU, OURS, heads, [Span(65, 2000)] * 24), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 17, 128, 417, 1000, 4096])
@pytest.mark.parametrize("layer", [(6144, 4096), (28672, 4096), (4096, 14336)])
def test_no_product_is_faster_than_the_roofline(rows: int, layer: tuple[int, int]) -> None:
    seconds = gemm_s(NPU, rows, *layer)

    assert seconds > 2 * rows * layer[0] * layer[1] / NPU.flops
    assert seconds > 2 * layer[0] * layer[1] / PEAK_BANDWIDTH


def test_no_step_is_faster_than_the_roofline() -> None:
    # All tokens of a span read its keys and values together.
    for spans, num_logits in grid():
        shape = StepShape(query_tile=1 << 20)
        for span in spans:
            shape.add(span.num_tokens, span.seq_len, num_logits // len(spans))
        seconds = step_s(NPU, LLAMA, spans, num_logits)
        assert seconds > LLAMA.work.flops(shape) / NPU.flops
        assert seconds > LLAMA.work.memory_bytes(shape) / PEAK_BANDWIDTH


def test_steps_take_longer_with_more_tokens_and_longer_contexts() -> None:
    by_tokens = [
        step_s(NPU, LLAMA, [Span(n, n + 2000)], 1) for n in (1, 15, 16, 17, 500, 501, 5000)
    ]
    by_context = [step_s(NPU, LLAMA, [Span(1, n)] * 4, 4) for n in (1, 127, 128, 129, 2049, 9000)]
    by_batch = [step_s(NPU, LLAMA, [Span(1, 900)] * n, n) for n in (1, 2, 16, 17, 64, 200)]

    for seconds in (by_tokens, by_context, by_batch):
        assert all(less <= more for less, more in itertools.pairwise(seconds))


def test_a_large_product_comes_near_the_peak() -> None:
    # 328 TFLOP/s were measured on 910B (gameofdimension/limulidae); the model lacks what keeps
    # real kernels below their bounds.
    flops = 2 * 8192**3 / gemm_s(NPU, 8192, 8192, 8192)

    assert 328e12 <= flops < NPU.flops


def test_the_profile_predicts_the_steps_that_it_was_fitted_to() -> None:
    profile = read_device("ascend-910b-tiles-llama-3-8b")
    for spans, num_logits in grid():
        shape = profile.cost_model.shape()
        for span in spans:
            shape.add(span.num_tokens, span.seq_len, num_logits // len(spans))
        seconds = step_s(NPU, LLAMA, spans, num_logits)
        assert profile.cost_model.predict(shape) == pytest.approx(seconds, rel=0.12)


def test_the_profiles_hold_as_many_tokens_as_the_rooflines() -> None:
    for profile in tile_profiles():
        roofline = read_device(profile.name.replace("-tiles", ""))
        assert profile.num_kv_tokens == pytest.approx(roofline.num_kv_tokens, rel=1e-3)
        assert profile.limits.kv_block_size == 128
