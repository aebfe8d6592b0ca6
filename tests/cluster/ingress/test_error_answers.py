import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.ingress.error_answers import ErrorAnswers, error_type


async def answer_of(
    path: str, body: bytes, status: int = 400, kind: str = "application/json"
) -> httpx.Response:
    """What an app's answer becomes."""

    async def answer(request: Request) -> Response:
        return Response(body, status, {"allow": "GET"}, kind)

    app = ErrorAnswers(Starlette(routes=[Route("/{path:path}", answer)]))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://here"
    ) as client:
        return await client.get(path)


OPENAI = {"message": "no", "type": "BadRequestError", "param": None, "code": 400}


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no", "type": "Bad Request", "param": None, "code": 400}},
        {"error": {"message": "no", "type": "invalid_request_error"}},
        {"detail": "no"},
        {"type": "error", "error": {"type": "BadRequestError", "message": "no"}},
        "no",
    ],
)
async def test_every_error_has_the_form_of_its_api(body: Any) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    openai = await answer_of("/v1/completions", text.encode())
    anthropic = await answer_of("/v1/messages", text.encode())

    assert (openai.status_code, openai.json()) == (400, {"error": OPENAI})
    assert (anthropic.status_code, anthropic.json()) == (
        400,
        {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}},
    )
    assert openai.headers["allow"] == "GET"
    assert openai.headers["content-type"] == "application/json"


async def test_the_field_of_an_error_is_kept() -> None:
    body = {"error": OPENAI | {"param": "max_tokens"}}

    assert (await answer_of("/v1/completions", json.dumps(body).encode())).json() == body


async def test_an_error_does_not_repeat_a_huge_value() -> None:
    body = {"error": OPENAI | {"message": "x" * 10**6, "param": "y" * 10**6}}

    assert len((await answer_of("/v1/completions", json.dumps(body).encode())).content) < 2500


@pytest.mark.parametrize(("body", "status"), [(b'{"error": "fine"}', 200), (b"", 503)])
async def test_other_answers_stay(body: bytes, status: int) -> None:
    answer = await answer_of("/health", body, status)

    assert (answer.status_code, answer.content) == (status, body)


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "BadRequestError", "invalid_request_error"),
        (404, "NotFoundError", "not_found_error"),
        (405, "MethodNotAllowedError", "invalid_request_error"),
        (429, "TooManyRequestsError", "rate_limit_error"),
        (500, "InternalServerError", "api_error"),
        (501, "NotImplementedError", "api_error"),
        (503, "ServiceUnavailableError", "overloaded_error"),
    ],
)
def test_the_type_of_an_error_follows_from_its_status(
    status: int, openai: str, anthropic: str
) -> None:
    assert error_type(status) == openai
    assert error_type(status, "/v1/messages/count_tokens") == anthropic
