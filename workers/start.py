"""The start of a process that computes: how long each phase takes, and no garbage collected."""

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import psutil


class StartPhase(StrEnum):
    """A phase of a worker's start, in their order."""

    PROCESS = "process"
    """Ray starts the process and connects it; Ray, Serve and our own files are imported."""
    IMPORTS = "imports"
    """vLLM and torch are imported."""
    MODEL = "model"
    """vLLM makes its config and the model, whose weights are read and packed."""
    KV_CACHE = "kv_cache"
    """Memory of the KV cache."""
    SCHEDULER = "scheduler"
    """Tokenizer, grammars and scheduler."""
    CALIBRATION = "calibration"
    """The profile of the engine is read, or measured."""
    REPORT = "report"
    """The first report to the GlobalScheduler is answered: requests may come."""


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """What one phase took."""

    took_s: float
    cpu_s: float
    """Processor time of the process, which a busy machine does not lengthen."""


class Start:
    """Times the phases of this process's start, each of which begins where the last one ended."""

    def __init__(self) -> None:
        """The first phase began with the process."""
        age_s = time.time() - psutil.Process().create_time()
        self._ended_s = time.monotonic() - age_s
        self._cpu_s = 0.0
        self.times: dict[StartPhase, PhaseTime] = {}
        """What each phase took, of those that have ended."""

    def ended(self, phase: StartPhase) -> None:
        """Note the end of a phase."""
        now_s, cpu_s = time.monotonic(), time.process_time()
        self.times[phase] = PhaseTime(now_s - self._ended_s, cpu_s - self._cpu_s)
        self._ended_s, self._cpu_s = now_s, cpu_s

    def summary(self) -> dict[str, float]:
        """Seconds of all phases together, and of each, as fields of a log line."""
        took = {f"{phase}_s": round(time.took_s, 2) for phase, time in self.times.items()}
        cpu_s = sum(time.cpu_s for time in self.times.values())
        return {"took_s": round(sum(took.values()), 2), "cpu_s": round(cpu_s, 2)} | took


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Collect no garbage while lasting objects are made, and none of them ever after.

    A collection looks through all that it may collect. Imports of vLLM make a million objects and
    next to no garbage, and vLLM collects eight times as it makes an engine: that is 3 s of
    processor time for 14 MB.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
