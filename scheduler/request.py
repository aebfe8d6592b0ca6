"""A generation request as scheduling sees it: how much work it brings and when it is due."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objectives of one request; infinite where there is none."""

    ttft_s: float = math.inf
    """Time to first token, from the request's arrival."""
    tpot_s: float = math.inf
    """Time per output token after the first."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:  # NaN is not either
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate; a call with n=4 is four requests."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    """Upper bound of tokens to generate."""
    priority: int = 0
    """Lower runs first, as in vLLM."""
    slo: Slo = Slo()
    slo_class: str = ""
    """Name of the service class that it came in; for reports only."""
    traceparent: str = ""
    """W3C trace context of its call, for those who trace it; empty if nobody does."""

    def num_outstanding_tokens(self, num_output_tokens: int = 0) -> int:
        """Tokens still to compute, at most, once `num_output_tokens` were generated.

        The prompt counts until the first output token shows that its prefill is over.
        """
        prompt = 0 if num_output_tokens else self.num_prompt_tokens
        return prompt + self.max_tokens - num_output_tokens


@dataclass(slots=True)
class RequestState:
    """How far a request has come on its worker; times are those of the worker's clock."""

    request: Request
    arrival_s: float
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the KV cache; of one that waits, those a prefix hit
    would give it."""
    first_token_s: float = math.inf
    last_token_s: float = math.inf
    draft_chances: tuple[float, ...] = ()
    """Of each draft token at hand for its next tokens, the chance to be accepted if those before it
    were."""

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return self.request.num_prompt_tokens + self.num_output_tokens

    @property
    def num_new_tokens(self) -> int:
        """Tokens known and not in the KV cache, without drafts."""
        return self.request.num_prompt_tokens + self.num_output_tokens - self.num_computed_tokens

    @property
    def num_drafts(self) -> int:
        """Draft tokens at hand."""
        return len(self.draft_chances)

    @property
    def is_decoding(self) -> bool:
        """Whether only its newest token is missing in the KV cache; else it is being prefilled."""
        return self.num_output_tokens > 0 and self.num_new_tokens == 1

    @property
    def due_s(self) -> float:
        """When its next token has to be there.

        The first one within `ttft_s` of the arrival. Token k (the first is 0) within k `tpot_s` of
        the first, so that the mean over the tokens so far keeps to the target, and within one
        `tpot_s` of the one before, so that the reader never waits longer for one.
        """
        slo = self.request.slo
        if self.num_output_tokens == 0:
            return self.arrival_s + slo.ttft_s
        return min(
            self.first_token_s + self.num_output_tokens * slo.tpot_s,
            self.last_token_s + slo.tpot_s,
        )
