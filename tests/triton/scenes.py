"""Steps for the Triton kernels, whatever runs them, and what they must give."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from workers.kernels import reference, triton_attention
from workers.kernels.shapes import AttentionShape
from workers.kernels.triton_attention import attend, plan_attention, write_kv
from workers.kernels.triton_gemm import GemmTiles, Weight, linear, quantised

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""For values about 1 in size."""
NUM_PROGRAMS = 3
NUM_ROWS = (1, 15, 16, 17, 64, 65, 150, 213)
CHUNK_KEYS = 64
"""Small, so that short contexts have several chunks."""
TILES = GemmTiles(block_n=64, block_k=32)


@dataclass(frozen=True)
class Scene:
    """The spans of one step, for one layer."""

    shape: AttentionShape
    query_lens: tuple[int, ...] = (1, 5, 40, 1, 150)
    seq_lens: tuple[int, ...] = (170, 5, 90, 1, 200)
    trees: Mapping[int, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def starts(self) -> NDArray[np.int32]:
        """The first token of each span, and the end of the last."""
        return np.concatenate([[0], np.cumsum(self.query_lens)]).astype(np.int32)


def shape(num_heads: int, num_kv_heads: int, head_size: int, **others: float) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=16,
        scale=0.2,
        **others,  # type: ignore[arg-type]
    )


def tree(size: int) -> NDArray[np.bool_]:
    """A draft tree in which some tokens see others."""
    random = np.random.default_rng(size)
    seen: NDArray[np.bool_] = random.random((size, size)) < 0.5
    return np.asarray(np.tril(seen) | np.eye(size, dtype=bool), np.bool_)


SCENES = {
    "one head": Scene(shape(1, 1, 32)),
    "groups of 2": Scene(shape(4, 2, 32)),
    "groups of 7": Scene(shape(14, 2, 32)),
    "groups of 20": Scene(shape(20, 1, 16)),
    "odd head": Scene(shape(4, 2, 24)),
    "window": Scene(shape(4, 2, 32, sliding_window=20)),
    "soft cap": Scene(shape(4, 2, 32, soft_cap=3.0)),
    "trees": Scene(shape(4, 2, 32), (1, 6, 40, 9), (70, 50, 90, 9), {1: tree(6), 3: tree(9)}),
    "decodes": Scene(shape(8, 2, 32), (1,) * 6, (300, 1, 64, 65, 17, 128)),
}


class Layer:
    """A scene's tensors: queries, and keys and values in a cache whose rest is not finite."""

    def __init__(self, scene: Scene, dtype: torch.dtype) -> None:
        random = np.random.default_rng(0)
        self.scene, kv_shape, size = scene, scene.shape, scene.shape.block_size

        def values(*sizes: int) -> torch.Tensor:
            return torch.from_numpy(random.standard_normal(sizes).astype(np.float32)).to(dtype)

        heads = kv_shape.num_kv_heads, kv_shape.head_size
        self.query = values(scene.starts[-1], kv_shape.num_heads, kv_shape.head_size)
        self.keys = [values(length, *heads) for length in scene.seq_lens]
        self.values = [values(length, *heads) for length in scene.seq_lens]
        blocks = [-(-length // size) for length in scene.seq_lens]
        cache_shape = (sum(blocks) + 1, heads[0], size, 2 * heads[1])
        self.cache = torch.full(cache_shape, float("nan"), dtype=dtype)
        self.table = np.zeros((len(blocks), max(blocks)), np.int32)
        numbers = iter(random.permutation(sum(blocks)))
        for span, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            self.table[span, : blocks[span]] = [next(numbers) for _ in range(blocks[span])]
            position = np.arange(len(key))
            slots = self.table[span, position // size] * size + position % size
            slots = torch.from_numpy(slots.astype(np.int64))
            write_kv(kv_shape, self.cache, key, value, slots, num_programs=2)

    def attend(
        self, first: int, end: int, query_lens: list[int], trees: bool, num_programs: int
    ) -> torch.Tensor:
        """Attend from the last tokens of the spans from `first` to `end`."""
        scene = self.scene
        starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
        query = torch.cat(
            [
                self.query[scene.starts[span + 1] - length : scene.starts[span + 1]]
                for span, length in zip(range(first, end), query_lens, strict=True)
            ]
        )
        plan = plan_attention(
            scene.shape,
            starts,
            np.array(scene.seq_lens[first:end], np.int32),
            {s - first: mask for s, mask in scene.trees.items() if first <= s < end and trees},
            num_programs=num_programs,
        )
        out = torch.full(query.shape, 7.0, dtype=query.dtype)
        table = torch.from_numpy(self.table[first:end])
        return attend(plan, query, self.cache, table, out, is_flat=True)

    def expected(self, span: int) -> NDArray[np.float64]:
        """The rows of a span, by the slow twin."""
        scene = self.scene
        visible = reference.visible_keys(
            scene.query_lens[span],
            scene.seq_lens[span],
            scene.shape.sliding_window,
            scene.trees.get(span),
        )
        return reference.attend(
            self.query[scene.starts[span] : scene.starts[span + 1]].float().numpy(),
            self.keys[span].float().numpy(),
            self.values[span].float().numpy(),
            scale=scene.shape.scale,
            visible=visible,
            soft_cap=scene.shape.soft_cap,
        )


def attention_error(layer: Layer) -> float:
    """The largest error of a step's rows."""
    scene, triton_attention.CHUNK_KEYS = layer.scene, CHUNK_KEYS
    spans = len(scene.seq_lens)
    out = layer.attend(0, spans, list(scene.query_lens), True, NUM_PROGRAMS)
    errors = [
        np.abs(out[scene.starts[span] : scene.starts[span + 1]].float().numpy() - expected).max()
        for span in range(spans)
        for expected in [layer.expected(span)]
    ]
    return float(max(errors))


def has_equal_bits_alone(layer: Layer) -> bool:
    """Whether each span, and its last token, has the same bits by itself, on one program or two."""
    scene, triton_attention.CHUNK_KEYS = layer.scene, CHUNK_KEYS
    together = layer.attend(0, len(scene.seq_lens), list(scene.query_lens), True, NUM_PROGRAMS)
    for span, query_len in enumerate(scene.query_lens):
        rows = together[scene.starts[span] : scene.starts[span + 1]]
        if not torch.equal(rows, layer.attend(span, span + 1, [query_len], True, 2)):
            return False
        last = layer.attend(span, span + 1, [1], False, 1)
        if span not in scene.trees and not torch.equal(rows[-1:], last):
            return False
    return True


@dataclass(frozen=True)
class Product:
    """A product of some kind, for any number of rows."""

    dtype: torch.dtype
    gated: bool = False
    int8: bool = False
    bias: bool = True
    num_features: int = 100
    num_inputs: int = 72

    def weight(self) -> tuple[Weight, torch.Tensor | None, NDArray[np.float32]]:
        """The weight and the bias, and what the weight stands for."""
        random = torch.Generator().manual_seed(0)
        values = torch.randn((self.num_features, self.num_inputs), generator=random) / 8
        bias = torch.randn(self.num_features, generator=random).to(self.dtype)
        if self.int8:
            weight = quantised(values, gated=self.gated, tiles=TILES)
            assert weight.scales is not None
            meant = weight.values.float() * weight.scales[:, None]
        else:
            weight = Weight(values.to(self.dtype), gated=self.gated, tiles=TILES)
            meant = weight.values.float()
        return weight, bias if self.bias else None, meant.numpy()

    def rows(self, number: int) -> torch.Tensor:
        """So many rows."""
        random = torch.Generator().manual_seed(1)
        return torch.randn((number, self.num_inputs), generator=random).to(self.dtype)


PRODUCTS: tuple[dict[str, bool], ...] = (
    {},
    {"gated": True},
    {"int8": True},
    {"int8": True, "gated": True},
    {"bias": False},
)


def product_error(product: Product) -> float:
    """The largest error over numbers of rows; what follows the rows must stay as it is."""
    weight, bias, meant = product.weight()
    twin = reference.gated_linear if product.gated else reference.linear
    worst = 0.0
    for number in NUM_ROWS:
        x = product.rows(number)
        out = torch.full((number + 3, weight.out_features), 7.0, dtype=product.dtype)
        linear(x, weight, bias, out[:number], num_programs=NUM_PROGRAMS)
        assert (out[number:] == 7).all()
        expected = twin(x.float().numpy(), meant, None if bias is None else bias.float().numpy())
        worst = max(worst, float(np.abs(out[:number].float().numpy() - expected).max()))
    return worst


def rows_have_equal_bits_alone(product: Product) -> bool:
    """Whether rows have the same bits in any number of others, on any number of programs."""
    weight, bias, _ = product.weight()
    x = product.rows(NUM_ROWS[-1])
    together = linear(x, weight, bias, num_programs=NUM_PROGRAMS)
    return all(
        torch.equal(together[:n], linear(x[:n], weight, bias, num_programs=1))
        and torch.equal(together[-n:], linear(x[-n:], weight, bias, num_programs=2))
        for n in NUM_ROWS
    )
