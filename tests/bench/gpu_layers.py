"""Decoder layers in `tests.bench.gpu`: a stack by our kernels beside the same stack by torch's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch.nn.functional import linear, rms_norm

from tests.bench.gpu_attention import Attention, Case, Ours, Span, Step, reference, sdpa, varlen
from tests.bench.gpu_card import Card, Contestant, Row, compiled
from tests.bench.gpu_gemm import Linear, Model, Table, cut_for, silu_and_mul
from workers.kernels.triton_attention import AttentionPlan, AttentionPlanner, attend, write_kv
from workers.kernels.triton_gemm import Weight

NUM_WEIGHTS = 4
"""Layers with weights of their own: together they do not fit the second-level cache."""
THETA = 500000.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step gives to all layers; a captured graph has it in its place."""

    x: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor
    """Where the step's own keys and values are in the cache."""
    packed_slots: torch.Tensor
    """Where they are when packed."""
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def random(cls, card: Card, model: Model, step: Step) -> "Inputs":
        """Random rows for a step."""
        lasts = [(keys.stop, queries.stop - queries.start) for queries, keys in step.parts]
        own = torch.cat([torch.arange(end - count, end) for end, count in lasts])
        position = torch.cat(
            [torch.arange(s.seq_len - s.num_tokens, s.seq_len) for s in step.spans]
        )
        half = model.attention.head_size // 2
        angle = position[:, None, None] * THETA ** (-torch.arange(half) / half)
        cos, sin = (side.to(card.device, card.dtype) for side in (angle.cos(), angle.sin()))
        own = own.to(card.device)
        x = card.random(len(own), model.hidden)
        return cls(x, step.table.clone(), step.slots[own], own, cos, sin)

    def take(self, other: "Inputs") -> None:
        """Have the values of another step of this form."""
        for each in fields(self):
            getattr(self, each.name).copy_(getattr(other, each.name))


Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """What two sides compute differently in a layer."""

    qkv: Product
    attend: Attention
    """From queries, keys and values of the step `[num_tokens, heads, head_size]`."""
    o: Product
    gate_up: Product
    """With its activation."""
    down: Product


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[num_tokens, heads, head_size]`."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers of a llama-like model in one step; they take the weights and caches in turn."""

    card: Card
    model: Model
    step: Step
    inputs: Inputs
    weights: Sequence[dict[str, torch.Tensor]]
    caches: Sequence[torch.Tensor]

    @classmethod
    def random(cls, card: Card, model: Model, step: Step) -> "Stack":
        """One with random weights."""
        linears = [model.linears.items() for _ in range(NUM_WEIGHTS)]
        weights = [{name: card.weight(*sizes) for name, sizes in own} for own in linears]
        caches = [step.cache.clone() for _ in weights]
        return cls(card, model, step, Inputs.random(card, model, step), weights, caches)

    def ours(self, ours: Ours, table: Table, plan: AttentionPlan | None = None) -> list[Layer]:
        """The layers by our kernels."""
        launch, shape, inputs = ours.launch(self.step), self.step.shape, self.inputs
        planned = plan or ours.plan(self.step, launch)
        out = torch.empty_like(self.step.query)

        def product(values: torch.Tensor, gated: bool = False) -> Linear:
            cut = cut_for(self.card, table, values, gated, len(inputs.x))
            return Linear(self.card, len(inputs.x), Weight(values, None, gated, cut.tiles), cut)

        def attention(cache: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
            query, keys, values = sides
            num_programs = 4 * self.card.num_cores
            write_kv(shape, cache, keys, values, inputs.slots, num_programs=num_programs)
            return attend(
                planned, query, cache, inputs.table, out,
                num_warps=launch.num_warps, num_stages=launch.num_stages,
            )  # fmt: skip

        return [
            Layer(
                product(own["qkv"]), partial(attention, cache), product(own["o"]),
                product(own["gate_up"], gated=True), product(own["down"]),
            )
            for own, cache in zip(self.weights, self.caches, strict=True)
        ]  # fmt: skip

    def theirs(self, make: Callable[[Step], Attention], dtype: torch.dtype) -> list[Layer]:
        """The layers by torch's kernels, over packed keys and values to which they add."""
        activate, attention, own = compiled(silu_and_mul, self.card), make(self.step), self.inputs
        keys, values = (side.to(dtype) for side in self.step.packed())

        def product(weight: torch.Tensor) -> Product:
            exact = weight.to(dtype)
            return lambda x: linear(x, exact)

        def gated(weight: torch.Tensor) -> Product:
            plain = product(weight)
            return lambda x: activate(plain(x))

        def attended(
            kept: tuple[torch.Tensor, torch.Tensor], query: torch.Tensor, *new: torch.Tensor
        ) -> torch.Tensor:
            for side, rows in zip(kept, new, strict=True):
                side.index_copy_(0, own.packed_slots, rows)
            return attention(query, *kept)

        return [
            Layer(
                product(own["qkv"]), partial(attended, (keys.clone(), values.clone())),
                product(own["o"]), gated(own["gate_up"]), product(own["down"]),
            )
            for own in self.weights
        ]  # fmt: skip

    def forward(
        self, layers: Sequence[Layer], num_layers: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The rows after so many layers; norms, rope and residuals are torch's on both sides."""
        shape, rotate, inputs = self.step.shape, compiled(rotated, self.card), self.inputs
        x, cos, sin = (side.to(dtype or side.dtype) for side in (inputs.x, inputs.cos, inputs.sin))
        normed = partial(rms_norm, normalized_shape=x.shape[1:], eps=1e-5)
        for number in range(num_layers):
            layer = layers[number % len(layers)]
            heads = layer.qkv(normed(x)).view(len(x), -1, shape.head_size)
            qk, values = heads.split([shape.num_heads + shape.num_kv_heads, shape.num_kv_heads], 1)
            query, keys = rotate(qk, cos, sin).split([shape.num_heads, shape.num_kv_heads], 1)
            x = x + layer.o(layer.attend(query, keys, values).reshape(len(x), -1))
            x = x + layer.down(layer.gate_up(normed(x)))
        return x


def row(ours: Ours, model: Model, case: Case, num_layers: int, table: Table) -> list[Row]:
    """So many layers in a step by both sides, of which one is checked."""
    card = ours.card
    stack = Stack.random(card, model, Step.random(card, model.attention, case))

    def contestant(make: Callable[[], Sequence[Layer]]) -> Contestant:
        layers = make()
        run = partial(stack.forward, layers, num_layers)
        return Contestant([run], lambda _: stack.forward(layers, 1))

    sides = {
        "ours": partial(stack.ours, ours, table),
        "torch sdpa": partial(stack.theirs, sdpa, card.dtype),
        "torch varlen": partial(stack.theirs, varlen, card.dtype),
    }
    exact = replace(stack, weights=stack.weights[:1]).theirs(reference, torch.float32)
    expected = stack.forward(exact, 1, torch.float32)
    del exact
    makers = {who: partial(contestant, make) for who, make in sides.items()}
    return [{"layers": num_layers, "spans": case.name} | card.compared(makers, expected, 5)]


def replays(ours: Ours, model: Model, batch: int, max_seq_len: int, table: Table) -> list[Row]:
    """Whether a captured graph finds the plan and inputs of another decode step in their place.

    That step has the requests in reverse order, with half of their keys.
    """
    card, shape = ours.card, model.attention
    spans = [Span(1, max(2, max_seq_len * (index + 1) // batch)) for index in range(batch)]
    step = Step.random(card, shape, Case("decode", f"{batch} of 1", spans))
    halves = [Span(1, span.seq_len // 2) for span in reversed(spans)]
    other = replace(step, spans=halves, table=step.table.flip(0))
    num_programs = card.num_cores * ours.launch(step).programs
    planner = AttentionPlanner(shape, num_programs=num_programs, device=card.device)
    planner.reserve(batch, 1, max_seq_len)
    stack = Stack.random(card, model, step)
    layers = stack.ours(ours, table, planner.plan(step.starts, step.seq_lens))
    out = torch.empty_like(stack.inputs.x)
    replay = card.captured([lambda: out.copy_(stack.forward(layers, NUM_WEIGHTS))])
    replay()

    stack.inputs.take(Inputs.random(card, model, other))
    planner.plan(other.starts, other.seq_lens)
    replay()
    eager = replace(stack, step=other)
    expected = eager.forward(eager.ours(ours, table), NUM_WEIGHTS)
    return [{"requests": batch, "layers": NUM_WEIGHTS, "equal": torch.equal(out, expected)}]
