"""Every metric of the cluster, once: what dashboards, alerts and the exporter name.

Names follow Prometheus: base units, `_total` for counters. All of them leave through Ray's metrics
endpoint of each node, which puts `ray_` before the name; `deploy/prometheus.yml` takes it off
again. Beside its own labels each sample has `application`, `deployment` and `replica` from Serve,
and `model_name`. vLLM's own metrics go the same way and keep their names, `vllm:...`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MODEL_LABEL = "model_name"
"""As vLLM calls it."""


class Kind(StrEnum):
    """Of a metric, in Prometheus' words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; `buckets` are the upper bounds of a histogram's, in its unit."""

    name: str
    kind: Kind
    unit: str
    """Of its values: seconds, bytes, tokens, requests, ..."""
    help: str
    labels: tuple[str, ...] = ()
    """Each of few values, known beforehand or bounded by the cluster's size."""
    buckets: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {}
"""All of ours by name, in the order of this file."""


def _metric(
    name: str,
    kind: Kind,
    unit: str,
    help: str,
    labels: Sequence[str] = (),
    buckets: Sequence[float] = (),
) -> Metric:
    assert name not in METRICS
    METRICS[name] = Metric(f"xyserve_{name}", kind, unit, help, tuple(labels), tuple(buckets))
    return METRICS[name]


def _counter(name: str, unit: str, help: str, *labels: str) -> Metric:
    return _metric(f"{name}_total", Kind.COUNTER, unit, help, labels)


def _gauge(name: str, unit: str, help: str, *labels: str) -> Metric:
    return _metric(name, Kind.GAUGE, unit, help, labels)


def _histogram(name: str, help: str, buckets: Sequence[float], *labels: str) -> Metric:
    unit = "ratio" if name.endswith("_ratio") else "seconds"
    return _metric(name, Kind.HISTOGRAM, unit, help, labels, buckets)


STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DECISION_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1)
TPOT_S = (0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
RELATIVE_ERROR = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
SHARE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)

# What clients see; told by each ingress.
ADMISSIONS = _counter(
    "admissions",
    "calls",
    "Calls of the API that generates: admitted, invalid (the client's error), or unavailable.",
    "outcome",
)
REQUESTS = _counter(
    "requests",
    "requests",
    "Requests that ended: by stop, length, abort (the client left) or error; n=4 makes four.",
    "slo_class",
    "outcome",
)
LIVE_REQUESTS = _gauge("live_requests", "requests", "Requests that were admitted and go on.")
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    "From a request's arrival at the ingress to its first token.",
    REQUEST_S,
    "slo_class",
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "time_per_output_token_seconds",
    "Mean time of a request's tokens after the first.",
    TPOT_S,
    "slo_class",
)
REQUEST_LATENCY = _histogram(
    "e2e_request_latency_seconds",
    "From a request's arrival at the ingress to its last token.",
    REQUEST_S,
    "slo_class",
)
SLO_REQUESTS = _counter(
    "slo_requests",
    "requests",
    "Requests that had a target, by whether it was met: ttft, tpot, or all that it had.",
    "slo_class",
    "target",
    "met",
)
REQUEST_TOKENS = _counter(
    "request_tokens",
    "tokens",
    "Tokens of requests that ended, of the prompt and of the output: who uses the cluster.",
    "slo_class",
    "kind",
)
RETRIES = _counter(
    "request_retries",
    "requests",
    "Times that a request lost its worker and went on with another, by what happened to the first.",
    "reason",
)

# Steps; told by each worker.
QUEUE_TIME = _histogram(
    "request_queue_seconds",
    "From a request's arrival at the ingress to the first step that computes some of it.",
    REQUEST_S,
    "slo_class",
)
STEP_SECONDS = _histogram("step_seconds", "How long a step took.", STEP_S)
STEP_DECISION_SECONDS = _histogram(
    "step_decision_seconds", "How long planning a step took, which is part of it.", DECISION_S
)
STEP_PREDICTION_ERROR = _histogram(
    "step_prediction_error_ratio",
    "Difference between predicted and measured time of a step, over the measured.",
    RELATIVE_ERROR,
)
STEP_BUDGET_USE = _histogram(
    "step_budget_use_ratio",
    "Predicted time of a step over the time that the targets of its requests leave it.",
    SHARE,
)
STEP_MEASURED_SECONDS = _counter(
    "step_measured_seconds", "seconds", "Time in steps; its rate is the share of time in use."
)
STEP_PREDICTED_SECONDS = _counter(
    "step_predicted_seconds", "seconds", "Time that the steps were predicted to take."
)
STEP_TOKENS = _counter(
    "step_tokens", "tokens", "Tokens computed in steps, by stage: prefill, decode, verify.", "stage"
)
DEFERRALS = _counter(
    "deferrals",
    "requests",
    "Requests that got nothing in a step, counted in each such step, by reason.",
    "reason",
)
STEP_FLOPS = _counter(
    "step_flops", "operations", "Floating point operations that the model's shape asks for."
)
STEP_MEMORY_BYTES = _counter(
    "step_memory_bytes", "bytes", "Weights and KV cache that the model's shape has steps move."
)
PEAK_FLOPS = _gauge(
    "peak_flops_per_second", "operations/s", "Fastest arithmetic measured on the worker's device."
)
PEAK_MEMORY_BANDWIDTH = _gauge(
    "peak_memory_bytes_per_second", "bytes/s", "Fastest reading measured on the worker's device."
)

# Drafts; told by each worker and by each draft worker.
DRAFT_TOKENS = _counter(
    "draft_tokens",
    "tokens",
    "Draft tokens: proposed by draft workers, verified, accepted; late, or dropped as stale.",
    "drafter",
    "outcome",
)
DRAFT_VERIFIED_AT = _counter(
    "draft_verified_tokens",
    "tokens",
    "Verified draft tokens by their position behind the newest token.",
    "drafter",
    "position",
)
DRAFT_ACCEPTED_AT = _counter(
    "draft_accepted_tokens",
    "tokens",
    "Accepted draft tokens by their position behind the newest token.",
    "drafter",
    "position",
)
DRAFT_ACCEPTANCE = _gauge(
    "draft_acceptance_ratio", "ratio", "Share of the drafts verified lately that were right."
)
TOKENS_PER_DECODE = _gauge(
    "draft_tokens_per_decode", "tokens", "Output tokens that a decode gave lately."
)
DRAFT_COLLAPSES = _counter(
    "draft_collapses",
    "collapses",
    "Times that the drafts for a worker were no longer accepted as they had been, by why.",
    "reason",
)
DRAFT_WORKER_BUSY = _gauge(
    "draft_worker_busy_ratio", "ratio", "Share of its time that a draft worker drafts."
)
DRAFT_WORKER_CONTEXTS = _gauge(
    "draft_worker_contexts", "requests", "Requests that a draft worker follows."
)

# Placement; told by the GlobalScheduler.
PLACEMENTS = _counter(
    "placements",
    "requests",
    "Requests placed on each worker, by why it was that one.",
    "worker",
    "reason",
)
WORKER_OUTSTANDING_TOKENS = _gauge(
    "worker_outstanding_tokens",
    "tokens",
    "Tokens that the requests of a worker may still need, as placement sees it.",
    "worker",
)
WORKER_REQUESTS = _gauge(
    "worker_requests", "requests", "Requests on a worker, as placement sees it.", "worker"
)
WORKER_REPORT_AGE = _gauge(
    "worker_report_age_seconds", "seconds", "Time since a worker told its load.", "worker"
)
START_TIME = _gauge(
    "start_time_seconds",
    "seconds",
    "When this incarnation of a replica started, since the epoch: a new value is a restart.",
)


@dataclass(frozen=True, slots=True)
class VllmMetric:
    """One of vLLM's own that dashboards show; its name and help are vLLM's."""

    name: str


VLLM_NUM_REQUESTS_RUNNING = VllmMetric("vllm:num_requests_running")
VLLM_NUM_REQUESTS_WAITING = VllmMetric("vllm:num_requests_waiting")
VLLM_KV_CACHE_USAGE = VllmMetric("vllm:kv_cache_usage_perc")
VLLM_PREFIX_CACHE_QUERIES = VllmMetric("vllm:prefix_cache_queries_total")
VLLM_PREFIX_CACHE_HITS = VllmMetric("vllm:prefix_cache_hits_total")
VLLM_NUM_PREEMPTIONS = VllmMetric("vllm:num_preemptions_total")
VLLM_PROMPT_TOKENS = VllmMetric("vllm:prompt_tokens_total")
VLLM_GENERATION_TOKENS = VllmMetric("vllm:generation_tokens_total")
VLLM_INTER_TOKEN_LATENCY = VllmMetric("vllm:inter_token_latency_seconds")
