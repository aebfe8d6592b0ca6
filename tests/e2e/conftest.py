"""One cluster for the whole session: `xyserve up` as a user starts it, on ports of its own."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import yaml

from cluster.client import XYServe

READY_TIMEOUT_S = 240
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Server:
    """A running `xyserve up`."""

    url: str
    dashboard: str
    ray_address: str
    config: Path
    folder: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(path: Path, port: int, **args: object) -> None:
    app = {
        "name": "xyserve",
        "route_prefix": "/",
        "import_path": "cluster.app:build_app",
        "args": {
            "num_workers": 2,
            "worker": {
                "cpus": 1,
                "engine": {"dtype": "float32", "max_num_seqs": 16, "kv_cache_gib": 0.5},
            },
            "ingress": {"max_request_bytes": 200_000},
        }
        | args,
    }
    document = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}
    path.write_text(yaml.safe_dump(document))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    config, log = folder / "app.yaml", folder / "up.log"
    write_config(config, free_port())
    # Ray's sockets need a short path.
    ray_folder = Path(f"/tmp/xyt{free_port()}")
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "up", str(config), "--temp-dir", str(ray_folder)],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        text = _wait_until_ready(process, log)
        yield Server(
            url=_find(r"OpenAI API +(\S+)/v1", text),
            dashboard=_find(r"Dashboard +(\S+)", text),
            ray_address=_find(r"Ray address +(\S+)", text),
            config=config,
            folder=folder,
        )
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(READY_TIMEOUT_S * 2):
        text = log.read_text()
        if "Ctrl-C stops it" in text:
            return text
        try:
            process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
        break
    process.kill()
    pytest.fail(f"the server did not come up:\n{log.read_text()}")


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match.group(1)


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def handle(server: Server) -> Iterator[XYServe]:
    with XYServe.connect(server.ray_address) as handle:
        yield handle
