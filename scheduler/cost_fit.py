"""Fits a cost model to measured steps."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scheduler.cost_model import SAMPLE_KNOTS, SPAN_FEATURE, TOKEN_KNOTS, CostModel, StepShape

Floats = npt.NDArray[np.float64]


def fit(
    steps: Sequence[tuple[StepShape, float]], *, token_tile: int = 1, num_rounds: int = 10
) -> CostModel:
    """The cost model closest to measured steps, given by their shapes and seconds.

    Minimises the sum of Huber's loss of the relative errors over weights that are not negative, by
    least squares that are reweighted in each round, so that an outlier counts little. Knots after
    which nothing was measured are left out. ValueError for fewer than two steps, for shapes that
    are empty or differ in their query tile, or for seconds that are not positive.
    """
    shapes = [shape for shape, _ in steps]
    seconds = np.array([measured_s for _, measured_s in steps])
    query_tiles = {shape.query_tile for shape in shapes}
    if len(steps) < 2 or len(query_tiles) != 1:
        raise ValueError(
            f"a fit needs at least two steps (got {len(steps)}), all of one query tile (got "
            f"{sorted(query_tiles)})"
        )
    if not (np.isfinite(seconds) & (seconds > 0)).all() or not all(s.num_tokens for s in shapes):
        raise ValueError("a fit needs steps of at least one token, and positive seconds")
    token_knots = _measured_knots(TOKEN_KNOTS, [shape.num_tokens for shape in shapes])
    sample_knots = _measured_knots(SAMPLE_KNOTS, [shape.num_logits for shape in shapes])
    model = CostModel(
        [0.0] * (1 + len(token_knots) + len(sample_knots) + 3),
        token_knots=token_knots,
        sample_knots=sample_knots,
        token_tile=token_tile,
        query_tile=query_tiles.pop(),
    )
    features = np.array([model.features(shape) for shape in shapes]) / seconds[:, None]
    if all(shape.num_logits == shape.num_spans for shape in shapes):
        features[:, SPAN_FEATURE] = 0  # not separable: each span has one row of the head
    trust = np.ones(len(steps))
    for _ in range(num_rounds):
        weights = _least_squares(features * trust[:, None], trust)
        errors = np.abs(features @ weights - 1)
        # Steps with at most twice the median error count in full; an exact fit has an error of 0,
        # by which nothing can be divided or compared.
        scale = max(float(np.median(errors)), 1e-6) * 2
        trust = np.sqrt(np.minimum(1, scale / np.maximum(errors, 1e-12)))
    return CostModel.from_dict(model.to_dict() | {"weights": weights.tolist()})


def _measured_knots(knots: tuple[int, ...], measured: list[int]) -> tuple[int, ...]:
    """The first knot, and those with a measured value in the segment that begins there."""
    kept = [knots[0]]
    for begin, end in zip(knots[1:], (*knots[2:], math.inf), strict=True):
        if any(begin < value <= end for value in measured):
            kept.append(begin)
    return tuple(kept)


def _least_squares(matrix: Floats, target: Floats) -> Floats:
    """Minimise |matrix @ w - target| over w >= 0, by the active sets of Lawson and Hanson (1974).

    The weight of a column that is a combination of others stays 0.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1
    matrix = matrix / scale
    weights = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(3 * len(weights)):
        gain = np.where(free, 0, matrix.T @ (target - matrix @ weights))
        if gain.max() <= 1e-9 * np.linalg.norm(target):  # 0 except for rounding: at the minimum
            break
        free[gain.argmax()] = True
        while free.any():
            trial = np.zeros_like(weights)
            trial[free] = np.linalg.lstsq(matrix[:, free], target)[0]
            if not (falls := free & (trial <= 0)).any():
                weights = trial
                break
            # Go only until the first weight falls to 0 (which may be at once, hence the bound on
            # the divisor); it then stays there, as does what is 0 except for rounding.
            reach = np.min(weights[falls] / np.maximum(weights[falls] - trial[falls], 1e-300))
            weights = np.maximum(weights + reach * (trial - weights), 0)
            free &= ~falls | (weights > 1e-12)
    solution: Floats = weights / scale
    return solution
