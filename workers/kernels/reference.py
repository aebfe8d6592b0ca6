"""Slow, obvious twins of the kernels, in float64: what the fast ones are tested against."""

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def linear(x: Float32Array, weight: Float32Array, bias: Float32Array | None = None) -> Float64Array:
    """Multiply rows `x` [M, K] by `weight` [N, K]: `x weight^T + bias`, [M, N]."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    return np.asarray(y if bias is None else y + bias, dtype=np.float64)


def gated_linear(
    x: Float32Array, weight: Float32Array, bias: Float32Array | None = None
) -> Float64Array:
    """Give `silu(gate) * up`, [M, I], where the rows of `weight` [2 * I, K] are gates, then ups."""
    gate, up = np.split(linear(x, weight, bias), 2, axis=1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up, dtype=np.float64)


def round_to_bf16(values: Float32Array) -> Float32Array:
    """Round finite numbers to the nearest bf16, ties to even; the result is still float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    # bf16 is the upper half of float32; what the lower half decides is whether to carry one up.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32)


def visible_keys(
    num_queries: int,
    seq_len: int,
    sliding_window: int | None = None,
    tree_mask: BoolArray | None = None,
) -> BoolArray:
    """Tell which of `seq_len` keys each query of a span sees; the span is the last of them.

    A tree mask [num_queries, num_queries] replaces the causal order inside the span.
    """
    start = seq_len - num_queries
    own = np.arange(start, seq_len)[:, None]
    position = np.arange(seq_len)[None, :]
    visible: BoolArray = position <= own
    if tree_mask is not None:
        visible[:, start:] = tree_mask
    if sliding_window is not None:
        visible &= position > own - sliding_window
    return visible


def attend(
    query: Float32Array,
    key: Float32Array,
    value: Float32Array,
    *,
    scale: float,
    visible: BoolArray,
    soft_cap: float | None = None,
) -> Float64Array:
    """Attend from one span's queries [Q, Hq, D] to all keys and values [S, Hkv, D] of its request.

    Query head h reads key head h // (Hq / Hkv). `visible` is [Q, S]; a query that sees no key gives
    zeros.
    """
    group_size = query.shape[1] // key.shape[1]
    out = np.empty(query.shape, dtype=np.float64)
    for head in range(query.shape[1]):
        keys = key[:, head // group_size].astype(np.float64)
        values = value[:, head // group_size].astype(np.float64)
        scores = query[:, head].astype(np.float64) @ keys.T * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(visible, scores, -np.inf)
        largest = scores.max(axis=1, keepdims=True, initial=-1e300)  # not the -inf of a blind query
        weights = np.exp(scores - largest)
        sums = weights.sum(axis=1, keepdims=True)
        out[:, head] = weights @ values / np.where(sums > 0, sums, 1)
    return out
