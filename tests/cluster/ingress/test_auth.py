"""Who may call: each route without a key, with a wrong one, without the right, and over a quota."""

import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from vllm.v1.engine import FinishReason

from cluster.config.app_config import AppConfig, parse_args
from cluster.config.routes import EXTRA_PATHS, EXTRA_ROUTES, ROUTES, right_at
from cluster.keys import Keyring, Right, edited_keys, new_key
from tests.cluster.ingress.answering_workers import Server, serving

TENANTS = {"acme": {"requests_per_minute": 1}, "free": {}}
PAST = datetime(2020, 1, 1, tzinfo=UTC)
OPEN_PATHS = {"/health", "/ping"}
ALL = [
    (method, route.path.replace("{model_id}", "some/model"))
    for route in (*ROUTES, *EXTRA_ROUTES)
    for method in route.methods.split(", ")
]


class Keys:
    """A file with a key of each kind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: dict[str, str] = {}
        self.add("infer", "free", Right.INFER)
        self.add("metrics", "free", Right.METRICS)
        self.add("admin", "free", Right.ADMIN)
        self.add("over_quota", "acme", Right.ADMIN)
        self.add("stranger", "nobody", Right.ADMIN)
        self.add("expired", "free", Right.ADMIN, expires=PAST)
        self.texts["wrong"] = new_key("free", (Right.ADMIN,), None)[0]

    def add(self, name: str, tenant: str, *rights: Right, expires: datetime | None = None) -> None:
        self.texts[name], key = new_key(tenant, rights, expires)
        with edited_keys(self.path) as keys:
            keys[key.id] = key

    def header(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.texts[name]}"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "keys")


def config_of(keys: Keys, **auth: Any) -> AppConfig:
    return parse_args(
        {
            "worker": {"kernels": "vllm"},
            "auth": {"keys_file": str(keys.path), **auth},
            "tenants": TENANTS,
            "ingress": {
                "routes": list(EXTRA_PATHS),
                "allowed_origins": ["https://chat.example.com"],
            },
        }
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(keys: Keys) -> AsyncIterator[Server]:
    async with serving(config_of(keys), Keyring(keys.path)) as server:
        yield server


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_every_route_of_the_app_has_a_right(server: Server) -> None:
    paths = {getattr(route, "path", "") for route in server.frontend._app.routes}
    known = {route.path for route in (*ROUTES, *EXTRA_ROUTES)}

    assert {path for path in paths if path.replace(":path}", "}") not in known} <= UNSUPPORTED
    assert {path for _, path in ALL if right_at(path) is None} == OPEN_PATHS


UNSUPPORTED = {
    *("/v1/embeddings", "/v1/rerank", "/rerank", "/v1/score", "/score", "/pooling", "/classify"),
    *("/v1/moderations", "/v1/audio/speech", "/v1/audio/transcriptions"),
    *("/v1/audio/translations", "/v1/images/generations"),
}


@pytest.mark.parametrize(("method", "path"), ALL)
@pytest.mark.parametrize(
    ("key", "status", "words"),
    [
        (None, 401, "no API key: send one as `Authorization: Bearer KEY` or `x-api-key: KEY`"),
        ("wrong", 401, "this is no API key of this app"),
        ("expired", 401, "has expired"),
        ("stranger", 403, "nobody, is not in `tenants` of the config"),
        ("lacking", 403, "has not the right `"),
    ],
)
async def test_no_route_answers_who_may_not_ask(
    server: Server, keys: Keys, method: str, path: str, key: str | None, status: int, words: str
) -> None:
    if key == "lacking":
        key = "infer" if right_at(path) is Right.METRICS else "metrics"
    headers = keys.header(key) if key else {}
    answer = await server.http.request(method, path, headers=headers)

    if path in OPEN_PATHS:
        assert answer.status_code in (200, 503)
        return
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] in {
        *("UnauthorizedError", "ForbiddenError", "authentication_error", "permission_error")
    }
    challenge = answer.headers.get("www-authenticate")
    assert (challenge is not None) is (status == 401)


@pytest.mark.parametrize(("method", "path"), ALL)
async def test_each_route_answers_who_may_ask(
    server: Server, keys: Keys, method: str, path: str
) -> None:
    right = right_at(path)
    for name in {right or "infer", "admin"}:
        answer = await server.http.request(method, path, headers=keys.header(name))
        assert answer.status_code not in (401, 403, 405, 429), (name, answer.text)


@pytest.mark.parametrize(("method", "path"), [one for one in ALL if one[0] == "POST"])
async def test_no_route_that_works_does_so_over_a_quota(
    server: Server, keys: Keys, method: str, path: str
) -> None:
    headers = keys.header("over_quota")
    answers = [await server.http.request(method, path, headers=headers) for _ in range(2)]

    if path in OPEN_PATHS:
        assert {answer.status_code for answer in answers} <= {200, 503}
        return
    last = answers[-1]
    assert last.status_code == 429
    assert "tenants.acme.requests_per_minute is 1" in last.json()["error"]["message"]
    assert 1 <= int(last.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    "method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "X"]
)
@pytest.mark.parametrize(
    "path",
    [
        *(
            "/",
            "/nope",
            "/admin",
            "/v1",
            "/v1/",
            "//metrics",
            "/metrics/",
            "/METRICS",
            "/health/../x",
        ),
        *(
            "/-/routes",
            "/debug",
            "/wake_up",
            "/collective_rpc",
            "/v1/load_lora_adapter",
            "/health/x",
        ),
        *("/docs/oauth2-redirect", "/v1/embeddings", "/server_info", "/pause", "/%2e%2e/metrics"),
    ],
)
async def test_what_is_no_route_tells_nothing_without_a_key(
    server: Server, method: str, path: str
) -> None:
    assert (await server.http.request(method, path)).status_code == 401


async def test_a_key_comes_in_the_headers_of_all_clients(server: Server, keys: Keys) -> None:
    text = keys.texts["infer"]
    browser = base64.b64encode(f"me:{text}".encode()).decode()

    async def status(path: str = "/v1/models", **headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return (await server.http.get(path, headers=named)).status_code

    assert await status(authorization=f"Bearer {text}") == 200
    assert await status(authorization=f"bearer  {text} ") == 200
    assert await status(x_api_key=text) == 200
    assert await status(authorization=text) == 401
    assert await status(authorization=f"Token {text}") == 401
    assert await status("/docs", authorization=f"Basic {browser}") == 200
    assert await status(authorization=f"Basic {browser}") == 401
    assert await status("/docs", authorization="Basic \x7f!") == 401
    assert await status(f"/v1/models?api_key={text}") == 401  # an address is in every log
    asked = await server.http.get("/docs")
    assert asked.headers["www-authenticate"] == 'Basic realm="key"'


async def test_a_key_is_in_no_answer(server: Server, keys: Keys) -> None:
    for name, text in keys.texts.items():
        for path in ("/v1/models", "/metrics", "/nope"):
            answer = await server.http.get(path, headers=keys.header(name))
            assert text not in answer.text + str(answer.headers)


async def test_a_negative_priority_needs_the_right_to_it(server: Server, keys: Keys) -> None:
    server.workers.play([([28], FinishReason.LENGTH)])
    body = {"prompt": "x", "max_tokens": 1}

    async def ask(key: str, priority: int) -> httpx.Response:
        return await server.http.post(
            "/v1/completions", headers=keys.header(key), json=body | {"priority": priority}
        )

    assert (await ask("infer", 1)).status_code == 200
    assert (await ask("admin", -1)).status_code == 200
    refused = await ask("infer", -1)
    assert refused.status_code == 403
    assert "priority (-1)" in refused.json()["error"]["message"]


async def test_answers_say_how_browsers_are_to_treat_them(server: Server, keys: Keys) -> None:
    answer = await server.http.get("/v1/models", headers=keys.header("infer"))
    foreign = await server.http.get(
        "/v1/models", headers=keys.header("infer") | {"origin": "https://evil.example"}
    )
    known = {"origin": "https://chat.example.com"}
    own = await server.http.get("/v1/models", headers=keys.header("infer") | known)
    refused = await server.http.get("/v1/models", headers=known)
    preflight = await server.http.options(
        "/v1/chat/completions",
        headers=known
        | {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        },
    )

    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in foreign.headers
    for allowed in (own, refused, preflight):
        assert allowed.headers["access-control-allow-origin"] == known["origin"]
    assert (refused.status_code, preflight.status_code) == (401, 200)


async def test_a_websocket_is_closed(server: Server) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await server.frontend.asgi_app(
        {"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send
    )

    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_errors_have_the_form_of_their_api(server: Server) -> None:
    anthropic = (await server.http.post("/v1/messages", json={})).json()
    openai = (await server.http.post("/v1/responses", content=b"{")).json()

    assert anthropic["error"]["type"] == "authentication_error"
    assert openai["error"]["code"] == 401
    assert json.dumps(openai).isascii()
