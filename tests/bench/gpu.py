"""Our Triton kernels against torch's and libraries' on an NVIDIA GPU: GEMM, attention, layers.

    python -m tests.bench.gpu --json gpu.json

Needs torch, triton and numpy, and at most `--minutes`. Each cell is checked against float32 first;
what is wrong, fails or does not fit the time is named, and the rest goes on. Contestants are CUDA
graphs that take turns, each after a write that clears the second-level cache; figures are medians.

GEMM: the linears of three models at M rows in bf16, against `torch.nn.functional.linear` (cuBLAS),
with copies of weights that together exceed the cache; gate_up with its activation (`fused`) apart.
Tiles are searched for (`--no-search` takes built-in ones): the best for each weight and range of M,
in the JSON as `tiles`. A weight has one BLOCK_K for all M, which is the order of its sums.

Attention: decode, prefill, verify and mixed steps drawn from traces, over pages of 64 tokens,
against the fastest of SDPA (span by span, by cuDNN, padded), torch's kernel for spans of any
length, flex_attention (in few cells, as it compiles for seconds), FlashAttention and FlashInfer.
All but the last find keys and values contiguous. `plan` is our plan, made once per step.

Layers: one, and a stack of 32 like Llama-3-8B's, with four layers' weights in turn: ours against
cuBLAS and the faster of torch's attentions; both sides share norms, rope and residuals. `replays`
is whether a captured graph computes another step once that is planned.

`ratio` is the time of the fastest rival over ours: above 1 ours is faster. `of limit` is the time
that the card's memory or arithmetic needs, over ours.

Without a GPU, `TRITON_INTERPRET=1 python -m tests.bench.gpu --interpret` takes the same way with
tiny sizes, for its checks; its figures mean nothing.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

try:
    import torch
    import triton
except ModuleNotFoundError as error:
    print(f"This benchmark needs {error.name}, which is not installed.", file=sys.stderr)
    sys.exit(2)

from tests.bench import gpu_attention, gpu_gemm, gpu_layers
from tests.bench.gpu_attention import TRACES, Case, Ours, mixed, uniform
from tests.bench.gpu_card import Card, Cells, Row, reason
from tests.bench.gpu_gemm import Model, Table, products
from workers.kernels.shapes import AttentionShape

NEEDS = (
    "This benchmark needs an NVIDIA GPU; without one, "
    "`TRITON_INTERPRET=1 python -m tests.bench.gpu --interpret` checks it in Triton's interpreter."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is measured."""

    models: Mapping[str, Model]
    num_rows: Sequence[int]
    mixed: Sequence[Case]
    uniform: Sequence[Case]
    batch: int
    """Requests of the step for which a captured graph is planned anew."""
    max_seq_len: int
    num_layers: int


_heads = partial(AttentionShape, head_size=128, block_size=64, scale=128**-0.5)
GPU = Grid(
    models={
        "Llama-3-8B": Model(4096, 14336, _heads(num_heads=32, num_kv_heads=8)),
        "Qwen2.5-7B": Model(3584, 18944, _heads(num_heads=28, num_kv_heads=4), True),
        "Qwen2.5-32B TP4": Model(5120, 6912, _heads(num_heads=10, num_kv_heads=2), True),
    },
    num_rows=(1, 2, 4, 8, 16, 32, 64, 65, 128, 256, 512, 1024, 2048, 4096),
    mixed=[mixed(trace, budget, 16384) for budget in (2048, 8192) for trace in TRACES],
    uniform=uniform(
        decode=[(1, 1, 8192), (8, 1, 2048), (32, 1, 1024), (128, 1, 1024), (32, 1, 4096)],
        prefill=[(1, 512, 0), (1, 2048, 0), (1, 2048, 6144), (1, 8192, 0), (1, 2048, 2048)],
        verify=[(8, 5, 2048), (32, 5, 1024), (32, 9, 2048)],
        trees=[(8, 33, 2048), (32, 13, 2048)],
    ),
    batch=32,
    max_seq_len=16384,
    num_layers=32,
)
_tiny = _heads(num_heads=4, num_kv_heads=2, head_size=16, block_size=16)
TINY = Grid(
    models={"tiny": Model(64, 48, _tiny, True)},
    num_rows=(1, 17, 65),
    mixed=[mixed(trace, 48, 90) for trace in TRACES],
    uniform=uniform(
        decode=[(3, 1, 40)], prefill=[(1, 20, 30)], verify=[(2, 5, 30)], trees=[(2, 7, 40)]
    ),
    batch=3,
    max_seq_len=90,
    num_layers=2,
)


@dataclass(slots=True)
class Report:
    """What was found, and what was not."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def measure(self, section: str, cells: Cells, end_s: float) -> None:
        """Measure the cells of a section; none begins after `end_s`."""
        for cell, measure in cells:
            what = f"{section}: {cell}"
            if time.monotonic() > end_s:
                self.skipped[what] = "the time was over"
                continue
            try:
                rows = list(measure())
            except Exception as error:  # the GPU may be there once: the rest shall be measured
                self.failed[what] = reason(error)
                print(f"{what} FAILED: {self.failed[what]}", flush=True)
                continue
            self.rows.setdefault(section, []).extend(rows)
            for row in rows:
                print(f"{what}:", ", ".join(f"{k} {v}" for k, v in _shown(row).items()), flush=True)

    def summary(self) -> dict[str, float | bool | None]:
        """Geometric means of the ratios, and the answers: None where nothing was measured."""
        gemms, steps = self.rows.get("gemm", []), self.rows.get("attention", [])
        plain = [row for row in gemms if not row["linear"].endswith("fused")]
        layers = self.rows.get("layers", [])
        groups = {
            "gemm_geomean_m1_64": [row["ratio"] for row in plain if row["M"] <= 64],
            "gemm_geomean_m65_4096": [row["ratio"] for row in plain if row["M"] > 64],
            "gemm_fused_geomean": [row["ratio"] for row in gemms if row not in plain],
            **{
                f"attention_{kind}_geomean": [r["ratio"] for r in steps if r["kind"] == kind]
                for kind in ("mixed", "decode", "prefill", "verify")
            },
            "layer_mixed_geomean": [row["ratio"] for row in layers if row["layers"] == 1],
            "stack_mixed_geomean": [row["ratio"] for row in layers if row["layers"] > 1],
        }
        answers = {
            "gemm_is_batch_invariant": "gemm invariance",
            "attention_is_batch_invariant": "attention invariance",
            "graph_replays_new_plans": "replays",
        }
        equal = {key: [row["equal"] for row in self.rows.get(s, [])] for key, s in answers.items()}
        return {
            **{key: statistics.geometric_mean(own) if own else None for key, own in groups.items()},
            "gemm_min": min((row["ratio"] for row in plain), default=None),
            **{key: all(own) if own else None for key, own in equal.items()},
        }

    def write(self, card: Card, path: Path | None) -> None:
        """Write what was found until now: the GPU may be gone before the end."""
        rows = {name: own for name, own in self.rows.items() if name != "tiles"}
        document: dict[str, Any] = {
            "machine": machine(card),
            "rows": rows,
            "tiles": self.rows.get("tiles"),
            "summary": self.summary(),
            "skipped": self.skipped,
            "failed": self.failed,
        }
        if path is not None:
            path.write_text(json.dumps(document, indent=1) + "\n")

    def show(self, card: Card) -> None:
        """Print tables, what is not in them, and the summary."""
        for section, rows in self.rows.items():
            shown = [_shown(row) for row in rows]
            lines = [list(shown[0]), *(list(row.values()) for row in shown)]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            print(f"\n{section}")
            for line in lines:
                print("  ".join(map(str.ljust, line, widths)))
        for title, reasons in (("skipped", self.skipped), ("FAILED", self.failed)):
            missing = (f"\n  {what}: {why}" for what, why in reasons.items())
            print(f"\n{title}: {len(reasons)}", *missing, sep="")
        for key, value in _shown(machine(card) | self.summary()).items():
            print(f"{key:>28} {value}")


def _shown(row: Row) -> dict[str, str]:
    plain = {key: value for key, value in row.items() if not isinstance(value, dict)}
    return {k: f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in plain.items()}


def machine(card: Card) -> dict[str, Any]:
    """The card and the versions that a figure belongs to."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"gpu": card.name, "cuda": torch.version.cuda, **versions, "date": date}


def sections(card: Card, grid: Grid, searches: bool) -> Iterator[tuple[str, float, Cells]]:
    """What is measured, in order, each with the share of the time at which it ends."""
    models, rows, table, ours = grid.models, grid.num_rows, Table(), Ours(card, {})
    shapes = {name: model.attention for name, model in models.items()}
    first, llama = next(iter(models.items()))

    def gemms(measure: Callable[..., list[Row]], *args: Any) -> Cells:
        return ((what, partial(measure, own, *args)) for what, own in products(card, models))

    def gemm_rows() -> Cells:
        for what, own in products(card, models):
            yield from ((f"{what} M={m}", partial(gpu_gemm.row, own, m, table)) for m in rows)

    def attentions(measure: Callable[..., list[Row]], cases: Sequence[Case]) -> Cells:
        for case, (name, shape) in itertools.product(cases, shapes.items()):
            own = replace(case, with_flex=case.with_flex and name == first)
            yield f"{name} {case.kind} {case.name}", partial(measure, ours, name, shape, own)

    def layers() -> Cells:
        for case, count in itertools.product(grid.mixed, (1, grid.num_layers)):
            yield f"{count}, {case.name}", partial(gpu_layers.row, ours, llama, case, count, table)

    if searches:
        yield "tiles", 0.35, gemms(gpu_gemm.searched, table)
    yield "gemm", 0.55, gemm_rows()
    yield "gemm invariance", 0.58, gemms(gpu_gemm.invariance, rows, table)
    yield "attention forms", 0.6, iter([("all", partial(ours.compile_forms, shapes.values()))])
    yield "attention", 0.82, attentions(gpu_attention.row, [*grid.mixed, *grid.uniform])
    yield "attention invariance", 0.85, attentions(gpu_attention.invariance, grid.mixed[:1])
    replay = partial(gpu_layers.replays, ours, llama, grid.batch, grid.max_seq_len, table)
    yield "replays", 0.87, iter([(f"{grid.batch} decodes", replay)])
    yield "layers", 1.0, layers()


def main() -> int:
    """Run the benchmark; 1 if a cell failed, 2 if there is no GPU."""
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin nothing after these")
    parser.add_argument("--no-search", action="store_true", help="take built-in tiles")
    parser.add_argument("--interpret", action="store_true", help="check without a GPU")
    options = parser.parse_args()
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if options.interpret != is_interpreted or not (is_interpreted or torch.cuda.is_available()):
        print(NEEDS, file=sys.stderr)
        return 2
    card, grid = (Card.interpreted(), TINY) if is_interpreted else (Card.find(), GPU)
    if is_interpreted:
        print("No GPU: tiny sizes in Triton's interpreter, whose figures mean nothing.")
    torch.manual_seed(0)
    report, began_s = Report(), time.monotonic()
    for section, share, cells in sections(card, grid, not options.no_search):
        report.measure(section, cells, began_s + share * 60 * options.minutes)
        report.write(card, options.json)
    report.show(card)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
