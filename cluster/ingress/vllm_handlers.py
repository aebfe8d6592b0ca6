"""vLLM's handlers of the routes, with the ids, ends and errors that clients expect."""

import inspect
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from functools import partial, wraps
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import State
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError, VLLMValidationError

from cluster.errors import RequestFailed
from cluster.ingress.calls import check_id, current_call
from cluster.ingress.error_answers import ANTHROPIC, error_content
from cluster.ingress.vllm_http import explain_validation
from cluster.ingress.vllm_responses import check_request, error_event, truthful, truthful_event
from cluster.ingress.vllm_seams import FRONT_END

logger = logging.getLogger(__name__)

Events = AsyncGenerator[Any, None]
Create = Callable[..., Awaitable[Any]]
Stream = Callable[..., Events]

CREATE = {
    "openai_serving_chat": "create_chat_completion",
    "openai_serving_chat_batch": "create_batch_chat_completion",
    "openai_serving_completion": "create_completion",
    "openai_serving_responses": "create_responses",
    "anthropic_serving_messages": "create_chat_completion",
    "serving_generative_scoring": "create_generative_scoring",
    "serving_tokens": "serve_tokens",
}
"""By handler, the method that answers a call: with a response, an error, or a stream of events."""

MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""Names of the same limit in the APIs."""

STREAM = {
    "openai_serving_chat": "chat_completion_stream_generator",
    "openai_serving_completion": "completion_stream_generator",
    "openai_serving_responses": "responses_stream_generator",
    "anthropic_serving_messages": "chat_completion_stream_generator",
    "serving_tokens": "serve_tokens_stream_generator",
}
"""By handler, the method that makes events of the results of a call."""


def adapt_handlers(state: State, max_model_len: int) -> None:
    """Wrap the handlers of vLLM's app.

    Each call has the id that its client gave. A stream that fails before its first result is an
    error with a status, raised like that of a call that is not streamed: vLLM checks some
    parameters, such as grammars, only when the results are asked for. A later error is an event.
    """
    for name, method in CREATE.items():
        _replace(state, name, method, partial(_answering, max_model_len=max_model_len))
    for name, method in STREAM.items():
        _replace(state, name, method, _begun)
    _replace(state, "openai_serving_chat", "chat_completion_stream_generator", _calling)
    _replace(state, "openai_serving_responses", "responses_stream_generator", _ending)
    _replace(state, "anthropic_serving_messages", "message_stream_converter", _converting)
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(is_news)


def _replace(state: State, name: str, method: str, wrap: Callable[[Any], Any]) -> None:
    handler = getattr(state, name)
    FRONT_END.replace(handler, method, wrap(getattr(handler, method)))


def error_in(data: Any) -> ErrorInfo | None:
    """The error that one event of a stream may be."""
    if isinstance(data, str) and (text := data.removeprefix("data: ")).startswith('{"error"'):
        return ErrorResponse.model_validate_json(text).error
    return None


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of vLLM's log is worth its place: the errors of clients have one of ours."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, Exception) and is_expected(error):
        return False
    return not str(record.msg).startswith("Error with model")


def is_expected(error: Exception) -> bool:
    """Whether an error is the client's or a refusal, and no bug."""
    return isinstance(error, VLLMError) or create_error_response(error).error.code < 500


def _answering(create: Create, max_model_len: int) -> Create:
    @wraps(create)
    async def answer(request: Any, raw_request: Any = None) -> Any:
        await _name(request, raw_request)
        if isinstance(request, ResponsesRequest):
            check_request(request)
        try:
            answer = await create(request, raw_request)
        except VLLMValidationError as error:
            raise _explained(error, request, max_model_len) from None
        except ValidationError as error:
            message, param = explain_validation(error.errors())
            raise VLLMValidationError(message, parameter=param) from None
        if isinstance(answer, AsyncGenerator):
            return await _begin(answer)
        return truthful(answer) if isinstance(answer, ResponsesResponse) else answer

    return answer


async def _name(request: Any, raw_request: Any) -> None:
    """Name a request: by the `request_id` in its body, otherwise by that of its call."""
    if (call := current_call.get()) is None:
        return
    body = await raw_request.json() if raw_request is not None else None
    if isinstance(body, dict) and (given := body.get("request_id")):
        try:
            check_id("request_id", given)
        except RequestFailed as failure:
            raise VLLMValidationError(str(failure), parameter="request_id") from None
        call.answer_id = given
    prefix = "resp_" if isinstance(request, ResponsesRequest) else ""  # vLLM adds the others
    request.request_id = f"{prefix}{call.answer_id}"


def _explained(error: VLLMValidationError, request: Any, max_model_len: int) -> VLLMValidationError:
    """The error in the client's terms, where vLLM's are those of its own arithmetic."""
    asked_for = {vars(request).get(name) for name in MAX_TOKENS}
    if (error.parameter, error.value) != ("max_tokens", 0) or 0 in asked_for:
        return error
    return VLLMValidationError(
        f"The prompt fills the model's maximum context length of {max_model_len} tokens and leaves "
        "no room for an answer: shorten it by as many tokens as the answer shall have.",
        parameter="max_tokens",
    )


async def _begin(events: AsyncIterator[Any]) -> Any:
    """The same events, once the first one is there; the error in its place, if it is one."""
    try:
        first = await anext(events)
    except StopAsyncIteration:
        return events
    if error := error_in(first):
        return ErrorResponse(error=error)
    return _all(first, events)


async def _all(first: Any, events: Any) -> Events:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _begun(stream: Stream) -> Stream:
    signature = inspect.signature(stream)

    @wraps(stream)
    async def events(*args: Any, **kwargs: Any) -> Events:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["result_generator"] = await _begin(bound.arguments["result_generator"])
        async with aclosing(stream(*bound.args, **bound.kwargs)) as made:
            async for event in made:
                yield event

    return events


def _calling(stream: Stream) -> Stream:
    """Chat: one part of one tool call in an event, which is all that many clients look for.

    vLLM puts there what one step gave, and with drafts a step gives several tokens.
    """

    @wraps(stream)
    async def events(*args: Any, **kwargs: Any) -> Events:
        async with aclosing(stream(*args, **kwargs)) as made:
            async for event in made:
                if isinstance(event, str) and '"tool_calls":[' in event:
                    for part in _one_call_each(json.loads(event.removeprefix("data: "))):
                        yield f"data: {json.dumps(part, ensure_ascii=False)}\n\n"
                else:
                    yield event

    return events


def _one_call_each(chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
    [choice] = chunk["choices"]
    calls: dict[int, dict[str, Any]] = {}
    for call in choice["delta"]["tool_calls"]:
        if (known := calls.setdefault(call["index"], call)) is not call:
            arguments = (one["function"].get("arguments") or "" for one in (known, call))
            known["function"] |= {"arguments": "".join(arguments)}
    for number, call in enumerate(calls.values(), 1):
        reason = choice.get("finish_reason") if number == len(calls) else None
        part = choice | {"delta": choice["delta"] | {"tool_calls": [call]}, "finish_reason": reason}
        yield chunk | {"choices": [part]}


def _ending(stream: Stream) -> Stream:
    """Responses: the right last event, also of an error, on which vLLM would cut the connection."""
    signature = inspect.signature(stream)

    @wraps(stream)
    async def events(*args: Any, **kwargs: Any) -> Events:
        bound = signature.bind(*args, **kwargs)
        results = bound.arguments["result_generator"]
        bound.arguments["result_generator"] = noted = _Noted(results)
        number = -1
        try:
            async with aclosing(stream(*bound.args, **bound.kwargs)) as made:
                async for event in made:
                    yield truthful_event(event)
                    number = event.sequence_number
        except Exception as error:  # any kind: after the head it can only be an event
            if number < 0:
                raise
            error = noted.error or error
            if not is_expected(error):
                logger.exception("a stream failed", exc_info=error)
            yield error_event(create_error_response(error).error, number + 1)

    return events


class _Noted:
    """Results, and the error that ended them: vLLM raises another on the way to the client."""

    def __init__(self, results: Any) -> None:
        self._results = results
        self.error: Exception | None = None

    def __aiter__(self) -> "_Noted":
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._results)
        except StopAsyncIteration:
            raise
        except Exception as error:
            self.error = error
            raise

    async def aclose(self) -> None:
        await self._results.aclose()


def _converting(convert: Stream) -> Stream:
    """Messages: an error of the chat's stream as an event, which vLLM cannot read."""

    @wraps(convert)
    async def events(chunks: Events) -> Events:
        failure: ErrorInfo | None = None

        async def until_error() -> Events:
            nonlocal failure
            async for chunk in chunks:
                if failure := error_in(chunk):
                    return
                yield chunk

        async for event in convert(until_error()):
            yield event
        if failure:
            content = error_content(ANTHROPIC, HTTPStatus(failure.code), failure.message)
            yield f"event: error\ndata: {json.dumps(content)}\n\n"

    return events
