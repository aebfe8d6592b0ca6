"""The telemetry of an ingress: metrics, spans, history and log of its requests."""

import itertools
import logging
import time
from http import HTTPStatus

from cluster.ingress.calls import current_call
from cluster.ingress.observer import IngressObserver
from cluster.observe.exporter import RequestMetrics
from cluster.observe.request_history import Refusal, RequestHistory, RequestRecord
from cluster.observe.tracing import Tracing

logger = logging.getLogger(__name__)


class IngressTelemetry(IngressObserver):
    """Counts, traces and remembers calls and requests."""

    def __init__(self, metrics: RequestMetrics, tracing: Tracing, history: RequestHistory) -> None:
        self._metrics = metrics
        self._tracing = tracing
        self._history = history
        self._num_live = 0

    def refused(self, refusal: Refusal) -> None:
        """Remember and count a call that was refused."""
        self._history.add(refusal)
        self._metrics.count_admission(refusal.outcome)
        if refusal.status == HTTPStatus.TOO_MANY_REQUESTS:
            self._metrics.count_over_quota(refusal.tenant)

    def began(self, record: RequestRecord) -> None:
        """Remember a request; the first one of a call shows that the call was admitted."""
        self._history.add(record)
        self._set_live(self._num_live + 1)
        if (call := current_call.get()) is None or call.records:
            return
        self._metrics.count_admission("admitted")
        self._tracing.add(
            "admission",
            call.traceparent,
            began_s=call.began_s,
            ended_s=time.time(),
            attributes={
                "xyserve.slo_class": record.request.slo_class,
                "xyserve.tenant": record.request.tenant,
            },
        )

    def retried(self, record: RequestRecord, reason: str) -> None:
        """Count a request that lost its worker and is placed again."""
        self._metrics.count_retry(reason)

    def ended(self, record: RequestRecord) -> None:
        """Count a request that ended, with a span for each retry."""
        self._history.settle(record)
        self._set_live(self._num_live - 1)
        self._metrics.count_end(record)
        for before, attempt in itertools.pairwise(record.attempts):
            self._tracing.add(
                "retry",
                record.request.traceparent,
                began_s=attempt.began_s,
                ended_s=min(record.first_token_s, time.time()),
                attributes={"xyserve.lost": before.lost, "xyserve.attempt_id": attempt.attempt_id},
            )
        logger.debug(
            "request ended",
            extra={
                "request_id": record.request.request_id,
                "tenant": record.request.tenant,
                "outcome": record.outcome,
                "ttft_s": record.ttft_s,
                "e2e_s": record.e2e_s,
                "num_output_tokens": record.num_output_tokens,
            },
        )

    def _set_live(self, num_live: int) -> None:
        self._num_live = num_live
        self._metrics.set_live(num_live)
