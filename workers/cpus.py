"""CPU sets of workers: cores that no other worker on the node uses."""

import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import IO


class CpuClaim:
    """Cores claimed by this process until it ends or releases them.

    Each core has a lock file on the node. The kernel drops the locks of a process that dies, so a
    claim does not outlive a crash or a kill.
    """

    def __init__(self, cpus: dict[int, IO[bytes]]) -> None:
        self._locks = cpus

    @property
    def cpus(self) -> tuple[int, ...]:
        """Claimed cores, ascending."""
        return tuple(sorted(self._locks))

    def pin_process(self) -> None:
        """Restrict all threads of this process, present and future, to the claimed cores."""
        for thread in os.listdir("/proc/self/task"):
            try:
                os.sched_setaffinity(int(thread), self._locks)
            except ProcessLookupError:
                continue  # the thread ended since the listing

    def release(self) -> None:
        """Release the cores."""
        for lock in self._locks.values():
            lock.close()
        self._locks = {}


def claim_cpus(count: int, *, timeout_s: float = 30.0, directory: Path | None = None) -> CpuClaim:
    """Claim `count` cores that no other claim on this node holds.

    The locks are in `directory`, by default a folder of the user's in TMPDIR; claims in different
    folders do not see each other. Waits up to `timeout_s` for workers that are shutting down;
    RuntimeError after that.
    """
    directory = directory or Path(tempfile.gettempdir()) / f"xyserve-cpus-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    allowed = sorted(os.sched_getaffinity(0))
    if count > len(allowed):
        raise RuntimeError(
            f"this worker wants {count} cores and its node has {len(allowed)}: lower worker.cpus"
        )
    deadline = time.monotonic() + timeout_s
    while len(claim := _claim_free(allowed, count, directory)) < count:
        free = len(claim)
        CpuClaim(claim).release()
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"this worker wants {count} cores and only {free} of the {len(allowed)} on its "
                "node are free of other workers: lower worker.cpus or num_workers"
            )
        time.sleep(0.2)
    return CpuClaim(claim)


def _claim_free(allowed: list[int], count: int, directory: Path) -> dict[int, IO[bytes]]:
    """Lock up to `count` free cores; one process at a time, so that two never get half each."""
    locks: dict[int, IO[bytes]] = {}
    with (directory / "claiming").open("wb") as claiming:
        fcntl.flock(claiming, fcntl.LOCK_EX)
        for cpu in allowed:
            if len(locks) == count:
                break
            lock = (directory / str(cpu)).open("wb")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locks[cpu] = lock
            except BlockingIOError:
                lock.close()
    return locks
