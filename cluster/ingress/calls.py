"""Calls of the API: what each is called, its span, and which were refused."""

import contextvars
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from opentelemetry.trace import Status, StatusCode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import RequestFailed
from cluster.observe.request_history import Refusal
from cluster.observe.tracing import Tracing, current_traceparent

CALL_ID_HEADER = "x-request-id"
"""A client may name its call, else Serve does; the answer tells the name, and vLLM makes it a part
of the requests' ids."""
TRACE_HEADER = "traceparent"

MAX_MESSAGE_BYTES = 1000
"""Of a refusal's message, as it is kept."""


@dataclass(slots=True)
class Call:
    """A call of the API, which may become several requests."""

    call_id: str
    began_s: float = field(default_factory=time.time)
    """By the wall clock."""
    admitted: bool = False
    """Whether a request was made of it."""
    status: int = HTTPStatus.OK
    message: str = ""
    """Of the error that it was answered with."""


current_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar(
    "current_call", default=None
)
"""The call that is being answered; vLLM's code between has no place for it."""


class Calls:
    """The calls of one ingress; `refused` is told of those that came to nothing."""

    def __init__(
        self,
        tracing: Tracing | None = None,
        refused: Callable[[Refusal], None] = lambda refusal: None,
    ) -> None:
        self._tracing = tracing or Tracing(None, "", "")
        self._refused = refused

    @contextmanager
    def answering(self, call_id: str | None, traceparent: str | None) -> Iterator[Call]:
        """A call from now on to its end, in the context of whoever answers it."""
        call_id = call_id or uuid.uuid4().hex
        attributes = {"xyserve.call_id": call_id}
        with self._tracing.call("ingress", traceparent or "", attributes) as span:
            call = Call(call_id)
            token = current_call.set(call)
            try:
                yield call
            except RequestFailed as failure:
                call.status, call.message = failure.status, str(failure)
                raise
            finally:
                current_call.reset(token)
                if call.status >= HTTPStatus.BAD_REQUEST:
                    span.set_status(Status(StatusCode.ERROR, call.message))
                    if not call.admitted:
                        self._refuse(call)

    def _refuse(self, call: Call) -> None:
        now = time.time()
        self._tracing.add(
            "admission", current_traceparent(), call.began_s, now, {}, error=call.message
        )
        self._refused(Refusal(call.call_id, now, call.status, call.message))


class CallsByHeader:
    """Makes a call of each POST under /v1/, with the names that its headers give it."""

    def __init__(self, app: ASGIApp, calls: Calls) -> None:
        self._app = app
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its call in the context."""
        if scope["type"] != "http" or scope["method"] != "POST" or "/v1/" not in scope["path"]:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        with self._calls.answering(headers.get(CALL_ID_HEADER), headers.get(TRACE_HEADER)) as call:

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    call.status = message["status"]
                elif call.status >= HTTPStatus.BAD_REQUEST:
                    text = message.get("body", b"").decode(errors="replace")
                    call.message = (call.message + text)[:MAX_MESSAGE_BYTES]
                await send(message)

            await self._app(scope, receive, watched)
