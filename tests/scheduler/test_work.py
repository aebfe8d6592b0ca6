from random import Random

import pytest

from scheduler.cost_model import StepShape
from scheduler.simulation.roofline import MODELS
from scheduler.work import ModelWork

WORK = ModelWork(
    body_flops_per_token=1000,
    head_flops_per_logit=200,
    flops_per_pair=3,
    body_bytes=5000,
    head_bytes=700,
    kv_bytes_per_token=8,
)


def shape_of(*spans: tuple[int, int, int]) -> StepShape:
    """Spans of (query tokens, length of the sequence, sampled tokens)."""
    shape = StepShape(query_tile=16)
    for span in spans:
        shape.add(*span)
    return shape


def test_a_decode_reads_all_weights_and_its_context() -> None:
    shape = shape_of((1, 100, 1))

    assert WORK.flops(shape) == 1000 + 200 + 3 * 100
    assert WORK.memory_bytes(shape) == 5000 + 700 + 8 * (1 + 100)


def test_a_prompt_reads_its_context_once_for_each_query_tile() -> None:
    shape = shape_of((20, 30, 1))  # the first query sees 11 keys, the last one 30

    assert WORK.flops(shape) == 20 * 1000 + 200 + 3 * sum(range(11, 31))
    assert WORK.memory_bytes(shape) == 5000 + 700 + 8 * (20 + 2 * 30)


def test_an_empty_step_takes_nothing() -> None:
    assert WORK.flops(shape_of()) == WORK.memory_bytes(shape_of()) == 0


def test_spans_add_up_except_for_the_weights_that_are_read_once() -> None:
    random = Random(0)
    for _ in range(100):
        spans = []
        for _ in range(random.randint(1, 20)):
            num_tokens = random.randint(1, 300)
            seq_len = num_tokens + random.randint(0, 2000)
            spans.append((num_tokens, seq_len, random.randint(0, num_tokens)))

        together, alone = shape_of(*spans), [shape_of(span) for span in spans]

        assert WORK.flops(together) == sum(map(WORK.flops, alone))
        weights = WORK.body_bytes + WORK.head_bytes
        assert WORK.memory_bytes(together) - weights == sum(
            WORK.memory_bytes(shape) - weights for shape in alone
        )


def test_the_work_of_a_model_follows_from_its_config() -> None:
    work = MODELS["llama-3-8b"].work

    assert work.head_flops_per_logit == 2 * 128256 * 4096
    assert work.body_flops_per_token == pytest.approx(2 * (8.03e9 - 2 * 128256 * 4096))
    assert work.flops_per_pair == 4 * 4096 * 32
    assert work.body_bytes == work.body_flops_per_token  # 16 bits a parameter, 2 flops each
    assert work.head_bytes == work.head_flops_per_logit
    assert work.kv_bytes_per_token == 131072
