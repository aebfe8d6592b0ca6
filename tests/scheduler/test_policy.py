"""What holds for every scheduler in every scene and on every machine."""

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.policy import StepPolicy
from scheduler.request import Request, RequestState, Slo
from scheduler.stage_policy import PolicyReason, WorkerPolicy
from scheduler.task import BatchPlan, Limits, Stage, StepView
from tests.scheduler.scenes import LIMITS, cost_model

POLICIES = [
    StepPolicy(),
    StepPolicy(name="static", budget=128, long_prefill_token_threshold=50),
    StepPolicy(name="decode_first", budget=64),
    StepPolicy(name="prefill_first", budget=96, reserved_slots=3),
]
NOW = 100.0
BLOCK = 16

targets = st.one_of(st.just(math.inf), st.floats(0.001, 50.0))


@st.composite
def states(draw: st.DrawFn, name: str, runs: bool) -> RequestState:
    request = Request(
        name,
        num_prompt_tokens=draw(st.integers(1, 600)),
        max_tokens=draw(st.integers(20, 50)),
        priority=draw(st.integers(-1, 1)),
        slo=Slo(draw(targets), draw(targets)),
    )
    state = RequestState(request, draw(st.floats(0, NOW)))
    if draw(st.booleans()):
        state.num_output_tokens = draw(st.integers(1, 19))
        state.first_token_s = draw(st.floats(state.arrival_s, NOW))
        state.last_token_s = draw(st.floats(state.first_token_s, NOW))
        state.draft_chances = tuple(draw(st.lists(st.floats(0, 1), max_size=4)))
    if runs:
        state.num_computed_tokens = (
            state.num_tokens - 1
            if state.num_output_tokens and draw(st.booleans())
            else draw(st.integers(0, state.num_tokens - 1))
        )
    else:
        state.draft_chances = ()
        state.num_computed_tokens = draw(st.integers(0, (state.num_tokens - 1) // BLOCK)) * BLOCK
    return state


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Limits, StepView]:
    running = [draw(states(f"r{i}", True)) for i in range(draw(st.integers(0, 12)))]
    waiting = [draw(states(f"w{i}", False)) for i in range(draw(st.integers(0, 8)))]
    limits = Limits(
        max_num_seqs=max(1, len(running) + draw(st.integers(0, 4))),
        max_num_batched_tokens=draw(st.sampled_from([64, 128, 2048])),
        kv_block_size=BLOCK,
        num_kv_blocks=2000,
    )
    waiting.sort(key=lambda state: (state.request.priority, state.arrival_s))
    free = draw(st.integers(0, 100))
    policy = draw(
        st.builds(
            WorkerPolicy,
            st.sampled_from([0.0, 0.1, 0.7, 1.0]),
            st.sampled_from([None, 0, 1, 2]),
            st.integers(0, 9),
            st.sampled_from(PolicyReason),
        )
    )
    return limits, StepView(draw(st.integers(0, 30)), running, waiting, free, policy=policy)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@given(scene=scenes(), attention_s=st.sampled_from([0.0, 1e-6, 1e-4]))
@settings(deadline=None, max_examples=60)
def test_a_plan_keeps_all_limits(
    policy: StepPolicy, scene: tuple[Limits, StepView], attention_s: float
) -> None:
    limits, view = scene
    model = cost_model(attention_s)

    plan = policy.make(limits, model).plan(view, NOW)

    by_id = {state.request.request_id: state for state in (*view.running, *view.waiting)}
    assert len({task.request_id for task in plan.tasks}) == len(plan.tasks)
    assert plan.num_tokens <= limits.max_num_batched_tokens
    assert not set(plan.preempted) & {task.request_id for task in plan.tasks}
    for task in plan.tasks:
        state = by_id[task.request_id]
        assert 1 <= task.num_tokens <= state.num_new_tokens + state.num_drafts
        assert task.seq_len == state.num_computed_tokens + task.num_tokens
        assert task.samples == (task.seq_len >= state.num_tokens)
        assert (task.stage is Stage.PREFILL) == (not state.is_decoding)
        assert task.stage is not Stage.PREFILL or task.seq_len <= state.num_tokens
    assert num_blocks_taken(limits, view, plan) <= view.num_free_kv_blocks
    running = {state.request.request_id for state in view.running}
    admitted = {task.request_id for task in plan.tasks} - running
    seats = len(running) - len(plan.preempted) + len(admitted)
    assert seats <= limits.max_num_seqs
    assert plan.predicted_s == model.predict(model.shape_of(plan.tasks))


def num_blocks_taken(limits: Limits, view: StepView, plan: BatchPlan) -> int:
    """KV blocks that are free before the step and not after it."""
    computed = {
        state.request.request_id: state.num_computed_tokens
        for state in (*view.running, *view.waiting)
    }
    running = {state.request.request_id for state in view.running}
    freed = sum(limits.num_blocks(computed[request_id]) for request_id in plan.preempted)
    return (
        sum(
            limits.num_blocks(task.seq_len)
            - (limits.num_blocks(computed[task.request_id]) if task.request_id in running else 0)
            for task in plan.tasks
        )
        - freed
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@given(scene=scenes())
@settings(deadline=None, max_examples=60)
def test_each_request_is_computed_or_has_a_reason(
    policy: StepPolicy, scene: tuple[Limits, StepView]
) -> None:
    limits, view = scene

    plan = policy.make(limits, cost_model()).plan(view, NOW)

    everyone = {state.request.request_id for state in (*view.running, *view.waiting)}
    computed = {task.request_id for task in plan.tasks}
    deferred = [deferral.request_id for deferral in plan.deferred]
    assert len(deferred) == len(set(deferred))
    assert computed | set(deferred) == everyone
    assert not computed & set(deferred)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@given(scene=scenes())
@settings(deadline=None, max_examples=60)
def test_equal_inputs_give_equal_plans(policy: StepPolicy, scene: tuple[Limits, StepView]) -> None:
    limits, view = scene
    before = copy.deepcopy(view)

    first = policy.make(limits, cost_model()).plan(view, NOW)
    second = policy.make(limits, cost_model()).plan(before, NOW)

    assert first == second
    assert view == before, "a plan changes nothing"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@given(scene=scenes())
@settings(deadline=None, max_examples=60)
def test_nothing_is_idle_while_work_fits(
    policy: StepPolicy, scene: tuple[Limits, StepView]
) -> None:
    limits, view = scene

    plan = policy.make(limits, cost_model()).plan(view, NOW)

    fits = any(
        limits.num_blocks(state.num_tokens) <= view.num_free_kv_blocks for state in view.waiting[:1]
    )
    if not plan.tasks:
        assert not view.running or plan.preempted
        assert plan.preempted or not fits


def test_vllms_own_scheduler_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="live only"):
        StepPolicy(name="vllm").make(LIMITS, cost_model())
