"""A collector of OpenTelemetry spans, as a tracing backend has one: OTLP over HTTP."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TIMEOUT_S = 30.0
"""Time for all spans of a trace to arrive; exporters send theirs every five seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedSpan:
    """One span, with the ids that join it to others."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    began_s: float
    ended_s: float
    attributes: dict[str, Any]
    error: str


class Collector:
    """All spans received so far."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.spans: list[CollectedSpan] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"

    def trace(
        self, trace_id: str, is_whole: Callable[[list[CollectedSpan]], bool]
    ) -> list[CollectedSpan]:
        """The spans of a trace by begin, once `is_whole` is true for them or time is up."""
        give_up_s = time.monotonic() + TIMEOUT_S
        while True:
            found = [span for span in self.spans if span.trace_id == trace_id]
            if is_whole(found) or time.monotonic() > give_up_s:
                return sorted(found, key=lambda span: span.began_s)
            time.sleep(0.1)

    def take(self, body: bytes) -> None:
        for of_service in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {a.key: a.value.string_value for a in of_service.resource.attributes}
            for scope in of_service.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        CollectedSpan(
                            name=span.name,
                            service=resource["service.name"],
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            began_s=span.start_time_unix_nano / 1e9,
                            ended_s=span.end_time_unix_nano / 1e9,
                            attributes={a.key: _value(a.value) for a in span.attributes},
                            error=span.status.message,
                        )
                    )


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """A collector that listens on a local port; 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    collector = Collector(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
