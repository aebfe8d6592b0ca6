"""What characterises each baseline, and that none of them exceeds a limit."""

import pytest

from scheduler.policy import StepPolicy
from scheduler.task import BatchPlan, StepView
from tests.scheduler.scenes import (
    LIMITS,
    cost_model,
    decoding,
    prefilling,
    reasons,
    tokens,
    view,
    waiting,
)


def plan(policy: StepPolicy, of: StepView) -> BatchPlan:
    return policy.make(LIMITS, cost_model()).plan(of, 1.0)


def test_static_serves_running_requests_in_order_and_then_waiting_ones() -> None:
    scene = view([decoding("a"), prefilling("p", 3000, 1000), decoding("b")], [waiting("w", 300)])

    assert tokens(plan(StepPolicy(name="static"), scene)) == {"a": 1, "p": 2000, "b": 1, "w": 46}


def test_static_cuts_long_prompts_at_their_threshold_unless_alone() -> None:
    policy = StepPolicy(name="static", long_prefill_token_threshold=500)

    assert tokens(plan(policy, view([], [waiting("w", 900), waiting("x", 900)]))) == {
        "w": 500,
        "x": 500,
    }
    assert tokens(plan(policy, view([], [waiting("w", 900)]))) == {"w": 900}


def test_decode_first_leaves_prefills_what_the_decodes_leave_of_its_budget() -> None:
    scene = view([prefilling("p", 300, 100), decoding("a"), decoding("b")], [waiting("w", 9000)])

    made = plan(StepPolicy(name="decode_first", budget=512), scene)

    assert tokens(made) == {"a": 1, "b": 1, "p": 200, "w": 310}


def test_prefill_first_keeps_slots_for_the_decodes_that_waited_longest() -> None:
    decodes = [decoding(f"d{i}", last_token_s=1.0 - i / 10) for i in range(5)]
    policy = StepPolicy(name="prefill_first", budget=512, reserved_slots=2)

    made = plan(policy, view(decodes, [waiting("w", 9000)]))

    assert tokens(made) == {"w": 510, "d4": 1, "d3": 1}
    assert reasons(made) == {"d0": "tokens", "d1": "tokens", "d2": "tokens"}


def test_prefill_first_gives_all_decodes_a_slot_when_no_prompt_waits() -> None:
    decodes = [decoding(f"d{i}") for i in range(5)]
    policy = StepPolicy(name="prefill_first", budget=512, reserved_slots=2)

    assert plan(policy, view(decodes)).num_tokens == 5


@pytest.mark.parametrize("name", ["static", "decode_first", "prefill_first"])
def test_no_request_passes_one_that_does_not_fit(name: str) -> None:
    scene = view([], [waiting("big", 1500), waiting("small")], num_free_kv_blocks=20)

    made = plan(StepPolicy(name=name), scene)  # type: ignore[arg-type]

    assert reasons(made) == {"big": "kv", "small": "behind"}


@pytest.mark.parametrize("name", ["static", "decode_first", "prefill_first"])
def test_a_full_kv_cache_preempts_the_latest_of_the_lowest_priority(name: str) -> None:
    running = [
        decoding("first", num_prompt_tokens=108, arrival_s=0.0),
        decoding("unimportant", num_prompt_tokens=108, arrival_s=0.1, priority=1),
        decoding("last", num_prompt_tokens=108, arrival_s=0.2),
    ]

    made = plan(
        StepPolicy(name=name),  # type: ignore[arg-type]
        view(running, [waiting("w")], num_free_kv_blocks=0),
    )

    assert made.preempted == ("unimportant",)
    assert tokens(made) == {"first": 1, "last": 1}
    assert reasons(made) == {"unimportant": "preempted", "w": "kv"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, r"budget \(0\) must be at least 1"),
        ({"reserved_slots": 0}, r"reserved_slots \(0\) must be at least 1"),
        ({"long_prefill_token_threshold": -1}, r"must not be negative; 0 means no limit"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepPolicy(**settings)  # type: ignore[arg-type]
