"""Arrays that lie against memory which must not be touched."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[3]
PAGE = mmap.PAGESIZE
PROT_NONE = 0

libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(array: npt.NDArray[np.generic], at_end: bool) -> npt.NDArray[np.generic]:
    """Copy an array to where a touch of the byte before it, or behind it, ends the process."""
    inner = -(-array.nbytes // PAGE) * PAGE
    memory = np.frombuffer(mmap.mmap(-1, inner + 2 * PAGE), np.uint8)
    for fence in (0, PAGE + inner):
        assert libc.mprotect(memory.ctypes.data + fence, PAGE, PROT_NONE) == 0
    start = PAGE + (inner - array.nbytes if at_end else 0)
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(program: str, timeout_s: float = 60) -> str:
    """Run a program in a process that it may crash; return what it printed, or why it ended."""
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    return process.stdout if process.returncode == 0 else f"{process.returncode} {process.stderr}"
