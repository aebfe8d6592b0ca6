import json
import math
import statistics
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cost_fit import fit
from scheduler.cost_model import CostModel, StepShape
from scheduler.task import Stage, StageTask

CHUNKS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

TRUTH = CostModel(
    # About SmolLM2-135M on one core: 16 ms of reading, then 2.6 ms a token, 0.6 ms a logit.
    [
        0.014, 0, 0.001, 0.0008, 0.0016, 0.002, 0.0026, 0.0022, 0.0024, 0.0025, 0.0026, 0.0027,
        0, 0.0002, 0.0006, 0.0006, 0, 2e-6, 1.5e-7,
    ],
    token_knots=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    sample_knots=(0, 1, 4, 16),
)  # fmt: skip


DECODE, PROMPT = (StepShape(32).plus(num_tokens, num_tokens, 1) for num_tokens in (1, 2))


def random_shape(random: Random, model: CostModel = TRUTH) -> StepShape:
    """Up to 32 decodes, and in half of the cases a chunk of a prompt."""
    shape = model.shape()
    for _ in range(random.randint(0, 32)):
        shape.add(1, random.randint(1, 2000), 1)
    if random.random() < 0.5 or not shape.num_tokens:
        num_tokens = random.choice(CHUNKS)
        shape.add(num_tokens, num_tokens + random.randint(0, 2000), random.randint(0, 1))
    return shape


def measured_s(shape: StepShape, random: Random, *, outliers: float = 0.0) -> float:
    """The true seconds with 3% of noise; a share of `outliers` takes 1.5 to 5 times as long."""
    seconds = TRUTH.predict(shape) * math.exp(random.gauss(0, 0.03))
    return seconds * (random.uniform(1.5, 5) if random.random() < outliers else 1)


def median_error(model: CostModel, random: Random) -> float:
    shapes = [random_shape(random) for _ in range(300)]
    return statistics.median(abs(model.predict(s) / TRUTH.predict(s) - 1) for s in shapes)


def profile(random: Random, count: int = 200, *, outliers: float = 0.0) -> CostModel:
    shapes = [random_shape(random) for _ in range(count)]
    return fit([(shape, measured_s(shape, random, outliers=outliers)) for shape in shapes])


@pytest.fixture(scope="module")
def fitted() -> CostModel:
    return profile(Random(0))


def copy(model: CostModel) -> CostModel:
    return CostModel.from_dict(json.loads(json.dumps(model.to_dict())))


def test_a_shape_counts_the_work_of_its_tasks() -> None:
    model = CostModel([0.0] * 6, token_knots=(0,), sample_knots=(0,), query_tile=32)
    shape = model.shape_of(
        [
            StageTask("d", Stage.DECODE, 1, 100, samples=True),
            StageTask("v", Stage.VERIFY, 4, 50, samples=True),
            StageTask("p", Stage.PREFILL, 40, 60, samples=False),
            StageTask("q", Stage.PREFILL, 2, 2, samples=True),
        ]
    )

    assert shape == StepShape(
        query_tile=32,
        num_tokens=47,
        num_samples=6,
        num_logits=7,
        num_spans=4,
        num_kv_reads=100 + 50 + 2 * 60 + 2,
        num_pairs=100 + (47 + 48 + 49 + 50) + sum(range(21, 61)) + 3,
    )


def test_a_draft_makes_a_span_longer_by_one_token() -> None:
    shape = TRUTH.shape().plus(1, 100, 1)

    longer = shape.longer(101)

    expected = TRUTH.shape().plus(2, 101, 2)
    expected.num_kv_reads = 100  # whether the tile reads one token more is not worth counting
    assert longer == expected
    assert shape == TRUTH.shape().plus(1, 100, 1)


def test_a_fit_reproduces_exact_measurements() -> None:
    random = Random(1)
    shapes = [random_shape(random) for _ in range(200)]

    model = fit([(shape, TRUTH.predict(shape)) for shape in shapes])

    assert median_error(model, Random(2)) < 1e-6


@pytest.mark.parametrize("outliers", [0.0, 0.1, 0.25])
def test_a_fit_is_not_led_astray_by_outliers(outliers: float) -> None:
    assert median_error(profile(Random(3), outliers=outliers), Random(2)) < 0.03


def test_without_drafts_the_cost_of_a_span_is_in_its_row_of_the_head(fitted: CostModel) -> None:
    decode, verify = (fitted.shape().plus(n, 100, n) for n in (1, 5))

    assert fitted.predict(verify) - fitted.predict(decode) == pytest.approx(
        TRUTH.predict(verify) - TRUTH.predict(decode), rel=0.5
    )


def test_knots_between_which_nothing_was_measured_are_left_out() -> None:
    shapes = [TRUTH.shape().plus(n, n, 1) for n in (1, 2, 40, 100)]

    model = fit([(shape, TRUTH.predict(shape)) for shape in shapes])

    assert model.token_knots == (0, 1, 32, 64)
    assert model.sample_knots == (0,)


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [(DECODE, 1.0)],
        [(DECODE, 1.0), (StepShape(16).plus(2, 2, 1), 1.0)],
        [(DECODE, 1.0), (PROMPT, 0.0)],
        [(DECODE, 1.0), (PROMPT, math.nan)],
        [(StepShape(32), 1.0), (PROMPT, 1.0)],
    ],
)
def test_a_fit_refuses_malformed_measurements(steps: list[tuple[StepShape, float]]) -> None:
    with pytest.raises(ValueError, match="a fit needs"):
        fit(steps)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [0.1]},
        {"weights": [-0.1] * 6},
        {"weights": [math.nan] * 6},
        {"speed": 0.0},
        {"token_knots": [1]},
        {"token_knots": []},
        {"sample_knots": [0, 4, 4]},
        {"token_tile": 0},
        {"query_tile": 0},
    ],
)
def test_a_malformed_model_is_refused(change: dict[str, object]) -> None:
    state = CostModel([0.1] * 6, token_knots=(0,), sample_knots=(0,)).to_dict()

    with pytest.raises(ValueError, match=r"\(|has 6 weights"):
        CostModel.from_dict(state | change)


def test_the_longest_chunk_is_the_last_that_keeps_the_limit(fitted: CostModel) -> None:
    decodes = fitted.shape().plus(1, 500, 1)
    limit_s = 0.3

    chunk = fitted.longest_chunk(decodes, 100, 2000, limit_s)

    assert 0 < chunk < 2000
    assert fitted.predict(decodes.plus(chunk, 100 + chunk, 0)) <= limit_s
    assert fitted.predict(decodes.plus(chunk + 1, 101 + chunk, 0)) > limit_s
    assert fitted.longest_chunk(decodes, 100, 2000, math.inf) == 2000
    assert fitted.longest_chunk(decodes, 100, 2000, 0.0) == 0


@pytest.mark.parametrize("slowdown", [1.3, 2.0, 3.0])
def test_predictions_follow_a_machine_that_gets_slower_and_fast_again(
    fitted: CostModel, slowdown: float
) -> None:
    model, random = copy(fitted), Random(5)

    for factor in (slowdown, 1.0, slowdown, 1.0):
        errors = []
        for _ in range(200):
            shape = random_shape(random)
            seconds = factor * measured_s(shape, random, outliers=0.1)
            errors.append(abs(model.predict(shape) / seconds - 1))
            model.observe(shape, seconds)
        assert statistics.median(errors[-50:]) < 0.1
    assert model.error < 0.1
    assert median_error(model, random) < 0.1


def test_one_outlier_hardly_changes_a_prediction(fitted: CostModel) -> None:
    model, random = copy(fitted), Random(6)
    for _ in range(20):
        shape = random_shape(random)
        model.observe(shape, TRUTH.predict(shape))
    probe = random_shape(random)
    before_s = model.predict(probe)

    model.observe(probe, 100 * before_s)

    assert model.predict(probe) == pytest.approx(before_s, rel=0.03)


def test_a_wrong_weight_of_the_profile_is_learnt(fitted: CostModel) -> None:
    state = fitted.to_dict()
    state["weights"][-2] *= 2  # of the KV reads
    model, random = CostModel.from_dict(state), Random(7)
    before = median_error(model, Random(2))

    for _ in range(2000):
        shape = random_shape(random)
        model.observe(shape, measured_s(shape, random))

    assert median_error(model, Random(2)) < max(0.03, before / 2)


def test_outliers_do_not_add_up_over_a_long_time(fitted: CostModel) -> None:
    model, random = copy(fitted), Random(8)

    for _ in range(20_000):
        shape = random_shape(random)
        model.observe(shape, measured_s(shape, random, outliers=0.1))

    assert median_error(model, random) < 0.05
    for now, profiled in zip(model.to_dict()["weights"], fitted.to_dict()["weights"], strict=True):
        assert profiled / 3 <= now * (1 + 1e-9)
        assert now <= profiled * 3 * (1 + 1e-9)


def test_the_error_is_the_median_of_recent_ones() -> None:
    model = CostModel([1.0, 0, 0, 0, 0, 0], token_knots=(0,), sample_knots=(0,))
    assert model.error == 0

    model.observe(model.shape().plus(1, 1, 1), 2.0)

    assert model.error == 0.5


spans = st.tuples(st.integers(1, 4096), st.integers(0, 100_000), st.booleans())
weights = st.lists(st.floats(0, 10), min_size=6 + 3, max_size=6 + 3)
observed = st.lists(st.tuples(spans, st.floats(allow_nan=True, allow_infinity=True)), max_size=40)


@given(weights=weights, steps=observed, span=spans, more=st.integers(1, 500), wide=st.booleans())
@settings(deadline=None)
def test_predictions_grow_with_tokens_and_context_whatever_was_observed(
    weights: list[float],
    steps: list[tuple[tuple[int, int, bool], float]],
    span: tuple[int, int, bool],
    more: int,
    wide: bool,
) -> None:
    model = CostModel(
        weights, token_knots=(0, 8, 64), sample_knots=(0, 4), token_tile=16 if wide else 1
    )
    for (num_tokens, context, samples), seconds in steps:
        model.observe(model.shape().plus(num_tokens, context + num_tokens, samples), seconds)
    num_tokens, context, samples = span

    seconds = model.predict(model.shape().plus(num_tokens, context + num_tokens, samples))

    longer = model.shape().plus(num_tokens + more, context + num_tokens + more, samples)
    further = model.shape().plus(num_tokens, context + more + num_tokens, samples)
    verified = model.shape().plus(num_tokens, context + num_tokens, samples).longer(context)
    assert math.isfinite(seconds)
    assert 0 == model.predict(model.shape()) <= seconds
    for greater in (longer, further, verified):
        assert seconds <= model.predict(greater) * (1 + 1e-9)


@given(steps=st.lists(st.tuples(spans, st.floats(1e-6, 1e3)), min_size=2, max_size=30))
@settings(deadline=None, max_examples=50)
def test_a_fit_of_any_measurements_is_a_model(
    steps: list[tuple[tuple[int, int, bool], float]],
) -> None:
    shapes = [StepShape(32).plus(n, context + n, samples) for (n, context, samples), _ in steps]

    model = fit([(shape, seconds) for shape, (_, seconds) in zip(shapes, steps, strict=True)])

    assert all(0 <= model.predict(shape) < math.inf for shape in shapes)
    assert copy(model).to_dict() == model.to_dict()


def test_lateness_is_what_one_step_in_ten_exceeds() -> None:
    model = CostModel([0.01, 0.001, 0, 0, 0, 0], token_knots=(0,), sample_knots=(0,))
    shape = model.shape()
    shape.add(10, 10, 1)
    assert model.lateness == 0

    for index in range(200):
        late = 1.3 if index % 9 == 0 else 1.0
        model.observe(shape, late * model.predict(shape))

    assert model.lateness == pytest.approx(0.3, abs=0.01)
    assert model.error == pytest.approx(0, abs=0.01)
