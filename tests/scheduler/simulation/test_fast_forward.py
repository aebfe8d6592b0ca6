import copy

import pytest

from scheduler.policy import StepPolicy
from scheduler.request import Slo
from scheduler.simulation.fast_forward import MAX_JUMP, FastForward, Jump, is_steady
from scheduler.simulation.noise import Noise
from scheduler.step_planner import StepPlanner
from scheduler.task import StepView
from tests.scheduler.scenes import LIMITS, cost_model, decoding, view, waiting

CONTEXT_S = 1e-6


def jump(scene: StepView, max_steps: int, noise: Noise | None = None) -> Jump | None:
    """What is found from a scene on."""
    model = cost_model(CONTEXT_S)
    planner = StepPlanner(LIMITS, StepPolicy(), model, learns=False)
    plan = planner.plan(scene, 5.0)
    assert is_steady(plan, scene)
    return FastForward(planner, model, noise).jump(scene, plan, 5.0, max_steps)


def test_each_step_is_longer_by_one_token_of_context_for_each_request() -> None:
    found = jump(view([decoding("a"), decoding("b")]), 10)

    assert found is not None
    assert found.num_steps == 10
    first_s, *_, last_s = found.seconds
    assert first_s == pytest.approx(0.010 + 2 * 0.001 + 2 * 105 * CONTEXT_S)
    assert last_s - first_s == pytest.approx(9 * 2 * CONTEXT_S)
    assert found.end_s == pytest.approx(5.0 + found.busy_s)


def test_a_jump_leaves_the_states_alone() -> None:
    states = [decoding(name, slo=Slo(1.0, 0.05), num_output_tokens=50) for name in "ab"]
    before = copy.deepcopy(states)

    assert jump(view(states), 1000) is not None
    assert states == before


def test_with_targets_a_jump_is_short() -> None:
    slo = Slo(100.0, 100.0)
    found = jump(view([decoding("a", slo=slo), decoding("b", slo=slo)]), 1000)

    assert found is not None
    assert found.num_steps == MAX_JUMP


def test_a_jump_fits_the_free_kv_blocks() -> None:
    # 104 tokens are in 7 blocks of 16, with room for 8 more; each other block holds 16.
    found = jump(view([decoding("a")], num_free_kv_blocks=2), 1000)

    assert found is not None
    assert 2 <= found.num_steps <= 8 + 2 * 16


def test_there_is_no_jump_of_one_step() -> None:
    assert jump(view([decoding("a")]), 1) is None


def test_noise_is_that_of_the_steps_taken_one_by_one() -> None:
    found = jump(view([decoding("a")], step=3), 4, Noise(0.2, [1]))
    plain, noise = jump(view([decoding("a")], step=3), 4), Noise(0.2, [1])

    assert found is not None
    assert plain is not None
    assert found.seconds == [
        seconds * noise.factors(3 + index, 1)[0] for index, seconds in enumerate(plain.seconds)
    ]


@pytest.mark.parametrize("scene", [view([decoding("a")], [waiting("w")]), view([], [waiting("w")])])
def test_a_step_with_a_prompt_is_not_steady(scene: StepView) -> None:
    planner = StepPlanner(LIMITS, StepPolicy(), learns=False)

    assert not is_steady(planner.plan(scene, 5.0), scene)


def test_a_jump_is_cut_at_the_end_of_the_step_under_way() -> None:
    found = jump(view([decoding("a")]), 10)
    assert found is not None
    second_s = found.ends[1]

    assert not found.cut(found.ends[-1])
    assert found.cut(second_s - 1e-9)
    assert (found.num_steps, found.end_s) == (2, second_s)
    assert found.num_done(second_s + 1.0) == 2
    assert found.num_done(second_s) == 1
