"""OpenTelemetry spans of a request, in the ingress, the GlobalScheduler and the worker."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.config.observe import TracingConfig

Attributes = Mapping[str, str | int | float | bool]

_PROPAGATOR = TraceContextTextMapPropagator()


def traceparent_of(span: Span) -> str:
    """W3C trace context of a span; empty if nothing is traced."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span, Context()))
    return carrier.get("traceparent", "")


class Tracing:
    """Creates the spans of one replica; without a config it creates none and costs nothing."""

    def __init__(self, config: TracingConfig | None, role: str, replica_id: str) -> None:
        """`role` is the part of the service's name after `xyserve.`."""
        self._provider: TracerProvider | None = None
        if config is None:
            return
        resource = {"service.name": f"xyserve.{role}", "service.instance.id": replica_id}
        self._provider = TracerProvider(
            resource=Resource.create(resource),
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
        )
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(config)))
        self._tracer = self._provider.get_tracer("xyserve")

    @property
    def is_on(self) -> bool:
        """Whether spans are created at all."""
        return self._provider is not None

    @contextmanager
    def call(self, name: str, traceparent: str, attributes: Attributes) -> Iterator[Span]:
        """Open the span of a call as a child of the client's; spans inside are its children."""
        if not self.is_on:
            yield trace.INVALID_SPAN
            return
        with self._tracer.start_as_current_span(
            name, _context(traceparent), SpanKind.SERVER, attributes
        ) as span:
            yield span

    def add(
        self,
        name: str,
        traceparent: str,
        *,
        began_s: float,
        ended_s: float,
        attributes: Attributes | None = None,
        error: str = "",
    ) -> None:
        """Create a span that is over, as a child of `traceparent`; times by the wall clock.

        Creates none if the request is not traced, or if a time is infinite or the two are not in
        order.
        """
        if not self.is_on or not traceparent or not began_s <= ended_s < math.inf:
            return
        span = self._tracer.start_span(
            name, _context(traceparent), attributes=attributes, start_time=_ns(began_s)
        )
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(_ns(ended_s))

    def shut_down(self) -> None:
        """Send the spans that have not been sent yet."""
        if self._provider is not None:
            self._provider.shutdown()


def _exporter(config: TracingConfig) -> SpanExporter:
    # Both are slow to import, and at most one of them is needed.
    if config.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter(config.endpoint, insecure=not config.endpoint.startswith("https"))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(config.endpoint)


def _context(traceparent: str) -> Context:
    return _PROPAGATOR.extract({"traceparent": traceparent}, Context())


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
