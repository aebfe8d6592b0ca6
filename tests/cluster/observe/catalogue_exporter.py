"""A cluster that exists only in its metrics, as Ray's endpoint would export them."""

import math
import random
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

import prometheus_client
from prometheus_client import CollectorRegistry

from cluster.observe import metrics
from cluster.observe.metrics import METRICS, Kind, Metric, VllmMetric

MODEL = "smollm2-135m-instruct"
WORKERS = ("a1b2c3d4", "k7x9q2m5")
DRAFT_WORKER = "d5r8a4f7"
INGRESS = "i3n6g9r1"
SCHEDULER = "s2c4h6e8"
CLASSES = {"interactive": 0.97, "standard": 0.995, "batch": 1.0}
"""With the share of the requests that meet their targets."""

TICK_S = 0.2


class CatalogueExporter:
    """Exports every metric of the catalogue, and those of vLLM's that dashboards show."""

    def __init__(self, port: int) -> None:
        self._registry = CollectorRegistry()
        self._made: dict[str, Any] = {}
        self._random = random.Random(7)
        self._stopping = threading.Event()
        self._began_s = time.time()
        self._port = port

    def __enter__(self) -> Self:
        self._tick(0.0)
        self._server, _ = prometheus_client.start_http_server(
            self._port, "127.0.0.1", self._registry
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._server.shutdown()
        self._server.server_close()

    def _run(self) -> None:
        while not self._stopping.wait(TICK_S):
            self._tick(time.time() - self._began_s)

    def _tick(self, now: float) -> None:
        load = 0.55 + 0.35 * math.sin(now / 17)
        self._clients(load)
        self._lengths(load)
        self._shares(load)
        self._scaling(load)
        for index, worker in enumerate(WORKERS):
            self._steps(worker, load * (1 - 0.15 * index))
            self._drafts(worker, load)
            self._vllm(worker, load * (1 - 0.15 * index))
            self._placement(worker, index, load)
        self._set(metrics.DRAFT_WORKER_BUSY, 0.5 * load, self._of("DraftWorker", DRAFT_WORKER))
        self._set(metrics.DRAFT_WORKER_CONTEXTS, 20 * load, self._of("DraftWorker", DRAFT_WORKER))
        self._prefixes(load)
        replicas = {"Ingress": INGRESS, "DraftWorker": DRAFT_WORKER, "GlobalScheduler": SCHEDULER}
        for deployment, replica in replicas.items():
            self._set(metrics.START_TIME, self._began_s - 4000, self._of(deployment, replica))
        for worker in WORKERS:
            started = self._began_s - 4000 if now < 40 else self._began_s + 35
            self._set(metrics.START_TIME, started, self._of("Worker", worker))

    def _shares(self, load: float) -> None:
        of = self._of("GlobalScheduler", SCHEDULER)
        for index, tenant in enumerate(("default", "acme")):
            self._add(metrics.TENANT_DEVICE_SECONDS, load * (0.9 - 0.5 * index), of, tenant=tenant)
            self._add(metrics.TENANT_QUEUED, load**3 * index, of, tenant=tenant)
            self._set(metrics.TENANT_WAITING, round(20 * load**3 * index), of, tenant=tenant)

    def _clients(self, load: float) -> None:
        of = self._of("Ingress", INGRESS)
        self._set(metrics.LIVE_REQUESTS, round(40 * load), of)
        self._add(metrics.ADMISSIONS, 6 * load, of, outcome="admitted")
        self._add(metrics.ADMISSIONS, 0.02, of, outcome="invalid")
        self._add(metrics.RETRIES, 0.004, of, reason="EngineDead")
        self._observe(metrics.TTFT_TO_PREDICTED, 0.9 + 0.3 * load, of)
        for kind, rate in {"placed": 900.0, "predicted": 420.0, "found": 400.0}.items():
            self._add(metrics.PREFIX_TOKENS, rate * load, of, kind=kind)
        for handler, status in {"/v1/chat/completions": 200, "none": 404}.items():
            labels = {"handler": handler, "method": "POST", "status": str(status)}
            self._add(metrics.HTTP_REQUESTS, 6 * load, of, **labels)
            self._observe(metrics.HTTP_SECONDS, 2 + 6 * load, of, handler=handler)
        for index, tenant in enumerate(("default", "acme")):
            rate = load * (3 - index)
            self._add(metrics.TENANT_REQUESTS, rate, of, tenant=tenant, outcome="stop")
            self._add(metrics.TENANT_TOKENS, 300 * rate, of, tenant=tenant, kind="prompt")
            self._add(metrics.TENANT_TOKENS, 200 * rate, of, tenant=tenant, kind="output")
            self._add(metrics.TENANT_REFUSALS, 0.2 * rate * index, of, tenant=tenant)
        for index, (slo_class, met) in enumerate(CLASSES.items()):
            rate, by_class = load * (3 - index), {"slo_class": slo_class}
            self._add(metrics.REQUESTS, 0.7 * rate, of, **by_class, outcome="stop")
            self._add(metrics.REQUESTS, 0.28 * rate, of, **by_class, outcome="length")
            self._add(metrics.REQUESTS, 0.02 * rate, of, **by_class, outcome="abort")
            self._add(metrics.REQUESTS, 0.002, of, **by_class, outcome="error")
            for target in ("ttft", "tpot", "all"):
                missed = min(1.0, (1 - met) * 4 * load**3)
                labels = by_class | {"target": target}
                self._add(metrics.SLO_REQUESTS, rate * (1 - missed), of, **labels, met="true")
                self._add(metrics.SLO_REQUESTS, rate * missed, of, **labels, met="false")
            self._add(metrics.REQUEST_TOKENS, 300 * rate, of, **by_class, kind="prompt")
            self._add(metrics.REQUEST_TOKENS, 90 * rate, of, **by_class, kind="output")
            self._observe(metrics.TIME_TO_FIRST_TOKEN, 0.08 + 0.4 * load**2, of, **by_class)
            self._observe(metrics.TIME_PER_OUTPUT_TOKEN, 0.02 + 0.05 * load, of, **by_class)
            self._observe(metrics.REQUEST_LATENCY, 2 + 6 * load, of, **by_class)

    def _steps(self, worker: str, load: float) -> None:
        of = self._of("Worker", worker)
        for slo_class in CLASSES:
            self._observe(metrics.QUEUE_TIME, 0.01 + 0.2 * load**3, of, slo_class=slo_class)
        self._observe(metrics.STEP_SECONDS, 0.02 + 0.06 * load, of)
        self._observe(metrics.STEP_DECISION_SECONDS, 0.0004 + 0.0004 * load, of)
        self._observe(metrics.STEP_PREDICTION_ERROR, 0.06, of)
        self._observe(metrics.STEP_BUDGET_USE, 0.3 + 0.6 * load, of)
        self._add(metrics.STEP_MEASURED_SECONDS, load, of)
        predicted = load * self._random.uniform(0.9, 1.05)
        self._add(metrics.STEP_PREDICTED_SECONDS, predicted, of)
        for stage, rate in {"prefill": 900.0, "decode": 250.0, "verify": 180.0}.items():
            self._add(metrics.STEP_TOKENS, rate * load, of, stage=stage)
        for reason, rate in {"time": 2.0, "tpot": 1.0, "seats": 0.5}.items():
            self._add(metrics.DEFERRALS, rate * load**4, of, reason=reason)
        self._add(metrics.STEP_FLOPS, 3e11 * load, of)
        self._add(metrics.STEP_MEMORY_BYTES, 9e9 * load, of)
        self._set(metrics.PEAK_FLOPS, 7e11, of)
        self._set(metrics.PEAK_MEMORY_BANDWIDTH, 1.8e10, of)

    def _drafts(self, worker: str, load: float) -> None:
        of = self._of("Worker", worker)
        for drafter, rate in {"suffix": 90.0, "head": 60.0}.items():
            counts = {
                "proposed": 1.0,
                "verified": 0.8,
                "accepted": 0.45,
                "late": 0.06,
                "stale": 0.1,
            }
            for outcome, part in counts.items():
                labels = {"drafter": drafter, "outcome": outcome}
                self._add(metrics.DRAFT_TOKENS, rate * part * load, of, **labels)
            for position in range(1, 7):
                verified, at = rate * load / (1 + position), {"position": str(position)}
                accepted = verified * 0.8**position
                self._add(metrics.DRAFT_VERIFIED_AT, verified, of, drafter=drafter, **at)
                self._add(metrics.DRAFT_ACCEPTED_AT, accepted, of, drafter=drafter, **at)
        self._set(metrics.DRAFT_SILENCE, 0.02 * load, of)
        self._set(metrics.DRAFT_ACCEPTANCE, 0.5 + 0.1 * load + self._random.gauss(0, 0.01), of)
        self._set(metrics.TOKENS_PER_DECODE, 1.5 + 0.4 * load + self._random.gauss(0, 0.02), of)
        self._add(
            metrics.DRAFT_COLLAPSES, 0.003, self._of("GlobalScheduler", SCHEDULER), reason="late"
        )

    def _vllm(self, worker: str, load: float) -> None:
        of = {"ReplicaId": worker, "model_name": MODEL, "engine": "0"}
        self._set(metrics.VLLM_NUM_REQUESTS_RUNNING, round(16 * load), of)
        self._set(metrics.VLLM_NUM_REQUESTS_WAITING, round(6 * load**6), of)
        self._set(metrics.VLLM_KV_CACHE_USAGE, 0.9 * load, of)
        self._add(metrics.VLLM_PREFIX_CACHE_QUERIES, 900 * load, of)
        self._add(metrics.VLLM_PREFIX_CACHE_HITS, 350 * load**2, of)
        self._add(metrics.VLLM_PROMPT_TOKENS, 900 * load, of)
        self._add(metrics.VLLM_GENERATION_TOKENS, 280 * load, of)
        self._observe(metrics.VLLM_INTER_TOKEN_LATENCY, 0.03 + 0.06 * load, of)

    def _placement(self, worker: str, index: int, load: float) -> None:
        of = self._of("GlobalScheduler", SCHEDULER)
        for reason, rate in {"soonest": 2.5, "fewest_requests": 0.3, "tie": 0.1}.items():
            self._add(metrics.PLACEMENTS, rate * load, of, worker=worker, reason=reason)
        for reason in ("overload", "too_long"):
            self._add(metrics.PLACEMENT_REFUSALS, 0.1 * load**6, of, reason=reason)
        tokens = 9000 * load + 400 * index + self._random.gauss(0, 150)
        self._set(metrics.WORKER_OUTSTANDING_TOKENS, max(0.0, tokens), of, worker=worker)
        self._set(metrics.WORKER_REQUESTS, round(18 * load), of, worker=worker)
        self._set(metrics.WORKER_REPORT_AGE, self._random.uniform(0.1, 2), of, worker=worker)
        slowness = 1 + 0.4 * load + self._random.gauss(0, 0.05)
        self._set(metrics.WORKER_SLOWNESS, slowness, of, worker=worker)
        share = round(1 - 0.4 * load * (index == 0), 1)
        self._set(metrics.PREFILL_SHARE, share, of, worker=worker)
        if index == 0:
            self._set(metrics.MAX_DRAFTS, 4 if load < 0.7 else 2, of, worker=worker)
            for reason in ("decodes_late", "few_late"):
                self._add(metrics.STAGE_POLICY_CHANGES, 0.02 * load, of, reason=reason)

    def _prefixes(self, load: float) -> None:
        of = self._of("GlobalScheduler", SCHEDULER)
        blocks = round(20_000 * (0.6 + 0.3 * load))
        self._set(metrics.PREFIX_INDEX_BLOCKS, blocks, of)
        self._set(metrics.PREFIX_INDEX_BYTES, 156 * blocks, of)
        self._set(metrics.PREFIX_INDEX_WORKERS, len(WORKERS), of)
        self._set(metrics.PREFIX_UNTOLD_WORKERS, 0, of)
        self._add(metrics.PREFIX_RESYNCS, 0.01, of)
        self._add(metrics.PREFIX_FORMAT_MISMATCH, 0.01, of)

    def _scaling(self, load: float) -> None:
        of = self._of("GlobalScheduler", SCHEDULER)
        self._set(metrics.WORKERS_WANTED, len(WORKERS) + (load > 0.8), of)
        self._set(metrics.WORKERS_READY, len(WORKERS), of)
        self._set(metrics.OFFERED_WORK, 1.3 * load, of)
        self._set(metrics.WORKER_CAPACITY, 0.6, of)
        for reason in ("load", "idle"):
            self._add(metrics.SCALING_CHANGES, 0.02, of, reason=reason)

    def _lengths(self, load: float) -> None:
        of = self._of("GlobalScheduler", SCHEDULER)
        for index, tenant in enumerate(("default", "acme")):
            error = 0.35 + 0.25 * index + 0.1 * load + self._random.gauss(0, 0.01)
            self._set(metrics.OUTPUT_LENGTH_ERROR, error, of, tenant=tenant)
            bias = 0.1 * (load - 0.5) + self._random.gauss(0, 0.01)
            self._set(metrics.OUTPUT_LENGTH_BIAS, bias, of, tenant=tenant)
            coverage = min(0.95 + self._random.gauss(0, 0.01), 1.0)
            self._set(metrics.OUTPUT_LENGTH_COVERAGE, coverage, of, tenant=tenant)

    def _of(self, deployment: str, replica: str) -> dict[str, str]:
        return {
            "application": "xyserve",
            "deployment": deployment,
            "replica": replica,
            "model_name": MODEL,
        }

    def _add(
        self, metric: Metric | VllmMetric, per_s: float, of: Mapping[str, str], **labels: str
    ) -> None:
        amount = per_s * TICK_S
        if not (isinstance(metric, Metric) and metric.unit == "seconds"):
            # As with real events, chance decides on what lies between integers.
            amount = int(amount) + (self._random.random() < amount % 1)
        self._child(metric, "Counter", {**of, **labels}).inc(amount)

    def _set(
        self, metric: Metric | VllmMetric, value: float, of: Mapping[str, str], **labels: str
    ) -> None:
        self._child(metric, "Gauge", {**of, **labels}).set(value)

    def _observe(
        self, metric: Metric | VllmMetric, middle: float, of: Mapping[str, str], **labels: str
    ) -> None:
        for _ in range(3):
            value = middle * self._random.lognormvariate(0, 0.5)
            self._child(metric, "Histogram", {**of, **labels}).observe(value)

    def _child(self, metric: Metric | VllmMetric, kind: str, labels: Mapping[str, str]) -> Any:
        if (made := self._made.get(metric.name)) is None:
            name = f"ray_{metric.name.replace(':', '_').removesuffix('_total')}"
            options: dict[str, Any] = {}
            if isinstance(metric, Metric):
                assert metric.kind == kind.lower(), metric
                if metric.kind is Kind.HISTOGRAM:
                    options["buckets"] = metric.buckets
            make = getattr(prometheus_client, kind)
            made = make(name, "-", tuple(labels), registry=self._registry, **options)
            self._made[metric.name] = made
        return made.labels(**labels)

    def missing(self) -> set[str]:
        """Metrics of the catalogue that it has not exported yet."""
        return {metric.name for metric in METRICS.values()} - self._made.keys()
