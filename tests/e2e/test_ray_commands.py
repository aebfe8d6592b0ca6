"""Ray's own commands next to the app, on a machine where `xyserve up` ran before."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster.ray_cluster import TOKEN
from tests.e2e.conftest import ANSWER_TIMEOUT_S, Server, free_port

BIN = Path(sys.executable).parent


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """One command of Ray, or of ours."""
    if command[0] == "xyserve":
        command = (sys.executable, "-m", "cluster.cli.main", *command[1:])
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        timeout=ANSWER_TIMEOUT_S,
        env=os.environ | env,
    )


def test_rays_commands_work_as_up_says(server: Server) -> None:
    up = (server.folder / "up.log").read_text()
    name, value = re.findall(r"export (\w+)=(\w+)", up)[0]

    status = run("serve", "status", "--address", server.dashboard, **{name: value})
    config = run("serve", "config", "--address", server.dashboard, **{name: value})
    ray_status = run("ray", "status", "--address", server.ray_address, **{name: value})

    assert yaml.safe_load(status.stdout)["applications"]["xyserve"]["status"] == "RUNNING"
    [app] = list(yaml.safe_load_all(config.stdout))
    assert app["import_path"] == "cluster.app:build_app"
    assert "Node status" in ray_status.stdout
    assert "oken authentication" not in up


@dataclass(frozen=True)
class Head:
    """A Ray cluster of `ray start --head`, without an app."""

    dashboard: str
    address: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """By the commands of the README, in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    env = {"HOME": str(home), "RAY_AUTH_MODE": "token"}
    generated = run("ray", "get-auth-token", "--generate", **env)
    assert (home / ".ray" / "auth_token").read_text() == generated.stdout
    port, dashboard_port, temp_dir = free_port(), free_port(), Path(f"/tmp/xyh{free_port()}")
    command: list[str | Path] = [
        *(BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=1"),
        *(f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={free_port()}"),
        *(f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={temp_dir}"),
    ]
    log = home / "ray.log"
    with log.open("w") as out:
        ray = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | env)
    try:
        for _ in range(ANSWER_TIMEOUT_S):
            if "Ray runtime started" in log.read_text():
                break
            try:
                ray.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                continue
        assert "Ray runtime started" in log.read_text(), log.read_text()
        yield Head(f"http://127.0.0.1:{dashboard_port}", f"127.0.0.1:{port}", env)
    finally:
        ray.send_signal(signal.SIGTERM)
        ray.wait(timeout=60)


def test_rays_commands_work_on_a_cluster_of_ray_start(head: Head) -> None:
    status = run("serve", "status", "--address", head.dashboard, **head.env)
    for _ in range(ANSWER_TIMEOUT_S):  # Ray's autoscaler writes it some seconds after the start
        ray_status = run("ray", "status", "--address", head.address, **head.env)
        if "No cluster status" not in ray_status.stdout:
            break
        time.sleep(1)

    assert yaml.safe_load(status.stdout)["applications"] == {}
    assert "Node status" in ray_status.stdout


def test_our_commands_send_the_token_by_themselves(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)

    done = run("xyserve", "status", "--address", head.address, HOME=head.env["HOME"])

    assert re.sub(r"\s+", " ", done.stderr) == (
        "error: no app 'xyserve' on this Ray cluster (running: none); start it with "
        "`serve deploy deploy/local.yaml` "
    )


@pytest.mark.parametrize("token", ["", "another"])
def test_a_wrong_token_is_named(head: Head, token: str, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token" if token else "disabled"}
    done = run("xyserve", "status", "--address", head.address, **env, RAY_AUTH_TOKEN=token)

    message = re.sub(r"\s+", " ", done.stderr)
    assert re.fullmatch(rf"error: the Ray cluster at \S+ refuses our token; {TOKEN} ", message)
