"""OpenTelemetry spans of a request: what the ingress, the GlobalScheduler and the worker did."""

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
    """Makes the spans of one replica; without a config it makes none and costs nothing."""

    def __init__(self, config: TracingConfig | None, role: str, replica_id: str) -> None:
        """`role` is the service's name behind `xyserve.`."""
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
        """Whether there are spans at all."""
        return self._provider is not None

    @contextmanager
    def call(self, name: str, traceparent: str, attributes: Attributes) -> Iterator[Span]:
        """The span of a call that begins now, as a child of the client's."""
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
        began_s: float,
        ended_s: float,
        attributes: Attributes,
        error: str = "",
    ) -> None:
        """A span that is over, below the one of `traceparent`; times by the wall clock.

        Nothing is made for a request that is not traced, or of what never began or ended.
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
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def _exporter(config: TracingConfig) -> SpanExporter:
    # Both take long to import, and only one is needed if any.
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
