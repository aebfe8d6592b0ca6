"""What is counted of HTTP, around a small app of FastAPI's."""

from collections import Counter
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Scope

from cluster.errors import RequestFailed
from cluster.ingress.error_answers import ErrorAnswers
from cluster.ingress.http_metrics import HttpMetrics


class Counted:
    """Keeps what is counted."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.seconds: list[float] = []

    def count_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        self.requests[handler, method, status] += 1
        self.seconds.append(seconds)


class Page:
    """A page that may fail."""

    failure: RequestFailed | None = None

    async def page(self) -> bytes:
        if self.failure:
            raise self.failure
        return b"vllm:num_requests_running 3.0\n"


def small_app() -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> str:
        return model_id

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def events() -> Any:
            yield "ok"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/broken")
    async def broken() -> None:
        raise HTTPException(503, "later")

    return app


@pytest.fixture
def counted() -> Counted:
    return Counted()


def client(counted: Counted, page: Page | None = None) -> httpx.AsyncClient:
    app, metrics = small_app(), HttpMetrics(counted, page or Page())  # type: ignore[arg-type]
    app.add_api_route("/metrics", metrics.show)
    around: ASGIApp = metrics.counted(ErrorAnswers(app))
    return httpx.AsyncClient(transport=httpx.ASGITransport(around), base_url="http://here")


async def test_answers_count_by_route_method_and_status(counted: Counted) -> None:
    async with client(counted) as http:
        for path in ("/v1/models/a", "/v1/models/b/c", "/broken", "/nowhere/1", "/nowhere/2"):
            await http.get(path)
        await http.put("/v1/models/a")
        await http.post("/stream")
        await http.request("BREW", "/v1/models/a")

    assert counted.requests == {
        ("/v1/models/{model_id:path}", "GET", 200): 2,
        ("/v1/models/{model_id:path}", "PUT", 405): 1,
        ("/v1/models/{model_id:path}", "other", 405): 1,
        ("/broken", "GET", 503): 1,
        ("none", "GET", 404): 2,
        ("/stream", "POST", 200): 1,
    }
    assert all(seconds >= 0 for seconds in counted.seconds)


async def test_a_client_that_leaves_before_the_answer_is_counted_as_that(counted: Counted) -> None:
    async def left(scope: Scope, receive: Any, send: Any) -> None:
        """An app whose caller has gone."""

    async def nothing(message: Message) -> None:
        raise AssertionError(message)

    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await HttpMetrics(counted, Page()).counted(left)(scope, nothing, nothing)  # type: ignore[arg-type]

    assert counted.requests == {("none", "POST", 499): 1}


async def test_the_page_is_plain_text_or_says_what_is_missing(counted: Counted) -> None:
    page = Page()
    async with client(counted, page) as http:
        shown = await http.get("/metrics")
        page.failure = RequestFailed("none of Ray's metrics endpoints answers", 503)
        missing = await http.get("/metrics")

    assert shown.headers["content-type"].startswith("text/plain")
    assert shown.text == "vllm:num_requests_running 3.0\n"
    assert missing.status_code == 503
    assert missing.json()["error"]["message"] == "none of Ray's metrics endpoints answers"
