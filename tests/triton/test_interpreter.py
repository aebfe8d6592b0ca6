"""The kernels' arithmetic, by Triton's interpreter, which knows no compiler.

bf16 is left out, of which it adds and multiplies the bits; and so are equal bits, as its products
are numpy's.
"""

import numpy as np
import pytest
import torch

from tests.triton.scenes import (
    CHUNK_KEYS,
    NUM_PROGRAMS,
    PRODUCTS,
    SCENES,
    TOLERANCE,
    Layer,
    Product,
    attention_error,
    product_error,
)
from workers.kernels import triton_attention
from workers.kernels.triton_attention import AttentionPlanner, attend

DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scene", SCENES)
def test_a_step_attends_as_its_slow_twin(scene: str, dtype: torch.dtype) -> None:
    assert attention_error(Layer(SCENES[scene], dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_products_are_those_of_the_slow_twin(product: dict[str, bool], dtype: torch.dtype) -> None:
    assert product_error(Product(dtype, **product)) < 3 * TOLERANCE[dtype]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "CHUNK_KEYS", CHUNK_KEYS)


@pytest.mark.usefixtures("short_chunks")
def test_a_launch_of_one_step_attends_as_planned_for_the_next() -> None:
    """As a captured graph replays: nothing of the launch changes but what its tables hold."""
    layer = Layer(SCENES["decodes"], torch.float32)
    scene, num_spans = layer.scene, len(layer.scene.seq_lens)
    planner = AttentionPlanner(scene.shape, num_programs=NUM_PROGRAMS)
    planner.reserve(num_spans, 1, max(scene.seq_lens))
    captured = planner.plan(scene.starts, np.ones(num_spans, np.int32))

    planner.plan(scene.starts, np.array(scene.seq_lens, np.int32))

    out = torch.full_like(layer.query, 7.0)
    attend(captured, layer.query, layer.cache, torch.from_numpy(layer.table), out)
    for span in range(num_spans):
        assert out[span].numpy() == pytest.approx(layer.expected(span)[0], abs=1e-5)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("query_len", [1, 5, 40])
def test_reserved_tables_stay_where_they_are(query_len: int) -> None:
    max_spans, max_keys = 9, 700
    random = np.random.default_rng(query_len)
    planner = AttentionPlanner(SCENES["groups of 2"].shape, num_programs=NUM_PROGRAMS)
    planner.reserve(max_spans, query_len, max_keys)
    places = set()
    for _ in range(200):
        num_spans = random.integers(1, max_spans + 1)
        starts = np.arange(num_spans + 1, dtype=np.int32) * query_len
        seq_lens = random.integers(query_len, max_keys + 1, num_spans, np.int32)
        plan = planner.plan(starts, seq_lens)
        tables = (plan.tasks, plan.merges, plan.counts, plan.partial_values, plan.partial_sums)
        places.add(tuple(table.data_ptr() for table in tables))

    assert len(places) == 1
