"""A clock that tests set."""

from dataclasses import dataclass


@dataclass
class FakeClock:
    """Time that moves when a test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now
