"""The HTTP side of the front end: what vLLM's app lacks to be public behind Ray Serve."""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.dependencies.utils import request_body_to_args
from fastapi.responses import JSONResponse
from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler

from cluster.config.app_config import AppConfig
from cluster.ingress.calls import Calls, CallsByHeader
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

ENGINE_ROUTES = {"/scale_elastic_ep", "/is_scaling_elastic_ep"}
"""Routes of vLLM that rebuild the engine next to its server; the workers' engines are elsewhere."""


def http_app(app: FastAPI, config: AppConfig, calls: Calls) -> ASGIApp:
    """vLLM's `app` with the calls, errors, limits and ends of requests that clients expect."""
    _answer_unsupported_routes(app, config.model_name)
    app.add_exception_handler(HTTPException, _answer_http_error)
    for error in VALIDATOR_ERRORS:
        app.add_exception_handler(error, _answer_validator_error)
    # Starlette has already built it, without these handlers.
    FRONT_END.replace(app, "middleware_stack", None)
    sized = RequestSizeLimit(EarlyStreamErrors(app), config.ingress.max_request_bytes)
    return DisconnectByMessage(CallsByHeader(sized, calls, Calls(config.slo)))


def error_in(data: str) -> ErrorInfo | None:
    """The error that one event of a stream may be."""
    if not data.startswith('{"error"'):
        return None
    return ErrorResponse.model_validate_json(data).error


def _answer_unsupported_routes(app: FastAPI, model_name: str) -> None:
    """Answer what the model cannot do with a sentence, not a bare 404; drop routes of no use."""
    routes = [route for route in app.routes if getattr(route, "path", None) not in ENGINE_ROUTES]
    FRONT_END.replace(app.router, "routes", routes)

    def make_answer(task: str) -> Callable[[], Awaitable[JSONResponse]]:
        async def answer() -> JSONResponse:
            error = create_error_response(
                f"The model `{model_name}` generates text and does not support {task}."
            )
            return JSONResponse(error.model_dump(), status_code=error.error.code)

        return answer

    served = {getattr(route, "path", None) for route in app.routes}
    for path, task in UNSUPPORTED_ROUTES.items():
        if path not in served:
            app.add_api_route(path, make_answer(task), methods=["POST"], include_in_schema=False)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer what Starlette refuses in the OpenAI form too; vLLM does so for FastAPI's errors."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        message = f"{message}: {request.method} {request.url.path}; see /docs for what there is"
    status = HTTPStatus(error.status_code)
    answer = create_error_response(message, status.phrase, status)
    return JSONResponse(answer.model_dump(), error.status_code, headers=error.headers)


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


class RequestSizeLimit:
    """Refuses bodies over `max_bytes` with status 413, declared or streamed."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its body."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(
                    413,
                    f"The request body is over the limit of {self._max_bytes} bytes "
                    "(ingress.max_request_bytes).",
                )
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


def _is_event_stream(head: Message) -> bool:
    return Headers(raw=head["headers"]).get("content-type", "").startswith("text/event-stream")


class EarlyStreamErrors:
    """Answers a stream that fails before its first chunk with its error, not with status 200.

    vLLM checks some parameters, such as grammars, only when the stream has begun.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and the head of a stream together with its first chunk."""
        held: Message | None = None
        replaced = False

        async def checked(message: Message) -> None:
            nonlocal held, replaced
            if replaced:
                return
            if message["type"] == "http.response.start" and _is_event_stream(message):
                held = message
                return
            if held is not None:
                head, held = held, None
                event = bytes(message.get("body", b"")).decode().partition("\n")[0]
                if error := error_in(event.removeprefix("data: ")):
                    replaced = True
                    answer = JSONResponse(ErrorResponse(error=error).model_dump(), error.code)
                    await answer(scope, receive, send)
                    return
                await send(head)
            await send(message)

        await self._app(scope, receive, checked)


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
