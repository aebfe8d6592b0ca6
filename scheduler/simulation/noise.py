"""Random factors of step times, drawn in advance."""

from collections.abc import Sequence

import numpy as np


class Noise:
    """Log-normal factors of mean 1, the same for a step whether it is taken alone or in a jump."""

    def __init__(self, sigma: float, seed: Sequence[int]) -> None:
        self._sigma = sigma
        self._generator = np.random.default_rng(seed)
        self._factors: list[float] = []
        self._first = 0

    def factors(self, step: int, count: int) -> list[float]:
        """Factors of `count` steps from `step` on; factors of earlier steps are dropped."""
        while self._first + len(self._factors) < step + count:
            passed = min(step - self._first, len(self._factors))
            del self._factors[:passed]
            self._first += passed
            drawn = self._generator.normal(-(self._sigma**2) / 2, self._sigma, 1024)
            self._factors += np.exp(drawn).tolist()
        return self._factors[step - self._first : step - self._first + count]
