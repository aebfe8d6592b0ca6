import httpx
import pytest
from ray.serve._private.http_util import validate_http_proxy_callback_return
from ray.serve._private.utils import call_function_from_import_path
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cluster.ingress.proxy import CALLBACK


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def get(headers: dict[str, bytes]) -> httpx.Response:
    [path] = CALLBACK.values()
    [found] = validate_http_proxy_callback_return(call_function_from_import_path(path))
    app = found.cls(Starlette(routes=[Route("/v1/models", hello)]), *found.args, **found.kwargs)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return await client.get(
            "/v1/models", headers=[(key.encode(), value) for key, value in headers.items()]
        )


@pytest.mark.parametrize("value", [b"\xff\xfe", b"\xe2\x82\xac", b"i" * 513, b"i" * 1_000_000])
@pytest.mark.parametrize("name", ["x-request-id", "X-Session-Id", "serve_multiplexed_model_id"])
async def test_a_header_that_serve_could_not_read_is_refused(name: str, value: bytes) -> None:
    answer = await get({name: value})

    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert message.startswith(f"{name.lower().replace('_', '-')}: an id has at most 512 printable")


@pytest.mark.parametrize("headers", [{}, {"x-request-id": b"mine"}, {"x-other": b"\xff"}])
async def test_other_headers_pass(headers: dict[str, bytes]) -> None:
    assert (await get(headers)).text == "hello"
