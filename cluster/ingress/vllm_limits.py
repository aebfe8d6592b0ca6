"""What one call may ask for, and have an ingress and a worker hold in memory; more is refused."""

from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.config.app_config import IngressConfig
from cluster.ingress.calls import Call
from cluster.keys import Right

LOGPROB_BYTES = 500
"""Memory of one log probability."""


def check_limits(
    limits: IngressConfig, call: Call, prompt: Any, params: Any, max_model_len: int
) -> None:
    """Count one prompt of a call; ValueError if the call then takes more than it may."""
    if not isinstance(params, SamplingParams):
        return  # refused anyway: there are no pooling tasks
    _check_lengths(limits, prompt, params, max_model_len)
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


def check_priority(call: Call, priority: int) -> None:
    """Answer 403 to a call that would go before those of others and may not."""
    if priority < 0 and not call.caller.allows(Right.ADMIN):
        raise GracefulHTTPError(
            f"priority ({priority}): below 0, before all others, needs a key with the right "
            f"`{Right.ADMIN}`",
            HTTPStatus.FORBIDDEN,
        )


def _check_lengths(
    limits: IngressConfig, prompt: Any, params: SamplingParams, max_model_len: int
) -> None:
    """Check the numbers of tokens and the lengths of lists."""
    num_prompt_tokens = _num_prompt_tokens(prompt)
    if limits.max_prompt_tokens is not None and num_prompt_tokens > limits.max_prompt_tokens:
        raise ValueError(
            f"prompt: its {num_prompt_tokens} tokens are more than {limits.max_prompt_tokens} "
            "(ingress.max_prompt_tokens): shorten it"
        )
    most = limits.max_output_tokens
    if most is not None and params.max_tokens is not None and params.max_tokens > most:
        if params.max_tokens < max_model_len - num_prompt_tokens:
            raise ValueError(
                f"max_tokens: {params.max_tokens} are more than {most} (ingress.max_output_tokens)"
            )
        params.max_tokens = most  # the call names no number, or all that there is room for
    for name in ("stop", "stop_token_ids", "bad_words", "logit_bias"):
        if (length := len(getattr(params, name) or ())) > limits.max_list_length:
            raise ValueError(
                f"{name}: its length of {length} is more than {limits.max_list_length} "
                "(ingress.max_list_length)"
            )


def _num_prompt_tokens(prompt: Any) -> int:
    return len(prompt.get("prompt_token_ids", ())) if isinstance(prompt, dict) else 0


def _num_logprobs(prompt: Any, params: SamplingParams, max_model_len: int) -> int:
    """Log probabilities that are held until the end; those of streamed tokens are not."""
    num_prompt_tokens = _num_prompt_tokens(prompt)
    num = 0
    if params.prompt_logprobs is not None:
        num += num_prompt_tokens * (params.prompt_logprobs + 1)
    if params.logprobs is not None and params.output_kind is not RequestOutputKind.DELTA:
        max_tokens = params.max_tokens or max_model_len - num_prompt_tokens
        num += max_tokens * (params.logprobs + 1)
    return params.n * num
