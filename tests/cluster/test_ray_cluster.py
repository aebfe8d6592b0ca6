"""Addresses that lead to no Ray cluster; that a right one works is in tests/e2e."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
from ray._private import services

from cluster import ray_cluster
from cluster.client import XYServe
from cluster.ray_cluster import RIGHT_ADDRESS, START_ONE, TOKEN, find_ray_cluster

ANSWER_TIMEOUT_S = 0.5
THIS_MACHINE = services.get_node_ip_address()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_cluster.ANSWER_TIMEOUT_S < 5
    monkeypatch.setattr(ray_cluster, "ANSWER_TIMEOUT_S", ANSWER_TIMEOUT_S)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def why_not(address: str | None) -> str:
    with pytest.raises(ConnectionError) as raised:
        XYServe.connect(address)
    return str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", THIS_MACHINE])
def test_a_port_that_nobody_listens_on(host: str) -> None:
    address = f"{host}:{free_port()}"

    assert why_not(address) == (
        f"no Ray cluster at {address!r}: Connection refused; {RIGHT_ADDRESS}"
    )


def test_a_server_that_takes_connections_and_says_nothing() -> None:
    with socket.create_server(("", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        assert why_not(address) == (
            f"no Ray cluster at {address!r}: nothing answers within 0.5 s; {RIGHT_ADDRESS}"
        )


def test_a_host_that_drops_packets() -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("", 0), backlog=0))
        port = full.getsockname()[1]
        for _ in range(3):  # fill the queue of connections: the kernel drops the packets of others
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((THIS_MACHINE, port))

        assert "nothing answers within 0.5 s" in why_not(f"127.0.0.1:{port}")


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def http_port() -> Iterator[int]:
    with HTTPServer(("", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def grpc_port() -> Iterator[int]:
    """The port of a gRPC server that is not Ray's, as are most of Ray's own."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    yield port
    server.stop(None).wait()


@pytest.mark.parametrize("kind", ["http_port", "grpc_port"])
def test_another_server(kind: str, request: pytest.FixtureRequest) -> None:
    address = f"127.0.0.1:{request.getfixturevalue(kind)}"

    assert why_not(address) == (
        f"no Ray cluster at {address!r}: another server answers there; {RIGHT_ADDRESS}"
    )


def test_a_host_that_does_not_exist() -> None:
    assert why_not("no-such-host.invalid:6379") == (
        "no Ray cluster at 'no-such-host.invalid:6379': there is no host no-such-host.invalid; "
        f"{RIGHT_ADDRESS}"
    )


@pytest.mark.parametrize(
    "address",
    [
        *("abc", "host", "host:port", "host:", ":6379", "127.0.0.1:0", "127.0.0.1:99999"),
        *("127.0.0.1:-1", "127.0.0.1:0x10", "127.0.0.1:6379 ", " ", "a b:6379", "::1:6379"),
        *("127.0.0.1:٦٣٧٩", "127.0.0.1:6379:1", "ray://127.0.0.1:10001", "http://127.0.0.1:8265"),
        *("127.0.0.1:6379/", "local", "[]:6379", "127.0.0.1:6379\n"),
    ],
)
def test_what_is_no_address(address: str) -> None:
    assert why_not(address) == (
        f"no address of a Ray cluster: {address!r} is not HOST:PORT; {RIGHT_ADDRESS}"
    )


@pytest.mark.parametrize("address", [None, "", "auto"])
@pytest.mark.parametrize("ray_address", ["ray://127.0.0.1:10001", "local", "host"])
def test_a_wrong_ray_address_is_named(
    address: str | None, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_address)

    assert why_not(address).startswith(
        f"no address of a Ray cluster: RAY_ADDRESS={ray_address} is not HOST:PORT; "
    )
    assert why_not(address).endswith(", or unset RAY_ADDRESS for the cluster of this machine")


def test_a_given_address_goes_before_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")

    assert "Connection refused" in why_not(f"127.0.0.1:{free_port()}")


def find_alone(tmp_path: Path, **env: str) -> str:
    """The error without an address, where no process of Ray is seen."""
    code = (
        "import psutil; psutil.process_iter = lambda *_: []\n"
        "from cluster.ray_cluster import find_ray_cluster\n"
        "try: find_ray_cluster(None)\n"
        "except ConnectionError as error: print(error)\n"
    )
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")} | env
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env | {"HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path)},
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("env", [{}, {"RAY_ADDRESS": ""}, {"RAY_ADDRESS": "auto"}])
def test_a_machine_without_a_cluster(tmp_path: Path, env: dict[str, str]) -> None:
    assert find_alone(tmp_path, **env) == (
        f"no Ray cluster runs on this machine; {START_ONE}, or give HOST:PORT of another"
    )


def test_a_cluster_that_was_killed_and_left_its_address(tmp_path: Path) -> None:
    address = f"{THIS_MACHINE}:{free_port()}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)

    assert find_alone(tmp_path) == (
        f"no Ray cluster at {address}, the latest of this machine: Connection refused; {START_ONE}"
    )


def test_token_mode_without_a_token(tmp_path: Path) -> None:
    address = f"{THIS_MACHINE}:{free_port()}"

    assert find_alone(tmp_path, RAY_ADDRESS=address, RAY_AUTH_MODE="token") == (
        f"RAY_AUTH_MODE is token, but no token is found; {TOKEN}"
    )


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "cluster.cli.main", "status", "--address", address]
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")  # Ray would warn that it is used
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}

    done = subprocess.run(
        command, capture_output=True, text=True, env=env | {"HOME": str(tmp_path)}
    )

    assert (done.returncode, done.stdout) == (1, "")
    message = re.sub(r"\s+", " ", done.stderr)
    assert message == f"error: no Ray cluster at {address!r}: Connection refused; {RIGHT_ADDRESS} "


def test_the_address_of_a_cluster_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a server that answers as Ray's does."""
    handler = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService",
        {"CheckAlive": grpc.unary_unary_rpc_method_handler(lambda request, context: b"")},
    )
    server = grpc.server(ThreadPoolExecutor(1), handlers=[handler])
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        assert find_ray_cluster(f"127.0.0.1:{port}") == f"{THIS_MACHINE}:{port}"
        monkeypatch.setenv("RAY_ADDRESS", f"{THIS_MACHINE}:{port}")
        assert find_ray_cluster(None) == find_ray_cluster("auto") == f"{THIS_MACHINE}:{port}"
    finally:
        server.stop(None).wait()
