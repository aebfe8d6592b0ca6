"""Latencies of simulated requests: each request's, and figures over many."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from scheduler.request import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Latencies and counts of one finished request."""

    request_id: str
    slo_class: str
    slo: Slo
    worker_id: str
    arrival_s: float
    ttft_s: float
    """Time to first token, from the arrival."""
    tpot_s: float
    """Mean time per output token after the first; 0 if there is only one token."""
    finish_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_cached_tokens: int
    """Prompt tokens that were in the KV cache when it was first admitted."""
    is_refused: bool = False
    """Whether it was not served; then it has no latencies, and missed its targets."""

    @property
    def e2e_s(self) -> float:
        """Time from the arrival to the last token."""
        return self.finish_s - self.arrival_s

    @property
    def met_targets(self) -> bool:
        """Whether it met both of its targets."""
        if self.is_refused:
            return False
        return self.ttft_s <= self.slo.ttft_s and self.tpot_s <= self.slo.tpot_s

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON can hold it; an absent target is None."""
        state = asdict(self)
        state["slo"] = {name: _finite(value) for name, value in state["slo"].items()}
        return state


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles of values in seconds; all 0 if there are none."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution":
        """The distribution of `values`."""
        if not values:
            return cls()
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(math.fsum(values) / len(values), p50, p90, p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures over many requests and the steps that served them."""

    num_requests: int
    ttft_s: Distribution
    tpot_s: Distribution
    """Only over requests with more than one output token."""
    e2e_s: Distribution
    makespan_s: float
    """Time from the first arrival to the last token."""
    requests_per_s: float
    output_tokens_per_s: float
    tokens_per_s: float
    """Prompt and output tokens per second."""
    goodput_rps: float
    """Requests per second that met both of their targets."""
    attainment: float
    """Share of the requests that met both of their targets."""
    ttft_attainment: float
    tpot_attainment: float
    num_preemptions: int
    prefix_hit_share: float
    """Share of the prompt tokens that were in the KV cache."""
    utilisation: float
    """Share of the makespan in which a worker computed, mean over the workers."""
    num_steps: int
    mean_batch: float
    """Mean number of requests in a step."""
    mean_step_tokens: float
    """Mean number of query tokens in a step."""
    mean_step_s: float

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON can hold it."""
        return asdict(self)


def summarise(
    outcomes: Sequence[Outcome],
    *,
    num_workers: int = 1,
    busy_s: float = 0.0,
    num_steps: int = 0,
    num_spans: int = 0,
    num_query_tokens: int = 0,
    like: Summary | None = None,
) -> Summary:
    """Summarise `outcomes` and the workers' steps that they came from.

    If `outcomes` are part of a larger set, `like` is the summary of that set, whose makespan and
    figures about steps are copied.
    """
    makespan_s = 0.0
    if like is not None:
        makespan_s = like.makespan_s
    elif outcomes:
        makespan_s = max(o.finish_s for o in outcomes) - min(o.arrival_s for o in outcomes)
    num_output_tokens = sum(o.num_output_tokens for o in outcomes)
    num_prompt_tokens = sum(o.num_prompt_tokens for o in outcomes)
    num_good = sum(o.met_targets for o in outcomes)
    return Summary(
        num_requests=len(outcomes),
        ttft_s=Distribution.of([o.ttft_s for o in outcomes]),
        tpot_s=Distribution.of([o.tpot_s for o in outcomes if o.num_output_tokens > 1]),
        e2e_s=Distribution.of([o.e2e_s for o in outcomes]),
        makespan_s=makespan_s,
        requests_per_s=_ratio(len(outcomes), makespan_s),
        output_tokens_per_s=_ratio(num_output_tokens, makespan_s),
        tokens_per_s=_ratio(num_prompt_tokens + num_output_tokens, makespan_s),
        goodput_rps=_ratio(num_good, makespan_s),
        attainment=_ratio(num_good, len(outcomes)),
        ttft_attainment=_ratio(sum(o.ttft_s <= o.slo.ttft_s for o in outcomes), len(outcomes)),
        tpot_attainment=_ratio(sum(o.tpot_s <= o.slo.tpot_s for o in outcomes), len(outcomes)),
        num_preemptions=sum(o.num_preemptions for o in outcomes),
        prefix_hit_share=_ratio(sum(o.num_cached_tokens for o in outcomes), num_prompt_tokens),
        utilisation=like.utilisation if like else _ratio(busy_s, num_workers * makespan_s),
        num_steps=like.num_steps if like else num_steps,
        mean_batch=like.mean_batch if like else _ratio(num_spans, num_steps),
        mean_step_tokens=like.mean_step_tokens if like else _ratio(num_query_tokens, num_steps),
        mean_step_s=like.mean_step_s if like else _ratio(busy_s, num_steps),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
