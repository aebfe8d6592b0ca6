from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from cluster.errors import RequestFailed
from cluster.ingress.calls import Calls, CallsByHeader, current_call
from cluster.observe.request_history import Refusal


class Api:
    """Answers with a status and body; admits a request before that if it shall."""

    def __init__(self, status: int, *body: bytes, admits: bool = False) -> None:
        self.status, self.body, self.admits = status, body, admits
        self.call_ids: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (call := current_call.get()) is not None:
            self.call_ids.append(call.call_id)
            call.admitted = self.admits
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        for part in self.body:
            await send({"type": "http.response.body", "body": part, "more_body": True})


async def post(api: Api, path: str = "/v1/completions", **headers: str) -> list[Refusal]:
    refusals: list[Refusal] = []
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(key.replace("_", "-").encode(), v.encode()) for key, v in headers.items()],
    }
    await CallsByHeader(api, Calls(refused=refusals.append))(scope, receive, send)
    assert sent[0]["status"] == api.status
    assert b"".join(message["body"] for message in sent[1:]) == b"".join(api.body)
    return refusals


async def test_a_call_has_the_name_that_its_header_gives_it() -> None:
    api = Api(200)

    await post(api, x_request_id="my-call")
    await post(api)

    assert api.call_ids[0] == "my-call"
    assert len(api.call_ids[1]) == 32
    assert current_call.get() is None


async def test_a_call_that_came_to_nothing_is_told_with_its_answer() -> None:
    [refusal] = await post(Api(400, b'{"error":', b' "no"}'), x_request_id="bad")

    assert (refusal.call_id, refusal.status) == ("bad", 400)
    assert refusal.message == '{"error": "no"}'


async def test_of_a_long_answer_the_beginning_is_kept() -> None:
    [refusal] = await post(Api(503, b"x" * 600, b"y" * 600))

    assert refusal.message == "x" * 600 + "y" * 400


@pytest.mark.parametrize(
    ("api", "path"),
    [
        (Api(200, b"fine"), "/v1/completions"),
        (Api(500, b"it died later", admits=True), "/v1/completions"),
        (Api(400, b"no"), "/tokenize"),
    ],
    ids=["answered", "failed after it was admitted", "no call that generates"],
)
async def test_other_calls_are_no_refusals(api: Api, path: str) -> None:
    assert await post(api, path) == []


def test_a_failure_of_a_handles_call_is_a_refusal_unless_it_was_admitted() -> None:
    refusals: list[Refusal] = []
    calls = Calls(refused=refusals.append)

    def fail(admitted: bool) -> None:
        with calls.answering("c", None) as call:
            call.admitted = admitted
            raise RequestFailed("no such class", 400)

    for admitted in (False, True):
        with pytest.raises(RequestFailed):
            fail(admitted)

    [refusal] = refusals
    assert (refusal.call_id, refusal.status, refusal.message) == ("c", 400, "no such class")
