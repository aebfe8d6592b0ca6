"""All metrics of the cluster, each defined once for the exporter, the dashboards and the alerts.

Names follow Prometheus' conventions: base units, `_total` for counters. All are exported through
Ray's metrics endpoint of each node, which prefixes the names with `ray_`; `deploy/prometheus.yml`
removes the prefix. In addition to its own labels each sample has `application`, `deployment` and
`replica` from Serve, and `model_name`. vLLM's own metrics are exported in the same way and keep
their names, `vllm:...`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MODEL_LABEL = "model_name"
"""Label of the model's name, as in vLLM's metrics."""


class Kind(StrEnum):
    """Type of a metric, by Prometheus' name."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    name: str
    kind: Kind
    unit: str
    """Unit of its values: seconds, bytes, tokens, requests, ..."""
    help: str
    labels: tuple[str, ...] = ()
    """Names of its labels; each has few values, fixed or bounded by the cluster's size."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, in its unit."""


METRICS: dict[str, Metric] = {}
"""All of our own metrics by name, in the order of this file."""


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


# Buckets: a step takes 1 ms (a small model on a GPU) to 10 s (a long prefill on a CPU), a decision
# a small part of that; latencies are resolved best around the targets of the built-in classes.
STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DECISION_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1)
TPOT_S = (0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
RELATIVE_ERROR = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
PREDICTED = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
SHARE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)

# What clients see; exported by each ingress.
ADMISSIONS = _counter(
    "admissions",
    "calls",
    "Calls of the generating API, by outcome: admitted, invalid (the client's error), unavailable.",
    "outcome",
)
REQUESTS = _counter(
    "requests",
    "requests",
    "Requests that ended, by outcome: stop, length, abort (the client left), unread (it did not"
    " read its stream), repetition, error; n=4 counts 4.",
    "slo_class",
    "outcome",
)
LIVE_REQUESTS = _gauge("live_requests", "requests", "Requests in flight.")
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    "Time from a request's arrival at the ingress to its first token.",
    REQUEST_S,
    "slo_class",
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "time_per_output_token_seconds",
    "Mean time per output token of a request after the first.",
    TPOT_S,
    "slo_class",
)
REQUEST_LATENCY = _histogram(
    "e2e_request_latency_seconds",
    "Time from a request's arrival at the ingress to its last token.",
    REQUEST_S,
    "slo_class",
)
SLO_REQUESTS = _counter(
    "slo_requests",
    "requests",
    "Requests with targets, by target (ttft, tpot, or all of theirs) and whether it was met.",
    "slo_class",
    "target",
    "met",
)
REQUEST_TOKENS = _counter(
    "request_tokens",
    "tokens",
    "Tokens of requests that ended, by kind: prompt or output.",
    "slo_class",
    "kind",
)
TENANT_REQUESTS = _counter(
    "tenant_requests",
    "requests",
    "Requests that ended, by the tenant whose key they came with, and by outcome.",
    "tenant",
    "outcome",
)
TENANT_TOKENS = _counter(
    "tenant_tokens",
    "tokens",
    "Tokens of requests that ended, by tenant and by kind: prompt or output.",
    "tenant",
    "kind",
)
TENANT_REFUSALS = _counter(
    "tenant_refusals",
    "calls",
    "Calls that were refused because a quota of their tenant was used up.",
    "tenant",
)
RETRIES = _counter(
    "request_retries",
    "requests",
    "Times that a request lost its worker and was retried on another, by the name of the error.",
    "reason",
)
TTFT_TO_PREDICTED = _histogram(
    "ttft_to_predicted_ratio",
    "Time from a request's placement to its first token over what was predicted for it.",
    PREDICTED,
)
PREFIX_TOKENS = _counter(
    "prefix_tokens",
    "tokens",
    "Tokens of prompts of which a cached prefix was predicted, by kind: all placed, those predicted"
    " to be cached, those found cached.",
    "kind",
)
HTTP_REQUESTS = _counter(
    "http_requests",
    "requests",
    "HTTP requests that were answered, by route, method and status; 499: the client left before.",
    "handler",
    "method",
    "status",
)
HTTP_SECONDS = _histogram(
    "http_request_seconds",
    "Time from an HTTP request to the end of its answer, a stream's last chunk, by route.",
    REQUEST_S,
    "handler",
)

# Steps; exported by each worker.
QUEUE_TIME = _histogram(
    "request_queue_seconds",
    "Time from a request's arrival at the ingress to the first step that computes part of it.",
    REQUEST_S,
    "slo_class",
)
STEP_SECONDS = _histogram("step_seconds", "Duration of a step.", STEP_S)
STEP_DECISION_SECONDS = _histogram(
    "step_decision_seconds", "Duration of planning a step, which is part of the step.", DECISION_S
)
STEP_PREDICTION_ERROR = _histogram(
    "step_prediction_error_ratio",
    "Difference between predicted and measured time of a step, relative to the measured time.",
    RELATIVE_ERROR,
)
STEP_BUDGET_USE = _histogram(
    "step_budget_use_ratio",
    "Predicted time of a step over the time that the targets of its requests allow.",
    SHARE,
)
STEP_MEASURED_SECONDS = _counter(
    "step_measured_seconds", "seconds", "Time in steps; its rate is the worker's utilisation."
)
STEP_PREDICTED_SECONDS = _counter(
    "step_predicted_seconds", "seconds", "Predicted time of the steps."
)
STEP_TOKENS = _counter(
    "step_tokens", "tokens", "Tokens computed in steps, by stage: prefill, decode, verify.", "stage"
)
DEFERRALS = _counter(
    "deferrals",
    "requests",
    "Requests deferred in a step, counted once per such step, by reason.",
    "reason",
)
STEP_FLOPS = _counter(
    "step_flops",
    "operations",
    "Floating point operations of the steps, computed from the model's shape.",
)
STEP_MEMORY_BYTES = _counter(
    "step_memory_bytes",
    "bytes",
    "Bytes of weights and KV cache read and written, computed from the model's shape.",
)
PEAK_FLOPS = _gauge(
    "peak_flops_per_second", "operations/s", "Peak arithmetic rate measured on the worker's device."
)
PEAK_MEMORY_BANDWIDTH = _gauge(
    "peak_memory_bytes_per_second",
    "bytes/s",
    "Peak bandwidth measured on the worker's device.",
)

# Drafts; exported by each worker and each draft worker.
DRAFT_TOKENS = _counter(
    "draft_tokens",
    "tokens",
    "Draft tokens by outcome: proposed, verified, accepted, late, or dropped as stale.",
    "drafter",
    "outcome",
)
DRAFT_VERIFIED_AT = _counter(
    "draft_verified_tokens",
    "tokens",
    "Verified draft tokens by their position after the newest token.",
    "drafter",
    "position",
)
DRAFT_ACCEPTED_AT = _counter(
    "draft_accepted_tokens",
    "tokens",
    "Accepted draft tokens by their position after the newest token.",
    "drafter",
    "position",
)
DRAFT_ACCEPTANCE = _gauge(
    "draft_acceptance_ratio", "ratio", "Share of the recently verified drafts that were accepted."
)
TOKENS_PER_DECODE = _gauge("draft_tokens_per_decode", "tokens", "Recent output tokens per decode.")
DRAFT_SILENCE = _gauge(
    "draft_silence_seconds",
    "seconds",
    "Time that the draft worker has owed a worker an answer and sent none.",
)
DRAFT_COLLAPSES = _counter(
    "draft_collapses",
    "collapses",
    "Times that the drafts for a worker were no longer accepted as they used to be, by reason.",
    "reason",
)
DRAFT_WORKER_BUSY = _gauge(
    "draft_worker_busy_ratio", "ratio", "Share of its time that a draft worker spends drafting."
)
DRAFT_WORKER_CONTEXTS = _gauge(
    "draft_worker_contexts", "requests", "Requests that a draft worker follows."
)

# Placement; exported by the GlobalScheduler.
PLACEMENTS = _counter(
    "placements",
    "requests",
    "Requests placed on each worker, by the reason for the choice.",
    "worker",
    "reason",
)
TENANT_DEVICE_SECONDS = _counter(
    "tenant_device_seconds",
    "seconds",
    "Predicted seconds of device time that a tenant's ended requests took.",
    "tenant",
)
TENANT_WAITING = _gauge(
    "tenant_waiting_requests",
    "requests",
    "Requests of a tenant that wait for its turn, while the workers are busy.",
    "tenant",
)
TENANT_QUEUED = _counter(
    "tenant_queued_requests",
    "requests",
    "Requests of a tenant that had to wait for its turn.",
    "tenant",
)
PLACEMENT_REFUSALS = _counter(
    "placement_refusals",
    "requests",
    "Requests that were refused at once, by the reason.",
    "reason",
)
WORKER_OUTSTANDING_TOKENS = _gauge(
    "worker_outstanding_tokens",
    "tokens",
    "Tokens that a worker's requests may still need, as placement sees it.",
    "worker",
)
WORKER_REQUESTS = _gauge(
    "worker_requests", "requests", "Requests on a worker, as placement sees it.", "worker"
)
WORKER_REPORT_AGE = _gauge(
    "worker_report_age_seconds", "seconds", "Seconds since the worker's last load report.", "worker"
)
PREFILL_SHARE = _gauge(
    "worker_prefill_share_ratio",
    "ratio",
    "Longest time for prefills that the stage policy gives a worker's steps with decodes, as a"
    " share of what they may last.",
    "worker",
)
MAX_DRAFTS = _gauge(
    "worker_max_drafts",
    "tokens",
    "Drafts of one request that the stage policy lets a worker verify at most; absent without a"
    " limit.",
    "worker",
)
STAGE_POLICY_CHANGES = _counter(
    "stage_policy_changes",
    "changes",
    "Changes of the bounds that the stage policy sets for a worker's steps, by reason.",
    "reason",
)
WORKER_SLOWNESS = _gauge(
    "worker_slowness_ratio",
    "ratio",
    "Recent step times of a worker relative to those that its profile predicts.",
    "worker",
)
PREFIX_INDEX_BLOCKS = _gauge(
    "prefix_index_blocks", "blocks", "Different blocks that the workers' prefix caches have."
)
PREFIX_INDEX_BYTES = _gauge(
    "prefix_index_bytes", "bytes", "Memory of the index of prefix caches, at most."
)
PREFIX_INDEX_WORKERS = _gauge(
    "prefix_index_workers", "workers", "Workers that tell what their prefix caches have."
)
PREFIX_UNTOLD_WORKERS = _gauge(
    "prefix_untold_workers",
    "workers",
    "Serving workers that do not tell what their prefix caches have; 0 where they need not.",
)
PREFIX_RESYNCS = _counter(
    "prefix_resyncs",
    "resyncs",
    "Times that a worker was asked for all that its prefix cache has.",
)
PREFIX_FORMAT_MISMATCH = _counter(
    "prefix_format_mismatch",
    "workers",
    "Workers whose blocks could not be compared with those of a request, over all requests.",
)
SCALING_CHANGES = _counter(
    "scaling_changes",
    "changes",
    "Times that another number of workers was wanted, by the reason.",
    "reason",
)
WORKERS_WANTED = _gauge("workers_wanted", "workers", "Workers that there should be.")
WORKERS_READY = _gauge("workers_ready", "workers", "Workers that take requests.")
OFFERED_WORK = _gauge(
    "offered_work",
    "workers",
    "Predicted work of the requests that come, in seconds of one worker's full steps per second.",
)
WORKER_CAPACITY = _gauge(
    "worker_capacity",
    "workers",
    "Work, in the same unit, that one worker is thought to take while targets are met.",
)
OUTPUT_LENGTH_ERROR = _gauge(
    "output_length_error_ratio",
    "ratio",
    "Mean |ln(predicted / real)| of the output lengths of a tenant's latest requests: 0.69 is a"
    " factor of two.",
    "tenant",
)
OUTPUT_LENGTH_BIAS = _gauge(
    "output_length_bias_ratio",
    "ratio",
    "Predicted output tokens of a tenant's latest requests, all together, relative to the real"
    " ones, minus 1.",
    "tenant",
)
OUTPUT_LENGTH_COVERAGE = _gauge(
    "output_length_coverage_ratio",
    "ratio",
    "Share of a tenant's latest requests that gave no more tokens than their predicted high"
    " quantile, 0.95.",
    "tenant",
)
START_TIME = _gauge(
    "start_time_seconds",
    "seconds",
    "Start time of this incarnation of a replica, since the epoch; a new value is a restart.",
)


@dataclass(frozen=True, slots=True)
class RayMetric:
    """One of Ray's own metrics that the alerts use; Ray defines its labels and help."""

    name: str


HEALTHY_REPLICAS = RayMetric("ray_serve_deployment_replica_healthy")
"""1 for each `replica` of a `deployment` of an `application` that has started and is healthy."""


@dataclass(frozen=True, slots=True)
class VllmMetric:
    """One of vLLM's own metrics that the dashboards show; vLLM defines its name and help."""

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
