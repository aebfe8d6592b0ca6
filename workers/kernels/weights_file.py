"""Packed weights in a file, for later starts of the same engine.

The weights are read into huge pages, not mapped: a file's pages are of 4 KiB, on which each step
would read its weights more slowly.
"""

import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from workers.kernels import native
from workers.kernels.gemm import Format, Weight

logger = logging.getLogger(__name__)

MAGIC = b"XYSERVE WEIGHTS 1\n"
"""First bytes of a file; the number is that of what follows it."""


def kernels_key() -> tuple[str, str]:
    """What the layout of a packed weight depends on: the library and the instruction set."""
    return hashlib.sha256(native.LIBRARY.read_bytes()).hexdigest(), native.isa()


def read_weights(file: Path, key: str) -> dict[str, Weight]:
    """The weights by name that `write_weights` wrote with this key.

    Empty if there is no such file or, with a warning, if any of its bytes is not as it was written.
    """
    try:
        with file.open("rb") as source:
            header = _read_header(source)
            if header["key"] != key:
                return {}
            return {name: _read(source, entry) for name, entry in header["weights"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        logger.warning(
            "packed weights cannot be used; they are packed again",
            extra={"file": str(file), "error": repr(error)},
        )
        return {}


def write_weights(file: Path, key: str, weights: Mapping[str, Weight]) -> bool:
    """Write weights for `read_weights`, in the place of any in the file; returns whether it did.

    It does not if another process is writing the file. Readers see the old weights or the new ones,
    never a part. Raises OSError, for example if the disk is full, and then leaves nothing.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # One name for all writers: what one that was killed has left, the next one overwrites.
        partial = file.with_name(f"{file.name}.partial")
        try:
            with partial.open("wb") as out:
                _write(out, key, weights)
            partial.replace(file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    return True


def _read_header(source: IO[bytes]) -> Any:
    if source.read(len(MAGIC)) != MAGIC:
        raise ValueError(f"it does not begin with {MAGIC!r}")
    size, checksum = (int.from_bytes(_exactly(source, 8), "little") for _ in range(2))
    if size > os.fstat(source.fileno()).st_size:
        raise EOFError("it is cut off")
    text = _exactly(source, size)
    if zlib.crc32(text) != checksum:
        raise ValueError("its header is damaged")
    return json.loads(text)


def _exactly(source: IO[bytes], size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise EOFError("it is cut off")
    return data


def _read(source: IO[bytes], entry: dict[str, Any]) -> Weight:
    weight = Weight(entry["n"], entry["k"], Format[entry["format"].upper()], entry["gate_up"])
    checksum = 0
    for array in weight.arrays():
        memory = array.data.cast("B")
        if source.readinto(memory) != len(memory):  # type: ignore[attr-defined]
            raise EOFError("it is cut off")
        checksum = zlib.crc32(memory, checksum)
    if checksum != entry["checksum"]:
        raise ValueError("a weight in it is damaged")
    return weight


def _write(out: IO[bytes], key: str, weights: Mapping[str, Weight]) -> None:
    entries = {
        name: {
            "n": weight.n,
            "k": weight.k,
            "format": weight.format,
            "gate_up": weight.gate_up,
            "checksum": _checksum(weight.arrays()),
        }
        for name, weight in weights.items()
    }
    header = json.dumps({"key": key, "weights": entries}).encode()
    out.write(MAGIC)
    for number in (len(header), zlib.crc32(header)):
        out.write(number.to_bytes(8, "little"))
    out.write(header)
    for weight in weights.values():
        for array in weight.arrays():
            out.write(array.data.cast("B"))


def _checksum(arrays: tuple[NDArray[np.generic], ...]) -> int:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.data.cast("B"), checksum)
    return checksum
