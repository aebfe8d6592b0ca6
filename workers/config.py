"""The config of workers, their engines and draft workers."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from scheduler.policy import StepPolicy

DeviceName = Literal["cpu", "cuda", "npu", "npu-emulated"]

NPU_VARIABLE, EMULATED = "XYSERVE_NPU", "emulated"
"""The variable of a process whose NPU is emulated, and its value."""


def is_npu_emulated() -> bool:
    """Whether this process emulates an NPU on its CPU."""
    return os.environ.get(NPU_VARIABLE) == EMULATED


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits and memory of one engine, under vLLM's names."""

    __pydantic_config__ = {"extra": "forbid"}

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and activations. `auto` is the checkpoint's; with our CPU kernels it is
    float32, the only one they compute in."""
    max_model_len: int | None = None
    """Maximum length of prompt plus output, in tokens; null: the model's limit."""
    max_num_seqs: int = 128
    """Maximum number of requests in one step."""
    max_num_batched_tokens: int = 2048
    """Maximum number of tokens in one step, over all requests."""
    kv_cache_gib: float = 1.0
    """Size of the KV cache, in GiB."""
    block_size: int | None = None
    """Tokens per block of the KV cache; null: the platform's choice."""
    enable_prefix_caching: bool = True
    """Whether prompts that begin alike share the KV cache of their common prefix."""
    enforce_eager: bool | None = None
    """Whether to run without compiling or capturing graphs; null: only on the CPU."""
    scheduling_policy: Literal["fcfs", "priority"] = "priority"
    """Order of waiting requests: `priority` (lower values first, equal ones by arrival) or `fcfs`
    (by arrival)."""
    seed: int = 0
    """Seed for sampling of requests that have none of their own."""
    extra_args: dict[str, Any] = field(default_factory=dict)
    """Further engine arguments of vLLM, under vLLM's names."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_gib"):
            if not getattr(self, name) > 0:  # NaN is not either
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        structured = self.extra_args.get("structured_outputs_config") or {}
        if (backend := structured.get("backend", "xgrammar")) != "xgrammar":
            raise ValueError(
                f"extra_args.structured_outputs_config.backend ({backend}) must be xgrammar, the "
                "only one whose grammars are compiled within bounds"
            )
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
class GrammarConfig:
    """Bounds of one grammar, of structured output or tools; what exceeds one gets status 400."""

    __pydantic_config__ = {"extra": "forbid"}

    max_bytes: int = 256 << 10
    """Maximum size of a JSON schema, regex, grammar, structural tag or list of choices."""
    max_compile_s: float = 10.0
    """Maximum processor time for compiling one, in seconds; on a busy core it takes ten times as
    long, as it leaves nine tenths to the steps."""
    max_compile_mib: int = 1024
    """Maximum memory for compiling one, in MiB; it is given back at the end."""
    max_compiled_mib: int = 16
    """Maximum size of a compiled one in transit to the engine, in MiB."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_compile_s", "max_compile_mib", "max_compiled_mib"):
            if not getattr(self, name) > 0:  # NaN is not either
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker's device, cores and engine."""

    __pydantic_config__ = {"extra": "forbid"}

    device: DeviceName = "cpu"
    """Device of one worker: CPU cores, one NVIDIA GPU (`cuda`) or one Ascend NPU (`npu`).
    `npu-emulated` runs the NPU's form of our kernels on CPU cores: slow, to try things out."""
    cpus: int = 1
    """CPU cores of one worker; if it runs on them no other worker uses them, and with `device: cpu`
    each runs a thread."""
    tensor_parallel_size: int = 1
    """GPUs or NPUs of one node over which the model's layers are split; with workers on CPU cores,
    processes that share `cpus`."""
    kernels: Literal["xyserve", "vllm"] = "xyserve"
    """Our kernels (`xyserve`) or vLLM's own, of which it has none for NPUs."""
    weight_format: Literal["auto", "int8", "int4"] = "auto"
    """Format of the weights in our kernels; `auto` is lossless: the checkpoint's, and on CPUs fp32
    if that is not bf16. `int4` is for CPUs only."""
    lm_head_format: Literal["auto", "int8"] = "auto"
    """Format of the LM head's weights in our CPU kernels, of which a small model has a large share:
    `auto` is `weight_format`, but int8 with int4."""
    activation_format: Literal["auto", "float32", "bf16", "int8"] = "auto"
    """Format of activations in products of our CPU kernels: exact (`float32`) or rounded, to `bf16`
    for bf16 weights, to `int8` for int8 and int4 weights. `auto` rounds on CPUs that have
    instructions for it (AVX512_BF16, AVX512_VNNI, AVX_VNNI, AMX, Arm's), where it is up to twice as
    fast; set it where workers run on different CPUs, so that all round alike."""
    kv_cache_format: Literal["auto", "float32", "bf16"] = "auto"
    """Format of keys and values in the KV cache of our CPU kernels; `auto` is bf16, in half the
    memory, where activations are rounded."""
    keep_packed_weights: bool = True
    """Whether our kernels' weights are kept in a file, so that a later start of the same model need
    not pack them; for a local checkpoint, in `packed/` of the home folder, as large as in
    memory."""
    calibrate_at_start: bool = True
    """Whether an engine times its steps at its first start on a machine, for about ten seconds, so
    that step times can be predicted; `xyserve calibrate` measures more accurately."""
    step_timeout_s: float = 120.0
    """Maximum duration of a step, in seconds; a longer one ends the worker, and it is replaced."""
    slow_timeout_s: float | None = 120.0
    """Time, in seconds, for which a worker's steps may take three times as long as predicted while
    those of another worker do not; then Serve replaces it, one worker at a time. null: never."""
    report_interval_s: float = 0.25
    """Minimum time between two load reports to the GlobalScheduler, in seconds."""
    prefix_index: bool = True
    """Whether a worker tells the GlobalScheduler which blocks its prefix cache has, so that prompts
    can be placed where they are cached; needs `engine.enable_prefix_caching`."""
    step_policy: StepPolicy = field(default_factory=StepPolicy)
    """Scheduler that decides what each step computes."""
    record: str | None = None
    """Path prefix of the decision record `<record>.<worker id>.jsonl`, written on the worker's node
    for `xyserve replay`; null: no record."""
    grammars: GrammarConfig = field(default_factory=GrammarConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("cpus", "step_timeout_s", "slow_timeout_s", "report_interval_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # NaN is not either
                raise ValueError(f"{name} ({value}) must be positive")
        if self.tensor_parallel_size < 1:
            raise ValueError(
                f"tensor_parallel_size ({self.tensor_parallel_size}) must be at least 1"
            )
        if self.runs_on_cpu and self.cpus % self.tensor_parallel_size:
            raise ValueError(
                f"cpus ({self.cpus}) must be a multiple of tensor_parallel_size "
                f"({self.tensor_parallel_size}): each process gets as many cores"
            )
        if "tensor_parallel_size" in self.engine.extra_args:
            raise ValueError(
                "engine.extra_args.tensor_parallel_size would leave Ray in the dark: set "
                "worker.tensor_parallel_size"
            )
        if self.uses_cpu_kernels and self.engine.dtype not in ("auto", "float32"):
            raise ValueError(
                f"engine.dtype ({self.engine.dtype}) must be float32 or auto with our CPU kernels, "
                "which compute in float32 on bf16 weights; or set kernels: vllm"
            )
        if self.weight_format != "auto" and self.kernels != "xyserve":
            raise ValueError(f"weight_format ({self.weight_format}) needs kernels: xyserve")
        if self.weight_format == "int4" and self.device != "cpu":
            raise ValueError(f"weight_format (int4) needs device: cpu, and this is {self.device}")
        for name in ("lm_head_format", "activation_format", "kv_cache_format"):
            if getattr(self, name) not in ("auto", "float32") and not self.uses_cpu_kernels:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) needs device: cpu and kernels: xyserve"
                )
        if self.activation_format == "bf16" and self.weight_format != "auto":
            raise ValueError(
                f"activation_format (bf16) needs weight_format: auto, and this is "
                f"{self.weight_format}; set it to int8, float32 or auto"
            )
        if self.activation_format == "int8" and self.weight_format == "auto":
            raise ValueError("activation_format (int8) needs weight_format: int8 or int4")
        if self.kernels == "vllm" and self.device in ("npu", "npu-emulated"):
            raise ValueError(
                f"kernels (vllm) needs another device than {self.device}: vLLM has no kernels for "
                "NPUs; leave it at xyserve"
            )
        if self.record is not None and self.step_policy.name == "vllm":
            raise ValueError(
                f"record ({self.record}) needs a step_policy of ours: vllm's decisions are its own"
            )

    @property
    def runs_on_cpu(self) -> bool:
        """Whether CPU cores compute the steps."""
        return self.device in ("cpu", "npu-emulated")

    @property
    def resource(self) -> tuple[str, int]:
        """What a worker needs on one node, by Ray's name."""
        if self.runs_on_cpu:
            return "CPU", self.cpus
        return {"cuda": "GPU", "npu": "NPU"}[self.device], self.tensor_parallel_size

    @property
    def cpus_per_rank(self) -> int:
        """CPU cores of each process that computes."""
        return self.cpus // self.tensor_parallel_size if self.runs_on_cpu else self.cpus

    @property
    def uses_cpu_kernels(self) -> bool:
        """Whether our CPU kernels run the model."""
        return self.device == "cpu" and self.kernels == "xyserve"

    @property
    def env(self) -> dict[str, str]:
        """Environment of the worker's process; it must be set before torch is imported."""
        env = {"OMP_NUM_THREADS": str(self.cpus_per_rank)}
        if self.device == "npu-emulated":
            env[NPU_VARIABLE] = EMULATED
        if self.uses_cpu_kernels:
            # Torch's idle threads would spin for milliseconds on the cores that our kernels need.
            env["OMP_WAIT_POLICY"] = "PASSIVE"
        return env


MAX_DRAFTS = 128
"""Drafts that vLLM verifies at most for a request in one step."""

DrafterName = Literal["suffix", "model", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Speculative decoding: the draft workers and their drafters."""

    __pydantic_config__ = {"extra": "forbid"}

    drafters: tuple[DrafterName, ...] = ("suffix",)
    """Drafters: `suffix` repeats what was written before, `model` runs a smaller model, `head` runs
    a light head on the target's last hidden states. Each draft worker runs all of them, in this
    order, and the most promising drafts for a request are verified."""
    num_workers: int = 1
    """Number of draft worker replicas."""
    autoscaling: dict[str, Any] | None = None
    """Ray Serve's `autoscaling_config` for the draft workers; it replaces `num_workers`. Unless it
    has a `policy` or `target_ongoing_requests`, the GlobalScheduler decides on their number, by how
    busy they are."""
    cpus: int = 0
    """CPU cores that one draft worker has to itself; 0: none, it runs on any core that is idle."""
    num_speculative_tokens: int = 12
    """Maximum number of drafts verified for a request in one step."""
    memory_tokens: int = 200_000
    """Output tokens that the `suffix` drafter remembers, about 0.6 KB each."""
    model: str | None = None
    """Model of the `model` drafter: a local directory or a hub id, with the target's vocabulary."""
    model_weight_format: Literal["auto", "int8", "int4"] = "auto"
    """Format of the `model` drafter's weights, as `worker.weight_format`."""
    model_kv_cache_gib: float = 0.5
    """Size of the `model` drafter's KV cache, in GiB."""
    head: str | None = None
    """File of the `head` drafter, made by `xyserve draft-head train`; null: the default model's
    head."""

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
