"""What Serve's HTTP proxy lets through: it decodes some headers, and fails if it cannot."""

from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import RequestFailed
from cluster.ingress.calls import check_id
from cluster.ingress.error_answers import error_answer
from cluster.ingress.protocol import HEADERS

DECODED = (HEADERS.call_id, "x-session-id", "serve-multiplexed-model-id")
"""Headers that Serve's proxy decodes; one that is no UTF-8 would be a plain 500."""

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.middlewares"}
"""The environment variable by which Serve's proxies find `middlewares`."""


def middlewares() -> list[Middleware]:
    """Serve's hook for its HTTP proxies."""
    return [Middleware(ReadableHeaders)]


class ReadableHeaders:
    """Refuses calls with ids that the app would refuse too, before the proxy reads them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer why its headers cannot be read."""
        try:
            for key, value in scope.get("headers", ()):
                if (name := key.decode("latin-1").lower().replace("_", "-")) in DECODED:
                    check_id(name, value.decode("latin-1"))
        except RequestFailed as failure:
            if scope["type"] != "http":
                raise
            answer = error_answer(scope["path"], HTTPStatus(failure.status), str(failure))
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)
