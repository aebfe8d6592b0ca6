import math
from collections.abc import Callable

import pytest
import torch

from workers.kernels.tile_table import Inputs
from workers.profiling import vllm_peaks
from workers.profiling.vllm_peaks import measure_peaks
from workers.reports import Peaks

CPU = torch.device("cpu")


@pytest.mark.parametrize("inputs", [None, *Inputs])
def test_a_device_computes_and_reads(inputs: Inputs | None) -> None:
    peaks = measure_peaks(CPU, torch.float32, inputs)

    assert 0 < peaks.flops_per_s < math.inf
    assert 0 < peaks.bytes_per_s < math.inf


def test_the_faster_product_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 0.5, 2.0])

    def best_s(call: Callable[[], object], device: torch.device) -> float:
        call()
        return next(seconds)

    monkeypatch.setattr(vllm_peaks, "_best_s", best_s)

    # Torch's product of 1024 rows in 4 s, ours of 480 in half a second; 256 MiB in 2 s.
    assert measure_peaks(CPU, torch.float32, Inputs.FLOAT32) == Peaks(
        2 * 480 * 1024**2 / 0.5, 2**28 / 2
    )


def test_the_fastest_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    takes_s = iter([9.0, 3.0, 2.0, 1.0, 2.0, 3.0])

    def call() -> None:
        nonlocal clock
        clock += next(takes_s)

    monkeypatch.setattr("time.perf_counter", lambda: clock)

    assert vllm_peaks._best_s(call, CPU) == 1.0
