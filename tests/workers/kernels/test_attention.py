import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kernels import native, reference
from workers.kernels.attention import AttentionShape, attend, plan_attention, write_kv
from workers.kernels.tiles import KV_CHUNK

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

TOLERANCE = 4e-6
"""For outputs about 1 in size."""


def make_shape(
    num_heads: int = 3, num_kv_heads: int = 1, head_size: int = 32, block_size: int = 32, **options
) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        scale=head_size**-0.5,
        **options,
    )


@dataclass(frozen=True)
class Request:
    """The queries, keys and values of all tokens of one request."""

    query: Array
    key: Array
    value: Array


def make_request(shape: AttentionShape, length: int, seed: int = 0) -> Request:
    """Make a request whose first tokens are those of any longer one of the same seed."""
    rng = np.random.default_rng(seed)
    heads = shape.num_heads + 2 * shape.num_kv_heads
    tokens = rng.standard_normal((length, heads, shape.head_size), dtype=np.float32)
    return Request(*np.split(tokens, [shape.num_heads, shape.num_heads + shape.num_kv_heads], 1))


@dataclass(frozen=True)
class Span:
    """The share of one request in a step: the last `num_queries` of its first `seq_len` tokens."""

    request: Request
    num_queries: int
    seq_len: int
    tree_mask: Mask | None = None

    @property
    def query(self) -> Array:
        return self.request.query[self.seq_len - self.num_queries : self.seq_len]
