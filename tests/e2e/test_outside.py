"""What others could reach of `xyserve up`: every socket that listens, asked without Ray's token."""

import ipaddress
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from tests.e2e.conftest import ANSWER_TIMEOUT_S, Server

ANSWER_S = 10
"""Time that a socket has to answer; a stream speaks first and at once, all others wait."""
GREETING_S = 2
PROCESSES = {
    "up": r"cluster\.cli\.main up ",
    "gcs_server": r"gcs_server",
    "raylet": r"/raylet ",
    "monitor": r"/monitor\.py",
    "dashboard": r"/dashboard\.py|ray-dashboard-",
    "dashboard agent": r"ray::DashboardAgent",
    "runtime env agent": r"ray::RuntimeEnvAgent",
    "proxy": r"ray::ProxyActor",
    "controller": r"ray::ServeController",
    "Ingress": r"ray::ServeReplica:xyserve:Ingress",
    "GlobalScheduler": r"ray::ServeReplica:xyserve:GlobalScheduler",
    "Worker": r"ray::ServeReplica:xyserve:Worker",
    "DraftWorker": r"ray::ServeReplica:xyserve:DraftWorker",
    "other process of Ray": r"ray::",
}
"""Processes by their titles; the first that fits is meant."""
METHODS = (
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.rpc.LogService/ListLogs",
    "/ray.serve.ASGIService/HandleRequest",
)
"""Of each gRPC service of Ray, with calls that without arguments do nothing."""
OPEN = {
    ("monitor", "metrics"),
    ("dashboard", "metrics"),
    ("dashboard agent", "metrics"),
    ("Ingress", "stream"),
    ("DraftWorker", "stream"),
}
"""What answers beyond this machine without Ray's token, as deploy/README.md says: pages of metrics,
and streams, which have tokens of their own."""


@dataclass(frozen=True)
class Listener:
    """A socket of the server that takes connections."""

    process: str
    address: str
    port: int

    @property
    def is_on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.address).is_loopback

    @property
    def host(self) -> str:
        """An address at which it is reached."""
        is_any = ipaddress.ip_address(self.address).is_unspecified
        return "127.0.0.1" if is_any else self.address


def processes(server: Server) -> Iterator[psutil.Process]:
    """`xyserve up` and all processes that it has started."""
    [up] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"up", str(server.config)} <= set(process.info["cmdline"] or ())
    ]
    yield up
    yield from up.children(recursive=True)


def listeners(server: Server) -> set[Listener]:
    found = set()
    for process in processes(server):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            names = [name for name, words in PROCESSES.items() if re.search(words, title)]
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    at = connection.laddr
                    found.add(Listener(names[0] if names else title[:80], at.ip, at.port))
    return found


def protection(listener: Listener) -> str:
    """What protects a socket: `token` if Ray's is asked for; others are told by what they say."""
    if _greets_as_stream(listener):
        return "stream"
    codes = {_call(listener, method) for method in METHODS}
    if codes & {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.OK}:
        allowed = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
        return "token" if codes <= allowed else f"gRPC: {codes}"
    try:
        answers = [_get(listener, path) for path in ("/", "/metrics", "/api/jobs/", "/api/version")]
    except httpx.RemoteProtocolError as error:
        return f"no HTTP ({error}); gRPC: {codes}"
    statuses = {answer.status_code for answer in answers}
    if statuses <= {401, 403}:
        return "token"
    if all(answer.text.startswith(("# HELP", "# TYPE")) for answer in answers):
        return "metrics"
    return f"HTTP: {statuses}"


def _greets_as_stream(listener: Listener) -> bool:
    """Whether it is a socket of ZeroMQ, which says so to whoever connects."""
    with socket.create_connection((listener.host, listener.port), GREETING_S) as connection:
        try:
            return connection.recv(1) == b"\xff"
        except TimeoutError:
            return False


def _call(listener: Listener, method: str) -> grpc.StatusCode:
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"{listener.host}:{listener.port}", options) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def _get(listener: Listener, path: str) -> httpx.Response:
    url = f"http://{listener.host}:{listener.port}{path}"
    return httpx.get(url, timeout=ANSWER_TIMEOUT_S, trust_env=False)


def test_what_others_can_reach_asks_for_rays_token_or_is_known(server: Server) -> None:
    reachable = {each for each in listeners(server) if not each.is_on_loopback}
    assert reachable

    found = {}
    for listener in reachable:
        with suppress(ConnectionRefusedError, httpx.ConnectError):  # it has ended meanwhile
            found[listener] = protection(listener)

    assert {
        listener: words
        for listener, words in found.items()
        if words != "token" and (listener.process, words) not in OPEN
    } == {}
    assert {"gcs_server", "raylet", "Worker"} <= {
        listener.process for listener, words in found.items() if words == "token"
    }


def test_dashboard_and_api_listen_on_this_machine_only(server: Server) -> None:
    ports = {httpx.URL(url).port for url in (server.dashboard, server.url)}
    addresses = {each.address for each in listeners(server) if each.port in ports}

    assert addresses == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("headers", "status"), [({}, 401), ({"Authorization": f"Bearer {'0' * 64}"}, 403)]
)
def test_nobody_submits_a_job_without_rays_token(
    server: Server, headers: dict[str, str], status: int, tmp_path: Path
) -> None:
    [agent] = {
        each.port
        for each in listeners(server)
        if each.process == "dashboard agent" and each.is_on_loopback
    }
    job = {"entrypoint": f"touch {tmp_path / 'it-ran'}"}
    urls = (
        f"{server.dashboard}/api/jobs/",
        f"http://127.0.0.1:{agent}/api/job_agent/jobs/",
    )

    for url in urls:
        answer = httpx.post(
            url, json=job, headers=headers, timeout=ANSWER_TIMEOUT_S, trust_env=False
        )
        assert answer.status_code == status, url
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    jobs = httpx.get(urls[0], headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    assert jobs.status_code == 200
    assert "it-ran" not in jobs.text
