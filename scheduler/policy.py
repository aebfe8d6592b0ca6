"""Chooses the scheduler that plans the steps, by name and settings."""

from dataclasses import dataclass, replace
from typing import Literal

from scheduler.baselines import DecodeFirst, PrefillFirst, StaticBudget
from scheduler.cost_model import CostModel
from scheduler.hybrid import HybridScheduler
from scheduler.task import Limits, StepScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPolicy:
    """The choice of a step scheduler, live or simulated."""

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["hybrid", "static", "decode_first", "prefill_first", "vllm"] = "hybrid"
    """Step scheduler: `hybrid` is ours, `static` vLLM's policy, `decode_first` Sarathi-Serve's and
    `prefill_first` that of XY-Serve's paper. `vllm` keeps vLLM's own code, which cannot be
    simulated."""
    budget: int | None = None
    """Max tokens in a step, within the engine's own limit; `hybrid` needs none."""
    long_prefill_token_threshold: int = 0
    """Max tokens of one prompt in a step of `static`; 0 means no limit."""
    reserved_slots: int = 64
    """Decodes that every step of `prefill_first` has room for."""

    def __post_init__(self) -> None:
        for name in ("budget", "reserved_slots"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if self.long_prefill_token_threshold < 0:
            raise ValueError(
                f"long_prefill_token_threshold ({self.long_prefill_token_threshold}) must not be "
                "negative; 0 means no limit"
            )

    def make(self, limits: Limits, cost_model: CostModel) -> StepScheduler:
        """The step scheduler of a worker; ValueError for `vllm`."""
        max_num_tokens = limits.max_num_batched_tokens
        budgeted = replace(
            limits, max_num_batched_tokens=min(self.budget or max_num_tokens, max_num_tokens)
        )
        match self.name:
            case "hybrid":
                return HybridScheduler(limits, cost_model)
            case "static":
                return StaticBudget(
                    budgeted,
                    cost_model,
                    long_prefill_token_threshold=self.long_prefill_token_threshold,
                )
            case "decode_first":
                return DecodeFirst(budgeted, cost_model)
            case "prefill_first":
                return PrefillFirst(budgeted, cost_model, reserved_slots=self.reserved_slots)
            case "vllm":
                raise ValueError("step_policy.name (vllm): vLLM decides its own steps, live only")
