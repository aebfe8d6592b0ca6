"""What one call may have an ingress and a worker hold in memory; more is refused."""

from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.config.app_config import IngressConfig
from cluster.ingress.calls import Call

LOGPROB_BYTES = 500
"""Memory of one log probability."""


def check_limits(
    limits: IngressConfig, call: Call, prompt: Any, params: Any, max_model_len: int
) -> None:
    """Count one prompt of a call; ValueError if the call then takes more than it may."""
    if not isinstance(params, SamplingParams):
        return  # refused anyway: there are no pooling tasks
    num_sequences = params.n + sum(not record.outcome for record in call.records)
    if num_sequences > limits.max_sequences:
        raise ValueError(
            f"prompt and n: {num_sequences} sequences at a time are more than "
            f"{limits.max_sequences} (ingress.max_sequences): send several calls"
        )
    call.token_bytes += LOGPROB_BYTES * (0 if params.logprobs is None else params.logprobs + 1)
    call.num_logprobs += _num_logprobs(prompt, params, max_model_len)
    if call.num_logprobs > limits.max_total_logprobs:
        raise ValueError(
            f"logprobs and prompt_logprobs: with them the answer may have {call.num_logprobs} log "
            f"probabilities, more than {limits.max_total_logprobs} (ingress.max_total_logprobs): "
            "ask for fewer, set max_tokens, or send several calls"
        )


def _num_logprobs(prompt: Any, params: SamplingParams, max_model_len: int) -> int:
    """Log probabilities that are held until the end; those of streamed tokens are not."""
    num_prompt_tokens = len(prompt.get("prompt_token_ids", ())) if isinstance(prompt, dict) else 0
    num = 0
    if params.prompt_logprobs is not None:
        num += num_prompt_tokens * (params.prompt_logprobs + 1)
    if params.logprobs is not None and params.output_kind is not RequestOutputKind.DELTA:
        max_tokens = params.max_tokens or max_model_len - num_prompt_tokens
        num += max_tokens * (params.logprobs + 1)
    return params.n * num
