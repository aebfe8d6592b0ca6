"""A generation request as scheduling sees it: how much work it brings, not what it says."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate; a call with n=4 is four requests."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    """Upper bound of tokens to generate."""
    priority: int = 0
    """Lower runs first, as in vLLM."""

    def num_outstanding_tokens(self, num_output_tokens: int = 0) -> int:
        """Tokens still to compute, at most, once `num_output_tokens` were generated.

        The prompt counts until the first output token shows that its prefill is over.
        """
        prompt = 0 if num_output_tokens else self.num_prompt_tokens
        return prompt + self.max_tokens - num_output_tokens
