"""Checks that hold for every plan, simulated or live, whichever scheduler made it."""

from scheduler.request import RequestState
from scheduler.task import BatchPlan, Limits, StageTask, StepView


class BrokenPlan(Exception):
    """A plan that no worker can execute: a bug in its scheduler."""


def check(plan: BatchPlan, view: StepView, limits: Limits) -> None:
    """BrokenPlan if `plan` was not made of this view or is not within these limits.

    KV blocks are not counted: only the KV cache knows which of them are shared.
    """
    tasks = {task.request_id: task for task in plan.tasks}
    num_found = 0
    for states in (view.running, view.waiting):
        for state in states:
            if task := tasks.get(state.request.request_id):
                _check_task(task, state)
                num_found += 1
    named = tasks.keys() | {request_id for request_id, _ in plan.deferred}
    num_states = len(view.running) + len(view.waiting)
    if num_found < len(tasks):
        unknown = sorted(tasks.keys() - _ids(view))
        raise BrokenPlan(f"the plan has tasks of unknown requests, {unknown}: {plan}")
    if len(named) != len(plan.tasks) + len(plan.deferred) or len(named) != num_states:
        raise BrokenPlan(
            "a plan names each request once, as a task or as deferred; "
            f"{sorted(_ids(view) ^ named)} are not or unknown, in {plan}"
        )
    if plan.num_tokens > limits.max_num_batched_tokens:
        raise BrokenPlan(
            f"{plan.num_tokens} tokens in a step; at most {limits.max_num_batched_tokens} fit"
        )
    _check_seats(plan, view, limits)


def _ids(view: StepView) -> set[str]:
    return {state.request.request_id for state in (*view.running, *view.waiting)}


def _check_task(task: StageTask, state: RequestState) -> None:
    num_tokens, num_computed = state.num_tokens, state.num_computed_tokens
    num_left = num_tokens - num_computed
    if state.draft_chances and state.is_decoding:
        num_left += state.num_drafts
    if not 0 < task.num_tokens <= num_left:
        raise BrokenPlan(f"{task}, but {num_left} tokens are left")
    if task.seq_len != num_computed + task.num_tokens or (
        task.samples != (task.seq_len >= num_tokens)
    ):
        raise BrokenPlan(f"{task} does not fit {state}")


def _check_seats(plan: BatchPlan, view: StepView, limits: Limits) -> None:
    if not plan.preempted and len(view.running) + len(view.waiting) <= limits.max_num_seqs:
        return
    running = {state.request.request_id for state in view.running}
    for request_id in plan.preempted:
        if request_id not in running:
            raise BrokenPlan(f"{request_id} is preempted but does not run")
    running.difference_update(plan.preempted)
    running.update(task.request_id for task in plan.tasks)
    if len(running) > limits.max_num_seqs:
        raise BrokenPlan(f"{len(running)} requests run; at most {limits.max_num_seqs} can")
