"""Calls of the API: the id, targets and trace of each, its requests, and its status."""

import contextvars
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from opentelemetry.trace import Status, StatusCode
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.config.slo import SloConfig
from cluster.errors import RequestFailed, RequestRefused
from cluster.ingress.auth import CALLER, TRUSTED, Caller
from cluster.ingress.error_answers import error_answer
from cluster.ingress.observer import IngressObserver
from cluster.ingress.protocol import HEADERS, Names
from cluster.ingress.targets import NO_TARGETS, Targets, read_targets
from cluster.ingress.tenants import NO_QUOTAS, Tenants
from cluster.observe.request_history import Refusal, RequestRecord
from cluster.observe.tracing import Tracing, traceparent_of

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1000
"""Length to which a refusal's message is cut."""
MAX_ID_LEN = 512
"""Max characters of an id that a client gives, as in OpenAI's API."""


@dataclass(slots=True)
class Call:
    """A call of the API, which may make several requests."""

    call_id: str
    caller: Caller = TRUSTED
    answer_id: str = ""
    """Id that a client gave in the body, otherwise `call_id`; the answer's own id contains it."""
    targets: Targets = NO_TARGETS
    traceparent: str = ""
    """W3C trace context of its span; empty if it is not traced."""
    began_s: float = field(default_factory=time.time)
    """Start, by the wall clock."""
    records: list[RequestRecord] = field(default_factory=list)
    """Its requests, in order; a call without any was not admitted."""
    num_logprobs: int = 0
    """Log probabilities that its answer may have."""
    token_bytes: int = 100
    """Memory of an output token while it waits for the client, with its log probabilities."""
    status: int = HTTPStatus.OK
    message: str = ""
    """Text of the error that it was answered with."""

    def __post_init__(self) -> None:
        self.answer_id = self.answer_id or self.call_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens of its requests so far."""
        return sum(one.request.num_prompt_tokens + one.num_output_tokens for one in self.records)

    @property
    def refusal(self) -> RequestRefused | None:
        """The error to answer it with, if one of its requests was refused a worker."""
        refused = [record.refused for record in self.records if record.refused]
        return RequestRefused(max(refused, key=lambda one: one.retry_after_s)) if refused else None


CALL_ID = HEADERS.call_id.encode()

current_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar(
    "current_call", default=None
)
"""The call that is being answered: vLLM's code, between its start and its requests, cannot pass it
on."""


class Calls:
    """The calls of one ingress."""

    def __init__(
        self,
        slo: SloConfig,
        tracing: Tracing | None = None,
        observer: IngressObserver | None = None,
        tenants: Tenants = NO_QUOTAS,
    ) -> None:
        self._slo = slo
        self._tenants = tenants
        self._tracing = tracing or Tracing(None, "", "")
        self._observer = observer or IngressObserver()

    def untold(self) -> "Calls":
        """The same, but its calls are neither traced nor remembered."""
        return Calls(self._slo, tenants=self._tenants)

    @asynccontextmanager
    async def answering(
        self, given: Mapping[str, Any], names: Names, caller: Caller
    ) -> AsyncIterator[Call]:
        """Open a call, which is `current_call` and has a span until the block ends.

        `given` holds its headers or parameters, called `names`. RequestFailed if one of them cannot
        be used, or if a quota of the caller's tenant is used up.
        """
        given_id, traceparent = given.get(names.call_id), given.get(names.traceparent)
        call_id = given_id if given_id and is_id(given_id) else uuid.uuid4().hex
        traceparent = traceparent if isinstance(traceparent, str) else ""
        with self._tracing.call("ingress", traceparent, {"xyserve.call_id": call_id}) as span:
            call = Call(call_id, caller, traceparent=traceparent_of(span))
            token = current_call.set(call)
            try:
                check_id(names.call_id, given_id)
                call.targets = read_targets(self._slo, given, names)
                async with self._tenants.calling(caller.tenant) as usage:
                    try:
                        yield call
                    finally:
                        usage.num_tokens = call.num_tokens
            except RequestFailed as failure:
                call.status, call.message = failure.status, str(failure)
                raise
            finally:
                current_call.reset(token)
                if call.status >= HTTPStatus.BAD_REQUEST:
                    span.set_status(Status(StatusCode.ERROR, call.message))
                    self._log(call)
                    if not call.records:
                        self._refuse(call)

    def _log(self, call: Call) -> None:
        if any(record.error for record in call.records):
            return  # which the engine client has logged
        logger.log(
            logging.INFO if call.status < HTTPStatus.INTERNAL_SERVER_ERROR else logging.ERROR,
            "a call was answered with an error",
            extra={
                "call_id": call.call_id,
                "tenant": call.caller.tenant,
                "key": call.caller.key_id,
                "status": int(call.status),
                "answer": call.message,
            },
        )

    def _refuse(self, call: Call) -> None:
        now = time.time()
        self._tracing.add(
            "admission", call.traceparent, began_s=call.began_s, ended_s=now, error=call.message
        )
        refusal = Refusal(call.call_id, now, call.status, call.message, call.caller.tenant)
        self._observer.refused(refusal)


def is_id(value: object) -> bool:
    """Whether a client may name its call so."""
    if not isinstance(value, str):
        return False
    return len(value) <= MAX_ID_LEN and value.isascii() and value.isprintable()


def check_id(name: str, value: object) -> None:
    """RequestFailed if `value`, given under `name`, cannot be an id; none and empty are no id."""
    if value is None or is_id(value):
        return
    shown = f"{value[:40]!a}" if isinstance(value, str) else f"of type {type(value).__name__}"
    length = f", {len(value)} characters" if isinstance(value, str) else ""
    raise RequestFailed(
        f"{name}: an id has at most {MAX_ID_LEN} printable ASCII characters, and this one is "
        f"{shown}{length}",
        HTTPStatus.BAD_REQUEST,
    )


class CallsByHeader:
    """Makes each POST a call, with the id, trace and targets in its headers.

    The answer names the class of the targets. Every POST has targets, so that no route that
    generates is forgotten; only those below /v1/ are traced, and remembered when refused.
    """

    def __init__(self, app: ASGIApp, calls: Calls) -> None:
        self._app = app
        self._calls = calls
        self._others = calls.untold()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its call in the context, or answer why it cannot be a call."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        calls = self._calls if "/v1/" in scope["path"] else self._others
        headers = Headers(scope=scope)
        # vLLM would take the header for the id of the answer, also where the body has one.
        scope["headers"] = [(k, v) for k, v in headers.raw if k != CALL_ID]
        try:
            async with calls.answering(headers, HEADERS, scope[CALLER]) as call:

                async def watched(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        call.status = message["status"]
                        headers = MutableHeaders(scope=message)
                        headers[HEADERS.slo_class] = call.targets.slo_class
                        if refusal := call.refusal:
                            headers["retry-after"] = str(math.ceil(refusal.retry_after_s))
                    elif call.status >= HTTPStatus.BAD_REQUEST:
                        text = message.get("body", b"").decode(errors="replace")
                        call.message = (call.message + text)[:MAX_MESSAGE_BYTES]
                    await send(message)

                await self._app(scope, receive, watched)
        except RequestFailed as failure:
            answer = error_answer(scope["path"], failure.status, str(failure))
            if isinstance(failure, RequestRefused):
                answer.headers["retry-after"] = str(math.ceil(failure.retry_after_s))
            await answer(scope, receive, send)
