import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from math import inf
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.config.slo import SloClass, SloConfig
from cluster.observe import metrics
from cluster.observe.exporter import PlacementMetrics, RequestMetrics, WorkerMetrics
from cluster.observe.metrics import METRICS, Kind, Metric
from cluster.observe.request_history import Attempt, RequestRecord
from cluster.placement.prefix_watch import PrefixStats
from scheduler.drafting import CollapseReason
from scheduler.fair_shares import Share
from scheduler.output_length import Accuracy, OutputLength
from scheduler.placement import Placement, PlacementReason, WorkerLoad
from scheduler.prefill_queue import Forecast
from scheduler.request import Request, Slo
from scheduler.scaling import ScalingDecision, ScalingReason
from scheduler.task import BatchPlan, Deferral, Reason, Stage, StageTask, StepReport
from workers.drafts.draft_client import DraftCounts
from workers.errors import EngineDead, WorkerDraining
from workers.reports import DraftStats

CLASSES = SloConfig(classes={"chat": SloClass(ttft_ms=1000, tpot_ms=500)})


class Exported:
    """Keeps what an exporter is given, and checks that it fits the catalogue."""

    def __init__(self) -> None:
        self.sums: Counter[Any] = Counter()
        self.begun: set[Any] = set()
        self.values: list[tuple[Any, ...]] = []
        self.gauges: dict[Metric, float] = {}

    def begin(self, metric: Metric, **labels: Iterable[str]) -> None:
        for values in itertools.product(*labels.values()):
            key = self._key(metric, Kind.COUNTER, dict(zip(labels, values, strict=True)))
            assert key not in self.sums
            self.begun.add(key)

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        assert amount > 0  # Ray takes no other
        self.sums[self._key(metric, Kind.COUNTER, labels)] += amount  # type: ignore[assignment]

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        self.values.append((*self._key(metric, Kind.HISTOGRAM, labels), value))

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self._key(metric, Kind.GAUGE, labels)
        self.gauges[metric] = value

    keep = set

    def _key(self, metric: Metric, kind: Kind, labels: dict[str, str]) -> tuple[Any, ...]:
        assert metric.kind is kind
        assert tuple(labels) == metric.labels
        return (metric, *labels.values())


@pytest.fixture
def exported() -> Exported:
    return Exported()


def step(limit_s: float = inf, deferred: int = 0) -> StepReport:
    tasks = (
        StageTask("a", Stage.DECODE, 1, 10, True),
        StageTask("b", Stage.PREFILL, 30, 30, False),
        StageTask("c", Stage.VERIFY, 4, 20, True),
    )
    waits = tuple(Deferral(str(number), Reason.KV) for number in range(deferred))
    plan = BatchPlan(tasks, waits, (), predicted_s=0.03, limit_s=limit_s)
    return StepReport(
        step=1,
        began_s=0.0,
        plan=plan,
        tasks=tasks,
        measured_s=0.04,
        decided_s=0.001,
        queued_s=(("chat", 0.5),),
        num_flops=2e9,
        num_bytes=3e8,
    )


def test_steps_are_added_up_until_they_are_exported(exported: Exported) -> None:
    worker = WorkerMetrics(exported)  # type: ignore[arg-type]
    for _ in range(3):
        worker.add_step(step(deferred=2))

    assert exported.sums == {}
    worker.export(None)
    worker.export(None)

    assert exported.sums == {
        (metrics.STEP_MEASURED_SECONDS,): pytest.approx(0.12),
        (metrics.STEP_PREDICTED_SECONDS,): pytest.approx(0.09),
        (metrics.STEP_FLOPS,): 6e9,
        (metrics.STEP_MEMORY_BYTES,): 9e8,
        (metrics.STEP_TOKENS, "decode"): 3,
        (metrics.STEP_TOKENS, "prefill"): 90,
        (metrics.STEP_TOKENS, "verify"): 12,
        (metrics.DEFERRALS, "kv"): 6,
    }


def test_each_step_counts_in_the_histograms(exported: Exported) -> None:
    WorkerMetrics(exported).add_step(step(limit_s=0.06))  # type: ignore[arg-type]

    assert exported.values == [
        (metrics.STEP_SECONDS, 0.04),
        (metrics.STEP_DECISION_SECONDS, 0.001),
        (metrics.STEP_PREDICTION_ERROR, pytest.approx(0.25)),
        (metrics.STEP_BUDGET_USE, pytest.approx(0.5)),
        (metrics.QUEUE_TIME, "chat", 0.5),
    ]


def test_a_step_without_targets_uses_no_budget(exported: Exported) -> None:
    WorkerMetrics(exported).add_step(step())  # type: ignore[arg-type]

    assert metrics.STEP_BUDGET_USE not in {value[0] for value in exported.values}


def test_the_growth_of_draft_counts_is_exported(exported: Exported) -> None:
    worker = WorkerMetrics(exported)  # type: ignore[arg-type]

    def export(**counts: Any) -> None:
        stats = DraftStats({"suffix": DraftCounts(**counts)}, 0.6, 1.5, "d", 0.0)
        worker.export(stats)

    export(proposed=10, verified=3, accepted=2, verified_at=[2, 1], accepted_at=[2])
    export(proposed=15, verified=5, accepted=3, late=1, verified_at=[3, 2], accepted_at=[2, 1])

    assert exported.sums == {
        (metrics.DRAFT_TOKENS, "suffix", "proposed"): 15,
        (metrics.DRAFT_TOKENS, "suffix", "verified"): 5,
        (metrics.DRAFT_TOKENS, "suffix", "accepted"): 3,
        (metrics.DRAFT_TOKENS, "suffix", "late"): 1,
        (metrics.DRAFT_VERIFIED_AT, "suffix", "1"): 3,
        (metrics.DRAFT_VERIFIED_AT, "suffix", "2"): 2,
        (metrics.DRAFT_ACCEPTED_AT, "suffix", "1"): 2,
        (metrics.DRAFT_ACCEPTED_AT, "suffix", "2"): 1,
    }
    assert exported.gauges == {
        metrics.DRAFT_ACCEPTANCE: 0.6,
        metrics.TOKENS_PER_DECODE: 1.5,
        metrics.DRAFT_SILENCE: 0.0,
    }


def ended(outcome: str, *times: float) -> RequestRecord:
    """A request that arrived at 10 s and had a token at each of these times."""
    slo = Slo(ttft_s=1.0, tpot_s=0.5)
    request = Request("r", 7, 9, slo=slo, slo_class="chat", tenant="acme")
    record = RequestRecord(request, 10.0, outcome=outcome)
    for time in times:
        record.deliver([7], time)
    return record


def test_a_request_counts_by_its_class_and_outcome(exported: Exported) -> None:
    client = RequestMetrics(exported, CLASSES)  # type: ignore[arg-type]
    client.count_end(ended("stop", 10.5, 11.0, 12.5))

    assert exported.values == [
        (metrics.TIME_TO_FIRST_TOKEN, "chat", 0.5),
        (metrics.REQUEST_LATENCY, "chat", 2.5),
        (metrics.TIME_PER_OUTPUT_TOKEN, "chat", 1.0),
    ]
    assert exported.sums == {
        (metrics.REQUESTS, "chat", "stop"): 1,
        (metrics.REQUEST_TOKENS, "chat", "prompt"): 7,
        (metrics.REQUEST_TOKENS, "chat", "output"): 3,
        (metrics.TENANT_REQUESTS, "acme", "stop"): 1,
        (metrics.TENANT_TOKENS, "acme", "prompt"): 7,
        (metrics.TENANT_TOKENS, "acme", "output"): 3,
        (metrics.SLO_REQUESTS, "chat", "ttft", "true"): 1,
        (metrics.SLO_REQUESTS, "chat", "tpot", "false"): 1,
        (metrics.SLO_REQUESTS, "chat", "all", "false"): 1,
    }


def test_a_request_that_gave_nothing_has_no_latency(exported: Exported) -> None:
    RequestMetrics(exported, CLASSES).count_end(ended("abort"))  # type: ignore[arg-type]

    assert exported.values == []
    assert exported.sums == {
        (metrics.REQUESTS, "chat", "abort"): 1,
        (metrics.TENANT_REQUESTS, "acme", "abort"): 1,
    }


def attempt(found: int | None, ttft_s: float, forecast: Forecast | None) -> Attempt:
    return Attempt("r.0", 10.0, "", forecast, 10.0, 10.0 + ttft_s, found)


def test_what_was_predicted_is_compared_with_what_came(exported: Exported) -> None:
    record = ended("stop", 10.5)
    predicted = Forecast(num_cached_tokens=4, ttft_s=0.25)
    record.attempts += [
        attempt(None, inf, predicted),  # lost before its first token
        attempt(6, 0.5, predicted),
        attempt(0, 0.5, Forecast(ttft_s=1.0)),
        attempt(5, 0.5, None),
    ]
    RequestMetrics(exported, CLASSES).count_end(record)  # type: ignore[arg-type]

    ratios = [value for metric, value, *_ in exported.values if metric is metrics.TTFT_TO_PREDICTED]
    assert ratios == [2.0, 0.5]
    tokens = {key[1]: num for key, num in exported.sums.items() if key[0] is metrics.PREFIX_TOKENS}
    assert tokens == {"placed": 14, "predicted": 4, "found": 6}


def test_what_is_known_of_prefix_caches_is_exported(exported: Exported) -> None:
    placement = PlacementMetrics(exported)  # type: ignore[arg-type]
    stats = PrefixStats(3, 1, 500, 9000, num_resyncs=2, num_format_mismatches=0)
    placement.set_prefixes(stats, is_told=True)
    gauges = dict(exported.gauges)
    placement.set_prefixes(dataclasses.replace(stats, num_format_mismatches=5), is_told=False)

    assert gauges == {
        metrics.PREFIX_INDEX_BLOCKS: 500,
        metrics.PREFIX_INDEX_BYTES: 9000,
        metrics.PREFIX_INDEX_WORKERS: 3,
        metrics.PREFIX_UNTOLD_WORKERS: 1,
    }
    assert exported.gauges[metrics.PREFIX_UNTOLD_WORKERS] == 0
    assert exported.sums == {(metrics.PREFIX_RESYNCS,): 2, (metrics.PREFIX_FORMAT_MISMATCH,): 5}


def test_counters_begin_at_zero_for_every_value_that_they_will_have(exported: Exported) -> None:
    """Otherwise `increase` in Prometheus misses the first event of each kind."""
    exporter: Any = exported
    client = RequestMetrics(exporter, CLASSES, ["acme"])
    placement = PlacementMetrics(exporter)
    client.count_over_quota("acme")
    worker = WorkerMetrics(exporter)
    for outcome in ("admitted", "invalid", "unavailable"):
        client.count_admission(outcome)
    for outcome in ("stop", "length", "abort", "error", "repetition"):  # vLLM's
        client.count_end(ended(outcome, 10.5, 11.0))
    for error in (ActorDiedError, ActorUnavailableError, EngineDead, WorkerDraining):
        client.count_retry(error.__name__)
    for collapse in CollapseReason:
        placement.count_collapse(collapse)
    load = WorkerLoad("w", 0, 0, draining=False)
    placement.set_load(load, 0.0)
    for reason in PlacementReason:
        placement.count_placement(Placement(load, None, reason, 0))
    worker.add_step(step(deferred=2))
    counts = DraftCounts(proposed=1, verified=1, accepted=1, late=1, stale=1)
    worker.export(DraftStats({"suffix": counts}, 0.6, 1.5, "d", 0.0))

    with_labels = {key for key in exported.sums if len(key) > 1}
    assert len(with_labels) > 30
    assert with_labels <= exported.begun


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_names_and_units_keep_to_prometheus_conventions(metric: Metric) -> None:
    assert metric.name.startswith("xyserve_")
    assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
    stem = metric.name.removesuffix("_total")
    if metric.unit in ("seconds", "bytes", "ratio"):
        assert stem.endswith(f"_{metric.unit}")
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(metric.buckets)
    # Ray and Serve have these of their own.
    assert not {"application", "deployment", "replica", "model_name"} & set(metric.labels)


def test_what_is_wanted_of_workers_is_exported(exported: Exported) -> None:
    decision = ScalingDecision(3, ScalingReason.LOAD, 1.5, 1.7, 0.6, 0.0, None, 2, 60.0)
    placement = PlacementMetrics(exported)  # type: ignore[arg-type]

    placement.count_rescaling(decision)
    placement.set_scaling(decision)

    assert exported.sums == {(metrics.SCALING_CHANGES, ScalingReason.LOAD): 1}
    assert exported.gauges == {
        metrics.WORKERS_WANTED: 3,
        metrics.WORKERS_READY: 2,
        metrics.OFFERED_WORK: 1.5,
        metrics.WORKER_CAPACITY: 0.6,
    }


def test_the_accuracy_of_predicted_lengths_is_exported(exported: Exported) -> None:
    accuracy = Accuracy()
    accuracy.add(OutputLength(mean=60.0, median=40.0, high=30.0), 20)

    PlacementMetrics(exported).set_length_accuracy("acme", accuracy)  # type: ignore[arg-type]

    assert exported.gauges == {
        metrics.OUTPUT_LENGTH_ERROR: pytest.approx(math.log(2)),
        metrics.OUTPUT_LENGTH_BIAS: 2.0,
        metrics.OUTPUT_LENGTH_COVERAGE: 1.0,
    }


def test_shares_of_tenants_are_exported_as_they_grow(exported: Exported) -> None:
    placement = PlacementMetrics(exported)  # type: ignore[arg-type]

    placement.set_share("acme", Share(attained_s=2.0, running_s=1.0, num_waiting=7))
    placement.set_share("acme", Share(attained_s=5.0, running_s=0.0, num_waiting=4))
    placement.count_queued("acme")

    assert exported.sums == {
        (metrics.TENANT_DEVICE_SECONDS, "acme"): 5.0,
        (metrics.TENANT_QUEUED, "acme"): 1,
    }
    assert exported.gauges == {metrics.TENANT_WAITING: 4}
