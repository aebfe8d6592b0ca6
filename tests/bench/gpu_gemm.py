"""The linears of a model in `tests.bench.gpu`: our GEMM in Triton beside cuBLAS."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter

import torch
from torch.nn.functional import linear, silu

from tests.bench.gpu_card import Call, Card, Contestant, Row, compiled
from workers.kernels.shapes import AttentionShape
from workers.kernels.triton_gemm import HEIGHTS, GemmTiles, Weight, plan_linear, run, tile_costs


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a model's layers on one GPU."""

    hidden: int
    intermediate: int
    attention: AttentionShape
    has_bias: bool = False
    """Whether qkv has one."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shape [N, K] of each linear."""
        heads, size = self.attention, self.attention.head_size
        return {
            "qkv": ((heads.num_heads + 2 * heads.num_kv_heads) * size, self.hidden),
            "o": (self.hidden, heads.num_heads * size),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut and launched."""

    tiles: GemmTiles
    programs: int
    """For each core of the card."""


def _cuts(*sizes: tuple[int, int, int, int, int]) -> list[Cut]:
    """Of BLOCK_N, BLOCK_K, warps, stages and programs."""
    return [Cut(GemmTiles(n, k, 8, warps, stages), each) for n, k, warps, stages, each in sizes]


_FEW = _cuts(
    (32, 64, 4, 6, 4), (16, 64, 4, 6, 4), (64, 64, 4, 5, 3),
    (16, 128, 4, 5, 4), (32, 128, 4, 4, 3), (64, 128, 4, 3, 3),
)  # fmt: skip
_SOME = _cuts(
    (64, 64, 4, 5, 2), (32, 64, 4, 5, 3), (128, 64, 4, 4, 2),
    (32, 128, 4, 4, 2), (64, 128, 4, 3, 2), (64, 128, 8, 3, 2),
)  # fmt: skip
_MANY = _cuts(
    (128, 64, 8, 4, 1), (64, 64, 4, 4, 2), (128, 64, 8, 3, 2), (256, 64, 8, 3, 1),
    (64, 128, 4, 3, 2), (128, 128, 8, 3, 1),
)  # fmt: skip
CUTS = {16: _FEW, 64: _SOME, 128: _MANY, 512: _MANY, 4096: _MANY}
"""Cuts that are tried for numbers of rows up to these. The first is built in: these have one
BLOCK_K, as the cuts of a weight must."""
INTERPRETED = dict.fromkeys(CUTS, _cuts((32, 32, 4, 2, 1), (32, 32, 4, 2, 2)))

Table = dict[tuple[torch.Size, bool], dict[int, Cut]]
"""The cut for each shape `[N, K]` of a weight, gated or not, and each range of rows."""


def cuts_of(card: Card) -> Mapping[int, Sequence[Cut]]:
    """The cuts for a card."""
    return INTERPRETED if card.is_interpreted else CUTS


def cut_for(card: Card, table: Table, values: torch.Tensor, gated: bool, num_rows: int) -> Cut:
    """The cut in the table, or else the one that is built in."""
    built_in = {limit: cuts[0] for limit, cuts in cuts_of(card).items()}
    limit = next(limit for limit in CUTS if num_rows <= limit or limit == max(CUTS))
    return table.get((values.shape, gated), built_in)[limit]


class Linear:
    """Our product of one weight with one number of rows, whose tasks are on the device."""

    def __init__(
        self, card: Card, num_rows: int, weight: Weight, cut: Cut, bias: torch.Tensor | None = None
    ) -> None:
        self.weight, self.bias = weight, bias
        tasks = plan_linear(num_rows, self.weight.out_features, cut.tiles, tile_costs())
        self.max_rows = HEIGHTS[int(tasks[:, 3].max())]
        self.tasks = torch.from_numpy(tasks).to(card.device)
        self.num_tasks = torch.tensor([len(tasks)], dtype=torch.int32, device=card.device)
        self.num_programs = card.num_cores * cut.programs
        self.out = weight.values.new_empty((num_rows, self.weight.out_features))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        run(
            x, self.weight, self.bias, self.out,
            self.tasks, self.num_tasks, self.num_programs, self.max_rows,
        )  # fmt: skip
        return self.out


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`."""
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


@dataclass(frozen=True, slots=True)
class Product:
    """A linear, with copies of its weight that together do not fit the second-level cache."""

    card: Card
    model: str
    linear: str
    gated: bool
    """Whether its activation is computed with it."""
    copies: Sequence[torch.Tensor]
    bias: torch.Tensor | None

    def rows(self, num_rows: int) -> torch.Tensor:
        """Random rows for it."""
        return self.card.random(num_rows, self.copies[0].shape[1])

    def ours(self, x: torch.Tensor, cut: Cut) -> list[Call]:
        """Our product of rows with each copy."""
        weights = [Weight(own, gated=self.gated, tiles=cut.tiles) for own in self.copies]
        return [partial(Linear(self.card, len(x), w, cut, self.bias), x) for w in weights]

    def theirs(self, x: torch.Tensor) -> list[Call]:
        """cuBLAS's, with the activation as one more kernel."""
        activate = compiled(silu_and_mul, self.card)

        def product(values: torch.Tensor) -> torch.Tensor:
            out = linear(x, values, self.bias)
            return activate(out) if self.gated else out

        return [partial(product, values) for values in self.copies]

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """The product with one copy in float32."""
        bias = None if self.bias is None else self.bias.float()
        out = linear(x.float(), self.copies[0].float(), bias)
        return silu_and_mul(out) if self.gated else out


def products(card: Card, models: Mapping[str, Model]) -> Iterator[tuple[str, Product]]:
    """All linears of all models, gate_up also with its activation."""
    for model, sizes in models.items():
        for name, (n, k) in sizes.linears.items():
            copies = [card.weight(n, k) for _ in range(1 + card.cache_bytes // (n * k))]
            bias = card.random(n) if sizes.has_bias and name == "qkv" else None
            yield f"{model} {name}", Product(card, model, name, False, copies, bias)
            if name == "gate_up":
                fused = Product(card, model, "gate_up fused", True, copies, bias)
                yield f"{model} {name} fused", fused


def searched(product: Product, table: Table) -> list[Row]:
    """Fill the table with the fastest cut in each range, all with the BLOCK_K for which they are
    fastest together."""
    card, values = product.card, product.copies[0]
    trials = {
        limit: {cut: product.ours(product.rows(min(limit, 2048)), cut) for cut in cuts}
        for limit, cuts in cuts_of(card).items()
    }
    card.compile_ahead(calls[0] for trial in trials.values() for calls in trial.values())
    best: dict[int, dict[int, tuple[Cut, float]]] = {}
    for limit, trial in trials.items():
        took_s = card.in_turns(trial, {})  # without those for which the card has too little memory
        for cut, own_s in sorted(took_s.items(), key=itemgetter(1), reverse=True):
            best.setdefault(cut.tiles.block_k, {})[limit] = cut, own_s
    complete = [own for own in best.values() if len(own) == len(trials)]
    fastest = min(complete, key=lambda own: sum(math.log(own_s) for _, own_s in own.values()))
    table[values.shape, product.gated] = {limit: cut for limit, (cut, _) in fastest.items()}
    sizes = {"N": values.shape[0], "K": values.shape[1], "gated": product.gated}
    return [
        {"model": product.model, **sizes, "max_rows": limit, **asdict(cut.tiles)}
        | {"programs": cut.programs, "ms": 1000 * own_s}
        for limit, (cut, own_s) in fastest.items()
    ]


def row(product: Product, num_rows: int, table: Table) -> list[Row]:
    """A product at one number of rows beside cuBLAS's."""
    card, values, gated = product.card, product.copies[0], product.gated
    x = product.rows(num_rows)
    cut = cut_for(card, table, values, gated, num_rows)
    makers = {
        "ours": lambda: Contestant(product.ours(x, cut)),
        "cublas": lambda: Contestant(product.theirs(x)),
    }
    expected = product.expected(x)
    found = card.compared(makers, expected)
    n, k = values.shape
    flops, num_bytes = 2 * num_rows * n * k, 2 * (n * k + num_rows * k + expected.numel())
    own = {"model": product.model, "linear": product.linear, "M": num_rows}
    return [own | found | {"of limit": card.of_limit(flops, num_bytes, found)}]


def invariance(product: Product, num_rows: Sequence[int], table: Table) -> list[Row]:
    """Whether the first and the last rows of many have the same bits in smaller numbers."""
    x = product.rows(num_rows[-1])

    def result(rows: torch.Tensor) -> torch.Tensor:
        cut = cut_for(product.card, table, product.copies[0], product.gated, len(rows))
        out: torch.Tensor = product.ours(rows, cut)[0]()
        return out

    together = result(x)
    differs = [
        count
        for count in num_rows
        if not torch.equal(together[:count], result(x[:count]))
        or not torch.equal(together[-count:], result(x[-count:]))
    ]
    own = {"model": product.model, "linear": product.linear}
    return [own | {"equal": not differs, "differs at": differs}]
