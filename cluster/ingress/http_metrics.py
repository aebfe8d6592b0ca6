"""The metrics of HTTP: each answer is counted, and `/metrics` shows those of the whole app."""

import http
import time

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import RequestFailed
from cluster.ingress.error_answers import error_answer
from cluster.observe.app_metrics import AppMetrics
from cluster.observe.exporter import RequestMetrics

CLIENT_LEFT = 499
"""Status, as nginx has it, of a request whose client left before its answer began."""
METRICS = "/metrics"
METHODS = frozenset(http.HTTPMethod)


class HttpMetrics:
    """Counts the requests of one ingress, and shows the metrics of its app."""

    def __init__(self, metrics: RequestMetrics, app: AppMetrics) -> None:
        self._metrics = metrics
        self._app = app

    async def show(self) -> Response:
        """Metrics of the app's replicas in Prometheus' text format, at most 10 s old."""
        try:
            return Response(await self._app.page(), media_type=CONTENT_TYPE_LATEST)
        except RequestFailed as failure:
            return error_answer(METRICS, failure.status, str(failure))

    def counted(self, app: ASGIApp) -> ASGIApp:
        """`app`, with its answers counted as the client gets them."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began_s, status = time.monotonic(), CLIENT_LEFT

            async def watched(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, watched)
            finally:
                # The router has left the route there; its path has no ids of the client's.
                handler = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in METHODS else "other"
                self._metrics.count_http(handler, method, status, time.monotonic() - began_s)

        return counted
