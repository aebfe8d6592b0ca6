import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workers.cpus import CpuClaim, claim_cpus

NODE = frozenset(range(100, 116))
"""The cores of the node as these tests see it, whatever machine runs them."""

CLAIMING_PROCESS = f"""
import os, sys
from pathlib import Path
from workers.cpus import claim_cpus
os.sched_getaffinity = lambda pid: {set(NODE)}
claim = claim_cpus(int(sys.argv[1]), directory=Path(sys.argv[2]))
print(*claim.cpus, flush=True)
sys.stdin.read()
"""


Claim = Callable[..., CpuClaim]


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Claim]:
    """`claim_cpus` on a node where nobody else claims; what a test claims is released after it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(NODE))
    claims = []

    def claim(count: int, timeout_s: float = 30.0) -> CpuClaim:
        claims.append(claim_cpus(count, timeout_s=timeout_s, directory=tmp_path))
        return claims[-1]

    yield claim
    for made in claims:
        made.release()


class ClaimingProcess:
    """A process that claims cores and holds them until it is asked to end, or killed."""

    def __init__(self, count: int, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLAIMING_PROCESS, str(count), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def cpus(self) -> tuple[int, ...]:
        assert self._process.stdout is not None
        return tuple(int(cpu) for cpu in self._process.stdout.readline().split())

    def end(self) -> None:
        self._process.communicate()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_a_claim_takes_the_first_free_cores(claim: Claim) -> None:
    first = claim(2)
    second = claim(3)

    assert (first.cpus, second.cpus) == ((100, 101), (102, 103, 104))


def test_released_cores_can_be_claimed_again(claim: Claim) -> None:
    first = claim(2)
    first.release()

    assert (first.cpus, claim(2).cpus) == ((), (100, 101))


def test_processes_that_start_together_share_no_core(tmp_path: Path) -> None:
    processes = [ClaimingProcess(count, tmp_path) for count in (5, 1, 3, 7)]
    claims = [process.cpus for process in processes]
    for process in processes:
        process.end()

    assert [len(cpus) for cpus in claims] == [5, 1, 3, 7]
    assert sorted(cpu for cpus in claims for cpu in cpus) == sorted(NODE)


@pytest.mark.parametrize("end", [ClaimingProcess.end, ClaimingProcess.kill])
def test_the_cores_of_a_process_that_ended_or_was_killed_are_free_again(
    claim: Claim, tmp_path: Path, end: Callable[[ClaimingProcess], None]
) -> None:
    process = ClaimingProcess(16, tmp_path)
    assert process.cpus == tuple(sorted(NODE))
    end(process)

    assert claim(16).cpus == tuple(sorted(NODE))


def test_claims_made_at_once_share_no_core(claim: Claim) -> None:
    with ThreadPoolExecutor(max_workers=8) as threads:
        claims = list(threads.map(lambda _: claim(2), range(8)))

    assert sorted(cpu for claimed in claims for cpu in claimed.cpus) == sorted(NODE)


def test_of_two_claims_that_do_not_fit_together_one_waits_for_the_other(claim: Claim) -> None:
    def claim_and_release(_: int) -> tuple[int, ...]:
        claimed = claim(10)
        cpus = claimed.cpus
        claimed.release()
        return cpus

    with ThreadPoolExecutor(max_workers=2) as threads:
        claims = list(threads.map(claim_and_release, range(2)))

    assert [len(cpus) for cpus in claims] == [10, 10]


def test_a_claim_waits_for_cores_that_are_just_being_given_back(claim: Claim) -> None:
    going = claim(16)
    threading.Timer(0.05, going.release).start()

    assert claim(16).cpus == tuple(sorted(NODE))


def test_a_claim_beyond_the_node_is_refused_at_once(claim: Claim) -> None:
    with pytest.raises(RuntimeError) as refused:
        claim(17)

    assert str(refused.value) == (
        "this worker wants 17 cores and its node has 16: lower worker.cpus"
    )


def test_a_claim_beyond_what_is_free_is_refused_in_the_end_and_keeps_nothing(
    claim: Claim,
) -> None:
    held = claim(14)
    with pytest.raises(RuntimeError) as refused:
        claim(3, timeout_s=0)

    assert str(refused.value) == (
        "this worker wants 3 cores and only 2 of the 16 on its node are free of other workers: "
        "lower worker.cpus or num_workers"
    )
    assert (len(held.cpus), claim(2).cpus) == (14, (114, 115))


def test_pinning_moves_every_thread_to_the_claimed_cores(
    claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: dict[int | None, list[int]] = {}
    monkeypatch.setattr(os, "sched_setaffinity", lambda t, cpus: pinned.update({t: [*cpus]}))
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    claim(2).pin_process()
    end.set()
    thread.join()

    assert [pinned.get(t) for t in (threading.get_native_id(), thread.native_id)] == [
        [100, 101]
    ] * 2
