"""A generation request as scheduling sees it: how much work it is and when it is due."""

import math
from dataclasses import dataclass, replace


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
    """Name of its service class; for reports only."""
    tenant: str = ""
    """Whose it is."""
    traceparent: str = ""
    """W3C trace context of its call; empty if it is not traced."""
    num_engine_deaths: int = 0
    """Engines that have died under it, perhaps because of it."""
    fingerprint: str = ""
    """Equal for requests with the same prompt and parameters; empty if nobody compares them."""
    num_prior_tokens: int = 0
    """Output tokens that its earlier attempts gave. Its worker computes them again, as it computes
    the prompt, and goes on behind them."""
    block_hashes: bytes = b""
    """Hashes of the full blocks of its prompt, as in `PrefixDelta`; empty if it cannot use blocks
    of others, or nobody knows their hashes. Only placement sees them."""
    prefix_format: str = ""
    """What they are of."""
    num_attempts: int = 0
    """Attempts at it that were placed before: it has been taken in."""
    names_slo: bool = True
    """Whether its client asks for these objectives; otherwise they are those of all who do not."""

    def without_hashes(self) -> "Request":
        """This request for those who need not know what is in its prompt."""
        return replace(self, block_hashes=b"", prefix_format="") if self.block_hashes else self

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens that this attempt computes before its first new one, if none of them is cached."""
        return self.num_prompt_tokens + self.num_prior_tokens

    def num_outstanding_tokens(self, num_output_tokens: int = 0) -> int:
        """Maximum number of tokens still to compute once this attempt gave `num_output_tokens`.

        What is prefilled, the prompt and prior tokens, counts until the first output token shows
        that it is over.
        """
        prefill = 0 if num_output_tokens else self.num_prefill_tokens
        return prefill + self.max_tokens - self.num_prior_tokens - num_output_tokens


@dataclass(slots=True)
class RequestState:
    """A request's progress on its worker; times are by the worker's clock."""

    request: Request
    arrival_s: float
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the KV cache; for a waiting request, those that a prefix
    hit would give it."""
    first_token_s: float = math.inf
    last_token_s: float = math.inf
    draft_chances: tuple[float, ...] = ()
    """Chance of each draft token at hand to be accepted if all before it are."""

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
        """Whether only its newest token is missing from the KV cache; otherwise it prefills."""
        return self.num_output_tokens > 0 and self.num_new_tokens == 1

    @property
    def due_s(self) -> float:
        """Deadline of its next token; infinite without targets.

        The first token is due within `ttft_s` of the arrival. Token k (the first is 0) is due
        within k `tpot_s` of the first, so that the mean over the tokens so far meets the target,
        and within one `tpot_s` of the token before, so that no single gap is longer.
        """
        slo = self.request.slo
        if self.num_output_tokens == 0:
            return self.arrival_s + slo.ttft_s
        return min(
            self.first_token_s + self.num_output_tokens * slo.tpot_s,
            self.last_token_s + slo.tpot_s,
        )
