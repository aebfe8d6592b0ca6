"""Small scenes for tests of step scheduling: requests in a state, on a machine of round numbers."""

from scheduler.cost_model import CostModel
from scheduler.request import Request, RequestState, Slo
from scheduler.task import BatchPlan, Limits, StepView

FIXED_S, TOKEN_S = 0.010, 0.001
"""A step costs 10 ms plus 1 ms for each token, whatever the context."""

NO_SLO = Slo()
LIMITS = Limits(max_num_seqs=32, max_num_batched_tokens=2048, kv_block_size=16, num_kv_blocks=1000)


def cost_model(attention_s: float = 0.0) -> CostModel:
    """The machine of this file; each token of context read costs `attention_s`."""
    weights = [FIXED_S, TOKEN_S, 0.0, 0.0, attention_s, 0.0]
    return CostModel(weights, token_knots=(0,), sample_knots=(0,))


def waiting(
    name: str,
    num_prompt_tokens: int = 100,
    *,
    slo: Slo = NO_SLO,
    arrival_s: float = 0.0,
    priority: int = 0,
    max_tokens: int = 1000,
    cached: int = 0,
) -> RequestState:
    """A request that has not begun."""
    request = Request(name, num_prompt_tokens, max_tokens, priority=priority, slo=slo)
    return RequestState(request, arrival_s, num_computed_tokens=cached)


def prefilling(
    name: str, num_prompt_tokens: int, num_computed: int, **more: object
) -> RequestState:
    """A request with a part of its prompt in the KV cache."""
    state = waiting(name, num_prompt_tokens, **more)  # type: ignore[arg-type]
    state.num_computed_tokens = num_computed
    return state


def decoding(
    name: str,
    *,
    num_prompt_tokens: int = 100,
    num_output_tokens: int = 5,
    first_token_s: float = 0.6,
    last_token_s: float = 1.0,
    num_drafts: int = 0,
    acceptance_rate: float = 0.7,
    **more: object,
) -> RequestState:
    """A request whose prompt is computed."""
    state = waiting(name, num_prompt_tokens, **more)  # type: ignore[arg-type]
    state.num_output_tokens = num_output_tokens
    state.num_computed_tokens = state.num_tokens - 1
    state.first_token_s, state.last_token_s = first_token_s, last_token_s
    state.draft_chances = (acceptance_rate,) * num_drafts
    return state


def view(
    running: list[RequestState] | None = None,
    waiting: list[RequestState] | None = None,
    *,
    step: int = 1,
    num_free_kv_blocks: int = 1000,
) -> StepView:
    """A worker with these requests."""
    return StepView(step, running or [], waiting or [], num_free_kv_blocks)


def tokens(plan: BatchPlan) -> dict[str, int]:
    """Query tokens of each request in a plan."""
    return {task.request_id: task.num_tokens for task in plan.tasks}


def reasons(plan: BatchPlan) -> dict[str, str]:
    """Why requests were deferred, as plain strings."""
    return {deferral.request_id: str(deferral.reason) for deferral in plan.deferred}
