"""A record of placements, for `xyserve replay`: what the GlobalScheduler saw and decided."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from scheduler.placement_replay import Began, Decided, Event, Forgotten, Reported

MAGIC = b"xyserve placements 1\n"
"""First bytes of a record."""
MAX_BYTES = 1 << 30
"""Size at which a record ends."""
LENGTH_BYTES = 4
_KINDS: tuple[type[Event], ...] = (Began, Reported, Forgotten, Decided)
"""Kinds of events, by the number that stands before each; only to be appended to."""


class PlacementRecorder:
    """Writes events to a file, each with its length and kind before it."""

    def __init__(self, path: Path) -> None:
        """Begin a new file; the folder is made if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb")
        self._file.write(MAGIC)
        self._num_bytes = len(MAGIC)
        self._encode = msgspec.msgpack.Encoder().encode

    def write(self, event: Event) -> None:
        """Add an event, unless the file would be too large."""
        body = bytes([_KINDS.index(type(event))]) + self._encode(event)
        if self._num_bytes + LENGTH_BYTES + len(body) > MAX_BYTES:
            return
        self._num_bytes += self._file.write(len(body).to_bytes(LENGTH_BYTES, "big") + body)
        self._file.flush()  # it is wanted most when its writer was killed

    def close(self) -> None:
        """End the record."""
        self._file.close()


def is_record(path: Path) -> bool:
    """Whether a file is a record of placements."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_events(path: Path) -> Iterator[Event]:
    """The events of a record; the last one may be cut off, as its writer was killed.

    ValueError if the file is no record.
    """
    decoders = [msgspec.msgpack.Decoder(kind) for kind in _KINDS]
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it is no record of placements")
        while len(length := file.read(LENGTH_BYTES)) == LENGTH_BYTES:
            body = file.read(int.from_bytes(length, "big"))
            if len(body) < int.from_bytes(length, "big"):
                return
            yield decoders[body[0]].decode(body[1:])
