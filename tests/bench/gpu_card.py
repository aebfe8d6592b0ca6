"""The card of `tests.bench.gpu`: its limits, and how contestants take turns on it."""

import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import triton

from workers.kernels import triton_attention
from workers.kernels.triton_launch import launching

PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 80GB HBM3": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
}
"""bf16 operations per second and bytes per second, by what is in a card's name (NVIDIA's data
sheets; without sparsity)."""

CELL_S = 0.06
"""Time to measure a cell's contestants."""
MIN_ROUNDS, MAX_ROUNDS = 5, 21

Call = Callable[[], Any]
Row = dict[str, Any]
Cells = Iterator[tuple[str, Callable[[], Iterable[Row]]]]
"""Names of cells, and what measures the rows of each."""
Name = TypeVar("Name", bound=Hashable)


class WrongError(Exception):
    """A result that is not what it must be."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A prepared way to compute what is compared."""

    calls: Sequence[Call]
    """The same on different data."""
    rows: Callable[[Any], torch.Tensor] = lambda out: out
    """What the first call returned, as all contestants return it."""


@dataclass(frozen=True, slots=True)
class Card:
    """The GPU, or the CPU that interprets the kernels instead."""

    name: str
    device: torch.device
    dtype: torch.dtype
    tolerance: float
    """Largest error, relative to a value and its row's root mean square. bf16 rounds to 4e-3."""
    num_cores: int
    """Streaming multiprocessors."""
    cache_bytes: int
    """Size of the second-level cache."""
    flops: float | None
    bytes_s: float | None

    @classmethod
    def find(cls) -> "Card":
        """The first GPU."""
        found = torch.cuda.get_device_properties(0)
        peaks = next((peaks for name, peaks in PEAKS.items() if name in found.name), (None, None))
        sizes = found.multi_processor_count, found.L2_cache_size
        return cls(found.name, torch.device("cuda", 0), torch.bfloat16, 2e-2, *sizes, *peaks)

    @classmethod
    def interpreted(cls) -> "Card":
        """No GPU: Triton's interpreter, with chunks so small that short contexts have several."""
        triton_attention.CHUNK_KEYS = 32
        return cls("interpreter", torch.device("cpu"), torch.float32, 1e-4, 2, 0, None, None)

    @property
    def is_interpreted(self) -> bool:
        """Whether there is no GPU."""
        return self.device.type == "cpu"

    def random(self, *sizes: int) -> torch.Tensor:
        """Values about 1 in size."""
        return torch.randn(sizes, dtype=self.dtype, device=self.device)

    def weight(self, n: int, k: int) -> torch.Tensor:
        """A weight whose products are about as large as what they are made from."""
        return self.random(n, k).mul_(k**-0.5)

    def of_limit(self, flops: float, num_bytes: float, row: Row) -> float | None:
        """The least time that the card needs, over ours in a row."""
        if self.flops is None or self.bytes_s is None:
            return None
        limit_ms = 1000 * max(flops / self.flops, num_bytes / self.bytes_s)
        return limit_ms / float(row["ours ms"])

    def captured(self, calls: Sequence[Call]) -> Call:
        """What replays these calls, as one graph."""
        if self.is_interpreted:
            return lambda: [call() for call in calls]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (*calls, calls[0]):  # compiles, tunes and warms up
                call()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        replay: Call = graph.replay
        return replay

    def in_turns(
        self, contestants: Mapping[Name, Sequence[Call]], lost: dict[Name, str]
    ) -> dict[Name, float]:
        """Median seconds of a call of each contestant; those that no graph can hold are `lost`."""
        if self.is_interpreted:
            return {who: timed_s(calls[0]) for who, calls in contestants.items()}
        replays = {}
        for who, calls in contestants.items():
            try:
                replays[who] = self.captured(calls)
            except Exception as error:  # of any library
                lost[who] = reason(error)
        clear = torch.empty(2 * self.cache_bytes, dtype=torch.int8, device=self.device)
        first_s = sum(_turn_s(replay, clear) for replay in replays.values())
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(CELL_S / max(first_s, 1e-6))))
        order = list(replays)
        times: dict[Name, list[float]] = {who: [] for who in order}
        for _ in range(rounds):
            for who in order:
                times[who].append(_turn_s(replays[who], clear))
            order.append(order.pop(0))
        return {who: statistics.median(own) / len(contestants[who]) for who, own in times.items()}

    def compared(
        self,
        makers: Mapping[str, Callable[[], Contestant]],
        expected: torch.Tensor,
        roundings: int = 1,
    ) -> Row:
        """Our time beside those of the rivals that are right and fit a graph."""
        contestants, lost = {}, dict[str, str]()
        for who, make in makers.items():
            try:
                contestant = make()
                found = contestant.rows(contestant.calls[0]())
                _check(found, expected, roundings * self.tolerance)
                contestants[who] = contestant.calls
            except Exception as error:  # of any library
                lost[who] = reason(error)
        took_s = self.in_turns(contestants, lost)
        if "ours" in lost:
            raise WrongError(lost["ours"])
        ours_s = took_s.pop("ours")
        rival = min(took_s, key=took_s.__getitem__)
        return {
            "ours ms": 1000 * ours_s,
            "rival ms": 1000 * took_s[rival],
            "rival": rival,
            "ratio": took_s[rival] / ours_s,
            "others ms": {who: 1000 * own_s for who, own_s in took_s.items()},
            "lost": lost,
        }

    def compile_ahead(self, calls: Iterable[Call]) -> None:
        """Compile what these calls launch, on all CPU cores at once."""
        if self.is_interpreted:
            return

        def compile_only(kernel: Any, programs: int, args: Any, constants: Any) -> None:
            kernel.warmup(*args, grid=(programs,), **constants)

        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),  # they come again at the launch
            launching(compile_only),
        ):
            for call in calls:
                call()


def reason(error: Exception) -> str:
    """Why a contestant or a cell is missing."""
    return f"{type(error).__name__}: {str(error)[:300]}"


def timed_s(call: Call) -> float:
    """Seconds of a call on the CPU."""
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


@cache
def compiled(function: Callable[..., Any], card: Card) -> Callable[..., Any]:
    """The function as few kernels."""
    return function if card.is_interpreted else torch.compile(function)


def _check(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare rows with float32."""
    size = expected.abs() + expected.square().mean(-1, keepdim=True).sqrt()
    error = float(((found.float() - expected).abs() / (size + 1e-30)).max())
    if not error < tolerance:
        raise WrongError(f"off by {error:.1e}")


def _turn_s(replay: Call, clear: torch.Tensor) -> float:
    """Seconds of a replay after a write that clears the second-level cache."""
    clear.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    elapsed_ms: float = begin.elapsed_time(end)
    return elapsed_ms / 1000
