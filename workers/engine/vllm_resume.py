"""Requests that go on in this engine behind tokens that another engine gave."""

from typing import Any

import torch
from vllm.sampling_params import SamplingType
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from workers.engine.vllm_sampling import Runner, on_each_rank
from workers.plugin.vllm_seams import VLLM


class Resumption:
    """Makes requests that another engine began look as if this one had preempted them.

    Tokens that they have given stay outputs: penalties, bad words, `min_tokens`, grammars and seeds
    see them as in an engine that was never lost. Appended to the prompt they would not.
    """

    def __init__(self, core: EngineCore) -> None:
        scheduler: Any = core.scheduler  # of any kind; what is used of it is in the table of seams
        self._scheduler = scheduler
        self._grammars: Any = core.structured_output_manager
        self._core = core
        self._is_unblocked = scheduler._handle_blocked_waiting_request
        VLLM.replace(scheduler, "_handle_blocked_waiting_request", self._unblock)

    def strip(self, core_request: EngineCoreRequest) -> None:
        """Take from a request what it has had; ValueError if it cannot go on."""
        sampling = core_request.sampling_params
        if sampling is None or core_request.resumable:
            kind = "pooling" if sampling is None else "streamed input"
            raise ValueError(f"a request for {kind} cannot go on where it was lost: send it again")
        sampling.prompt_logprobs = None  # they came with its first token

    def resume(self, request: VllmRequest, token_ids: tuple[int, ...]) -> None:
        """Have `request` go on behind `token_ids`, once its grammar is there if it has one.

        Called before it is added to the scheduler.
        """
        request.prefill_stats = None  # the other engine has sent them
        request.num_preemptions = 1
        rider: Any = request
        rider.goes_on_behind = token_ids
        if not request.use_structured_output:
            self._restore(request)

    def _unblock(self, request: VllmRequest) -> bool:
        """Whether a waiting request can run; once its grammar is there, its tokens are, too."""
        if not self._is_unblocked(request):
            return False
        return request.status != RequestStatus.WAITING or self._restore(request)

    def _restore(self, request: VllmRequest) -> bool:
        """Give a request its tokens; False if its grammar does not allow them, which ends it."""
        token_ids = getattr(request, "goes_on_behind", ())
        if not token_ids:
            return True
        for token_id in token_ids:  # one by one: thinking may end at any of them
            request.append_output_token_ids(token_id)
            if not self._grammars.accept_tokens(request, [token_id]):
                self._scheduler.grammar_compile_error_reqs.add(request.request_id)
                return False
        request.status = RequestStatus.PREEMPTED
        if not self._scheduler.use_v2_model_runner:
            on_each_rank(self._core, _remember, _as_preempted(request))
        return True


def _as_preempted(request: VllmRequest) -> CachedRequestState:
    """What vLLM's runner keeps of a request that is preempted."""
    assert request.sampling_params is not None
    return CachedRequestState(
        req_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        prompt_embeds=request.prompt_embeds,
        prompt_is_token_ids=request.prompt_is_token_ids,
        mm_features=request.mm_features,
        sampling_params=request.sampling_params,
        generator=None,
        block_ids=(),  # those of a resumed request come with the step
        num_computed_tokens=0,
        output_token_ids=list(request.output_token_ids),
        lora_request=request.lora_request,
    )


def _remember(runner: Runner, state: CachedRequestState) -> None:
    """Give vLLM's runner what it keeps of a request, with its generator if it has one of its own.

    Its second runner keeps nothing: it counts penalties anew and draws by seed and position.
    """
    sampling = state.sampling_params
    assert sampling is not None
    if sampling.sampling_type is SamplingType.RANDOM_SEED:
        assert sampling.seed is not None
        state.generator = torch.Generator(device=runner.device).manual_seed(sampling.seed)
        skip_draws(runner, state.generator, len(state.output_token_ids))
    if runner.uses_mrope:
        runner._init_mrope_positions(state)
    runner.requests[state.req_id] = state


def skip_draws(runner: Runner, generator: torch.Generator, num_tokens: int) -> None:
    """Leave a seeded generator as vLLM's sampler leaves it after `num_tokens` tokens."""
    sampler = runner.sampler.topk_topp_sampler
    if generator.device.type == "cpu" and not sampler.use_fp64_gumbel:
        # One number for each token; so many at once are the same ones.
        torch.randint(0, 2**31, (num_tokens,), generator=generator)
        return
    logits = torch.zeros(1, runner.input_batch.vocab_size, device=generator.device)
    for _ in range(num_tokens):
        sampler(logits, {0: generator}, None, None)
