"""The HTTP side of the front end: what vLLM's app lacks to be public behind Ray Serve."""

import asyncio
import itertools
import logging
import reprlib
import traceback
from collections.abc import Awaitable, Callable, Collection, Sequence
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.utils import request_body_to_args
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from ray.exceptions import TaskCancelledError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.exceptions import VLLMValidationError

from cluster.config.app_config import AppConfig
from cluster.config.routes import EXTRA_PATHS, EXTRA_ROUTES, ROUTES
from cluster.ingress.auth import AuthorizedCalls, Doorkeeper
from cluster.ingress.calls import Calls, CallsByHeader
from cluster.ingress.error_answers import ErrorAnswers
from cluster.ingress.http_metrics import METRICS, HttpMetrics
from cluster.ingress.protocol import HEADERS
from cluster.ingress.unread import RequestsOfCalls, UnreadLimit
from cluster.ingress.vllm_responses import KEEPS_NONE
from cluster.ingress.vllm_seams import FRONT_END

logger = logging.getLogger(__name__)

VALIDATOR_ERRORS = (AttributeError, LookupError)
"""Raised by vLLM's validators, in addition to ValueError and TypeError, for a field of a wrong
type."""

UNSUPPORTED_ROUTES = {
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "reranking",
    "/rerank": "reranking",
    "/v1/score": "scoring",
    "/score": "scoring",
    "/pooling": "pooling",
    "/classify": "classification",
    "/v1/moderations": "moderation",
    "/v1/audio/speech": "speech synthesis",
    "/v1/audio/transcriptions": "transcription",
    "/v1/audio/translations": "speech translation",
    "/v1/images/generations": "image generation",
}
"""Known routes of the OpenAI API and vLLM that a text generation model cannot serve."""

NO_SUCH_MODEL: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse}}

COUNTING = "PrometheusInstrumentatorMiddleware"

MAX_SENTENCES, MAX_FAULTS = 5, 3
"""Max fields of a request, and faults of one, that an answer names. One in `messages` may have a
dozen, for as many kinds of message that it could have been."""

KEPT_NOWHERE = ("/v1/responses", "/v1/conversations", "/v1/files", "/v1/batches")
"""Routes of the OpenAI API below which clients look for what a server keeps."""

BROWSER_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
"""Headers of each answer: it is what it says, in no frame, and kept nowhere."""
EXPOSED = (HEADERS.call_id, HEADERS.slo_class, "retry-after")
"""Headers of answers that pages may read."""

SCALE_OUT = ("/inference/v1/generate", "/v1/chat/completions/render", "/v1/completions/render")
"""Extra routes that vLLM has behind one argument."""


def http_app(
    app: FastAPI,
    config: AppConfig,
    calls: Calls,
    requests: RequestsOfCalls,
    doorkeeper: Doorkeeper,
    http_metrics: HttpMetrics | None = None,
) -> ASGIApp:
    """vLLM's `app` with the calls, errors, limits and ends of requests that clients expect.

    `requests` holds those of a call whose client does not read its stream.
    """
    app.title, app.version = "XY-Serve", version("xyserve")
    app.description = f"The model `{config.model_name}`, served by XY-Serve."
    _choose_routes(app, config.ingress.routes)
    app.add_api_route("/v1/models/{model_id:path}", show_model, responses=NO_SUCH_MODEL)
    if http_metrics:
        app.add_api_route(METRICS, http_metrics.show, response_class=PlainTextResponse)
    _check_rights(app)
    _answer_unsupported_routes(app, config.model_name)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    for error in VALIDATOR_ERRORS:
        app.add_exception_handler(error, _answer_validator_error)
    # One counts answers for a page that is not shown, and before our errors replace some of them.
    kept = [one for one in app.user_middleware if COUNTING not in repr(one.cls)]
    FRONT_END.replace(app, "user_middleware", kept)
    # Starlette has already built it, without these handlers.
    FRONT_END.replace(app, "middleware_stack", None)
    limits = config.ingress
    sized = BodyLimit(ErrorAnswers(app), limits.max_request_bytes, limits.body_timeout_s)
    read = UnreadLimit(sized, limits.max_unread_bytes, limits.unread_timeout_s, requests)
    answering: ASGIApp = AuthorizedCalls(CallsByHeader(read, calls), doorkeeper)
    counted = http_metrics.counted(answering) if http_metrics else answering
    return DisconnectByMessage(_for_browsers(counted, limits.allowed_origins))


async def show_model(request: Request, model_id: str) -> JSONResponse:
    """The card of one model, as OpenAI's clients ask for it; an id may hold slashes."""
    models = await request.app.state.openai_serving_models.show_available_models()
    if not model_id:  # "/v1/models/"
        return JSONResponse(models.model_dump())
    for card in models.data:
        if card.id == model_id:
            return JSONResponse(card.model_dump())
    status = HTTPStatus.NOT_FOUND
    message = f"The model `{model_id}` does not exist."  # vLLM's words where it is a parameter
    error = create_error_response(message, "NotFoundError", status, "model")
    return JSONResponse(error.model_dump(), status)


def _choose_routes(app: FastAPI, extra: Collection[str]) -> None:
    """Leave only those of vLLM's routes that we promise, and those that the config names."""
    paths = {route.path for route in ROUTES} | {*extra}
    paths.remove(METRICS)  # vLLM's are of the engine beside its server; ours are elsewhere
    routes = [route for route in app.routes if getattr(route, "path", None) in paths]
    FRONT_END.replace(app.router, "routes", routes)


def _check_rights(app: FastAPI) -> None:
    """Raise LookupError for a route of which cluster/config/routes.py has not the right."""
    for route in app.routes:
        path = getattr(route, "path", "")
        if not any(known.is_at(path) for known in (*ROUTES, *EXTRA_ROUTES)):
            raise LookupError(f"the route {path} has no right in cluster/config/routes.py")


def _for_browsers(app: ASGIApp, allowed_origins: Collection[str]) -> ASGIApp:
    """`app` with the headers by which a browser protects its user, and those of CORS."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in BROWSER_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await app(scope, receive, headed if scope["type"] == "http" else send)

    if not allowed_origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=list(allowed_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[*EXPOSED],
    )


def _answer_unsupported_routes(app: FastAPI, model_name: str) -> None:
    """Answer what the model cannot do with a sentence, not a bare 404."""

    def make_answer(task: str) -> Callable[[], Awaitable[JSONResponse]]:
        async def answer() -> JSONResponse:
            error = create_error_response(
                f"The model `{model_name}` generates text and does not support {task}."
            )
            return JSONResponse(error.model_dump(), status_code=error.error.code)

        return answer

    for path, task in UNSUPPORTED_ROUTES.items():
        app.add_api_route(path, make_answer(task), methods=["POST"], include_in_schema=False)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer what Starlette refuses in the OpenAI form too; vLLM does so for FastAPI's errors."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = str(error.detail)
    if error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        message = f"{message}: {request.method} {path}; {_hint(path)}"
    status = HTTPStatus(error.status_code)
    answer = create_error_response(message, status.phrase, status)
    return JSONResponse(answer.model_dump(), error.status_code, headers=error.headers)


def _hint(path: str) -> str:
    if path in EXTRA_PATHS:
        return f"this route is off; to switch it on, add {path} to `ingress.routes` in the config"
    if path.startswith(KEPT_NOWHERE):
        return KEEPS_NONE
    return "see /docs for what there is"


async def _answer_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """Answer a body that is no request in sentences."""
    assert isinstance(error, RequestValidationError)
    message, param = explain_validation(error.errors())
    answer = create_error_response(message, param=param)
    return JSONResponse(answer.model_dump(), answer.error.code)


def explain_validation(errors: Sequence[Any]) -> tuple[str, str | None]:
    """What pydantic found wrong with a request, and the first field that it is about.

    In sentences: each field with its faults, which are alternatives if it may have several types.
    """
    faults: dict[str, dict[str, None]] = {}  # in order; alternatives may say the same
    for error in errors:
        if isinstance(error, str):  # vLLM's own
            faults.setdefault("", {})[error] = None
            continue
        if error["type"] == "json_invalid":
            what = f"the body is no JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
            faults.setdefault("", {})[what] = None
            continue
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, VLLMValidationError):
            return str(cause), cause.parameter
        field = _field_at(error["loc"])
        text = error["msg"].removeprefix("Value error, ")
        if field and error["type"] != "missing":
            text += f" (given: {reprlib.repr(error['input'])})"
        faults.setdefault(field, {})[text] = None
    sentences = [
        f"{field}: {', or '.join(itertools.islice(texts, MAX_FAULTS))}".removeprefix(": ")
        for field, texts in faults.items()
    ]
    shown = "; ".join(sentences[:MAX_SENTENCES])
    if len(sentences) > MAX_SENTENCES:
        shown += f"; and {len(sentences) - MAX_SENTENCES} more"
    return shown, next(iter(faults)) or None


def _field_at(place: Sequence[str | int]) -> str:
    """A field as its client knows it: without the type, of several, that was tried on it."""
    given = (part for part in place if part != "body" and not str(part)[:1].isupper())
    return clean_loc_for_param(tuple(given))


async def _answer_validator_error(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 if the error came while the body was read, otherwise as vLLM does."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    if request_body_to_args.__code__ in frames:
        # The validator's name says which field it looked at.
        error = ValueError(
            f"a field of the request has the wrong type: {error} ({frames[-1].co_name})"
        )
    else:
        logger.error("a request failed", exc_info=error, extra={"path": request.url.path})
    answer: JSONResponse = await exception_handler(request, error)
    return answer


TOKENIZE_WEIGHT = 8
"""How much smaller a body for `/tokenize` must be: each of its bytes takes 250 of memory. Other
routes refuse a text that is longer than the context before they make tokens of it."""


class BodyLimit:
    """Refuses bodies over `max_bytes` with status 413, and those that do not come with 408.

    A request has one of the places that Serve gives out while its body comes.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        """A body must have come within `timeout_s`."""
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its body."""
        received, is_whole = 0, False
        give_up_s = asyncio.get_running_loop().time() + self._timeout_s
        is_tokenize = scope.get("path", "").endswith("/tokenize")
        max_bytes = self._max_bytes // TOKENIZE_WEIGHT if is_tokenize else self._max_bytes

        async def counted() -> Message:
            nonlocal received, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(give_up_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"The request body did not come within {self._timeout_s:g} s "
                    "(ingress.body_timeout_s).",
                ) from None
            is_whole = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > max_bytes:
                key = "ingress.max_request_bytes"
                raise HTTPException(
                    413,
                    f"The request body is over the limit of {max_bytes} bytes "
                    f"({key}{f' / {TOKENIZE_WEIGHT}, for /tokenize' if is_tokenize else ''}).",
                )
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


class DisconnectByMessage:
    """Sends an app the message that its client is gone, as ASGI says; Serve cancels the call.

    vLLM's handlers wait for the message; cancelled, they would leave what they started running.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; when cancelled, wait until the app has ended by itself."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gone = asyncio.Event()

        async def receive_or_gone() -> Message:
            receiving = asyncio.ensure_future(receive())
            leaving = asyncio.create_task(gone.wait())
            try:
                await asyncio.wait({receiving, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if receiving.done():
                    return receiving.result()
            except TaskCancelledError:  # Serve's own call for the message was cancelled too
                pass
            finally:
                receiving.cancel()
                leaving.cancel()
            return {"type": "http.disconnect"}

        running = asyncio.ensure_future(self._app(scope, receive_or_gone, send))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            gone.set()
            await asyncio.gather(running, return_exceptions=True)
            raise
