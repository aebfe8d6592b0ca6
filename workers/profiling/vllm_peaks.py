"""Measures how fast a device computes and reads memory."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from workers.kernels.tile_table import Inputs
from workers.reports import Peaks

BUDGET_S = 0.15
"""Time for each product and for the reading: all together are to take less than a second."""
MIN_CALLS = 5
"""Calls of which the fastest counts, even if the budget is over."""

CPU_SIZE, ACCELERATOR_SIZE = 1024, 8192
"""Rows and columns of the matrices to multiply: large enough for full speed, small enough for
several calls in the budget."""
CPU_BYTES, ACCELERATOR_BYTES = 256 << 20, 512 << 20
"""Memory to read: much more than all caches hold."""
GEMM_ROWS = 480
"""Rows to multiply by our GEMM: four full blocks of rows."""


def measure_peaks(device: torch.device, dtype: torch.dtype, inputs: Inputs | None) -> Peaks:
    """Measure the device with this process's threads; takes about a second.

    Arithmetic is measured on a large product in `dtype`, by torch or, if our CPU kernels are in use
    and take such `inputs`, by our GEMM if that is faster; memory, on a sum over more than the
    caches hold. The fastest call counts: other load on the machine can only slow a call down.
    """
    products = [_torch_flops_per_s(device, dtype)]
    if inputs is not None:
        products.append(_gemm_flops_per_s(inputs))
    return Peaks(max(products), _bytes_per_s(device))


def _torch_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    size = CPU_SIZE if device.type == "cpu" else ACCELERATOR_SIZE
    left = torch.ones(size, size, dtype=dtype, device=device)
    right, out = torch.ones_like(left), torch.empty_like(left)
    return 2 * size**3 / _best_s(partial(torch.mm, left, right, out=out), device)


def _gemm_flops_per_s(inputs: Inputs) -> float:
    """Speed of our GEMM with the weights that suit the inputs best."""
    from workers.kernels import gemm  # other devices do not need our library

    best = {Inputs.FLOAT32: "fp32", Inputs.BF16: "bf16", Inputs.INT8: "int8"}[inputs]
    ones = np.ones((CPU_SIZE, CPU_SIZE), np.float32)
    weight = gemm.Weight.pack(ones, best, inputs=inputs)
    rows = np.ones((GEMM_ROWS, CPU_SIZE), np.float32)
    out = np.empty_like(rows)
    best_s = _best_s(partial(gemm.linear, rows, weight, out=out), torch.device("cpu"))
    return 2 * GEMM_ROWS * CPU_SIZE**2 / best_s


def _bytes_per_s(device: torch.device) -> float:
    num_bytes = CPU_BYTES if device.type == "cpu" else ACCELERATOR_BYTES
    values = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / _best_s(values.sum, device)


def _best_s(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""

    def call_s() -> float:
        began_s = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - began_s

    call_s()  # the first call may include set-up
    times: list[float] = []
    ends_s = time.perf_counter() + BUDGET_S
    while len(times) < MIN_CALLS or time.perf_counter() < ends_s:
        times.append(call_s())
    return min(times)
