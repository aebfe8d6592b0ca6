import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from cluster.config.slo import SloClass, SloConfig
from cluster.errors import RequestFailed
from cluster.ingress.auth import CALLER, Caller
from cluster.ingress.calls import Call, Calls, CallsByHeader, current_call
from cluster.ingress.observer import IngressObserver
from cluster.ingress.protocol import PARAMETERS
from cluster.ingress.targets import Targets
from cluster.keys import Right
from cluster.observe.request_history import Refusal, RequestRecord
from scheduler.request import Request, Slo

SLO = SloConfig(classes={"fast": SloClass(ttft_ms=500, tpot_ms=50)})


class Refusals(IngressObserver):
    """Keeps the refused calls."""

    def __init__(self) -> None:
        self.found: list[Refusal] = []

    def refused(self, refusal: Refusal) -> None:
        self.found.append(refusal)


CALLED_BY = Caller("acme", (Right.INFER,), "0123456789")


class Api:
    """Answers with a status and body; makes a request of the call before that if it shall."""

    def __init__(self, status: int = 200, *body: bytes, admits: bool = False) -> None:
        self.status, self.body, self.admits = status, body, admits
        self.calls: list[Call | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls.append(call := current_call.get())
        if call is not None and self.admits:
            call.records.append(RequestRecord(Request("r", 1, 1), 0.0))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        for part in self.body:
            await send({"type": "http.response.body", "body": part, "more_body": True})


class Answer:
    """What a client receives, and what the observer of the ingress sees."""

    def __init__(self, sent: list[Message], refusals: list[Refusal]) -> None:
        self.status = sent[0]["status"]
        self.headers = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
        self.body = b"".join(message["body"] for message in sent[1:])
        self.refusals = refusals


async def send_to(
    api: Api, path: str = "/v1/completions", method: str = "POST", **headers: str
) -> Answer:
    refusals = Refusals()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [
            (key.replace("_", "-").encode(), v.encode("latin-1")) for key, v in headers.items()
        ],
        CALLER: CALLED_BY,
    }
    app = CallsByHeader(api, Calls(SLO, observer=refusals))
    await app(scope, receive, send)
    assert current_call.get() is None
    return Answer(sent, refusals.found)


async def test_a_call_has_the_id_in_its_header() -> None:
    api = Api()

    await send_to(api, x_request_id="my-call")
    await send_to(api)

    named, nameless = api.calls
    assert named is not None
    assert nameless is not None
    assert named.call_id == "my-call"
    assert len(nameless.call_id) == 32


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations"])
async def test_every_post_has_targets_and_its_answer_names_their_class(path: str) -> None:
    api = Api()

    answer = await send_to(api, path, x_slo_class="fast", x_slo_ttft_ms="200")

    [call] = api.calls
    assert call is not None
    assert call.targets == Targets(Slo(0.2, 0.05), "fast", is_named=True)
    assert answer.headers["x-slo-class"] == "fast"


async def test_what_is_no_post_is_no_call() -> None:
    api = Api()

    answer = await send_to(api, "/v1/models", "GET", x_slo_class="fastest")

    assert (api.calls, answer.status, answer.headers) == ([None], 200, {})


@pytest.mark.parametrize(("path", "num_kept"), [("/v1/completions", 1), ("/invocations", 0)])
async def test_a_call_whose_targets_cannot_be_used_never_reaches_the_api(
    path: str, num_kept: int
) -> None:
    api = Api()

    answer = await send_to(api, path, x_slo_class="fastest", x_request_id="bad")

    error = json.loads(answer.body)["error"]
    assert (answer.status, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert error["message"].startswith("x-slo-class: 'fastest' is no service class")
    assert api.calls == []
    assert [(refusal.call_id, refusal.message) for refusal in answer.refusals] == [
        ("bad", error["message"])
    ] * num_kept


async def test_a_refused_call_is_remembered_with_its_answer() -> None:
    answer = await send_to(Api(400, b'{"error":', b' "no"}'), x_request_id="bad")

    [refusal] = answer.refusals
    assert (refusal.call_id, refusal.status) == ("bad", 400)
    assert refusal.message == '{"error": "no"}'
    assert (answer.status, answer.body) == (400, b'{"error": "no"}')


async def test_the_beginning_of_a_long_answer_is_kept() -> None:
    [refusal] = (await send_to(Api(503, b"x" * 600, b"y" * 600))).refusals

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
    assert (await send_to(api, path)).refusals == []


async def test_a_handles_call_brings_the_same_as_parameters() -> None:
    given = {"request_id": "mine", "slo_class": "fast", "slo_tpot_ms": "none", "prompt": "Hello"}

    async with Calls(SLO).answering(given, PARAMETERS, CALLED_BY) as call:
        assert current_call.get() is call

    assert (call.call_id, call.traceparent) == ("mine", "")
    assert call.targets == Targets(Slo(ttft_s=0.5), "fast", is_named=True)
    assert current_call.get() is None


async def test_a_failure_of_a_handles_call_is_a_refusal_unless_it_was_admitted() -> None:
    refusals = Refusals()
    calls = Calls(SLO, observer=refusals)

    async def fail(admitted: bool) -> None:
        async with calls.answering({"request_id": "c"}, PARAMETERS, CALLED_BY) as call:
            if admitted:
                call.records.append(RequestRecord(Request("r", 1, 1), 0.0))
            raise RequestFailed("no such class", 400)

    for admitted in (False, True):
        with pytest.raises(RequestFailed):
            await fail(admitted)

    [refusal] = refusals.found
    assert (refusal.call_id, refusal.status, refusal.message) == ("c", 400, "no such class")


LONGEST = "i" * 512
NO_IDS = ["i" * 513, "i" * 1_000_000, "\xe9", "\u20ac", "a\tb", "a\nb", "\0", 5, ["id"], {"a": 1}]


@pytest.mark.parametrize("name", ["my-call", LONGEST, "with spaces", "{}<>&?;'\"\\%00"])
async def test_an_id_is_printable_ascii(name: str) -> None:
    async with Calls(SLO).answering({"request_id": name}, PARAMETERS, CALLED_BY) as call:
        assert (call.call_id, call.answer_id) == (name, name)


@pytest.mark.parametrize("name", [None, ""])
async def test_a_call_without_an_id_gets_one(name: str | None) -> None:
    async with Calls(SLO).answering({"request_id": name}, PARAMETERS, CALLED_BY) as call:
        assert len(call.call_id) == 32


@pytest.mark.parametrize("name", NO_IDS, ids=[str(name)[:8] for name in NO_IDS])
async def test_what_cannot_be_an_id_is_refused_and_not_kept(name: object) -> None:
    refusals = Refusals()
    words = "^request_id: an id has at most 512 printable ASCII characters, and this one is "
    with pytest.raises(RequestFailed, match=words) as refused:
        async with Calls(SLO, observer=refusals).answering(
            {"request_id": name}, PARAMETERS, CALLED_BY
        ):
            pytest.fail("it was let in")

    assert (refused.value.status, len(str(refused.value)) < 250) == (400, True)
    assert len(refusals.found[0].call_id) == 32


@pytest.mark.parametrize("value", [b"\xff\xfe", b"\xe2\x82\xac", b"i" * 513])
async def test_a_header_that_cannot_be_an_id_is_refused(value: bytes) -> None:
    answer = await send_to(Api(), x_request_id=value.decode("latin-1"))

    assert answer.status == 400
    assert json.loads(answer.body)["error"]["message"].startswith("x-request-id: an id has")


@pytest.mark.parametrize(
    "traceparent", ["", "x", "00-" + "0" * 55, "\xff", "i" * 100_000, "00-zz-zz-01", 5, None, ["a"]]
)
async def test_an_odd_trace_context_is_none(traceparent: object) -> None:
    async with Calls(SLO).answering({"traceparent": traceparent}, PARAMETERS, CALLED_BY) as call:
        assert call.traceparent == ""


@pytest.mark.parametrize(
    ("status", "admits", "levels"),
    [(400, False, ["INFO"]), (500, False, ["ERROR"]), (200, True, [])],
)
async def test_a_call_that_failed_is_one_line_in_the_log(
    status: int, admits: bool, levels: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cluster.ingress.calls")

    await send_to(Api(status, b"no", admits=admits))

    assert [record.levelname for record in caplog.records] == levels
