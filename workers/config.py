"""What is configured of workers, their engines and draft workers."""

from dataclasses import dataclass, field
from typing import Any, Literal

from scheduler.policy import StepPolicy


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker's device, cores and engine."""

    __pydantic_config__ = {"extra": "forbid"}

    device: Literal["cpu", "cuda", "npu"] = "cpu"
    cpus: int = 1
    """Cores of one worker; on the CPU they are its own, and its number of threads."""
    kernels: Literal["xyserve", "vllm"] = "xyserve"
    """On the CPU: our GEMM, attention and forward pass, or vLLM's own."""
    weight_format: Literal["auto", "int8", "int4"] = "auto"
    """How our kernels keep weights; `auto` loses nothing: bf16 if the checkpoint is, else fp32."""
    calibrate_at_start: bool = True
    """Measure the engine's steps at its first start on a machine, some ten seconds long, so that
    their times can be predicted; `xyserve calibrate` does it more exactly."""
    step_timeout_s: float = 120.0
    """A step that runs longer makes the worker unhealthy, and Serve replaces it."""
    report_interval_s: float = 0.25
    """Least time between two reports of load to the GlobalScheduler."""
    step_policy: StepPolicy = field(default_factory=StepPolicy)
    """Who decides what each step computes."""
    record: str | None = None
    """Write every decision to `<record>.<worker id>.jsonl` on the worker's node, to be replayed."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("cpus", "step_timeout_s", "report_interval_s"):
            if not getattr(self, name) > 0:  # NaN is not either
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        if self.uses_own_kernels and self.engine.dtype not in ("auto", "float32"):
            raise ValueError(
                f"engine.dtype ({self.engine.dtype}) must be float32 or auto with our CPU kernels, "
                "which compute in float32 on bf16 weights; or set kernels: vllm"
            )
        if self.weight_format != "auto" and not self.uses_own_kernels:
            raise ValueError(
                f"weight_format ({self.weight_format}) needs device: cpu and kernels: xyserve"
            )
        if self.record is not None and self.step_policy.name == "vllm":
            raise ValueError(
                f"record ({self.record}) needs a step_policy of ours: vllm's decisions are its own"
            )

    @property
    def uses_own_kernels(self) -> bool:
        """Whether our CPU kernels run the model."""
        return self.device == "cpu" and self.kernels == "xyserve"

    @property
    def thread_env(self) -> dict[str, str]:
        """Environment of the worker's process; it must be there before torch is imported."""
        env = {"OMP_NUM_THREADS": str(self.cpus)}
        if self.uses_own_kernels:
            # Torch's idle threads would spin for milliseconds on the cores that our kernels need.
            env["OMP_WAIT_POLICY"] = "PASSIVE"
        return env


MAX_DRAFTS = 128


DrafterName = Literal["suffix", "model", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Speculative decoding: draft workers beside the workers, and what drafts."""

    __pydantic_config__ = {"extra": "forbid"}

    drafters: tuple[DrafterName, ...] = ("suffix",)
    """`suffix` repeats what was written before, `model` asks a smaller model, `head` a light head
    on the target's last hidden states. With several, each draft worker runs them all, in this
    order, and of the drafts for a request the most promising are verified."""
    num_workers: int = 1
    """Draft worker replicas."""
    cpus: int = 0
    """Cores of one draft worker, its own as those of workers are; 0: those that others leave."""
    num_speculative_tokens: int = 12
    """Most drafts that are verified for a request in one step."""
    memory_tokens: int = 200_000
    """Of `suffix`: tokens of output that it remembers, about 0.6 KB each."""
    model: str | None = None
    """Of `model`: a local directory or a hub id with the target's vocabulary."""
    model_weight_format: Literal["auto", "int8", "int4"] = "auto"
    """Of `model`: how our CPU kernels keep its weights."""
    model_kv_cache_gib: float = 0.5
    """Of `model`: memory of its KV cache, in GiB."""
    head: str | None = None
    """Of `head`: a file that `xyserve draft-head train` made; if not given, the default model's."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_speculative_tokens", "memory_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.num_speculative_tokens > MAX_DRAFTS:
            raise ValueError(
                f"num_speculative_tokens ({self.num_speculative_tokens}) must be at most "
                f"{MAX_DRAFTS}, which is what vLLM verifies"
            )
        if not self.model_kv_cache_gib > 0:  # NaN is not either
            raise ValueError(f"model_kv_cache_gib ({self.model_kv_cache_gib}) must be positive")
        if self.cpus < 0:
            raise ValueError(f"cpus ({self.cpus}) must not be negative")
        if not self.drafters or len(set(self.drafters)) != len(self.drafters):
            raise ValueError(
                f"drafters ({list(self.drafters)}) must name one or more of suffix, model and "
                "head, each once; leave `draft` out to switch speculation off"
            )
        if (self.model is not None) != ("model" in self.drafters):
            raise ValueError(
                f"model ({self.model}) and the drafter `model` need each other: give both or none"
            )
