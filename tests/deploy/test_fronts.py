"""The fronts of deploy/tls before a small app: what they pass on, hold back, end and log."""

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.deploy.fronts import KINDS, Front, running
from tests.deploy.upstream import HANG, STREAM, TIMEOUT_S, Upstream, upstream
from tests.programs import require

MAX_BYTES = 8 << 20
"""The default of `ingress.max_request_bytes`."""
KEY = "sk-of-a-client-0123456789"
POST = "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n{{}}"


@pytest.fixture(scope="module")
def app() -> Iterator[Upstream]:
    with upstream() as app:
        yield app


@pytest.fixture(autouse=True)
def forgotten(app: Upstream) -> None:
    """The app knows of no call before a test."""
    app.calls.clear()


@pytest.fixture(scope="module", params=KINDS)
def front(
    app: Upstream, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    # Calls per second are limited in a test of their own.
    changes = {"burst=40": "burst=4000"} if request.param == "nginx" else {}
    with running(request.param, tmp_path_factory.mktemp("front"), app.port, changes) as front:
        yield front


@pytest.fixture
def client(front: Front) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=front.url, verify=front.context(), timeout=TIMEOUT_S, trust_env=False
    ) as client:
        yield client


def test_events_arrive_one_by_one(app: Upstream, client: httpx.Client) -> None:
    with client.stream("POST", STREAM, json={}) as answer:
        lines = answer.iter_lines()
        for event in ("first", "second", "third"):
            app.emit(event)  # the next one is not sent before this one was read
            assert [next(lines), next(lines)] == [f"data: {event}", ""]


def test_clients_speak_http_2(front: Front) -> None:
    with front.connect("h2") as connection:
        assert connection.selected_alpn_protocol() == "h2"


@pytest.mark.parametrize("protocol", ["--http1.1", "--http2"])
def test_a_client_that_leaves_its_stream_is_gone_for_the_app_too(
    app: Upstream, front: Front, protocol: str
) -> None:
    options = ("--silent", "--no-buffer", "--noproxy", "*", "--cacert", str(front.certificate))
    curl = subprocess.Popen(
        [require("curl", "curl"), *options, protocol, "--data", "{}", f"{front.url}{STREAM}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert curl.stdout is not None
    app.emit("first")
    assert curl.stdout.readline() == "data: first\n"
    call = app.latest(STREAM)
    assert not call.has_left.is_set()

    curl.kill()
    curl.wait()
    curl.stdout.close()

    assert call.has_left.wait(TIMEOUT_S)


def test_a_client_that_leaves_before_its_answer_is_gone_for_the_app_too(
    app: Upstream, front: Front
) -> None:
    with front.connect() as connection:
        connection.sendall(POST.format(path=HANG).encode())
        call = app.latest(HANG)
        assert not call.has_left.is_set()

    assert call.has_left.wait(TIMEOUT_S)


@pytest.mark.parametrize("has_length", [True, False])
def test_a_body_has_the_limit_of_the_app(
    app: Upstream, client: httpx.Client, has_length: bool
) -> None:
    def post(size: int) -> httpx.Response:
        body = b"x" * size
        return client.post("/v1/body", content=body if has_length else iter([body]))

    fits = post(MAX_BYTES)
    assert (fits.status_code, fits.text) == (200, str(MAX_BYTES))
    assert post(MAX_BYTES + 1).status_code == 413
    assert all(call.num_bytes <= MAX_BYTES for call in app.calls)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
def test_browsers_are_told_to_stay_with_tls(client: httpx.Client, path: str) -> None:
    answer = client.get(path)

    assert answer.headers["strict-transport-security"] == "max-age=31536000"


def test_a_header_has_a_limit(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"x": "y" * 8_000}).status_code == 200
    assert client.get("/v1/models", headers={"x": "y" * 100_000}).status_code in (400, 431)


def test_who_calls_is_what_the_front_sees_and_keys_are_passed_on(
    app: Upstream, client: httpx.Client
) -> None:
    client.post(
        "/v1/who",
        headers={
            "Authorization": f"Bearer {KEY}",
            "x-api-key": KEY,
            "Forwarded": "for=192.0.2.1",
            "X-Forwarded-For": "192.0.2.1",
            "X-Forwarded-Host": "evil.example",
            "X-Forwarded-Port": "1",
            "X-Forwarded-Proto": "http",
            "X-Real-IP": "192.0.2.1",
        },
    )

    call = app.latest("/v1/who")
    assert call.header("authorization") == [f"Bearer {KEY}"]
    assert call.header("x-api-key") == [KEY]
    assert call.header("x-forwarded-for") == ["127.0.0.1"]
    assert call.header("x-forwarded-proto") == ["https"]
    assert call.header("forwarded") == call.header("x-real-ip") == []
    assert call.header("x-forwarded-port") == []
    assert "evil.example" not in str(call.headers)


@pytest.mark.parametrize("path", ["/metrics", "/-/routes", "/-/healthz"])
def test_what_is_for_the_inside_is_not_there(
    app: Upstream, client: httpx.Client, path: str
) -> None:
    assert client.get(path).status_code == 404
    assert path not in {call.path for call in app.calls}


@pytest.mark.parametrize(
    "path", ["/%6detrics", "/metrics?x", "/metrics/", "/./metrics", "/v1/../metrics", "/%2D/routes"]
)
def test_what_is_for_the_inside_is_not_found_by_another_spelling(
    app: Upstream, front: Front, path: str
) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    with front.connect() as connection:
        connection.sendall(request.encode())
        while connection.recv(65536):
            pass

    # The paths that the app's router would take for one of these.
    assert not {"/metrics", "/metrics/", "/-/routes"} & {call.path for call in app.calls}


def test_no_log_has_a_key(app: Upstream, client: httpx.Client, front: Front) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "x-api-key": KEY}
    client.post(f"/v1/logged?key={KEY}", headers=headers)
    client.get(f"/metrics?key={KEY}", headers=headers)

    front.log_with("/metrics")
    assert KEY not in front.log_with("/v1/logged")


@contextmanager
def breaking_app() -> Iterator[tuple[int, list[str]]]:
    """The port of an app that answers GET and closes at anything else, and what it was asked."""
    asked: list[str] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            while request := connection.recv(65536).decode():
                asked.append(request.splitlines()[0])
                if not request.startswith("GET"):
                    return
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed, at the end
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept, args=(listener,))]
        threads[0].start()
        yield listener.getsockname()[1], asked
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(TIMEOUT_S)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_breaks_is_not_sent_again_and_its_key_is_not_logged(
    kind: str, tmp_path: Path
) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "x-api-key": KEY}
    with (
        breaking_app() as (port, asked),
        running(kind, tmp_path, port) as front,
        httpx.Client(
            base_url=front.url, verify=front.context(), timeout=TIMEOUT_S, trust_env=False
        ) as client,
    ):
        client.get("/v1/models")  # leaves a connection, of which the next call could be retried
        assert client.post("/v1/broken", json={}, headers=headers).status_code == 502
        assert KEY not in front.log_with("/v1/broken")

    assert asked == ["GET /v1/models HTTP/1.1", "POST /v1/broken HTTP/1.1"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("nginx", {"client_header_timeout 10s": "client_header_timeout 1s"}),
        ("caddy", {"read_header 10s": "read_header 1s"}),
    ],
)
def test_a_header_that_does_not_come_is_not_waited_for_and_a_long_stream_goes_on(
    app: Upstream, kind: str, changes: dict[str, str], tmp_path: Path
) -> None:
    with running(kind, tmp_path, app.port, changes) as front, front.connect() as streaming:
        streaming.sendall(POST.format(path=STREAM).encode())
        app.latest(STREAM)
        app.emit("before")
        assert "before" in _read_until(streaming, "before")

        with front.connect() as slow:
            slow.sendall(b"POST /v1/slow HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
            while slow.recv(65536):  # until the front closes it
                pass

        app.emit("after")
        assert "after" in _read_until(streaming, "after")
    assert "/v1/slow" not in {call.path for call in app.calls}


def test_nginx_does_not_wait_for_a_body_that_does_not_come(app: Upstream, tmp_path: Path) -> None:
    changes = {"client_body_timeout 20s": "client_body_timeout 1s"}
    with running("nginx", tmp_path, app.port, changes) as front, front.connect() as slow:
        head = "POST /v1/half HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nhalf"
        slow.sendall(head.encode())
        while slow.recv(65536):
            pass
    assert "/v1/half" not in {call.path for call in app.calls}


def test_nginx_limits_the_calls_of_an_address_at_a_time(app: Upstream, tmp_path: Path) -> None:
    with running("nginx", tmp_path, app.port, {"at_a_time 64": "at_a_time 1"}) as front:

        def call() -> int:
            return httpx.get(
                f"{front.url}/v1/models", verify=front.context(), timeout=TIMEOUT_S, trust_env=False
            ).status_code

        with front.connect() as streaming:
            streaming.sendall(POST.format(path=STREAM).encode())
            open_call = app.latest(STREAM)
            app.emit("first")
            _read_until(streaming, "first")
            assert call() == 429
        assert open_call.has_left.wait(TIMEOUT_S)
        assert call() == 200


def test_nginx_limits_the_calls_of_an_address_per_second(app: Upstream, tmp_path: Path) -> None:
    changes = {"rate=20r/s": "rate=1r/m", "burst=40": "burst=1"}
    with (
        running("nginx", tmp_path, app.port, changes) as front,
        httpx.Client(verify=front.context(), timeout=TIMEOUT_S, trust_env=False) as client,
    ):
        statuses = [client.get(f"{front.url}/v1/models").status_code for _ in range(3)]

    assert statuses == [200, 200, 429]


def _read_until(connection: ssl.SSLSocket, text: str) -> str:
    """What comes on a connection up to a text."""
    received = ""
    while text not in received:
        more = connection.recv(65536).decode()
        assert more, f"the front closed the connection after:\n{received}"
        received += more
    return received
