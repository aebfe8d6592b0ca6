"""What a worker asks of an inference engine, and how one is configured."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from scheduler.request import Request
from workers.drafts.draft_client import DraftCounts
from workers.drafts.draft_stream import DrafterAddress
from workers.token_stream import StreamAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits and memory of one engine, in vLLM's words."""

    __pydantic_config__ = {"extra": "forbid"}

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and activations; `auto` keeps the checkpoint's, and with our CPU kernels
    is float32."""
    max_model_len: int | None = None
    """Longest prompt plus output of one request, in tokens; the model's own limit if not given."""
    max_num_seqs: int = 128
    """Requests in one step."""
    max_num_batched_tokens: int = 2048
    """Tokens computed in one step, over all requests."""
    kv_cache_gib: float = 1.0
    """Memory of the KV cache, in GiB."""
    block_size: int | None = None
    """Tokens in one block of the KV cache; the platform's choice if not given."""
    enable_prefix_caching: bool = True
    enforce_eager: bool | None = None
    """Run without compiling or capturing graphs; if not given, so on the CPU only."""
    scheduling_policy: Literal["fcfs", "priority"] = "priority"
    """`priority` serves lower `priority` values first, equal ones in order of arrival."""
    seed: int = 0
    extra_args: dict[str, Any] = field(default_factory=dict)
    """Any other engine argument of vLLM, by its name there."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_gib"):
            if not getattr(self, name) > 0:  # NaN is not either
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(
                f"max_model_len ({self.max_model_len}) must be at least 2: one prompt token and "
                "one output token"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or a full decode batch would not fit"
            )


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step produced for one client."""

    num_new_tokens: dict[str, int]
    """By request id."""
    finish_reasons: dict[str, str]
    """Of the requests that ended in this step, by request id."""
    frames: list[bytes]
    """Token ids, logprobs and statistics, encoded for the client to decode."""


@dataclass(frozen=True, slots=True)
class DraftStats:
    """What came of drafts, since the engine's start."""

    counts_of: dict[str, DraftCounts]
    """By drafter."""
    acceptance_rate: float
    """Share of the drafts verified lately that were right."""
    tokens_per_span: float
    """Output tokens that a decode gave lately, drafts included."""
    drafter: str | None
    """Incarnation of the draft worker that makes them."""
    silent_s: float
    """How long it has owed an answer and given none."""

    @property
    def counts(self) -> DraftCounts:
        """Of all drafters together."""
        return sum(self.counts_of.values(), DraftCounts())


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at this moment."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Share of the KV cache in use, 0 to 1."""
    drafts: DraftStats | None = None
    """None without speculation."""


class Engine(Protocol):
    """Generates tokens; used from one thread only."""

    def add_request(
        self, request: Request, engine_request: list[bytes], client: StreamAddress
    ) -> None:
        """Queue a request whose outputs go to `client`; ValueError if it is malformed.

        `engine_request` is the request in the engine's own encoding (vLLM's
        `EngineCoreRequest`), opaque to everything between the front end and the engine.
        """

    def abort_requests(self, request_ids: list[str]) -> None:
        """Forget these requests and free their memory; unknown ids are ignored."""

    def has_requests(self) -> bool:
        """Whether a step would find work."""

    def step(self) -> tuple[dict[StreamAddress, StepOutput], bool]:
        """Compute one step: its output for each client, and whether the model ran."""

    def assign_drafter(self, drafter: DrafterAddress | None) -> None:
        """Have this draft worker make the drafts from now on."""

    def stats(self) -> EngineStats:
        """Count what runs and waits."""

    def record(self, path: Path) -> None:
        """Write every decision from now on to a new file; called before the first request."""

    def shutdown(self) -> None:
        """Release everything."""
