"""The attention of one step in `tests.bench.gpu`: our meta-kernel beside torch's and libraries'."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tests.bench.gpu_card import Call, Card, Contestant, Row, compiled, timed_s
from workers.kernels.shapes import AttentionShape
from workers.kernels.triton_attention import AttentionPlan, attend, plan_attention

TRACES = {
    "azure 2023 code": (
        (51, 37), (250, 6), (702, 279), (1093, 9), (1864, 37), (2511, 12), (3781, 14), (7435, 13),
    ),
    "azure 2023 conv": (
        (181, 84), (381, 78), (401, 105), (851, 397), (1072, 419), (1165, 409), (2236, 55),
        (4092, 44),
    ),
    "mooncake conversation": (
        (897, 352), (1343, 4), (3144, 31), (5657, 302), (10049, 309), (14814, 1072), (23009, 26),
        (55009, 644),
    ),
    "mooncake synthetic": (
        (18, 79), (30, 168), (71, 460), (528, 361), (14286, 10), (17921, 279), (28469, 2),
        (47838, 4),
    ),
}  # fmt: skip
"""Prompt and output tokens of 8 requests of each trace (Azure 2023, CC-BY-4.0; Mooncake,
Apache-2.0), about even in rank by prompt."""
MAX_PADDED_TOKENS = 64
"""Spans up to this length are filled up to one: those of decode and verify."""


@dataclass(frozen=True, slots=True)
class Span:
    """One request's query tokens in a step: the last `num_tokens` of `seq_len`."""

    num_tokens: int
    seq_len: int


@dataclass(frozen=True, slots=True)
class Case:
    """The spans of one step."""

    kind: str
    name: str
    spans: Sequence[Span]
    has_trees: bool = False
    with_flex: bool = False
    """Whether flex_attention takes part, which compiles for seconds."""


def uniform(**sizes: Sequence[tuple[int, int, int]]) -> list[Case]:
    """Steps of each kind whose spans are alike: how many, their tokens and the tokens before. Those
    of `trees` verify; flex_attention takes part in the last of a kind."""
    cases = []
    for kind, own in sizes.items():
        has_trees = kind == "trees"
        for batch, num_tokens, context in own:
            name = f"{batch} of {num_tokens} after {context}{', trees' * has_trees}"
            spans = [Span(num_tokens, context + num_tokens)] * batch
            with_flex = (batch, num_tokens, context) == own[-1]
            cases.append(Case("verify" if has_trees else kind, name, spans, has_trees, with_flex))
    return cases


def mixed(trace: str, budget: int, max_seq_len: int) -> Case:
    """A step of so many tokens, as `tests.workload` draws it: 8 to 32 requests generate, about half
    of them with 2 to 8 drafts, and prefill chunks take what is left."""
    random, lengths = Random(f"{trace} {budget}"), TRACES[trace]
    spans = []
    for _ in range(min(random.randint(8, 32), budget // 16)):
        prompt, output = random.choice(lengths)
        num_tokens = 1 + random.choice([0, random.randint(2, 8)])
        spans.append(Span(num_tokens, min(prompt + random.randint(1, output), max_seq_len)))
    while left := budget - sum(span.num_tokens for span in spans):
        prompt = min(random.choice(lengths)[0], max_seq_len)
        start = random.randrange(0, prompt, budget)
        num_tokens = min(left, prompt - start)
        spans.append(Span(num_tokens, start + num_tokens))
    return Case("mixed", f"{trace}, {budget}", spans)


@dataclass(frozen=True, slots=True)
class Step:
    """The attention of one step in one layer."""

    shape: AttentionShape
    spans: Sequence[Span]
    query: torch.Tensor
    """`[num_tokens, num_heads, head_size]`."""
    cache: torch.Tensor
    """Keys and values by pages, as our kernel reads them; some pages may be of other steps."""
    table: torch.Tensor
    """int32 `[num_spans, max_blocks]`."""
    trees: Mapping[int, NDArray[np.bool_]]

    @classmethod
    def random(cls, card: Card, shape: AttentionShape, case: Case) -> "Step":
        """A step with random values, and trees in which a token's parent is any before it."""
        random, page = np.random.default_rng(0), shape.block_size
        num_blocks = [-(-span.seq_len // page) for span in case.spans]
        # Triton compiles anew for a stride that is 1 or no multiple of 16.
        table = np.zeros((len(num_blocks), -(-max(num_blocks) // 16) * 16), np.int32)
        pages = np.split(random.permutation(sum(num_blocks)), np.cumsum(num_blocks)[:-1])
        for row, own in zip(table, pages, strict=True):
            row[: len(own)] = own
        trees = {}
        for index, span in enumerate(case.spans if case.has_trees else ()):
            trees[index] = np.eye(span.num_tokens, dtype=bool)
            for token in range(1, span.num_tokens):
                trees[index][token] |= trees[index][random.integers(token)]
        num_tokens = sum(span.num_tokens for span in case.spans)
        query = card.random(num_tokens, shape.num_heads, shape.head_size)
        cache = card.random(sum(num_blocks), shape.num_kv_heads, page, 2 * shape.head_size)
        return cls(shape, case.spans, query, cache, torch.from_numpy(table).to(card.device), trees)

    @property
    def starts(self) -> NDArray[np.int32]:
        """The first token of each span, and the end of the last."""
        return np.cumsum([0, *(span.num_tokens for span in self.spans)], dtype=np.int32)

    @property
    def seq_lens(self) -> NDArray[np.int32]:
        """Tokens of each span's request."""
        return np.array([span.seq_len for span in self.spans], np.int32)

    @property
    def parts(self) -> list[tuple[slice, slice]]:
        """Each span's queries, and its keys when packed."""
        ends = zip(self.spans, self.starts[1:], self.seq_lens.cumsum(), strict=True)
        return [(slice(q - s.num_tokens, q), slice(k - s.seq_len, k)) for s, q, k in ends]

    @property
    def slots(self) -> torch.Tensor:
        """Where the packed keys and values are in the cache."""
        page = self.shape.block_size
        slots = self.table.long()[..., None] * page + torch.arange(page, device=self.table.device)
        return torch.cat([row.ravel()[:n] for row, n in zip(slots, self.seq_lens, strict=True)])

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, span by span: `[sum of seq_lens, num_kv_heads, head_size]`."""
        slots, page = self.slots, self.shape.block_size
        keys, values = self.cache[slots // page, :, slots % page].chunk(2, -1)
        return keys.contiguous(), values.contiguous()

    def seen(self, index: int) -> torch.Tensor:
        """Which keys a span's queries see, `[num_tokens, seq_len]`."""
        span, device = self.spans[index], self.query.device
        context = span.seq_len - span.num_tokens
        seen = torch.ones(span.num_tokens, span.seq_len, dtype=torch.bool, device=device)
        if index in self.trees:
            seen[:, context:] = torch.from_numpy(self.trees[index]).to(device)
        return seen.tril_(context)

    @property
    def flops(self) -> int:
        """Operations of the two products over the keys that each query sees."""
        pairs = sum(s.num_tokens * (2 * s.seq_len - s.num_tokens + 1) // 2 for s in self.spans)
        return 4 * pairs * self.shape.num_heads * self.shape.head_size

    @property
    def num_bytes(self) -> int:
        """Bytes that have to be read and written once."""
        of_keys = int(self.seq_lens.sum()) * self.shape.num_kv_heads * 2 * self.shape.head_size
        return (of_keys + 2 * self.query.numel()) * self.query.element_size()


Attention = Callable[..., torch.Tensor]
"""From queries `[num_tokens, num_heads, head_size]` to packed keys and values."""


def reference(step: Step) -> Attention:
    """The step's attention in float32, each KV head of each span by itself."""
    group, scale = step.shape.num_heads // step.shape.num_kv_heads, step.shape.scale

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query, dtype=torch.float32)
        for index, (own, context) in enumerate(step.parts):
            unseen = ~step.seen(index)
            for head in range(step.shape.num_kv_heads):
                members = slice(head * group, (head + 1) * group)
                queries = query[own, members].transpose(0, 1).float()
                scores = queries @ keys[context, head].float().T * scale
                weights = scores.masked_fill_(unseen, -math.inf).softmax(-1)
                out[own, members] = (weights @ values[context, head].float()).transpose(0, 1)
        return out

    return attend


@dataclass(frozen=True, slots=True)
class Launch:
    """How our kernel is launched."""

    num_warps: int
    num_stages: int
    programs: int
    """For each core of the card."""


LAUNCHES = {
    16: (Launch(4, 3, 4), Launch(4, 4, 2), Launch(2, 3, 4)),
    64: (Launch(4, 2, 2), Launch(4, 3, 2), Launch(8, 2, 2)),
    128: (Launch(8, 2, 1), Launch(8, 3, 1), Launch(4, 2, 2)),
}
"""What is tried, by the rows of the tallest tile."""


@dataclass(frozen=True, slots=True)
class Ours:
    """Our attention, launched as is fastest for tiles of a height."""

    card: Card
    found: dict[Any, Launch]
    """By candidates and whether there are trees; each is measured once."""

    def plan(self, step: Step, launch: Launch) -> AttentionPlan:
        """The plan of a step, for all layers."""
        return plan_attention(
            step.shape, step.starts, step.seq_lens, step.trees,
            num_programs=self.card.num_cores * launch.programs, device=self.card.device,
        )  # fmt: skip

    def call(self, step: Step, launch: Launch) -> Call:
        """A step's attention, planned."""
        return partial(
            attend, self.plan(step, launch), step.query, step.cache, step.table,
            torch.empty_like(step.query), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip

    def candidates(self, step: Step) -> tuple[Launch, ...]:
        """The launches to try for a step."""
        return LAUNCHES[self.plan(step, LAUNCHES[16][0]).max_rows]

    def launch(self, step: Step) -> Launch:
        """The fastest launch for a step."""
        candidates = self.candidates(step)
        key = candidates, bool(step.trees)
        if key not in self.found:
            took_s = self.card.in_turns({w: [self.call(step, w)] for w in candidates}, {})
            self.found[key] = min(took_s, key=took_s.__getitem__)
        return self.found[key]

    def compile_forms(self, shapes: Iterable[AttentionShape]) -> list[Row]:
        """Compile all forms of the kernel, each for a small step."""
        cases = uniform(
            verify=[(1, 1, 256), (1, 5, 256), (1, 128, 256)], trees=[(1, 5, 256), (1, 33, 256)]
        )
        steps = [Step.random(self.card, shape, case) for shape in shapes for case in cases]
        calls = [self.call(step, launch) for step in steps for launch in self.candidates(step)]
        return [{"forms": len(calls), "s": timed_s(lambda: self.card.compile_ahead(calls))}]


def packed(make: Callable[[Step], Attention], step: Step) -> Contestant:
    """An attention over packed keys and values."""
    return Contestant([partial(make(step), step.query, *step.packed())])


def sdpa(step: Step, *, first: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Attention:
    """torch's attention, span by span, by its kernels in an order of preference."""
    _refuse(bool(step.trees), "has no trees span by span")
    scale = step.shape.scale
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def of_span(*sides: torch.Tensor) -> torch.Tensor:
        query, keys, values = (side.transpose(0, 1)[None] for side in sides)
        num_tokens, seq_len = len(sides[0]), len(sides[1])
        mask = causal_lower_right(num_tokens, seq_len) if num_tokens > 1 else None
        out = scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(list(dict.fromkeys([first, *others])), set_priority=True):
            return torch.cat([of_span(query[q], keys[k], values[k]) for q, k in step.parts])

    return attend


def varlen(step: Step) -> Attention:
    """The kernel behind torch's attention of nested tensors, all spans at once."""
    kernel, bounds = torch.ops.aten._flash_attention_forward, _bounds(step)
    return lambda *sides: kernel(*sides, *bounds, 0.0, True, False, scale=step.shape.scale)[0]


def flash_attn(step: Step) -> Attention:
    """FlashAttention 3 or 2, all spans at once."""
    kernel, bounds = _import("flash_attn_interface", "flash_attn"), _bounds(step)

    def attend(*sides: torch.Tensor) -> Any:
        options = {"softmax_scale": step.shape.scale, "causal": True}
        out = kernel.flash_attn_varlen_func(*sides, *bounds, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _bounds(step: Step) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Where the queries and the keys of each span begin and end, and the longest."""
    _refuse(bool(step.trees), "has no trees")
    key_starts = np.cumsum([0, *step.seq_lens], dtype=np.int32)
    starts, ends = (torch.from_numpy(a).to(step.query.device) for a in (step.starts, key_starts))
    return starts, ends, int(np.diff(step.starts).max()), int(step.seq_lens.max())


class Padded:
    """The spans of a step filled up to one length; the query heads of a KV head are its rows."""

    def __init__(self, step: Step) -> None:
        shape, self.spans, num_spans = step.shape, step.spans, len(step.spans)
        self.sizes = shape.num_heads // shape.num_kv_heads, max(s.num_tokens for s in self.spans)
        group, num_tokens = self.sizes
        seq_len = -(-max(span.seq_len for span in step.spans) // 64) * 64
        query = step.query.new_zeros(num_spans, num_tokens, shape.num_heads, shape.head_size)
        seen = query.new_zeros(num_spans, num_tokens, seq_len, dtype=torch.bool)
        seen[..., 0] = True  # by tokens that only fill up
        sizes = num_spans, shape.num_kv_heads, seq_len, shape.head_size
        self.keys, self.values = query.new_zeros(sizes), query.new_zeros(sizes)
        keys, values = (side.transpose(0, 1) for side in step.packed())
        for index, (own, context) in enumerate(step.parts):
            span = step.spans[index]
            query[index, : span.num_tokens] = step.query[own]
            seen[index, : span.num_tokens, : span.seq_len] = step.seen(index)
            self.keys[index, :, : span.seq_len] = keys[:, context]
            self.values[index, :, : span.seq_len] = values[:, context]
        grouped = query.unflatten(2, (shape.num_kv_heads, group)).permute(0, 2, 3, 1, 4)
        self.query, self.seen = grouped.flatten(2, 3).contiguous(), seen.repeat(1, group, 1)

    def rows(self, out: torch.Tensor) -> torch.Tensor:
        """The rows of `[num_spans, num_kv_heads, group * num_tokens, head_size]` that are real."""
        heads = out.unflatten(2, self.sizes).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return torch.cat([own[: s.num_tokens] for own, s in zip(heads, self.spans, strict=True)])


def sdpa_padded(step: Step) -> Contestant:
    """torch's attention, all spans at once."""
    _refuse(max(np.diff(step.starts)) > MAX_PADDED_TOKENS, "is for decode and verify")
    padded = Padded(step)
    mask = torch.zeros_like(padded.seen, dtype=step.query.dtype)
    mask = mask.masked_fill_(~padded.seen, -math.inf)[:, None]
    run = partial(
        scaled_dot_product_attention, padded.query, padded.keys, padded.values,
        attn_mask=None if padded.seen.all() else mask, scale=step.shape.scale,
    )  # fmt: skip
    return Contestant([run], padded.rows)


def flex(step: Step, card: Card) -> Contestant:
    """flex_attention, all spans at once."""
    padded = Padded(step)
    num_spans, num_rows, num_keys = padded.seen.shape
    mask = create_block_mask(
        lambda b, _, q, k: padded.seen[b, q, k],
        num_spans, None, num_rows, num_keys, device=card.device,
    )  # fmt: skip
    run = partial(
        compiled(flex_attention, card), padded.query, padded.keys, padded.values,
        block_mask=mask, scale=step.shape.scale,
    )  # fmt: skip
    return Contestant([run], padded.rows)


def flashinfer(step: Step) -> Contestant:
    """FlashInfer over the pages, all spans at once."""
    _refuse(bool(step.trees), "is given no trees")
    library, shape, device = _import("flashinfer"), step.shape, step.query.device
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    num_pages = -(-step.seq_lens // shape.block_size)
    pages = torch.cat([row[:count] for row, count in zip(step.table, num_pages, strict=True)])
    last = step.seq_lens - (num_pages - 1) * shape.block_size
    arrays = step.starts, np.cumsum([0, *num_pages], dtype=np.int32), last
    starts, page_starts, last_len = (torch.from_numpy(array).to(device) for array in arrays)
    wrapper.plan(
        starts, page_starts, pages, last_len,
        shape.num_heads, shape.num_kv_heads, shape.head_size, shape.block_size,
        causal=True, sm_scale=shape.scale,
        q_data_type=step.query.dtype, kv_data_type=step.query.dtype,
    )  # fmt: skip
    keys, values = (side.contiguous() for side in step.cache.chunk(2, -1))
    return Contestant([partial(wrapper.run, step.query, (keys, values))])


RIVALS: dict[str, Callable[[Step], Contestant]] = {
    "sdpa": partial(packed, sdpa),
    "sdpa cudnn": partial(packed, partial(sdpa, first=SDPBackend.CUDNN_ATTENTION)),
    "sdpa padded": sdpa_padded,
    "torch varlen": partial(packed, varlen),
    "flash_attn": partial(packed, flash_attn),
    "flashinfer": flashinfer,
}


def _refuse(is_refused: bool, why: str) -> None:
    if is_refused:
        raise NotServedError(why)


class NotServedError(Exception):
    """Why a rival cannot compute a step."""


def _import(*names: str) -> Any:
    """The first of these modules that is installed."""
    found = [name for name in names if find_spec(name)]
    _refuse(not found, f"{names[-1]} is not installed")
    return import_module(found[0])


def row(ours: Ours, model: str, shape: AttentionShape, case: Case) -> list[Row]:
    """A step's attention in one layer beside the rivals'."""
    card, step = ours.card, Step.random(ours.card, shape, case)
    launch = ours.launch(step)
    makers: dict[str, Callable[[], Contestant]] = {
        "ours": lambda: Contestant([ours.call(step, launch)]),
        **{name: partial(make, step) for name, make in RIVALS.items()},
    }
    if case.with_flex:
        makers["flex"] = partial(flex, step, card)
    found = card.compared(makers, reference(step)(step.query, *step.packed()))
    return [
        {"model": model, "kind": case.kind, "spans": case.name, **found}
        | {"of limit": card.of_limit(step.flops, step.num_bytes, found)}
        | {"plan ms": 1000 * timed_s(lambda: ours.plan(step, launch)), "launch": str(launch)}
    ]


def invariance(ours: Ours, model: str, shape: AttentionShape, case: Case) -> list[Row]:
    """Whether spans, and their last tokens, have the same bits alone."""
    step = Step.random(ours.card, shape, case)

    def result(step: Step) -> torch.Tensor:
        out: torch.Tensor = ours.call(step, ours.launch(step))()
        return out

    together = result(step)
    differs = []
    for index, (span, (own, _)) in enumerate(zip(step.spans, step.parts, strict=True)):
        alone = replace(step, spans=[span], query=step.query[own], table=step.table[[index]])
        last = replace(alone, spans=[Span(1, span.seq_len)], query=alone.query[-1:])
        if not torch.equal(together[own], result(alone)):
            differs.append(f"{span.num_tokens} of {span.seq_len} alone")
        elif not torch.equal(together[own][-1:], result(last)):
            differs.append(f"the last of {span.seq_len} after {span.num_tokens - 1} others")
    return [{"model": model, "spans": case.name, "equal": not differs, "differs at": differs}]
