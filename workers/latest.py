"""The latest values by key, within a number of bytes."""

from collections.abc import Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")

ENTRY_BYTES = 300
"""Memory of an entry beside its value and the characters of its key."""


class Latest(Generic[Value]):
    """Values by key; beyond `max_bytes` the oldest are dropped.

    Who adds a value says how many bytes it takes: only its owner knows what it alone holds.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: dict[str, tuple[Value, int]] = {}
        self._num_bytes = 0

    def add(self, key: str, value: Value, num_bytes: int) -> None:
        """Keep a value as the newest, in place of another one with its key."""
        self._drop(key)
        self._put(key, value, num_bytes)

    def resize(self, key: str, value: Value, num_bytes: int) -> None:
        """Count a value anew that has grown, if it is still kept; it stays in its place."""
        kept = self._entries.get(key)
        if kept and kept[0] is value:
            self._num_bytes -= kept[1]
            self._put(key, value, num_bytes)

    def get(self, key: str) -> Value | None:
        """The value of a key, if it is kept."""
        kept = self._entries.get(key)
        return kept[0] if kept else None

    def items(self) -> Iterator[tuple[str, Value]]:
        """Keys and values, oldest first."""
        return ((key, value) for key, (value, _) in self._entries.items())

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        return self._num_bytes

    def _put(self, key: str, value: Value, num_bytes: int) -> None:
        num_bytes += ENTRY_BYTES + len(key)
        self._entries[key] = value, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        if dropped := self._entries.pop(key, None):
            self._num_bytes -= dropped[1]
