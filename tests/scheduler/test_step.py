from scheduler.step import Step
from scheduler.task import Reason
from tests.scheduler.scenes import LIMITS, cost_model, decoding, prefilling, reasons, tokens, view
from tests.scheduler.scenes import waiting as new


def test_admissions_are_undone_before_a_running_request_is_preempted() -> None:
    running = prefilling("p", 64, 0)
    step = Step(view([running], num_free_kv_blocks=4), LIMITS, cost_model())

    assert step.admit(new("w", 16), 16) is None
    assert step.take_running(running, 64)

    plan = step.plan(1.0)
    assert tokens(plan) == {"p": 64}
    assert reasons(plan) == {"w": "kv"}
    assert plan.preempted == ()


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    running = [
        decoding("a", num_prompt_tokens=108, arrival_s=-1.0),
        decoding("b", num_prompt_tokens=108),
    ]
    step = Step(view(running, num_free_kv_blocks=0), LIMITS, cost_model())

    assert step.take_running(running[0], 1)
    assert step.admit(new("w", 16), 16) is Reason.KV


def test_a_preempted_request_loses_its_task_in_the_step() -> None:
    running = [decoding("a", num_prompt_tokens=108), decoding("b", arrival_s=0.5)]
    step = Step(view(running, num_free_kv_blocks=0), LIMITS, cost_model())

    assert step.take_running(running[1], 1)  # has room in its last block
    assert step.take_running(running[0], 1)  # needs a new one

    plan = step.plan(1.0)
    assert tokens(plan) == {"a": 1}
    assert plan.predicted_s == cost_model().predict(cost_model().shape_of(plan.tasks))
    assert step.num_tokens_left == LIMITS.max_num_batched_tokens - 1


def test_drafts_are_left_out_when_the_kv_cache_has_no_block_for_them() -> None:
    state = decoding("a", num_prompt_tokens=107, num_drafts=4)  # one place left in its block
    step = Step(view([state], num_free_kv_blocks=0), LIMITS, cost_model())

    step.take_running(state, 1)
    step.extend(state, 4)

    assert tokens(step.plan(1.0)) == {"a": 1}
