"""The Responses API: what of it is refused, and the events that vLLM's stream lacks."""

from collections.abc import Iterator
from typing import Any

from openai.types.responses import ResponseErrorEvent, ResponseIncompleteEvent
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo
from vllm.exceptions import VLLMValidationError

KEEPS_NONE = (
    "this server keeps no responses and no conversations; send the whole conversation in `input`"
)

NOT_SERVED: dict[str, str] = {
    "background": "responses are not made in the background: this server keeps none; leave it out "
    "and read the answer, or stream it",
    "previous_response_id": KEEPS_NONE,
    "conversation": KEEPS_NONE,
    "moderation": "this server has no moderation; leave it out",
    "image": "this server makes no images; leave it out",
    "context_management": "conversations are not compacted; shorten `input` yourself",
}
"""Parameters that are refused unless they are null or false, with the reason."""

INCLUDES = ("message.output_text.logprobs", "reasoning.encrypted_content")
"""Values of `include`. Reasoning is always in the answer, in plain text, so that clients which ask
for it encrypted miss nothing; the others belong to tools that are not served."""

TOOLS = ("function", "custom", "namespace")
"""Types of tools, all of which the client runs."""

MAX_TOP_LOGPROBS = 20
"""As in OpenAI's API."""


class ResponseIncomplete(ResponseIncompleteEvent):
    """The last event of a response that was cut off, with vLLM's type of a response."""

    response: ResponsesResponse  # type: ignore[assignment]


def check_request(request: ResponsesRequest) -> None:
    """VLLMValidationError names what this server does not do of what a request asks for."""
    for parameter, reason in _refused(request):
        raise VLLMValidationError(f"`{parameter}` is not supported: {reason}", parameter=parameter)


def _refused(request: ResponsesRequest) -> Iterator[tuple[str, str]]:
    for name, reason in NOT_SERVED.items():
        if getattr(request, name, None):
            yield name, reason
    for value in request.include or ():
        if value not in INCLUDES:
            yield "include", f"{value!r} belongs to a tool that this server does not run"
    for tool in request.tools:
        if tool.type not in TOOLS:
            yield "tools", _of_tool(tool.type)
    choice = request.tool_choice
    kind = choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", "function")
    if kind not in (*TOOLS, "allowed_tools"):
        yield "tool_choice", _of_tool(kind)
    for item in request.input if isinstance(request.input, list) else ():
        if _field(item, "type") == "item_reference":
            yield "input", f"an `item_reference` names something kept, but {KEEPS_NONE}"
        content = _field(item, "content")
        for part in content if isinstance(content, list) else ():
            if _field(part, "file_id") or _field(part, "type") == "input_file":
                yield "input", "this server takes no files; send their text"
    if (request.top_logprobs or 0) > MAX_TOP_LOGPROBS:
        yield "top_logprobs", f"the most is {MAX_TOP_LOGPROBS}, not {request.top_logprobs}"


def _of_tool(kind: Any) -> str:
    return f"this server does not run the tool {kind!r}; it has tools of type {', '.join(TOOLS)}"


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else getattr(item, name, None)


def truthful(response: ResponsesResponse) -> ResponsesResponse:
    """A response that says whether it is kept, as OpenAI's do."""
    return response.model_copy(update={"store": False})


def truthful_event(event: Any) -> Any:
    """An event of a stream; the last one of a response that was cut off is `incomplete`."""
    response = getattr(event, "response", None)
    if not isinstance(response, ResponsesResponse):
        return event
    response = truthful(response)
    if event.type == "response.completed" and response.status == "incomplete":
        number = event.sequence_number
        return ResponseIncomplete(
            type="response.incomplete", response=response, sequence_number=number
        )
    return event.model_copy(update={"response": response})


def error_event(error: ErrorInfo, sequence_number: int) -> ResponseErrorEvent:
    """The end of a stream by an error.

    OpenAI's documents have the fields at the top, its server and clients have them in `error`.
    """
    fields = {"message": error.message, "param": error.param, "code": str(error.code)}
    return ResponseErrorEvent.model_validate(
        {
            "type": "error",
            "sequence_number": sequence_number,
            **fields,
            "error": {"type": error.type, **fields},
        }
    )
