import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cost_model import CostModel
from scheduler.hybrid import MARGIN, HybridScheduler
from scheduler.request import Slo
from scheduler.speculation import (
    MAX_CHANCE,
    PROBE_STEPS,
    REST_STEPS,
    Acceptance,
    num_expected,
)
from scheduler.task import BatchPlan, Stage
from tests.scheduler.scenes import (
    FIXED_S,
    LIMITS,
    TOKEN_S,
    cost_model,
    decoding,
    prefilling,
    tokens,
    view,
)


def plan(*states: object) -> BatchPlan:
    return HybridScheduler(LIMITS, cost_model()).plan(view(list(states)), 1.0)  # type: ignore[arg-type]


def test_likely_drafts_are_verified_where_a_token_costs_less_than_the_step() -> None:
    made = plan(decoding("a", num_drafts=4, acceptance_rate=0.9))

    assert tokens(made) == {"a": 5}
    assert made.tasks[0].stage is Stage.VERIFY
    assert made.tasks[0].seq_len == 109


def test_unlikely_drafts_are_not_verified() -> None:
    made = plan(decoding("a", num_drafts=4, acceptance_rate=0.05))

    assert tokens(made) == {"a": 1}
    assert made.tasks[0].stage is Stage.DECODE


def test_the_likelier_request_gets_more_of_its_drafts() -> None:
    made = tokens(
        plan(
            decoding("sure", num_drafts=8, acceptance_rate=0.9),
            decoding("unsure", num_drafts=8, acceptance_rate=0.4),
        )
    )

    assert made["sure"] > made["unsure"] >= 1


def test_fewer_drafts_are_verified_when_the_batch_is_large() -> None:
    alone = plan(decoding("a", num_drafts=8, acceptance_rate=0.6))
    crowd = plan(*(decoding(f"d{i}", num_drafts=8, acceptance_rate=0.6) for i in range(30)))

    assert crowd.num_tokens / 30 < alone.num_tokens


def test_drafts_never_break_a_target() -> None:
    limit_s = (FIXED_S + 3 * TOKEN_S + 1e-6) / MARGIN
    state = decoding("a", num_drafts=8, acceptance_rate=0.95, slo=Slo(2.0, limit_s))
    state.first_token_s, state.last_token_s = 1.0 - 4 * limit_s, 1.0

    assert tokens(plan(state)) == {"a": 3}


def test_a_request_in_prefill_has_no_drafts_verified() -> None:
    state = prefilling("p", 200, 100)
    state.draft_chances = (0.7,) * 4

    assert tokens(plan(state)) == {"p": 100}


@given(drafts=st.lists(st.tuples(st.integers(0, 8), st.floats(0, 1)), min_size=1, max_size=12))
def test_what_is_verified_raises_the_expected_tokens_per_second(
    drafts: list[tuple[int, float]],
) -> None:
    states = [
        decoding(f"d{i}", num_drafts=count, acceptance_rate=rate)
        for i, (count, rate) in enumerate(drafts)
    ]
    made = tokens(plan(*states))

    def expected(name: str, rate: float) -> float:
        return sum(rate**k for k in range(made[name]))

    total = sum(expected(f"d{i}", rate) for i, (_, rate) in enumerate(drafts))
    with_drafts = total / (FIXED_S + TOKEN_S * sum(made.values()))
    assert with_drafts >= len(drafts) / (FIXED_S + TOKEN_S * len(drafts)) - 1e-9
    assert all(made[f"d{i}"] <= 1 + count for i, (count, _) in enumerate(drafts))


def test_drafts_beyond_a_jump_of_the_step_time_are_considered() -> None:
    # Two tokens cost as much as five: the first draft alone would not pay, all four together do.
    stepped = CostModel(
        [0.010, 0.006, 0.0, 0.0, 0.0, 0.0, 0.0], token_knots=(0, 2), sample_knots=(0,)
    )
    states = [decoding("a", num_drafts=4, acceptance_rate=0.5)]

    made = HybridScheduler(LIMITS, stepped).plan(view(states), 1.0)

    assert tokens(made) == {"a": 5}


def test_expected_drafts_are_the_sum_of_the_products_of_their_chances() -> None:
    assert num_expected(()) == 0
    assert num_expected((0.5, 0.5)) == 0.75
    assert num_expected((1.0, 0.0, 1.0)) == 1.0


def verify(acceptance: Acceptance, request_id: str, probs: list[float], num_accepted: int) -> None:
    acceptance.chances(request_id, "suffix", probs)
    acceptance.offer(request_id, "suffix", probs)
    acceptance.verified(request_id, len(probs), num_accepted)


def test_at_first_a_drafters_estimates_are_the_chances() -> None:
    assert Acceptance().chances("a", "suffix", [0.5, 0.25]) == pytest.approx((0.5, 0.25))


def test_no_draft_is_sure() -> None:
    assert Acceptance().chances("a", "suffix", [1.0]) == (MAX_CHANCE,)


def test_the_chances_of_an_overconfident_drafter_fall() -> None:
    acceptance = Acceptance()
    for number in range(200):
        verify(acceptance, f"r{number}", [0.9], int(number % 3 == 0))

    [chance] = acceptance.chances("new", "suffix", [0.9])
    assert 0.2 < chance < 0.5
    assert acceptance.chances("new", "head", [0.3])[0] == pytest.approx(0.3, abs=0.2)
    assert acceptance.rate == pytest.approx(1 / 3, abs=0.1)


def test_sure_and_unsure_drafts_are_calibrated_apart() -> None:
    acceptance = Acceptance()
    for number in range(200):
        verify(acceptance, f"r{number}", [0.9], 0)
        verify(acceptance, f"r{number}", [0.3], 1)

    assert acceptance.chances("new", "suffix", [0.3]) > acceptance.chances("new", "suffix", [0.9])


def test_a_request_whose_drafts_fail_has_lower_chances_than_others() -> None:
    acceptance = Acceptance()
    for _ in range(20):
        verify(acceptance, "lucky", [0.5], 1)
        verify(acceptance, "unlucky", [0.5], 0)

    [lucky] = acceptance.chances("lucky", "suffix", [0.5])
    [unlucky] = acceptance.chances("unlucky", "suffix", [0.5])
    [new] = acceptance.chances("new", "suffix", [0.5])
    assert unlucky < new < lucky


def test_a_request_that_has_ended_is_forgotten() -> None:
    acceptance = Acceptance()
    for _ in range(20):
        verify(acceptance, "a", [0.5], 0)
        verify(acceptance, "b", [0.5], 1)
    acceptance.forget("a")
    acceptance.forget("unknown")

    [again] = acceptance.chances("a", "suffix", [0.5])
    [other] = acceptance.chances("new", "suffix", [0.5])
    assert again == other


def test_while_no_drafts_are_verified_one_is_probed_now_and_then() -> None:
    acceptance = Acceptance()
    offers = {"a": (0.1, 0.1), "b": (0.2,)}

    probes = [acceptance.next_probe(offers) for _ in range(3 * PROBE_STEPS)]

    assert [probe for probe in probes if probe] == ["b"] * 3
    assert probes[PROBE_STEPS - 1] == "b"


def test_nothing_is_probed_while_drafts_are_verified() -> None:
    acceptance = Acceptance()
    for _ in range(3 * PROBE_STEPS):
        assert acceptance.next_probe({"a": (0.5,)}) is None
        verify(acceptance, "a", [0.5], 1)

    assert not acceptance.is_resting


def test_useless_drafts_are_requested_only_before_a_probe() -> None:
    acceptance = Acceptance()
    rests = []
    for _ in range(4 * PROBE_STEPS):
        acceptance.next_probe({})
        rests.append(acceptance.is_resting)

    assert not any(rests[:REST_STEPS])
    assert 0.8 < sum(rests[REST_STEPS:]) / len(rests[REST_STEPS:]) < 1
    assert not rests[-1], "the next step may probe"


def test_a_decode_gives_more_tokens_where_drafts_are_accepted() -> None:
    acceptance = Acceptance()
    before = acceptance.tokens_per_decode
    for _ in range(100):
        verify(acceptance, "a", [0.9, 0.9], 2)
        acceptance.count_decodes(2)

    assert before == 1
    assert acceptance.tokens_per_decode == pytest.approx(2, abs=0.1)


@given(
    drafts=st.lists(
        st.tuples(st.lists(st.floats(0, 1), max_size=6), st.integers(0, 6)), max_size=60
    )
)
def test_chances_are_between_0_and_1_whatever_is_verified(
    drafts: list[tuple[list[float], int]],
) -> None:
    acceptance = Acceptance()
    for probs, num_accepted in drafts:
        verify(acceptance, "a", probs, min(num_accepted, len(probs)))
        chances = acceptance.chances("a", "suffix", probs)
        assert len(chances) == len(probs)
        assert all(0 <= chance <= MAX_CHANCE for chance in chances)
    assert 0 <= acceptance.rate <= 1
