"""vLLM's OpenAI front end over the workers: its routes, renderers and detokeniser, no weights."""

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import hashlib
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from cluster.ingress.vllm_seams import FRONT_END  # before vLLM: sets what it reads

# isort: split

from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.tasks import SupportedTask
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    RequestOutputCollector,
    RequestState,
)
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import StatLoggerFactory
from vllm.v1.serial_utils import MsgpackDecoder

from cluster.config.app_config import AppConfig, IngressConfig
from cluster.config.auth import TenantConfig
from cluster.errors import RequestFailed
from cluster.ingress.auth import Caller, Doorkeeper
from cluster.ingress.calls import Call, Calls, current_call
from cluster.ingress.engine_client import EngineClient, Failure
from cluster.ingress.http_metrics import HttpMetrics
from cluster.ingress.protocol import PARAMETERS, TENANT, Api
from cluster.ingress.vllm_grammars import bound_grammars, grammar_of
from cluster.ingress.vllm_handlers import adapt_handlers, error_in
from cluster.ingress.vllm_http import SCALE_OUT, http_app
from cluster.ingress.vllm_limits import check_limits, check_priority
from cluster.ingress.vllm_prefix import PrefixHashes
from cluster.ingress.vllm_request import read_request
from cluster.keys import DEFAULT_TENANT
from cluster.observe.vllm_metrics import RequestStatLogger
from scheduler.request import Request
from workers.engine.vllm_engine import encoder, engine_args
from workers.engine_request import EngineRequest
from workers.errors import GrammarRefused

logger = logging.getLogger(__name__)

ENGINE_FAILED = "its worker's engine failed it, see the worker's log"
SIBLING_FAILED = "another sequence of the same call failed"

SUPPORTED_TASKS: tuple[SupportedTask, ...] = ("generate",)


class WorkersCore(EngineCoreClient):
    """All workers together, where vLLM expects the client of one engine core."""

    engine_ranks_managed = (0,)

    def __init__(
        self,
        client: EngineClient[EngineCoreOutputs],
        tenants: Mapping[str, TenantConfig],
        prefix_hashes: PrefixHashes | None = None,
    ) -> None:
        """Without `prefix_hashes` requests are placed whatever their prompts are."""
        self._client = client
        self._prefix_hashes = prefix_hashes
        self._tenants = tenants
        self._encode = encoder()
        self.output_processor: OutputProcessor | None = None
        """Set by `ClusterLLM`; gives each sequence's outputs to its call."""
        self.resources = SimpleNamespace(engine_dead=False)

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        """The tasks of chat and completion models."""
        return SUPPORTED_TASKS

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send a request to a worker; returns at once.

        ValueError, TypeError or OverflowError if it cannot be encoded: huge integers, halves of
        characters.
        """
        sampling = request.sampling_params
        if sampling is None:
            raise NotImplementedError("the served model generates text; it has no pooling tasks")
        num_prompt_tokens = len(request.prompt_token_ids or request.prompt_is_token_ids or ())
        assert sampling.max_tokens is not None  # set by vLLM's InputProcessor
        call = current_call.get() or Call(request.request_id)  # of a WebSocket
        check_priority(call, request.priority)
        tenant = call.caller.tenant
        if self._tenants[tenant].private_cache or request.cache_salt:
            # A name has no space, so that no tenant can give a salt that is another's.
            request.cache_salt = f"{tenant} {request.cache_salt or ''}"
        ours = Request(
            request.request_id,
            num_prompt_tokens,
            sampling.max_tokens,
            request.priority,
            call.targets.slo,
            call.targets.slo_class,
            tenant,
            call.traceparent,
            fingerprint=self._fingerprint(request),
            names_slo=call.targets.is_named,
        )
        if hashes := self._prefix_hashes:
            hashes.follow(self._client.prefix_format)
            ours = dataclasses.replace(
                ours, block_hashes=hashes.of(request), prefix_format=hashes.format
            )
        sent = EngineRequest(ours, self._encode(request), grammar=grammar_of(sampling))
        record = self._client.submit(sent, request.arrival_time)
        record.call_id = call.call_id
        call.records.append(record)

    def _fingerprint(self, request: EngineCoreRequest) -> str:
        """Equal for requests that are the same work, whoever sends them and when."""
        digest = hashlib.blake2b(array("q", request.prompt_token_ids or ()), digest_size=8)
        sampling = copy.copy(request.sampling_params)
        assert sampling
        sampling.output_kind = RequestOutputKind.DELTA  # streamed or not
        for part in self._encode(sampling):
            digest.update(part)
        return digest.hexdigest()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Stop requests on their workers.

        vLLM also calls this for a request whose answer is complete by a stop string; it has ended
        by then, see `finish`.
        """
        call = current_call.get()
        failed = call is not None and any(one.outcome == "error" for one in call.records)
        self._client.abort(request_ids, SIBLING_FAILED if failed else "")

    def finish(self, request_id: str, reason: FinishReason, num_output_tokens: int) -> None:
        """End a request as its answer does, of which vLLM's output processor has the last word."""
        self._client.finish(request_id, str(reason), num_output_tokens)

    async def get_output_async(self) -> EngineCoreOutputs:
        """The outputs of the next step of any worker.

        A request that failed fails its whole call, at once and with its status.
        """
        while True:
            outputs = await self._client.next_outputs()
            if isinstance(outputs, Failure):
                self._fail(outputs.request_id, outputs.error)
                continue
            for output in outputs.outputs:
                if output.finish_reason == FinishReason.ERROR:
                    extra = {"request_id": output.request_id, "error": ENGINE_FAILED}
                    logger.error("request failed", extra=extra)
                    self._client.abort([output.request_id], ENGINE_FAILED)
                    self._fail(output.request_id, None)
            return outputs

    def _fail(self, request_id: str, error: Exception | None) -> None:
        assert self.output_processor is not None
        state = self.output_processor.request_states.get(request_id)
        if state is None or (queue := state.queue) is None:
            return  # its client has left
        queue.put(_answer_to(error, state.external_req_id))
        request_ids = self.output_processor.abort_requests([queue.request_id], internal=True)
        self._client.abort(request_ids, SIBLING_FAILED)

    def hold(self, call: Call) -> None:
        """Take the requests of a call from their workers."""
        self._client.hold([record.request.request_id for record in call.records])

    def go_on(self, call: Call) -> None:
        """Have the requests of a call go on that were held."""
        self._client.go_on([record.request.request_id for record in call.records])

    def give_up(self, call: Call, reason: str) -> None:
        """End the requests of a call whose client does not read its stream, with an error.

        Without a reason, those of a client that has left.
        """
        request_ids = [record.request.request_id for record in call.records if not record.outcome]
        self._client.abort(request_ids, reason, "unread")
        for request_id in request_ids:
            error = RequestFailed(reason or "the client left", HTTPStatus.REQUEST_TIMEOUT)
            self._fail(request_id, error)

    async def has_workers(self) -> bool:
        """Whether a request that came now would find a worker."""
        return await self._client.has_workers()

    def shutdown(self, timeout: float | None = None) -> None:
        """Do nothing: the workers live on without this front end."""


class ClusterLLM(AsyncLLM):
    """vLLM's asynchronous engine with the workers as its engine core."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        core: WorkersCore,
        limits: IngressConfig,
        stat_loggers: Sequence[StatLoggerFactory] = (),
    ) -> None:
        with _engine_core(core):
            super().__init__(
                vllm_config,
                Executor.get_class(vllm_config),
                log_stats=True,
                log_requests=False,
                stat_loggers=list(stat_loggers),
            )
        self._core = core
        self._limits = limits
        core.output_processor = self.output_processor
        count_end = self.output_processor._update_stats_from_finished

        def end(state: RequestState, reason: FinishReason, stats: Any) -> None:
            assert state.detokenizer is not None
            core.finish(state.request_id, reason, state.detokenizer.num_output_tokens())
            count_end(state, reason, stats)

        FRONT_END.replace(self.output_processor, "_update_stats_from_finished", end)

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> RequestOutputCollector:
        """Start a request; VLLMClientError if it is too large, or cannot be read or sent."""
        try:
            if call := current_call.get():
                max_model_len = self.model_config.max_model_len
                check_limits(self._limits, call, prompt, params, max_model_len)
            return await super().add_request(request_id, prompt, params, *args, **kwargs)
        except (ValueError, TypeError, OverflowError) as error:
            raise VLLMClientError(str(error)) from error

    async def _add_request(self, request: EngineCoreRequest, *args: Any) -> None:
        """Start one sequence of a call; if it cannot be sent, the output processor forgets it.

        vLLM registers it there before it is sent.
        """
        try:
            await super()._add_request(request, *args)
        except BaseException:
            await self.abort(request.request_id, internal=True)
            raise

    async def check_health(self) -> None:
        """Raise EngineDeadError while there is no worker."""
        await super().check_health()
        if not await self._core.has_workers():
            raise EngineDeadError


@contextlib.contextmanager
def _engine_core(core: WorkersCore) -> Iterator[None]:
    """Let `AsyncLLM` take `core` instead of starting an engine; it offers no parameter for it."""
    make = staticmethod(lambda **_: core)
    with FRONT_END.replaced(EngineCoreClient, "make_async_mp_client", make):
        yield


def _answer_to(error: Exception | None, call_id: str) -> Exception:
    """The error, in vLLM's form, that a call gets whose request failed with `error`."""
    if isinstance(error, GrammarRefused):
        return VLLMValidationError(str(error))
    if not isinstance(error, RequestFailed):
        error = RequestFailed(
            f"The request failed on its worker; `xyserve explain {call_id}` says why."
        )
    return GracefulHTTPError(str(error), HTTPStatus(error.status))


def decode_outputs() -> Callable[[list[bytes]], EngineCoreOutputs]:
    """A decoder of what a worker's engine encoded."""
    decode: Callable[[list[bytes]], EngineCoreOutputs] = MsgpackDecoder(EngineCoreOutputs).decode
    return decode


class Frontend:
    """The OpenAI API for one model."""

    def __init__(
        self,
        config: AppConfig,
        model: str,
        client: EngineClient[EngineCoreOutputs],
        calls: Calls,
        doorkeeper: Doorkeeper,
        http_metrics: HttpMetrics | None = None,
    ) -> None:
        self._calls = calls
        self._tenants = config.all_tenants
        bound_grammars(config.worker.grammars)
        self._args = _serve_args(config, model)
        args = engine_args(model, config.worker, kernels=False)
        args.served_model_name = config.model_name  # in messages and metrics
        vllm_config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        stat_loggers = (RequestStatLogger,) if config.metrics else ()
        uses_prefixes = (
            config.worker.prefix_index and vllm_config.cache_config.enable_prefix_caching
        )
        prefix_hashes = PrefixHashes(vllm_config) if uses_prefixes else None
        core = WorkersCore(client, self._tenants, prefix_hashes)
        self._llm = ClusterLLM(vllm_config, core, config.ingress, stat_loggers)
        self._app = build_app(self._args, SUPPORTED_TASKS, vllm_config.model_config)
        self.asgi_app = http_app(self._app, config, calls, core, doorkeeper, http_metrics)

    async def start(self) -> None:
        """Make the request handlers; needed once, before the first request."""
        await init_app_state(self._llm, self._app.state, self._args, SUPPORTED_TASKS)
        adapt_handlers(self._app.state, self._llm.model_config.max_model_len)
        # vLLM's error handler would end its HTTP server with a broken engine; see check_health.
        self._app.state.server = SimpleNamespace(should_exit=False)

    def check_health(self) -> None:
        """Raise EngineDeadError when nothing reads the workers' outputs any longer."""
        if self._llm.errored:
            raise EngineDeadError

    async def complete(self, api: Api, payload: dict[str, Any]) -> str:
        """Answer one call of `api` ("chat" or "completion") as the JSON of its OpenAI response."""
        async with self._calls.answering(payload, PARAMETERS, self._caller(payload)) as call:
            response = await self._respond(call, api, payload, streamed=False)
            return str(response.model_dump_json())

    async def stream(self, api: Api, payload: dict[str, Any]) -> Any:
        """The chunks of one streaming call, each as the JSON of its OpenAI chunk."""
        async with self._calls.answering(payload, PARAMETERS, self._caller(payload)) as call:
            async for event in await self._respond(call, api, payload, streamed=True):
                data = event.removeprefix("data: ").strip()
                if error := error_in(event):
                    raise call.refusal or RequestFailed(error.message, error.code)
                if data and data != "[DONE]":
                    yield data

    def _caller(self, payload: dict[str, Any]) -> Caller:
        """Who calls by a client handle, which whoever can reach Ray may do."""
        name = payload.get(TENANT) or DEFAULT_TENANT
        if not isinstance(name, str) or name not in self._tenants:
            known = ", ".join(sorted(self._tenants))
            raise RequestFailed(
                f"{TENANT}: {name!r:.80} is no tenant; known are {known}", HTTPStatus.BAD_REQUEST
            )
        return Caller(name)

    async def _respond(
        self, call: Call, api: Api, payload: dict[str, Any], *, streamed: bool
    ) -> Any:
        state = self._app.state
        request = read_request(api, payload, call.call_id, streamed=streamed)
        try:
            if api == "chat":
                response = await state.openai_serving_chat.create_chat_completion(request)
            else:
                response = await state.openai_serving_completion.create_completion(request)
        except Exception as error:  # as in vLLM's handlers for HTTP
            if refusal := call.refusal:
                raise refusal from None
            response = create_error_response(error)
            if response.error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                logger.exception("a call of a client handle failed", extra={"api": api})
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
    args.tool_strict_level = "parameter"  # most clients do not say `strict`, and rely on the schema
    args.structured_outputs_config.reasoning_parser = config.ingress.reasoning_parser or ""
    args.chat_template = config.ingress.chat_template
    args.enable_prompt_tokens_details = True
    args.enable_tokenizer_info_endpoint = True  # for the remote tokenizer of lm-eval
    args.enable_scale_out = any(path in SCALE_OUT for path in config.ingress.routes)
    for name, value in config.ingress.extra_args.items():
        setattr(args, name, value)
    validate_parsed_serve_args(args)
    return args
