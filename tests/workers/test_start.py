import gc
import time
import weakref

import psutil
import pytest

from workers.start import Start, StartPhase, nothing_collected


class Node:
    """Part of a ring, which only a collection frees."""

    def __init__(self) -> None:
        self.ring = self


def test_phases_follow_each_other_from_the_beginning_of_the_process() -> None:
    start = Start()
    start.ended(StartPhase.PROCESS)
    before_s = time.process_time()
    while time.process_time() - before_s < 0.02:
        pass
    start.ended(StartPhase.IMPORTS)
    age_s = time.time() - psutil.Process().create_time()

    process, imports = start.times.values()
    assert list(start.times) == [StartPhase.PROCESS, StartPhase.IMPORTS]
    assert process.took_s + imports.took_s == pytest.approx(age_s, abs=1)
    assert process.cpu_s + imports.cpu_s <= time.process_time()
    assert imports.cpu_s >= 0.02


def test_the_summary_has_all_phases_and_their_sum() -> None:
    start = Start()
    for phase in StartPhase:
        start.ended(phase)

    summary = start.summary()

    assert list(summary) == [
        *("took_s", "cpu_s", "process_s", "imports_s", "model_s", "kv_cache_s", "scheduler_s"),
        *("calibration_s", "report_s"),
    ]
    phases = [value for name, value in summary.items() if name not in ("took_s", "cpu_s")]
    assert summary["took_s"] == pytest.approx(sum(phases), abs=0.01)


def test_what_is_made_while_nothing_is_collected_is_never_looked_at() -> None:
    with nothing_collected():
        assert not gc.isenabled()
        ring = weakref.ref(Node())
    try:
        assert gc.isenabled()
        gc.collect()
        assert ring() is not None
    finally:
        gc.unfreeze()
    gc.collect()
    assert ring() is None


def test_collection_is_as_it_was_afterwards_also_after_an_error() -> None:
    def fail() -> None:
        with nothing_collected():
            raise ValueError("it failed")

    for was_on in (True, False):
        (gc.enable if was_on else gc.disable)()
        try:
            with pytest.raises(ValueError, match="it failed"):
                fail()
            assert gc.isenabled() == was_on
        finally:
            gc.unfreeze()
            gc.enable()
