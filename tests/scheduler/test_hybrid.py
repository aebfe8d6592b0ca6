"""The rules that the hybrid scheduler holds, each in the smallest scene that shows it."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.baselines import DecodeFirst
from scheduler.fair_shares import YIELDS
from scheduler.hybrid import (
    MARGIN,
    PUT_OFF_S,
    STARVATION_S,
    TURN,
    TURN_TOKENS,
    YIELDING_STEP_S,
    HybridScheduler,
)
from scheduler.request import RequestState, Slo
from scheduler.stage_policy import ALONE, PolicyReason, WorkerPolicy
from scheduler.task import BatchPlan, Limits, Stage, StepView
from tests.scheduler.scenes import (
    FIXED_S,
    LIMITS,
    TOKEN_S,
    cost_model,
    decoding,
    prefilling,
    reasons,
    tokens,
    view,
    waiting,
)
from tests.scheduler.test_policy import scenes

CHAT = Slo(ttft_s=2.0, tpot_s=0.1)


def plan(of: StepView, now: float = 1.0) -> BatchPlan:
    return HybridScheduler(LIMITS, cost_model()).plan(of, now)


def test_a_long_prompt_takes_only_the_time_that_decodes_can_spare() -> None:
    chunk = tokens(plan(view([decoding("a", slo=CHAT)], [waiting("long", 5000)])))["long"]

    assert FIXED_S + (1 + chunk) * TOKEN_S <= MARGIN * CHAT.tpot_s
    assert FIXED_S + (2 + chunk) * TOKEN_S > MARGIN * CHAT.tpot_s  # and not a token less


def test_a_step_without_targets_takes_the_whole_budget() -> None:
    made = plan(view([decoding("a")], [waiting("long", 5000)]))

    assert tokens(made) == {"a": 1, "long": 2047}


def test_without_targets_its_plans_are_those_of_decode_first() -> None:
    scene = view(
        [prefilling("p", 3000, 1000, arrival_s=0.1), decoding("a"), decoding("b")],
        [waiting("w", 300, arrival_s=0.2), waiting("x", 900, arrival_s=0.3)],
    )
    sarathi = DecodeFirst(LIMITS, cost_model())

    assert plan(scene).tasks == sarathi.plan(scene, 1.0).tasks


def test_prefills_go_by_deadline_and_not_by_arrival() -> None:
    relaxed = waiting("relaxed", 120, slo=Slo(ttft_s=60, tpot_s=0.1), arrival_s=0.5)
    urgent = waiting("urgent", 120, slo=Slo(ttft_s=0.5, tpot_s=0.1), arrival_s=0.9)

    made = plan(view([decoding("a", slo=CHAT)], [relaxed, urgent]))

    assert tokens(made)["urgent"] == 88
    assert reasons(made) == {"relaxed": "time"}


def test_a_shorter_prompt_passes_a_long_one_that_runs() -> None:
    long = prefilling("long", 5000, 1000, slo=Slo(ttft_s=60, tpot_s=0.1))
    short = waiting("short", 50, slo=CHAT, arrival_s=0.9)

    made = plan(view([decoding("a", slo=CHAT), long], [short]))

    assert tokens(made)["short"] == 50
    assert tokens(made)["long"] == 99 - 10 - 1 - 50


def test_of_two_that_cannot_both_be_on_time_the_longer_waits() -> None:
    long = waiting("long", 1800, slo=Slo(ttft_s=2.0, tpot_s=1.0), arrival_s=0.9)
    short = waiting("short", 400, slo=Slo(ttft_s=2.0, tpot_s=1.0), arrival_s=0.95)

    assert list(tokens(plan(view([], [long, short])))) == ["short", "long"]


def test_a_request_that_missed_its_target_goes_behind_one_that_can_be_saved() -> None:
    lost = waiting("lost", 120, slo=CHAT, arrival_s=-5.0)
    saved = waiting("saved", 120, slo=CHAT, arrival_s=0.9)

    made = plan(view([decoding("a", slo=CHAT)], [lost, saved]))

    assert "saved" in tokens(made)
    assert "lost" not in tokens(made)


def test_a_lost_decode_does_not_shorten_a_step_for_a_prefill_that_can_be_saved() -> None:
    lost = decoding("lost", slo=Slo(ttft_s=0.001, tpot_s=0.02), arrival_s=-5.0)
    saved = waiting("saved", 400, slo=CHAT, arrival_s=0.9)

    assert tokens(plan(view([lost], [saved])))["saved"] == 400


def test_the_oldest_prefill_that_was_passed_over_goes_first_at_each_turn() -> None:
    lost = waiting("lost", 80, slo=CHAT, arrival_s=-5.0)
    others = [waiting(f"w{i}", 80, slo=CHAT, arrival_s=0.9) for i in range(5)]

    made = plan(view([decoding("a", slo=CHAT)], [lost, *others], step=TURN))

    assert tokens(made)["lost"] == 80


def test_a_prefill_progresses_at_its_turn_even_if_decodes_leave_no_time() -> None:
    tight = [decoding(f"d{i}", slo=Slo(2.0, 0.043)) for i in range(32)]
    lost = prefilling("lost", 5000, 1000, slo=CHAT, arrival_s=-5.0)

    assert "lost" not in tokens(plan(view([*tight, lost], step=1)))
    assert tokens(plan(view([*tight, lost], step=TURN)))["lost"] == TURN_TOKENS


def test_late_decodes_are_left_out_where_they_would_make_others_late() -> None:
    saved = [decoding(f"s{i}", slo=Slo(2.0, 0.025)) for i in range(10)]
    lost = [decoding(f"l{i}", slo=Slo(0.001, 1.0), arrival_s=-9.0 + i) for i in range(10)]

    made = plan(view([*lost, *saved]))

    assert made.predicted_s <= 0.025
    assert {f"s{i}" for i in range(10)} <= tokens(made).keys()
    assert "l0" in tokens(made), "the oldest is always in"
    assert set(reasons(made).values()) == {"overdue"}


def test_a_prefill_whose_decode_would_break_targets_waits() -> None:
    running = [decoding(f"d{i}", slo=Slo(2.0, 0.04)) for i in range(30)]

    made = plan(view(running, [waiting("w", 20, slo=Slo(2.0, 0.04), arrival_s=0.9)]))

    assert reasons(made) == {"w": "tpot"}


def test_a_step_without_decodes_is_short_against_the_time_to_first_token() -> None:
    made = plan(view([], [waiting("w", 1900, slo=CHAT, arrival_s=1.0)]))

    assert 0 < made.predicted_s <= CHAT.ttft_s / 4


def test_what_fits_is_taken_when_the_first_does_not_fit_the_kv_cache() -> None:
    big = waiting("big", 1500, slo=Slo(60, 1.0))
    small = waiting("small", 100, slo=Slo(60, 1.0), arrival_s=0.5)

    made = plan(view([decoding("a", slo=CHAT)], [big, small], num_free_kv_blocks=20))

    assert tokens(made) == {"a": 1, "small": 88}
    assert reasons(made) == {"big": "kv"}


def test_without_targets_no_request_passes_one_that_does_not_fit_the_kv_cache() -> None:
    made = plan(
        view([decoding("a")], [waiting("big", 1500), waiting("small")], num_free_kv_blocks=20)
    )

    assert tokens(made) == {"a": 1}
    assert reasons(made) == {"big": "kv", "small": "behind"}


def test_a_starved_request_gets_the_next_free_kv_blocks() -> None:
    starved = waiting("starved", 1500, slo=CHAT, arrival_s=-STARVATION_S)
    fresh = waiting("fresh", 80, slo=CHAT, arrival_s=0.9)
    running = [decoding("a", slo=CHAT)]

    assert "fresh" not in tokens(plan(view(running, [starved, fresh], num_free_kv_blocks=20)))
    assert "starved" in tokens(plan(view(running, [starved, fresh], num_free_kv_blocks=200)))


@pytest.mark.parametrize("tpot_s", [0.001, 0.0105, 0.02])
def test_something_is_computed_even_if_no_target_can_be_met(tpot_s: float) -> None:
    scenes: list[tuple[list[RequestState], list[RequestState]]] = [
        ([decoding("a", slo=Slo(0.001, tpot_s))], []),
        ([], [waiting("w", 500, slo=Slo(0.001, tpot_s))]),
        ([], [waiting("w", 500, slo=Slo(0.03, tpot_s), arrival_s=1.0)]),
        ([prefilling("p", 500, 100, slo=Slo(0.6, tpot_s), arrival_s=0.99)], []),
    ]
    for running, queue in scenes:
        assert plan(view(running, queue)).tasks


def test_higher_priority_goes_before_an_earlier_deadline() -> None:
    low = waiting("low", 120, slo=Slo(1.0, 0.1), arrival_s=0.9, priority=1)
    high = waiting("high", 120, slo=Slo(30.0, 0.1), arrival_s=0.9, priority=0)

    assert "low" not in tokens(plan(view([decoding("a", slo=CHAT)], [low, high])))


def test_a_full_kv_cache_preempts_the_lost_before_the_latest() -> None:
    lost = decoding("lost", num_prompt_tokens=108, slo=Slo(0.001, 1), arrival_s=-9.0)
    late = decoding("late", num_prompt_tokens=108, slo=CHAT, arrival_s=0.0)
    first = decoding("first", num_prompt_tokens=108, slo=CHAT, arrival_s=-1.0)

    made = plan(view([first, lost, late], num_free_kv_blocks=0))

    assert made.preempted == ("lost",)
    assert tokens(made) == {"first": 1, "late": 1}


def test_a_preempted_request_comes_back_before_new_ones() -> None:
    preempted = waiting("preempted", 120, slo=CHAT, arrival_s=-1.0)
    preempted.num_output_tokens, preempted.first_token_s, preempted.last_token_s = 3, 0.0, 0.9
    fresh = waiting("fresh", 120, slo=CHAT, arrival_s=0.9)

    made = plan(view([decoding("a", slo=CHAT)], [fresh, preempted]))

    assert list(tokens(made)) == ["a", "preempted"]


def test_a_prefix_hit_counts_as_computed() -> None:
    made = plan(view([decoding("a", slo=CHAT)], [waiting("w", 1000, slo=CHAT, cached=960)]))

    (task,) = (task for task in made.tasks if task.request_id == "w")
    assert (task.num_tokens, task.seq_len, task.samples) == (40, 1000, True)


def test_every_request_is_in_the_plan_or_has_a_reason() -> None:
    running = [decoding(f"d{i}", slo=CHAT) for i in range(5)]
    queue = [waiting(f"w{i}", 300, slo=CHAT if i % 2 else Slo()) for i in range(40)]

    made = plan(view(running, queue))

    everyone = {state.request.request_id for state in (*running, *queue)}
    assert tokens(made).keys() | reasons(made).keys() == everyone
    assert not tokens(made).keys() & reasons(made).keys()


def test_a_margin_is_kept_for_steps_that_take_longer_than_predicted() -> None:
    model = cost_model()
    scene = view([decoding("a", slo=CHAT)], [waiting("w", 500, slo=CHAT)])
    exact = HybridScheduler(LIMITS, model).plan(scene, 1.0)
    shape = model.shape_of(exact.tasks)
    for index in range(100):
        model.observe(shape, exact.predicted_s * (0.8 if index % 2 else 1.2))

    careful = HybridScheduler(LIMITS, model).plan(scene, 1.0)

    assert careful.predicted_s < 0.8 * exact.predicted_s


def bounded(of: StepView, prefill_share: float, max_drafts: int | None = None) -> StepView:
    return replace(of, policy=WorkerPolicy(prefill_share, max_drafts))


def test_prefills_take_their_share_of_what_a_step_with_decodes_may_last() -> None:
    scene = bounded(view([decoding("a", slo=CHAT)], [waiting("long", 5000)]), 0.4)

    made = plan(scene)

    allowed_s = 0.4 * MARGIN * CHAT.tpot_s
    chunk = tokens(made)["long"]
    assert chunk * TOKEN_S <= allowed_s < (chunk + 1) * TOKEN_S
    assert made.limit_s == pytest.approx(MARGIN * CHAT.tpot_s)


def test_what_the_share_puts_off_says_so() -> None:
    scene = view([decoding("a", slo=CHAT)], [waiting("w", 500, slo=CHAT), waiting("x", 500)])

    assert reasons(plan(bounded(scene, 0.0))) == {"w": "share", "x": "share"}
    assert reasons(plan(scene)) == {"x": "time"}


def test_the_share_bounds_a_step_without_targets_too() -> None:
    scene = view([decoding("a")], [waiting("long", 5000)])

    # A full step of 2048 tokens takes 2.058 s.
    assert tokens(plan(bounded(scene, 0.5)))["long"] == pytest.approx(1029, abs=1)


def test_without_decodes_prefills_take_the_whole_step() -> None:
    scene = view([], [waiting("long", 5000, slo=CHAT)])

    assert plan(bounded(scene, 0.1)).tasks == plan(scene).tasks


def test_the_oldest_prefill_has_its_turn_whatever_the_share() -> None:
    lost = waiting("lost", 500, slo=CHAT, arrival_s=-9.0)
    scene = view([decoding("a", slo=CHAT)], [lost], step=TURN)

    assert tokens(plan(bounded(scene, 0.0))) == {"a": 1, "lost": TURN_TOKENS}


def test_a_starved_request_is_served_whatever_the_share() -> None:
    starved = waiting("starved", 500, slo=CHAT, arrival_s=-STARVATION_S)
    scene = view([decoding("a", slo=CHAT)], [starved])

    assert "starved" in tokens(plan(bounded(scene, 0.0)))


def test_no_request_has_more_drafts_verified_than_the_policy_allows() -> None:
    scene = view([decoding("a", num_drafts=4, acceptance_rate=0.9), decoding("b", num_drafts=1)])

    assert tokens(plan(scene)) == {"a": 5, "b": 2}
    assert tokens(plan(bounded(scene, 1.0, 2))) == {"a": 3, "b": 2}
    assert tokens(plan(bounded(scene, 1.0, 0))) == {"a": 1, "b": 1}


@given(scene=scenes(), share=st.sampled_from([0.0, 0.1, 0.5, 0.9]))
@settings(deadline=None, max_examples=60)
def test_no_step_has_more_prefills_than_its_share(
    scene: tuple[Limits, StepView], share: float
) -> None:
    limits, of = scene
    model = cost_model(1e-5)
    # No turn of the oldest, and nobody has waited for a minute.
    of = bounded(replace(of, step=TURN + 1), share)

    made = HybridScheduler(limits, model).plan(of, 50.0)

    decodes = [task for task in made.tasks if task.stage is not Stage.PREFILL]
    prefills = [task for task in made.tasks if task.stage is Stage.PREFILL]
    starved = any(50.0 - state.arrival_s > STARVATION_S for state in of.waiting)
    if decodes and prefills and not (starved or made.preempted) and made.limit_s < math.inf:
        undrafted = [task._replace(num_tokens=1) for task in decodes]
        alone_s = model.predict(model.shape_of(undrafted))
        with_prefills_s = model.predict(model.shape_of([*undrafted, *prefills]))
        assert with_prefills_s - alone_s <= share * made.limit_s + 1e-9


@given(scene=scenes())
@settings(deadline=None, max_examples=60)
def test_no_share_makes_a_step_empty(scene: tuple[Limits, StepView]) -> None:
    limits, of = scene
    scheduler = HybridScheduler(limits, cost_model(1e-5))

    free, least = (scheduler.plan(bounded(of, share), 100.0) for share in (1.0, 0.0))

    assert least.tasks or not free.tasks


@given(scene=scenes())
@settings(deadline=None)
def test_a_policy_that_bounds_nothing_changes_nothing(scene: tuple[Limits, StepView]) -> None:
    limits, of = scene
    scheduler = HybridScheduler(limits, cost_model(1e-5))
    ruled = replace(of, policy=WorkerPolicy(1.0, None, 8, PolicyReason.FEW_LATE))

    assert scheduler.plan(ruled, 100.0) == scheduler.plan(replace(of, policy=ALONE), 100.0)


def test_decodes_that_yield_wait_for_a_prefill_if_they_can() -> None:
    slow = Slo(ttft_s=2.0, tpot_s=0.25)
    decodes = [decoding(f"d{i}", slo=slow, priority=YIELDS) for i in range(4)]
    own = decoding("own", slo=slow)

    made = plan(view([*decodes, own], [waiting("first", 100, slo=CHAT, arrival_s=0.9)]))

    assert tokens(made) == {"own": 1, "first": 100}
    assert reasons(made) == dict.fromkeys(["d0", "d1", "d2", "d3"], "behind")
    next_step_s = FIXED_S + 5 * TOKEN_S
    assert made.limit_s <= MARGIN * 0.25 - next_step_s


def test_they_do_not_wait_if_they_would_be_late_then() -> None:
    due = decoding("due", slo=CHAT, priority=YIELDS, last_token_s=0.92)
    first = waiting("first", 500, slo=CHAT, arrival_s=0.9)

    assert tokens(plan(view([due], [first])))["due"] == 1


def test_they_do_not_wait_for_a_prefill_that_has_no_seat() -> None:
    running = [decoding(f"d{i}", priority=YIELDS) for i in range(LIMITS.max_num_seqs)]
    made = plan(view(running, [waiting("first", 100, slo=CHAT, arrival_s=0.9)]))

    assert len(tokens(made)) == LIMITS.max_num_seqs


def test_decodes_without_targets_wait_only_for_a_while() -> None:
    first = prefilling("first", 5000, 1000, slo=Slo(60.0, 0.1), arrival_s=0.9)

    def taken(last_token_s: float) -> bool:
        decode = decoding("d", priority=YIELDS, last_token_s=last_token_s)
        return "d" in tokens(plan(view([decode, first])))

    assert not taken(1.0)
    assert taken(1.0 - PUT_OFF_S)


def test_prefills_that_yield_do_not_lengthen_the_step_of_one_that_does_not() -> None:
    first = waiting("first", 50, slo=CHAT, arrival_s=0.9)
    second = waiting("second", 50, slo=CHAT, arrival_s=0.8, priority=YIELDS)

    assert tokens(plan(view([], [second, first]))) == {"first": 50}
    assert tokens(plan(view([], [second]))) == {"second": 50}


def test_a_step_is_short_while_all_prefills_yield_to_other_tenants() -> None:
    long = waiting("long", 1000, slo=Slo(60.0, 1.0), arrival_s=0.9, priority=YIELDS)
    decodes = [decoding(f"d{i}", slo=Slo(60.0, 1.0), priority=YIELDS) for i in range(20)]

    assert tokens(plan(view([], [long])))["long"] == round((YIELDING_STEP_S - FIXED_S) / TOKEN_S)
    assert plan(view(decodes, [long])).predicted_s == pytest.approx(YIELDING_STEP_S)
    own = waiting("own", 1000, slo=Slo(60.0, 1.0), arrival_s=0.9)
    assert tokens(plan(view([], [own])))["own"] == 1000


def test_one_of_another_tenant_gets_all_of_the_next_step() -> None:
    long = prefilling("long", 1000, 100, slo=Slo(60.0, 1.0), arrival_s=0.1, priority=YIELDS)
    other = waiting("other", 300, slo=CHAT, arrival_s=0.9)

    assert tokens(plan(view([long], [other]))) == {"other": 300}


def test_a_clients_priority_puts_no_decode_off() -> None:
    decode = decoding("d", slo=Slo(2.0, 0.25), priority=5)
    second = waiting("second", 50, slo=CHAT, arrival_s=0.8, priority=1)

    made = plan(view([decode], [second, waiting("first", 50, slo=CHAT, arrival_s=0.9)]))

    assert tokens(made) == {"d": 1, "first": 50, "second": 50}
