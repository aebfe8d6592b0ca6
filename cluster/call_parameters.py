"""Parameters of a client handle's call: sent as JSON, Python types among them as JSON schemas."""

import json
import reprlib
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, get_origin

import openai
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticUserError

from cluster.errors import RequestFailed

_ANY = TypeAdapter[Any](Any)


def encode_parameters(params: Mapping[str, Any]) -> str:
    """Their JSON object; RequestFailed names the one that cannot be sent."""
    items = [f"{json.dumps(name)}: {_encode(name, value)}" for name, value in params.items()]
    return f"{{{', '.join(items)}}}"


def check_timeout(timeout_s: Any) -> None:
    """RequestFailed if `timeout_s` is no time; None is no limit."""
    if timeout_s is None:
        return
    check_type("timeout_s", timeout_s, float)
    if not timeout_s > 0:
        raise unusable("timeout_s", f"{timeout_s} is not a positive number of seconds")


def check_type(name: str, value: Any, wanted: type) -> None:
    """RequestFailed if an argument has another type."""
    types = (int, float) if wanted is float else wanted
    if not isinstance(value, types) or isinstance(value, bool):
        raise unusable(name, f"{reprlib.repr(value)} is not of the type {wanted.__name__}")


def answer_type(params: Mapping[str, Any]) -> "TypeAdapter[Any] | None":
    """The Python type that `response_format` may be, for `parse_answer`."""
    wanted = params.get("response_format")
    return _adapter(wanted) if _is_type(wanted) else None


def parse_answer(answer: ChatCompletion, wanted: "TypeAdapter[Any]") -> None:
    """Set `parsed` of each message, as `chat.completions.parse` of the `openai` package does.

    Its LengthFinishReasonError if an answer is cut off, pydantic's ValidationError if one does not
    suit the type. An answer that calls a tool has None.
    """
    for choice in answer.choices:
        if choice.finish_reason == "length":
            raise openai.LengthFinishReasonError(completion=answer)
        content = choice.message.content
        parsed = wanted.validate_json(content) if content else None
        choice.message.parsed = parsed  # type: ignore[attr-defined]


def unusable(name: str, fault: str) -> RequestFailed:
    """The error for a parameter that cannot be used."""
    return RequestFailed(f"{name}: {fault}", HTTPStatus.BAD_REQUEST)


def _encode(name: str, value: Any) -> str:
    try:
        if name == "response_format" and _is_type(value):
            value = _response_format(value)
        elif name == "tools" and isinstance(value, list | tuple):
            value = [openai.pydantic_function_tool(t) if _is_model(t) else t for t in value]
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise unusable(name, f"it cannot be sent as JSON: {error}") from None


def _plain(value: Any) -> Any:
    """What the json module cannot encode, as something that it can."""
    if isinstance(value, Iterator | range):
        return list(value)
    if isinstance(value, BaseModel):
        # As the `openai` package sends it, for answers that go back into a conversation.
        left_out = getattr(value, "__api_exclude__", None)
        return value.model_dump(mode="json", exclude_unset=True, exclude=left_out)
    if not isinstance(value, type) and hasattr(value, "tolist"):
        return value.tolist()  # an array of numpy or torch
    return _ANY.dump_python(value, mode="json")


def _response_format(wanted: Any) -> dict[str, Any]:
    name = getattr(wanted, "__name__", "answer")
    try:
        schema = _adapter(wanted).json_schema()
    except PydanticUserError as error:
        fault, *_ = error.message.splitlines()
        raise unusable("response_format", f"{name} has no JSON schema: {fault}") from None
    json_schema = {"name": name, "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": json_schema}


def _adapter(wanted: Any) -> "TypeAdapter[Any]":
    return TypeAdapter(wanted)


def _is_type(value: Any) -> bool:
    return isinstance(value, type) or get_origin(value) is not None


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
