"""Gives back to the system what large requests have taken."""

import ctypes
import gc
import threading
import time

import psutil

CHECK_INTERVAL_S = 2.0
GROWTH_BYTES = 32 << 20
"""Growth of a process after which its free memory is given back."""


def give_back_memory() -> None:
    """Watch this process in a thread, and give back what it has freed when it has grown.

    The C library keeps most of what is freed for the next allocation, and Python what is in cycles.
    """
    gc.collect()
    gc.freeze()  # what is there to stay is not looked at again, so that `collect` is short
    threading.Thread(target=_watch, name="memory", daemon=True).start()


def _watch() -> None:
    process = psutil.Process()
    usual_bytes = process.memory_info().rss
    while True:
        time.sleep(CHECK_INTERVAL_S)
        now_bytes = process.memory_info().rss
        if now_bytes > usual_bytes + GROWTH_BYTES:
            gc.collect()
            _trim()
            usual_bytes = process.memory_info().rss
        usual_bytes = min(usual_bytes, now_bytes)


def _trim() -> None:
    # Only glibc has it. Called so, it does not hold Python's lock.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
