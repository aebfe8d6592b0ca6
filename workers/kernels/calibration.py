"""What was measured on this machine: the table that row tiles are chosen from."""

import ctypes
import functools
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from workers.kernels import native
from workers.kernels.tiles import GemmPlan, TileCosts, default_costs, parse_costs

logger = logging.getLogger(__name__)

SHAPE = (512, 768)
"""N and K of the weight that is measured on: in bf16 it stays in the caches."""

ROWS = 48
"""About so many rows of each product: several tiles share a panel, as in a step."""

MIN_ROUNDS, MAX_ROUNDS = 30, 200
"""Each height once a round; as many rounds as fit the time, within these."""

BUDGET_S = 4.0

UNIT = f"ns of one row tile on one panel of {SHAPE[1]} input features"

Progress = Callable[[float], None]
"""Told the share that is done, 0 to 1."""


def path() -> Path:
    """Where this machine's figures lie: a file for each CPU and instruction set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "-".join([*cpu().split(), native.isa()]).replace("/", "-")
    return cache / "xyserve" / "calibration" / f"{name}.json"


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def tile_costs() -> TileCosts:
    """The measured costs of row tiles, or the built-in ones where none were measured."""
    return _in_use(native.isa())[0]


def is_measured() -> bool:
    """Whether `tile_costs` were measured on this machine."""
    return _in_use(native.isa())[1]


@functools.cache
def _in_use(isa: str) -> tuple[TileCosts, bool]:
    """The costs, and whether they are what `save` wrote: the log says why a file is left out."""
    file = path()
    try:
        return _parse(json.loads(file.read_text())), True
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning(
            "measured row tiles are not used but built-in ones; to measure anew: xyserve calibrate",
            extra={"file": str(file), "error": str(error)},
        )
    return default_costs(native.kernels().max_height), False


def _parse(document: object) -> TileCosts:
    """The costs in a file; ValueError says why they are not for this machine's tiles."""
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    for key, own in (("cpu", cpu()), ("isa", native.isa())):
        if document.get(key) != own:
            raise ValueError(f"its {key} is {document.get(key)!r}, this machine's is {own!r}")
    height = native.kernels().max_height
    try:
        costs = parse_costs(document, height)
    except (TypeError, ValueError):
        costs = None
    if costs is None or not all(cost > 0 and math.isfinite(cost) for cost in costs.of_height):
        raise ValueError(f"its tile_costs are not {height} positive numbers")
    return costs


def save(costs: TileCosts) -> None:
    """Keep the costs for this and later processes on this machine."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "tile_costs": [round(cost, 2) for cost in costs.of_height],
        "unit": UNIT,
        "cpu": cpu(),
        "isa": native.isa(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    # Renamed when it is whole: a worker that starts meanwhile reads the old file or the new one.
    whole = file.with_name(f"{file.name}.{os.getpid()}")
    whole.write_text(json.dumps(document, indent=1) + "\n")
    whole.replace(file)
    _in_use.cache_clear()


def measure(progress: Progress = lambda share: None) -> TileCosts:
    """Time tiles of each height in turn, on one thread, in `UNIT`; takes seconds.

    Lower quartiles: on a busy machine more than half of the times may be too long.
    """
    num_threads = native.num_threads()
    native.set_num_threads(1)
    try:
        times_s = _interleaved(_products(), progress)
    finally:
        native.set_num_threads(num_threads)
    return TileCosts(tuple(1e9 * statistics.quantiles(times)[0] for times in times_s))


def _products() -> list[Callable[[], float]]:
    """For each height, what multiplies with such tiles only and gives the seconds of one."""
    from workers.kernels.gemm import Epilogue, Weight, plan_struct  # it imports this module

    random = np.random.default_rng(0)
    n, k = SHAPE
    values = random.standard_normal((n, k), dtype=np.float32)
    weight = Weight.pack((values.view(np.uint32) & 0xFFFF0000).view(np.float32), "bf16")
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
            began_s = time.thread_time()  # not counting what other processes take
            linear(
                weight_struct, ctypes.byref(plan_of_call), x.ctypes.data, k,
                None, Epilogue.STORE, out.ctypes.data, n,
            )  # fmt: skip
            took_s = time.thread_time() - began_s
            return took_s / (num_tiles * num_panels)

        return tile_s

    return [product(height) for height in range(1, native.kernels().max_height + 1)]


def _interleaved(products: list[Callable[[], float]], progress: Progress) -> list[list[float]]:
    """Let them take turns, so that whatever else slows the machine down slows all of them."""
    times_s: list[list[float]] = [[product()] for product in products]  # touches its memory
    # In an order that keeps no step with what comes at intervals.
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
