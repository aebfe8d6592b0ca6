"""Answers with an error: one form for all errors of an API, whoever made them."""

import json
from http import HTTPStatus
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANTHROPIC = "/v1/messages"
"""Routes below it have the errors of Anthropic's API, all others those of OpenAI's."""

MAX_MESSAGE_LEN, MAX_PARAM_LEN = 2000, 200
"""Max characters of what an error says: some repeat the value that they are about."""

ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_type(status: int, path: str = "") -> str:
    """The type of an error by its HTTP status, in the words of the API at `path`.

    In the OpenAI form it is named as vLLM names its own: `BadRequestError`, `NotFoundError`.
    """
    if path.startswith(ANTHROPIC):
        other = "invalid_request_error" if status < 500 else "api_error"
        return ANTHROPIC_TYPES.get(status, other)
    words = HTTPStatus(status).phrase.removesuffix(" Error").split()
    return "".join(word.capitalize() for word in words) + "Error"


def error_content(path: str, status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error, in the form of the API at `path`."""
    if len(message) > MAX_MESSAGE_LEN:
        message = f"{message[:MAX_MESSAGE_LEN]}..."
    error = {"type": error_type(status, path), "message": message}
    if path.startswith(ANTHROPIC):
        return {"type": "error", "error": error}
    return {"error": {**error, "param": param and param[:MAX_PARAM_LEN], "code": int(status)}}


def error_answer(path: str, status: int, message: str) -> JSONResponse:
    """The answer to a call that does not reach the API."""
    return JSONResponse(error_content(path, status, message), status)


class ErrorAnswers:
    """Gives each answer with an error the form of its API, and the type of its status.

    vLLM's own differ by the place that they come from.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and hold back the head of an error until its body is there."""
        head: Message | None = None
        body = b""

        async def formed(message: Message) -> None:
            nonlocal head, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                head = message
                return
            if head is None:
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                body = _formed(scope["path"], head["status"], body)
                headers = MutableHeaders(scope=head)
                headers["content-length"] = str(len(body))
                if body:
                    headers["content-type"] = "application/json"
                await send(head)
                await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, formed if scope["type"] == "http" else send)


def _formed(path: str, status: int, body: bytes) -> bytes:
    if not body:  # of /health
        return body
    message, param = body.decode(errors="replace"), None
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if isinstance(found, dict):
        error = found.get("error", found)
        if isinstance(error, dict):
            message = str(error.get("message", error.get("detail", message)))
            param = error.get("param")
    return json.dumps(error_content(path, status, message, param)).encode()
