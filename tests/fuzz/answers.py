"""What is wrong with an answer, whatever was asked: a 5xx, a cut, a stream without its end."""

from dataclasses import dataclass
from typing import Any

import httpx
import requests

from tests.fuzz.parameters import Input

TIMEOUT_S = 300
LAST_EVENTS = {
    "/v1/responses": ("response.completed", "response.incomplete", "response.failed", "error"),
    "/v1/messages": ("message_stop", "error"),
}
"""How the streams of a path end; those of others with [DONE]."""


@dataclass(frozen=True)
class Fault:
    """What was sent, and what is wrong with the answer."""

    sent: str
    what: str

    def __str__(self) -> str:
        return f"{self.sent}\n    {self.what}"


def fault_of_case(case: Any) -> Fault | None:
    """Send a request of schemathesis and look at the whole answer."""
    sent = f"{case.method} {case.formatted_path} {case.query or ''} {case.body!r}"
    try:
        answer = case.call(timeout=TIMEOUT_S)
    except requests.RequestException as error:
        return Fault(sent, f"no answer, or one that was cut: {error!r}")
    kinds = answer.headers.get("content-type", ())
    retry = "retry-after" in answer.headers
    text = answer.content.decode(errors="replace")
    return _fault(sent, case.operation.path, answer.status_code, "".join(kinds), retry, text)


def fault_of_input(client: httpx.Client, given: Input) -> Fault | None:
    """Send a request as it is and look at the whole answer."""
    headers = [(name.encode(), value) for name, value in given.headers.items()]
    try:
        answer = client.request(given.method, given.path, content=given.body, headers=headers)
    except httpx.LocalProtocolError:
        return None  # cannot be sent
    except (httpx.HTTPError, UnicodeError) as error:
        return Fault(str(given), f"no answer, or one that was cut: {error!r}")
    kind, retry = answer.headers.get("content-type", ""), "retry-after" in answer.headers
    return _fault(str(given), given.path, answer.status_code, kind, retry, answer.text)


def _fault(
    sent: str, path: str, status: int, kind: str, may_retry: bool, text: str
) -> Fault | None:
    is_refusal = status == 503 and may_retry
    if status >= 500 and not is_refusal:
        return Fault(sent, f"{status}: {text[:300]}")
    if "event-stream" in kind and not is_ended(path, text):
        return Fault(sent, f"a stream without its end: {text[-300:]!r}")
    return None


def is_ended(path: str, text: str) -> bool:
    """Whether a stream has the last event of its API."""
    *_, last = ["", *(part for part in text.split("\n\n") if part.strip())]
    if path in LAST_EVENTS:
        return last.startswith(tuple(f"event: {name}\n" for name in LAST_EVENTS[path]))
    return last.strip() == "data: [DONE]"
