from hypothesis import given
from hypothesis import strategies as st

from scheduler.hybrid import SAFETY, HybridScheduler
from scheduler.request import Slo
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


def test_unlikely_drafts_are_left() -> None:
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
    limit_s = (FIXED_S + 3 * TOKEN_S + 1e-6) / SAFETY
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
