from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.kernels import guarded
from workers.kernels import gemm, native, reference
from workers.kernels.gemm import Format, Weight, linear
from workers.kernels.tile_table import tile_costs
from workers.kernels.tiles import TileCosts

pytestmark = pytest.mark.usefixtures("isa", "one_thread")

Array = npt.NDArray[np.float32]

FORMATS = ["bf16", "fp32", "int8", "int4", "bf16_pairs", "int8_quads", "int4_quads"]

ROWS = [*range(1, 21), 31, 32, 33, 1025]
"""Past the tallest tile, about the next powers of two, and a long prompt."""

SIZES = [(1, 1), (1, 17), (7, 1), (17, 7), (31, 33), (64, 96), (100, 577), (577, 100)]
"""N and K: what divides nothing, and what fills panels and groups."""

MULTIPLY_BESIDE_GUARDS = """
import numpy as np
from tests.workers.kernels.guarded import guarded
from workers.kernels import native
from workers.kernels.gemm import Weight, linear

def ones(*shape, at_end):
    return guarded(np.ones(shape, np.float32), at_end)

native.use_isa("{isa}")
for format in ("bf16", "fp32", "int8", "int4", "bf16_pairs", "int8_quads", "int4_quads"):
    for n, k, gate_up in ((1, 1, False), (17, 7, False), (34, 100, True), (33, 257, False)):
        for at_end in (False, True):
            weight = Weight.pack(ones(n, k, at_end=at_end), format, gate_up=gate_up)
            bias = ones(n, at_end=at_end)
            for m in (*range(1, 14), 31, 130):
                out = ones(m, n // 2 if gate_up else n, at_end=at_end)
                linear(ones(m, k, at_end=at_end), weight, bias, out)
print("untouched")
"""

MULTIPLY_IN_FORKED_CHILDREN = """
import os, signal, threading
import numpy as np
from workers.kernels import native
from workers.kernels.gemm import Weight, linear

weight, x = Weight.pack(np.ones((3000, 100), np.float32)), np.ones((50, 100), np.float32)
native.set_num_threads(3)
stop = threading.Event()

def multiply():
    while not stop.is_set():
        linear(x, weight)

thread = threading.Thread(target=multiply)
thread.start()
endings = []
for num_threads in (3, 1, 2, 4) * 10:
    if (child := os.fork()) == 0:
        signal.alarm(20)
        native.set_num_threads(num_threads)
        os._exit(0 if all((linear(x, weight) == 100).all() for _ in range(3)) else 1)
    endings.append(os.waitpid(child, 0)[1])
    if endings[-1]:
        break
stop.set()
thread.join()
print(endings)
"""


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def packed(n: int, k: int, format: str = "fp32", *, gate_up: bool = False) -> Weight:
    rows = random(n, k, seed=7)
    rows = reference.round_to_bf16(rows) if format.startswith("bf16") else rows
    return Weight.pack(rows, format, gate_up=gate_up)


def between_nans(values: Array) -> Array:
    """The same rows, with NaN before, after and next to them in memory."""
    m, k = values.shape
    buffer = np.full((m + 40, k + 40), np.nan, np.float32)
    buffer[20 : 20 + m, 20 : 20 + k] = values
    return buffer[20 : 20 + m, 20 : 20 + k]


def bits(values: Array) -> bytes:
    return values.tobytes()


def error_of_sums(x: Array, w: Array, bias: Array | None = None) -> npt.NDArray[np.float64]:
    """The error that float32 sums of this length may have: a random walk, and some room."""
    size: npt.NDArray[np.float64] = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
    if bias is not None:
        size += np.abs(bias)
    size *= (4 + np.sqrt(x.shape[1])) * 2.0**-24
    return size


def inputs(x: Array, weight: Weight) -> Array:
    """What a product makes of its inputs."""
    if weight.format.endswith("_quads"):
        return reference.round_to_int8(x)
    return reference.round_to_bf16(x) if weight.format == "bf16_pairs" else x


def assert_is_product(x: Array, weight: Weight, bias: Array | None = None) -> None:
    w, seen = weight.unpacked(), inputs(x, weight)
    error = np.abs(linear(x, weight, bias) - reference.linear(seen, w, bias))

    assert (error <= error_of_sums(x, w, bias)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", ROWS)
def test_any_number_of_rows_is_multiplied(m: int, format: str) -> None:
    assert_is_product(random(m, 100), packed(37, 100, format))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_weight_of_any_size_is_multiplied(n: int, k: int, format: str) -> None:
    for m in (1, 2, 5, 33):
        assert_is_product(random(m, k), packed(n, k, format), bias=random(n, seed=2))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [255, 256, 257, 383, 384, 385, 513, 768, 769, 1030])
def test_sums_of_several_chunks_are_whole(k: int, format: str) -> None:
    for m in (1, 9):
        assert_is_product(random(m, k), packed(5, k, format))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads_multiplies(num_threads: int, format: str) -> None:
    native.set_num_threads(num_threads)

    assert_is_product(random(130, 65), packed(300, 65, format))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("width", "k"), [(1, 1), (8, 32), (17, 100), (33, 300)])
def test_gate_and_up_give_the_gated_product(width: int, k: int, format: str) -> None:
    weight = packed(2 * width, k, format, gate_up=True)
    for m, bias in ((1, None), (7, random(2 * width, seed=2)), (33, None)):
        x, w = inputs(random(m, k), weight), weight.unpacked()
        error = np.abs(linear(x, weight, bias) - reference.gated_linear(x, w, bias))
        gate, up = np.split(np.abs(reference.linear(x, w, bias)), 2, axis=1)
        # Both factors are off by the rounding of their sums; silu is steeper than 1 nowhere but
        # near 2.4, where it is 1.1, and its own rounding is a few units in the last place.
        of_gate, of_up = np.split(error_of_sums(x, w, bias), 2, axis=1)

        assert (error <= 1.1 * of_gate * (up + of_up) + gate * of_up + gate * up * 1e-6).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("width", "k"), [(1, 1), (17, 100), (64, 700)])
def test_gate_and_up_may_be_multiplied_apart(width: int, k: int, format: str) -> None:
    """As layers that run one by one do."""
    rows, bias = random(2 * width, k, seed=7), random(2 * width, seed=2)
    rows = reference.round_to_bf16(rows) if format.startswith("bf16") else rows
    together, plain = (Weight.pack(rows, format, gate_up=gate_up) for gate_up in (True, False))
    for m in (1, 7, 33):
        x, out = random(m, k), np.full((m, 2 * width), np.nan, np.float32)
        gemm.run(together, m, x.ctypes.data, k, bias.ctypes.data, out.ctypes.data, 2 * width)

        assert bits(out) == bits(linear(x, plain, bias))


def test_silu_of_a_far_gate_is_zero_or_the_gate() -> None:
    weight = Weight.pack(np.array([[1], [1]], np.float32), gate_up=True)
    x = np.array([[-1e4], [-200], [-90], [0], [90], [200], [1e4]], np.float32)

    expected = np.array([[0], [0], [0], [0], [90.0**2], [200.0**2], [1e8]])
    assert np.allclose(linear(x, weight), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 13, 33])
def test_nothing_beside_the_rows_is_read_or_written(m: int, gate_up: bool, format: str) -> None:
    weight, x = packed(34, 37, format, gate_up=gate_up), random(m, 37)
    expected = linear(x, weight)
    out = between_nans(np.zeros_like(expected))
    linear(between_nans(x), weight, out=out)

    assert bits(out) == bits(expected)
    out[:] = np.nan
    assert out.base is not None
    assert np.isnan(out.base).all()


def test_rows_may_lie_apart_backwards_or_on_one_another() -> None:
    weight, x = packed(34, 37), random(12, 37)
    out = np.zeros((24, 34), np.float32)
    for rows in (x[::2], x[::-1], np.broadcast_to(x[3], x.shape)):
        linear(rows, weight, out=out[: 2 * len(rows) : 2])

        assert bits(out[: 2 * len(rows) : 2]) == bits(linear(rows.copy(), weight))
    assert not out[1::2].any()


def test_no_page_beside_an_array_is_touched(isa: str) -> None:
    assert guarded.run(MULTIPLY_BESIDE_GUARDS.replace("{isa}", isa)) == "untouched\n"


@pytest.mark.parametrize("m", [1, 9, 130])
def test_the_product_is_added_to_what_is_there(m: int) -> None:
    weight, x, bias = packed(37, 100), random(m, 100), random(37, seed=2)
    before = random(m, 37, seed=3)
    out = between_nans(before)
    linear(x, weight, bias, out, add=True)

    assert bits(out) == bits(before + bias + linear(x, weight))
    out[:] = np.nan
    assert out.base is not None
    assert np.isnan(out.base).all()


def test_no_rows_make_no_rows() -> None:
    assert linear(random(0, 17), packed(7, 17)).shape == (0, 7)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_with_nan_and_infinity_disturbs_no_other(format: str) -> None:
    weight, x = packed(37, 100, format), random(14, 100)
    expected = linear(x, weight)
    x[5, 3], x[9, 99] = np.nan, np.inf
    found = linear(x, weight)

    clean = np.delete(np.arange(14), [5, 9])
    assert bits(found[clean]) == bits(expected[clean])
    assert np.isnan(found[5]).all()
    assert not np.isfinite(found[9]).any()


# ---- Bits ----


@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_in_any_batch(format: str, gate_up: bool) -> None:
    # Wide enough for tiles of one row to take several panels, deep enough for several chunks.
    weight, x = packed(230, 577, format, gate_up=gate_up), random(70, 577)
    alone = np.concatenate([linear(row[None], weight) for row in x])

    for m in (*range(2, 21), 33, 47, 70):
        for start in {0, 70 - m, (70 - m) // 2}:
            assert bits(linear(x[start : start + m], weight)) == bits(alone[start : start + m])


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_in_a_long_prompt(format: str) -> None:
    weight, x = packed(41, 800, format), random(1025, 800)
    whole = linear(x, weight)

    for row in (0, 1, 119, 120, 121, 500, 1019, 1023, 1024):
        assert bits(linear(x[row : row + 1], weight)) == bits(whole[row])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [1, 6, 13, 130])
def test_threads_change_no_bit(m: int, format: str) -> None:
    weight, x = packed(300, 300, format), random(m, 300)
    by_threads = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        by_threads.append(bits(linear(x, weight)))

    assert by_threads[1:] == by_threads[:1] * 2


def test_calls_of_several_threads_at_once_change_no_bit() -> None:
    native.set_num_threads(2)
    weight = packed(130, 300)
    inputs = [random(m, 300, seed=m) for m in range(1, 41)]
    expected = [bits(linear(x, weight)) for x in inputs]
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda x: bits(linear(x, weight)), inputs * 5))

    assert found == expected * 5


@pytest.mark.parametrize("format", FORMATS)
def test_the_choice_of_tiles_changes_no_bit(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed(70, 300, format), random(29, 300)
    expected = bits(linear(x, weight))
    max_height = tile_costs(Format[format.upper()].inputs).max_height
    for cheap in range(max_height):
        costs = TileCosts(tuple(1e-9 if i == cheap else 1.0 for i in range(max_height)))
        monkeypatch.setattr(gemm, "tile_costs", lambda inputs, costs=costs: costs)
        assert cheap + 1 in weight.plan(29).heights

        assert bits(linear(x, weight)) == expected


@pytest.mark.parametrize(("m", "k"), [(1, 33), (6, 96), (13, 577), (40, 1536)])
def test_sums_of_bf16_pairs_are_those_of_the_instruction_bit_by_bit(m: int, k: int) -> None:
    """On every x86 CPU but AMX's tiles: the odd product of a pair is added first, and each sum
    rounded."""
    if native.isa() in ("amx", "armv86"):
        pytest.skip("other_cpu.cpp has the sums of this one")
    weight, x = packed(50, k, "bf16_pairs"), random(m, k)
    depth = -(-k // 32) * 32
    num_chunks = -(-depth // 640)
    chunk = -(-depth // num_chunks // 32) * 32
    pad = ((0, 0), (0, depth - k))
    rows, columns = (np.pad(a, pad) for a in (reference.round_to_bf16(x), weight.unpacked()))

    whole = np.zeros((m, 50), np.float32)
    for begin in range(0, depth, chunk):
        sums = np.zeros((m, 50), np.float32)
        for pair in range(begin, min(begin + chunk, depth), 2):
            for j in (pair + 1, pair):
                sums += rows[:, j, None] * columns[None, :, j]
        whole += sums

    assert bits(linear(x, weight)) == bits(whole)


@pytest.mark.parametrize("format", ["int8_quads", "int4_quads"])
@pytest.mark.parametrize("isa_name", native.available_isas())
@pytest.mark.parametrize(("m", "k"), [(1, 33), (6, 96), (13, 577), (40, 1536)])
def test_products_of_integers_are_exact_on_every_instruction_set(
    m: int, k: int, isa_name: str, format: str, isa: str
) -> None:
    """A largest input of 127 in each group makes all scales 1."""
    draw = np.random.default_rng(0)
    x = draw.integers(-127, 128, (m, k)).astype(np.float32)
    x[:, ::32] = -127
    w = draw.integers(0, 16, (50, k)).astype(np.float32)
    w[:, ::32], w[:, 31::32], w[:, -1] = 0, 15, 15
    w[:, 5] = 127 if format == "int8_quads" else 3
    if k % 32 == 1:  # the last group is a single input feature
        w[:, -1] = 0 if format == "int4_quads" else 1
    native.use_isa(isa_name)
    try:
        weight = Weight.pack(w, format)

        assert bits(weight.unpacked()) == bits(w)
        assert (linear(x, weight) == x.astype(np.int64) @ w.T.astype(np.int64)).all()
    finally:
        native.use_isa(isa)


@pytest.mark.parametrize("format", ["int8_quads", "int4_quads"])
def test_inputs_of_any_size_are_rounded_to_their_own_scale(format: str) -> None:
    weight, x = packed(37, 96, format), random(9, 96)
    for factor in (1e-20, 1e-3, 1.0, 1e20):
        scaled = x * np.float32(factor)

        assert_is_product(scaled, weight)
    x[3, 32:64] = 0
    assert_is_product(x, weight)
    assert not linear(np.zeros((2, 96), np.float32), weight).any()


def test_a_child_forked_during_a_product_can_multiply() -> None:
    assert guarded.run(MULTIPLY_IN_FORKED_CHILDREN) == f"{[0] * 40}\n"


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    m=st.integers(1, 40),
    format=st.sampled_from(FORMATS),
    rows=st.data(),
)
def test_any_rows_of_a_batch_have_their_own_bits(
    n: int, k: int, m: int, format: str, rows: st.DataObject
) -> None:
    weight, x = packed(n, k, format), random(m, k)
    chosen = rows.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=20))

    assert bits(linear(x[chosen], weight)) == bits(linear(x, weight)[chosen])


# ---- Packing ----


@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (34, 7), (100, 577)])
@pytest.mark.parametrize("format", ["fp32", "bf16", "bf16_pairs"])
def test_unquantised_weights_stand_for_themselves(
    format: str, n: int, k: int, gate_up: bool
) -> None:
    rows = reference.round_to_bf16(random(n, k))
    weight = Weight.pack(rows, format, gate_up=gate_up)

    assert bits(weight.unpacked()) == bits(rows)
    assert (weight.n, weight.k, weight.format) == (n, k, format)


@pytest.mark.parametrize(
    ("lowest_bits", "format"), [(0, "bf16"), (1, "fp32"), (0x8000, "fp32"), (0xFFFF, "fp32")]
)
def test_auto_is_bf16_only_if_no_weight_is_rounded(lowest_bits: int, format: str) -> None:
    rows = reference.round_to_bf16(random(17, 33))
    rows.view(np.uint32)[16, 32] |= lowest_bits
    weight = Weight.pack(rows)

    assert weight.format == format
    assert bits(weight.unpacked()) == bits(rows)


def test_extreme_weights_are_packed_without_loss() -> None:
    rows = np.array([[0.0, -0.0, 2.0**-133, -(2.0**-126), 3.3895314e38, -3.3895314e38]], np.float32)

    assert bits(Weight.pack(rows, "bf16").unpacked()) == bits(rows)
    assert bits(Weight.pack(rows, "fp32").unpacked()) == bits(rows)


@pytest.mark.parametrize("format", ["int8", "int8_quads"])
def test_int8_weights_are_off_by_half_a_step_at_most(format: str) -> None:
    rows = random(37, 100) * np.logspace(-3, 3, 37, dtype=np.float32)[:, None]
    rows[5] = 0
    step = np.abs(rows).max(axis=1, keepdims=True) / 127

    assert (np.abs(Weight.pack(rows, format).unpacked() - rows) <= step * 0.50001).all()


@pytest.mark.parametrize("k", [32, 100, 64, 1, 33])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("format", ["int4", "int4_quads"])
def test_int4_weights_are_off_by_about_half_a_step_of_their_group(
    format: str, k: int, offset: int
) -> None:
    rows = random(37, k) + offset
    found = Weight.pack(rows, format).unpacked()
    for start in range(0, k, 32):
        group = rows[:, start : start + 32]
        low, high = group.min(axis=1, keepdims=True), group.max(axis=1, keepdims=True)
        # The scale and the minimum are bf16: of 8 significant bits.
        allowed = (high - low) / 15 / 2 * 1.01 + (np.abs(low) + high - low) * 2.0**-8

        assert (np.abs(found[:, start : start + 32] - group) <= allowed).all()


def test_a_weight_that_its_format_holds_exactly_is_not_changed() -> None:
    quanta = np.random.default_rng(0).integers(0, 16, (17, 100))
    quanta[:, ::32], quanta[:, 1::32], quanta[:, 99] = 0, 15, 15
    int4 = (quanta * 0.5 - 2).astype(np.float32)
    int8 = (quanta - 7).astype(np.float32)
    int8[:, 3] = 127

    for suffix in ("", "_quads"):
        assert bits(Weight.pack(int4, f"int4{suffix}").unpacked()) == bits(int4)
        assert bits(Weight.pack(int8, f"int8{suffix}").unpacked()) == bits(int8)


@pytest.mark.parametrize("format", FORMATS)
def test_huge_weights_stay_finite(format: str) -> None:
    rows = reference.round_to_bf16(np.array([[1e38, -1e38, 1.0]], np.float32))

    assert np.isfinite(Weight.pack(rows, format).unpacked()).all()


def test_packed_weights_take_the_bytes_of_their_format() -> None:
    rows = reference.round_to_bf16(random(256, 512))
    sizes = {format: Weight.pack(rows, format).nbytes * 8 / rows.size for format in FORMATS}

    # int8 adds one float for each of 256 rows, int4 two bf16 for each 32 weights.
    int8, int4 = 8 + 32 / 512, 4 + 32 / 32
    assert sizes == {"fp32": 32, "bf16": 16, "int8": int8, "int4": int4} | {
        "bf16_pairs": 16, "int8_quads": int8, "int4_quads": int4,
    }  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_cut_out_of_a_wider_one_is_packed_as_it_is_seen(format: str) -> None:
    rows = reference.round_to_bf16(random(17, 33))
    expected = Weight.pack(rows, format).unpacked()

    assert bits(Weight.pack(between_nans(rows), format).unpacked()) == bits(expected)


@pytest.mark.parametrize("format", FORMATS)
def test_threads_change_no_packed_bit(format: str) -> None:
    expected = packed(130, 100, format).unpacked()
    native.set_num_threads(2)

    assert bits(packed(130, 100, format).unpacked()) == bits(expected)


# ---- Refusals ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", ["auto", *FORMATS])
def test_weights_that_are_not_finite_are_refused(format: str, value: float) -> None:
    rows = reference.round_to_bf16(random(17, 7))
    rows[3, 5] = value
    with pytest.raises(ValueError, match=rf"weight\[3, 5\] is {value}; the checkpoint is damaged"):
        Weight.pack(rows, format)


def test_weights_that_bf16_would_round_are_refused_as_bf16() -> None:
    with pytest.raises(ValueError, match="bf16 would round; pack it as fp32 or auto"):
        Weight.pack(random(17, 7), "bf16")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (np.zeros((2, 3)), "weight is float64; it must be float32"),
        (np.zeros(3, np.float32), r"weight has shape \(3,\); it must have 2 dimensions"),
        (np.zeros((3, 2), np.float32).T, "weight has strides .* must be contiguous"),
    ],
    ids=["float64", "one dimension", "transposed"],
)
def test_a_weight_that_is_no_float32_matrix_is_refused(rows: Array, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Weight.pack(rows)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format \('fp8'\) must be one of auto, fp32, bf16"):
        Weight.pack(np.zeros((2, 3), np.float32), "fp8")


def test_an_odd_number_of_gate_and_up_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="weight has 3 rows; gate and up together need"):
        Weight.pack(np.zeros((3, 2), np.float32), gate_up=True)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_weight_without_elements_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="weight has shape"):
        Weight.pack(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": random(2, 8)}, r"x has shape \(2, 8\); its last dimension must be 7"),
        ({"x": random(7)}, r"x has shape \(7,\); it must have 2 dimensions"),
        ({"x": random(2, 7).astype(np.float64)}, "x is float64; it must be float32"),
        ({"x": random(7, 2).T}, "x has strides .* must be contiguous"),
        ({"bias": random(16)}, r"bias has shape \(16,\); its last dimension must be 17"),
        ({"bias": random(1, 17)}, r"bias has shape \(1, 17\); it must have 1 dimensions"),
        ({"bias": random(34)[::2]}, "bias has strides .* must be contiguous"),
        ({"bias": random(17).astype(np.float16)}, "bias is float16; it must be float32"),
        ({"out": random(3, 17)}, "out has 3 rows, x has 2"),
        ({"out": random(2, 16)}, r"out has shape \(2, 16\); its last dimension must be 17"),
        ({"out": random(17, 2).T}, "out has strides .* must be contiguous"),
        ({"out": random(2, 17).astype(np.float64)}, "out is float64; it must be float32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        linear(weight=packed(17, 7), **{"x": random(2, 7), **arrays})


def test_an_output_that_may_not_be_written_is_refused() -> None:
    out = np.zeros((2, 17), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out"):
        linear(random(2, 7), packed(17, 7), out=out)
    assert not out.any()


def test_adding_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="add needs an `out`"):
        linear(random(2, 7), packed(17, 7), add=True)


def test_adding_a_gated_product_is_refused() -> None:
    with pytest.raises(ValueError, match="add does not work with a gate_up weight"):
        linear(
            random(2, 7), packed(34, 7, gate_up=True), out=np.zeros((2, 17), np.float32), add=True
        )


def test_a_number_of_threads_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_threads \(0\) must be at least 1"):
        native.set_num_threads(0)


def test_an_unknown_instruction_set_is_refused(isa: str) -> None:
    with pytest.raises(ValueError, match=rf"isa \('mmx'\) must be one of {native.isa()}|portable"):
        native.use_isa("mmx")
    assert native.isa() == isa
