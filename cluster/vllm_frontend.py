"""vLLM's OpenAI front end over the workers: its routes, renderers and detokeniser, no weights."""

import argparse
import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from ray.exceptions import TaskCancelledError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request as HTTPRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.tasks import SupportedTask
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor
from vllm.v1.serial_utils import MsgpackDecoder

from cluster.config import AppConfig
from cluster.engine_client import EngineClient
from cluster.errors import RequestFailed
from scheduler.request import Request
from workers.vllm_engine import encoder, engine_args

logger = logging.getLogger(__name__)

SUPPORTED_TASKS: tuple[SupportedTask, ...] = ("generate",)

UNSUPPORTED_ROUTES = {
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "reranking",
    "/v1/score": "scoring",
    "/v1/moderations": "moderation",
    "/v1/audio/speech": "speech synthesis",
    "/v1/audio/transcriptions": "transcription",
    "/v1/audio/translations": "speech translation",
    "/v1/images/generations": "image generation",
}
"""Known routes of the OpenAI API that a text generation model cannot serve."""


class WorkersCore(EngineCoreClient):
    """All workers together, in the place where vLLM expects the client of one engine core."""

    engine_ranks_managed = (0,)

    def __init__(self, client: EngineClient[EngineCoreOutputs]) -> None:
        self._client = client
        self._encode = encoder()
        self.resources = SimpleNamespace(engine_dead=False)

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        """What chat and completion models do."""
        return SUPPORTED_TASKS

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send a request to a worker; returns at once."""
        sampling = request.sampling_params
        if sampling is None:
            raise NotImplementedError("the served model generates text; it has no pooling tasks")
        num_prompt_tokens = len(request.prompt_token_ids or request.prompt_is_token_ids or ())
        assert sampling.max_tokens is not None  # set by vLLM's InputProcessor
        self._client.submit(
            Request(request.request_id, num_prompt_tokens, sampling.max_tokens, request.priority),
            lambda attempt_id: self._encode(
                msgspec.structs.replace(request, request_id=attempt_id)
            ),
        )

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Stop requests on their workers."""
        self._client.abort(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        """What the next step of any worker produced."""
        return await self._client.next_outputs()

    def shutdown(self, timeout: float | None = None) -> None:
        """The workers live on without this front end."""


class ClusterLLM(AsyncLLM):
    """vLLM's asynchronous engine with the workers as its engine core."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        core: WorkersCore,
        has_workers: Callable[[], Awaitable[bool]],
    ) -> None:
        with _engine_core(core):
            super().__init__(
                vllm_config, Executor.get_class(vllm_config), log_stats=True, log_requests=False
            )
        self._has_workers = has_workers

    async def check_health(self) -> None:
        """Raise EngineDeadError while no worker is there."""
        await super().check_health()
        if not await self._has_workers():
            raise EngineDeadError


@contextlib.contextmanager
def _engine_core(core: WorkersCore) -> Iterator[None]:
    """Let `AsyncLLM` take `core` instead of starting an engine; it offers no parameter for it."""
    make = EngineCoreClient.make_async_mp_client
    EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: core)  # type: ignore[method-assign]
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = make  # type: ignore[method-assign]


def decode_outputs() -> Callable[[list[bytes]], EngineCoreOutputs]:
    """A decoder of what a worker's engine encoded."""
    decoder = MsgpackDecoder(EngineCoreOutputs)

    def decode(frames: list[bytes]) -> EngineCoreOutputs:
        outputs: EngineCoreOutputs = decoder.decode(frames)
        # A gauge of one worker must not pass for the sum of all.
        outputs.scheduler_stats = None
        return outputs

    return decode


def failed_outputs(request_id: str, error: Exception) -> EngineCoreOutputs:
    """The outputs that end a request with an error, which vLLM answers with status 500."""
    return EngineCoreOutputs(
        outputs=[EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)]
    )


class Frontend:
    """The OpenAI API for one model."""

    def __init__(
        self,
        config: AppConfig,
        model: str,
        client: EngineClient[EngineCoreOutputs],
        has_workers: Callable[[], Awaitable[bool]],
    ) -> None:
        self._args = _serve_args(config, model)
        args = engine_args(model, config.worker)
        args.served_model_name = config.model_name  # in messages and metrics
        vllm_config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        self._llm = ClusterLLM(vllm_config, WorkersCore(client), has_workers)
        self._app = build_app(self._args, SUPPORTED_TASKS, vllm_config.model_config)
        _answer_unsupported_routes(self._app, config.model_name)
        self._app.add_exception_handler(StarletteHTTPException, _answer_http_error)
        self._app.middleware_stack = None  # was built already, without this handler
        self.asgi_app = DisconnectByMessage(
            RequestSizeLimit(self._app, config.ingress.max_request_bytes)
        )

    async def start(self) -> None:
        """Make the request handlers; needed once, before the first request."""
        await init_app_state(self._llm, self._app.state, self._args, SUPPORTED_TASKS)

    async def complete(self, api: str, payload: dict[str, Any]) -> str:
        """Answer one call of `api` ("chat" or "completion") as the JSON of its OpenAI response."""
        response = await self._respond(api, payload)
        return str(response.model_dump_json())

    async def stream(self, api: str, payload: dict[str, Any]) -> Any:
        """The chunks of one streaming call, each as the JSON of its OpenAI chunk."""
        async for event in await self._respond(api, payload | {"stream": True}):
            data = event.removeprefix("data: ").strip()
            if data.startswith('{"error"'):
                error = ErrorResponse.model_validate_json(data).error
                raise RequestFailed(error.message, error.code)
            if data and data != "[DONE]":
                yield data

    async def _respond(self, api: str, payload: dict[str, Any]) -> Any:
        state = self._app.state
        try:
            if api == "chat":
                response = await state.openai_serving_chat.create_chat_completion(
                    ChatCompletionRequest(**payload)
                )
            else:
                response = await state.openai_serving_completion.create_completion(
                    CompletionRequest(**payload)
                )
        except Exception as error:  # as in vLLM's handlers for HTTP
            response = create_error_response(error)
            if response.error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                logger.exception("a call of a client handle failed")
        if isinstance(response, ErrorResponse):
            if (task := asyncio.current_task()) and task.cancelling():
                raise asyncio.CancelledError  # vLLM turns it into an answer that nobody reads
            raise RequestFailed(response.error.message, response.error.code)
        return response


def _serve_args(config: AppConfig, model: str) -> argparse.Namespace:
    """vLLM's server arguments for `config`."""
    args: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.model = model
    args.served_model_name = [config.model_name]
    args.tool_call_parser = config.ingress.tool_call_parser
    args.enable_auto_tool_choice = config.ingress.tool_call_parser is not None
    args.structured_outputs_config.reasoning_parser = config.ingress.reasoning_parser or ""
    args.chat_template = config.ingress.chat_template
    args.enable_prompt_tokens_details = True
    for name, value in config.ingress.extra_args.items():
        setattr(args, name, value)
    validate_parsed_serve_args(args)
    return args


def _answer_unsupported_routes(app: FastAPI, model_name: str) -> None:
    """Say what the model cannot do instead of a bare 404."""

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


async def _answer_http_error(request: HTTPRequest, error: Exception) -> JSONResponse:
    """Answer what Starlette refuses in the OpenAI form too; vLLM does so for FastAPI's errors."""
    assert isinstance(error, StarletteHTTPException)
    message = str(error.detail)
    if error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        message = f"{message}: {request.method} {request.url.path}; see /docs for what there is"
    status = HTTPStatus(error.status_code)
    answer = create_error_response(message, status.phrase, status)
    return JSONResponse(answer.model_dump(), error.status_code, headers=error.headers)


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


class DisconnectByMessage:
    """Tells an app by message that its client is gone, as ASGI says, where Serve cancels the call.

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
            except TaskCancelledError:  # the same, from Serve's own call for the message
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
