"""Sends the metrics of `cluster/observe/metrics.py` to Ray's metrics endpoint of the node."""

import itertools
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from ray.serve import metrics as serve_metrics

from cluster.config.slo import SloConfig
from cluster.observe import metrics
from cluster.observe.metrics import MODEL_LABEL, Kind, Metric
from cluster.observe.request_history import Attempt, RequestRecord
from cluster.placement.prefix_watch import PrefixStats
from scheduler.drafting import CollapseReason
from scheduler.fair_shares import Share
from scheduler.output_length import Accuracy
from scheduler.placement import Placement, PlacementReason, RefusalReason, WorkerLoad
from scheduler.scaling import ScalingDecision, ScalingReason
from scheduler.stage_policy import PolicyReason, WorkerPolicy
from scheduler.task import Reason, Stage, StepReport
from workers.drafts.draft_client import DraftCounts
from workers.reports import DraftStats, DraftWorkerStatus

REFRESH_S = 5.0
"""How often kept gauges are set again: well within the 20 s after which Ray forgets them."""

ADMISSION_OUTCOMES = ("admitted", "invalid", "unavailable")
REQUEST_OUTCOMES = ("stop", "length", "abort", "unread", "error", "repetition")
RETRY_REASONS = (
    "ActorDiedError",
    "ActorUnavailableError",
    "EngineDead",
    "StepFailed",
    "WorkerDraining",
)
PREFIX_KINDS = ("placed", "predicted", "found")
DRAFT_OUTCOMES = ("proposed", "verified", "accepted", "late", "stale")


class _Nowhere:
    """A stand-in for Ray's metrics where none are exported."""

    def inc(self, amount: float, labels: dict[str, str]) -> None:
        """Drop what a counter is given."""

    def _record(self, value: float, labels: dict[str, str]) -> None:
        """Drop where a counter starts."""

    def set(self, value: float, labels: dict[str, str]) -> None:
        """Drop what a gauge is given."""

    def observe(self, value: float, labels: dict[str, str]) -> None:
        """Drop what a histogram is given."""


_NOWHERE = _Nowhere()


class Exporter:
    """The metrics of one replica."""

    def __init__(self, model_name: str, enabled: bool) -> None:
        """`model_name` is a label of every metric; if not `enabled`, nothing is exported."""
        self._model_name = model_name
        self._enabled = enabled
        self._made: dict[str, Any] = {}
        self._kept: dict[Metric, float] = {}
        self.keep(metrics.START_TIME, time.time())
        threading.Thread(target=self._refresh, name="metrics", daemon=True).start()

    def begin(self, counter: Metric, **labels: Iterable[str]) -> None:
        """Start a counter at zero for all of these values of its labels.

        A series that starts with its first event hides that one from Prometheus' `increase`.
        """
        for values in itertools.product(*labels.values()):
            # Ray's `inc` takes no zero.
            self._ray_metric(counter)._record(0, dict(zip(labels, values, strict=True)))

    def add(self, counter: Metric, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._ray_metric(counter).inc(amount, labels)

    def set(self, gauge: Metric, value: float, **labels: str) -> None:
        """Set a gauge. Ray forgets it after 20 s, so that stale values vanish: set it often."""
        self._ray_metric(gauge).set(value, labels)

    def keep(self, gauge: Metric, value: float) -> None:
        """Set a gauge that lasts until it is set again or the replica ends."""
        self._kept[gauge] = value
        self.set(gauge, value)

    def observe(self, histogram: Metric, value: float, **labels: str) -> None:
        """Add one value to a histogram."""
        self._ray_metric(histogram).observe(value, labels)

    def _refresh(self) -> None:
        while True:
            time.sleep(REFRESH_S)
            for gauge, value in self._kept.copy().items():
                self.set(gauge, value)

    def _ray_metric(self, metric: Metric) -> Any:
        if not self._enabled:
            return _NOWHERE
        if (made := self._made.get(metric.name)) is None:
            options: dict[str, Any] = {"tag_keys": (*metric.labels, MODEL_LABEL)}
            if metric.kind is Kind.HISTOGRAM:
                options["boundaries"] = list(metric.buckets)
            cls = getattr(serve_metrics, metric.kind.capitalize())
            made = cls(metric.name, metric.help, **options)
            made.set_default_tags({MODEL_LABEL: self._model_name})
            self._made[metric.name] = made
        return made


class WorkerMetrics:
    """Totals over a worker's steps and drafts.

    Steps are added up until they are exported: Ray takes a few microseconds for each value.
    """

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._sums: defaultdict[tuple[Metric, str], float] = defaultdict(float)
        """Sums by metric and the value of its label, empty if it has none."""
        self._drafts: dict[str, DraftCounts] = {}
        exporter.begin(metrics.STEP_TOKENS, stage=Stage)
        exporter.begin(metrics.DEFERRALS, reason=Reason)

    def add_step(self, step: StepReport) -> None:
        """Count one step; called in the engine's thread, between two steps."""
        observe, sums, plan = self._exporter.observe, self._sums, step.plan
        measured_s = step.measured_s
        observe(metrics.STEP_SECONDS, measured_s)
        observe(metrics.STEP_DECISION_SECONDS, step.decided_s)
        observe(metrics.STEP_PREDICTION_ERROR, abs(plan.predicted_s / measured_s - 1))
        if plan.limit_s < math.inf:
            observe(metrics.STEP_BUDGET_USE, plan.predicted_s / max(plan.limit_s, 1e-6))
        for slo_class, queued_s in step.queued_s:
            observe(metrics.QUEUE_TIME, queued_s, slo_class=slo_class)
        sums[metrics.STEP_MEASURED_SECONDS, ""] += measured_s
        sums[metrics.STEP_PREDICTED_SECONDS, ""] += plan.predicted_s
        sums[metrics.STEP_FLOPS, ""] += step.num_flops
        sums[metrics.STEP_MEMORY_BYTES, ""] += step.num_bytes
        for task in step.tasks:
            sums[metrics.STEP_TOKENS, task.stage] += task.num_tokens
        for deferral in plan.deferred:
            sums[metrics.DEFERRALS, deferral.reason] += 1

    def export(self, drafts: DraftStats | None) -> None:
        """Send the sums, and the growth of the drafts' counts, since the last export."""
        for (metric, label), amount in self._sums.items():
            if amount:
                self._exporter.add(metric, amount, **dict.fromkeys(metric.labels, label))
        self._sums.clear()
        if drafts is None:
            return
        self._exporter.set(metrics.DRAFT_ACCEPTANCE, drafts.acceptance_rate)
        self._exporter.set(metrics.TOKENS_PER_DECODE, drafts.tokens_per_decode)
        self._exporter.set(metrics.DRAFT_SILENCE, drafts.silent_s)
        for drafter, counts in drafts.counts_of.items():
            if drafter not in self._drafts:
                self._exporter.begin(
                    metrics.DRAFT_TOKENS, drafter=[drafter], outcome=DRAFT_OUTCOMES
                )
            self._add_drafts(drafter, counts, self._drafts.get(drafter, DraftCounts()))
        self._drafts = drafts.counts_of

    def _add_drafts(self, drafter: str, counts: DraftCounts, before: DraftCounts) -> None:
        add = self._exporter.add
        for outcome in DRAFT_OUTCOMES:
            if (new := getattr(counts, outcome) - getattr(before, outcome)) > 0:
                add(metrics.DRAFT_TOKENS, new, drafter=drafter, outcome=outcome)
        for metric, now, then in (
            (metrics.DRAFT_VERIFIED_AT, counts.verified_at, before.verified_at),
            (metrics.DRAFT_ACCEPTED_AT, counts.accepted_at, before.accepted_at),
        ):
            for position, (number, old) in enumerate(itertools.zip_longest(now, then, fillvalue=0)):
                if number > old:
                    add(metric, number - old, drafter=drafter, position=str(position + 1))


class RequestMetrics:
    """Metrics of requests as the clients of one ingress see them."""

    def __init__(self, exporter: Exporter, slo: SloConfig, tenants: Iterable[str] = ()) -> None:
        self._exporter = exporter
        exporter.begin(metrics.TENANT_REFUSALS, tenant=tenants)
        exporter.begin(metrics.TENANT_REQUESTS, tenant=tenants, outcome=REQUEST_OUTCOMES)
        exporter.begin(metrics.TENANT_TOKENS, tenant=tenants, kind=("prompt", "output"))
        exporter.begin(metrics.ADMISSIONS, outcome=ADMISSION_OUTCOMES)
        exporter.begin(metrics.RETRIES, reason=RETRY_REASONS)
        exporter.begin(metrics.PREFIX_TOKENS, kind=PREFIX_KINDS)
        classes = slo.all_classes
        exporter.begin(metrics.REQUESTS, slo_class=classes, outcome=REQUEST_OUTCOMES)
        exporter.begin(metrics.REQUEST_TOKENS, slo_class=classes, kind=("prompt", "output"))
        targets, met = ("ttft", "tpot", "all"), ("true", "false")
        exporter.begin(metrics.SLO_REQUESTS, slo_class=classes, target=targets, met=met)

    def count_admission(self, outcome: str) -> None:
        """Count a call of the API, by its outcome: admitted, invalid or unavailable."""
        self._exporter.add(metrics.ADMISSIONS, outcome=outcome)

    def count_over_quota(self, tenant: str) -> None:
        """Count a call that was refused because its tenant had used up a quota."""
        self._exporter.add(metrics.TENANT_REFUSALS, tenant=tenant)

    def count_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count an HTTP request that was answered; `handler` is the path of its route."""
        self._exporter.add(
            metrics.HTTP_REQUESTS, handler=handler, method=method, status=str(status)
        )
        self._exporter.observe(metrics.HTTP_SECONDS, seconds, handler=handler)

    def count_retry(self, reason: str) -> None:
        """Count a request that lost its worker and is retried on another."""
        self._exporter.add(metrics.RETRIES, reason=reason)

    def set_live(self, num_live: int) -> None:
        """Set the number of requests in flight."""
        self._exporter.keep(metrics.LIVE_REQUESTS, num_live)

    def count_end(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        add, observe = self._exporter.add, self._exporter.observe
        slo_class = record.request.slo_class
        tenant = record.request.tenant
        add(metrics.REQUESTS, slo_class=slo_class, outcome=record.outcome)
        add(metrics.TENANT_REQUESTS, tenant=tenant, outcome=record.outcome)
        if record.num_output_tokens:
            observe(metrics.TIME_TO_FIRST_TOKEN, record.ttft_s, slo_class=slo_class)
            observe(metrics.REQUEST_LATENCY, record.e2e_s, slo_class=slo_class)
            add(
                metrics.REQUEST_TOKENS, record.num_output_tokens, slo_class=slo_class, kind="output"
            )
            prompt = record.request.num_prompt_tokens
            add(metrics.REQUEST_TOKENS, prompt, slo_class=slo_class, kind="prompt")
            add(metrics.TENANT_TOKENS, prompt, tenant=tenant, kind="prompt")
            add(metrics.TENANT_TOKENS, record.num_output_tokens, tenant=tenant, kind="output")
        if record.num_output_tokens > 1:
            observe(metrics.TIME_PER_OUTPUT_TOKEN, record.tpot_s, slo_class=slo_class)
        for attempt in record.attempts:
            self._count_attempt(attempt, record.request.num_prompt_tokens)
        for target, met in record.attainment().items():
            add(metrics.SLO_REQUESTS, slo_class=slo_class, target=target, met=str(met).lower())

    def _count_attempt(self, attempt: Attempt, num_prompt_tokens: int) -> None:
        """Compare an attempt with what was predicted for it, if it got a token."""
        forecast, num_found = attempt.forecast, attempt.num_cached_tokens
        if forecast is None or attempt.ttft_s == math.inf:
            return
        if forecast.ttft_s > 0:
            self._exporter.observe(metrics.TTFT_TO_PREDICTED, attempt.ttft_s / forecast.ttft_s)
        if num_found is not None:
            numbers = num_prompt_tokens, forecast.num_cached_tokens, num_found
            for kind, number in zip(PREFIX_KINDS, numbers, strict=True):
                if number:
                    self._exporter.add(metrics.PREFIX_TOKENS, number, kind=kind)


class PlacementMetrics:
    """Metrics of what the GlobalScheduler sees and decides."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._workers: set[str] = set()
        """Workers whose counters have begun."""
        self._attained_s: dict[str, float] = {}
        """What was exported last, by tenant."""
        self._prefixes: PrefixStats | None = None
        """What was exported last."""
        exporter.begin(metrics.DRAFT_COLLAPSES, reason=CollapseReason)
        exporter.begin(metrics.STAGE_POLICY_CHANGES, reason=PolicyReason)
        exporter.begin(
            metrics.PLACEMENT_REFUSALS, reason=(RefusalReason.OVERLOAD, RefusalReason.TOO_LONG)
        )
        exporter.begin(metrics.PREFIX_RESYNCS)
        exporter.begin(metrics.PREFIX_FORMAT_MISMATCH)
        exporter.begin(metrics.SCALING_CHANGES, reason=ScalingReason)

    def count_placement(self, placement: Placement) -> None:
        """Count a request that was placed."""
        worker = placement.chosen.worker_id
        self._exporter.add(metrics.PLACEMENTS, worker=worker, reason=placement.reason)

    def count_refusal(self, reason: RefusalReason) -> None:
        """Count a request that was refused for good."""
        self._exporter.add(metrics.PLACEMENT_REFUSALS, reason=reason)

    def count_queued(self, tenant: str) -> None:
        """Count a request that has to wait for its tenant's turn."""
        self._exporter.add(metrics.TENANT_QUEUED, tenant=tenant)

    def set_share(self, tenant: str, share: Share) -> None:
        """Set what a tenant has had of the workers, and what it waits for."""
        self._exporter.set(metrics.TENANT_WAITING, share.num_waiting, tenant=tenant)
        if tenant not in self._attained_s:
            self._exporter.begin(metrics.TENANT_DEVICE_SECONDS, tenant=[tenant])
            self._exporter.begin(metrics.TENANT_QUEUED, tenant=[tenant])
        before_s = self._attained_s.get(tenant, 0.0)
        if share.attained_s > before_s:
            added_s = share.attained_s - before_s
            self._exporter.add(metrics.TENANT_DEVICE_SECONDS, added_s, tenant=tenant)
        self._attained_s[tenant] = share.attained_s

    def count_collapse(self, reason: CollapseReason) -> None:
        """Count that the drafts for some worker are no longer accepted."""
        self._exporter.add(metrics.DRAFT_COLLAPSES, reason=reason)

    def count_policy_change(self, policy: WorkerPolicy) -> None:
        """Count that the stage policy has set other bounds for a worker."""
        self._exporter.add(metrics.STAGE_POLICY_CHANGES, reason=policy.reason)

    def set_policies(self, policies: Mapping[str, WorkerPolicy]) -> None:
        """Set the bounds of each worker's steps."""
        for worker, policy in policies.items():
            self._exporter.set(metrics.PREFILL_SHARE, policy.prefill_share, worker=worker)
            if policy.max_drafts is not None:
                self._exporter.set(metrics.MAX_DRAFTS, policy.max_drafts, worker=worker)

    def set_load(self, load: WorkerLoad, report_age_s: float) -> None:
        """Set a worker's load as the GlobalScheduler sees it."""
        set_, worker = self._exporter.set, load.worker_id
        if worker not in self._workers:
            self._workers.add(worker)
            self._exporter.begin(metrics.PLACEMENTS, worker=[worker], reason=PlacementReason)
        set_(metrics.WORKER_OUTSTANDING_TOKENS, load.num_outstanding_tokens, worker=worker)
        set_(metrics.WORKER_REQUESTS, load.num_requests, worker=worker)
        set_(metrics.WORKER_REPORT_AGE, report_age_s, worker=worker)
        set_(metrics.WORKER_SLOWNESS, load.slowness, worker=worker)

    def set_prefixes(self, stats: PrefixStats, is_told: bool) -> None:
        """Set what is known of the prefix caches; `is_told` if the config has workers tell it."""
        set_, before = self._exporter.set, self._prefixes
        set_(metrics.PREFIX_INDEX_BLOCKS, stats.num_blocks)
        set_(metrics.PREFIX_INDEX_BYTES, stats.num_bytes)
        set_(metrics.PREFIX_INDEX_WORKERS, stats.num_workers)
        set_(metrics.PREFIX_UNTOLD_WORKERS, stats.num_untold if is_told else 0)
        for counter, number, then in (
            (metrics.PREFIX_RESYNCS, stats.num_resyncs, before and before.num_resyncs),
            (
                metrics.PREFIX_FORMAT_MISMATCH,
                stats.num_format_mismatches,
                before and before.num_format_mismatches,
            ),
        ):
            if number > (then or 0):
                self._exporter.add(counter, number - (then or 0))
        self._prefixes = stats

    def count_rescaling(self, decision: ScalingDecision) -> None:
        """Count that another number of workers is wanted."""
        self._exporter.add(metrics.SCALING_CHANGES, reason=decision.reason)

    def set_scaling(self, decision: ScalingDecision) -> None:
        """Set how many workers are wanted, and what for."""
        set_ = self._exporter.set
        set_(metrics.WORKERS_WANTED, decision.num_wanted)
        set_(metrics.WORKERS_READY, decision.num_ready)
        set_(metrics.OFFERED_WORK, decision.load)
        set_(metrics.WORKER_CAPACITY, decision.limit)

    def set_length_accuracy(self, tenant: str, accuracy: Accuracy) -> None:
        """Set how well the lengths of a tenant's outputs are predicted."""
        set_ = self._exporter.set
        set_(metrics.OUTPUT_LENGTH_ERROR, accuracy.log_error, tenant=tenant)
        set_(metrics.OUTPUT_LENGTH_BIAS, accuracy.bias, tenant=tenant)
        set_(metrics.OUTPUT_LENGTH_COVERAGE, accuracy.coverage, tenant=tenant)


class DraftWorkerMetrics:
    """Metrics of how busy a draft worker is."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    def export(self, status: DraftWorkerStatus) -> None:
        """Send the current state."""
        self._exporter.set(metrics.DRAFT_WORKER_BUSY, status.busy_share)
        self._exporter.set(metrics.DRAFT_WORKER_CONTEXTS, status.num_contexts)
