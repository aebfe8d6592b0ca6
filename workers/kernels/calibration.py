"""Measures the costs of row tiles on this machine."""

import ctypes
import statistics
import time
from collections.abc import Callable

import numpy as np

from workers.kernels import native
from workers.kernels.gemm import Epilogue, Weight, plan_struct
from workers.kernels.tile_table import SHAPE, Inputs, TileTable, max_height
from workers.kernels.tiles import GemmPlan, TileCosts

ROWS = 48
"""Approximate rows of each product: several tiles share a panel, as in a real step."""

MIN_ROUNDS, MAX_ROUNDS = 30, 200
"""Bounds of the rounds, each of which times every height once: fewer would make the quartiles
noisy, and more would not change them."""

BUDGET_S = 3.0
"""Time for all rounds of one kind of inputs: `xyserve calibrate` is meant to take seconds."""

Progress = Callable[[float], None]
"""Called with the fraction done, 0 to 1."""


FORMAT_OF = {Inputs.FLOAT32: "bf16", Inputs.BF16: "bf16_pairs", Inputs.INT8: "int8_quads"}
"""Format of the weights that stand for all with such inputs."""


def measure(progress: Progress = lambda share: None) -> TileTable:
    """Time tiles of each height in turn, on one thread, in `tile_table.UNIT`; takes seconds.

    The result is the lower quartile: on a busy machine more than half of the times may be too long.
    """
    num_threads = native.num_threads()
    native.set_num_threads(1)
    found: dict[Inputs, TileCosts] = {}
    try:
        for inputs in Inputs:
            times_s = _interleaved(
                _products(inputs), lambda share: progress((len(found) + share) / len(Inputs))
            )
            quartiles = (1e9 * statistics.quantiles(times)[0] for times in times_s)
            found[inputs] = TileCosts(tuple(quartiles))
    finally:
        native.set_num_threads(num_threads)
    return found


def _products(inputs: Inputs) -> list[Callable[[], float]]:
    """Per height, a product that uses only such tiles and returns the seconds of one."""
    random = np.random.default_rng(0)
    n, k = SHAPE
    values = random.standard_normal((n, k), dtype=np.float32)
    rounded = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    weight = Weight.pack(rounded, FORMAT_OF[inputs])
    num_panels: int = weight.num_panels
    linear = native.kernels().linear

    def product(height: int) -> Callable[[], float]:
        num_tiles = max(2, round(ROWS / height))
        x = random.standard_normal((num_tiles * height, k), dtype=np.float32)
        out = np.empty((num_tiles * height, n), np.float32)
        plan = GemmPlan(
            num_rows=len(x),
            heights=np.full(num_tiles, height, np.int32),
            row_block=num_tiles,
            panel_block=num_panels,
        )

        def tile_s() -> float:
            weight_struct, plan_of_call = ctypes.byref(weight.struct), plan_struct(plan)
            began_s = time.thread_time()  # excludes the time of other processes
            linear(
                weight_struct, ctypes.byref(plan_of_call), x.ctypes.data, k,
                None, Epilogue.STORE, out.ctypes.data, n,
            )  # fmt: skip
            took_s = time.thread_time() - began_s
            return took_s / (num_tiles * num_panels)

        return tile_s

    return [product(height) for height in range(1, max_height(inputs) + 1)]


def _interleaved(products: list[Callable[[], float]], progress: Progress) -> list[list[float]]:
    """Time the products in turn, so that anything that slows the machine down slows all of them."""
    times_s: list[list[float]] = [[product()] for product in products]  # touches the memory
    # A random order, so that periodic disturbances do not always hit the same height.
    turns = np.random.default_rng(0)
    began_s = time.perf_counter()
    for done in range(1, MAX_ROUNDS + 1):
        for index in turns.permutation(len(products)):
            times_s[index].append(products[index]())
        spent = (time.perf_counter() - began_s) / BUDGET_S
        progress(max(done / MAX_ROUNDS, min(done / MIN_ROUNDS, spent, 1.0)))
        if done >= MIN_ROUNDS and spent >= 1:
            break
    progress(1.0)
    return times_s
