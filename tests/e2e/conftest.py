"""One cluster for the whole session: `xyserve up` as a user starts it, on ports of its own."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import ray
import yaml
from ray import serve

from cluster.client import XYServe
from cluster.config.app_config import MIN_UNREAD_BYTES
from scheduler.placement import WorkerLoad
from tests.collector import Collector, collecting
from tests.plugins import faults

READY_TIMEOUT_S = 480
ANSWER_TIMEOUT_S = 120
RESTORED_TIMEOUT_S = 120
STOPPED_TIMEOUT_S = 120
MODEL = "smollm2-135m-instruct"
WORKER = {
    "cpus": 1,
    "activation_format": "float32",  # the same tokens on every CPU
    "grammars": {"max_bytes": 100_000},
    "engine": {
        "dtype": "float32",
        "max_num_seqs": 16,
        "kv_cache_gib": 0.5,
        "extra_args": {"logits_processors": [faults.NAME]},
    },
}
"""The workers' config."""
A_LINE = re.compile(r"^\d{4}-\d\d-\d\dT", re.MULTILINE)
"""The beginning of a line of a log; a traceback ends before the next one."""
SHADOWS = ("scheduler.py", "workers.py", "tests.py")
"""Files with names of ours in the folder in which the server is started."""


@dataclass(frozen=True)
class Server:
    """A running `xyserve up`."""

    url: str
    dashboard: str
    ray_address: str
    config: Path
    folder: Path
    ray_folder: Path

    def write(self, file: Path) -> None:
        """Write it down for `pytest --server`."""
        file.write_text(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def read(cls, file: Path) -> "Server":
        """The server that was written down."""
        known = json.loads(file.read_text())
        for name in ("config", "folder", "ray_folder"):
            known[name] = Path(known[name])
        return cls(**known)

    def replicas(self) -> dict[int, str]:
        """The live replicas of the app, by pid; Ray has a log of each, and its title names it."""
        found = {}
        for log in (self.ray_folder / "session_latest" / "logs").glob("worker-*.err"):
            with suppress(psutil.NoSuchProcess):
                pid = int(log.stem.rpartition("-")[2])
                title = " ".join(psutil.Process(pid).cmdline())
                if name := re.search(r"ServeReplica:xyserve:(\w+)", title):
                    found[pid] = name.group(1)
        return found

    def tracebacks(self) -> list[str]:
        """What the replicas and the proxy have logged as a crash, with the lines that follow."""
        found = []
        for log in (self.ray_folder / "session_latest" / "logs").glob("worker-*.err"):
            _, *crashes = log.read_text(errors="replace").split("Traceback (most recent call last)")
            found += [f"{log.name}: {A_LINE.split(crash)[0][:2000]}" for crash in crashes]
        return found


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
            "draft": {"drafters": ["suffix"]},
            "worker": WORKER,
            # Long enough for a worker to start on a busy machine.
            "ingress": {
                "max_request_bytes": 200_000,
                "placement_timeout_s": 300,
                "max_unread_bytes": MIN_UNREAD_BYTES,
                "unread_timeout_s": 5,
            },
        }
        | args,
    }
    document = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}
    path.write_text(yaml.safe_dump(document))


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Of spans; only calls whose client traces them are traced."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Server]:
    if file := request.config.getoption("server"):
        yield Server.read(file)
        return
    collector: Collector = request.getfixturevalue("collector")
    tracing = {"endpoint": collector.endpoint, "sample_ratio": 0.0}
    with serving(tmp_path_factory.mktemp("server"), tracing=tracing) as server:
        yield server


@contextmanager
def serving(folder: Path, **args: object) -> Iterator[Server]:
    """A server with these args of the app, its config and log in `folder`."""
    config = folder / "app.yaml"
    write_config(config, free_port(), **args)
    with running(config) as server:
        yield server


@contextmanager
def running(config: Path) -> Iterator[Server]:
    """A server of this config, with a Ray of its own; its log is beside the config."""
    folder, log = config.parent, config.with_name("up.log")
    # Ray's sockets need a short path.
    ray_folder = Path(f"/tmp/xyt{free_port()}")
    ray_folder.mkdir()
    # As beside a user's own programs; neither the command nor Ray's processes may import these.
    for name in SHADOWS:
        (folder / name).write_text("raise AssertionError(f'{__file__} is not ours')\n")
    # A server of the user's may run on this machine and have claimed its cores: this one claims in
    # a folder of its own, so both run on the same cores. It starts a Ray of its own as well.
    ray_settings = ("RAY_ADDRESS", "RAY_AUTH_MODE")
    env = {name: value for name, value in os.environ.items() if name not in ray_settings}
    env["TMPDIR"] = str(ray_folder)
    env["PYTHONPATH"] = f"{faults.FOLDER}:{env.get('PYTHONPATH', '')}".rstrip(":")
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "cluster.cli.main",
                "up",
                str(config),
                "--temp-dir",
                str(ray_folder),
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=env,
        )
    try:
        text = _wait_until_ready(process, log)
        yield Server(
            url=_find(r"OpenAI API +(\S+)/v1", text),
            dashboard=_find(r"Dashboard +(\S+)", text),
            ray_address=_find(r"Ray address +(\S+)", text),
            config=config,
            folder=folder,
            ray_folder=ray_folder,
        )
    finally:
        process.terminate()  # SIGINT is ignored in what a shell started in the background
        process.wait(timeout=STOPPED_TIMEOUT_S)


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
    pytest.fail(f"the server did not come up:\n{log.read_text()}", pytrace=False)


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match.group(1)


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S
    ) as client:
        yield client


@pytest.fixture(scope="session")
def handle(server: Server) -> Iterator[XYServe]:
    with XYServe.connect(server.ray_address) as handle:
        yield handle
    ray.shutdown()


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    """For what the official client would not send."""
    with httpx.Client(base_url=server.url, timeout=ANSWER_TIMEOUT_S) as client:
        yield client


@pytest.fixture
def restored(handle: XYServe) -> Iterator[None]:
    """For a test that kills replicas: the next one finds as many as this one did."""
    num_workers, num_draft_workers = num_serving(handle)
    yield
    give_up_s = time.monotonic() + RESTORED_TIMEOUT_S
    while num_serving(handle) != (num_workers, num_draft_workers):
        assert time.monotonic() < give_up_s, "Serve has not replaced what the test killed"
        time.sleep(0.5)


def num_serving(handle: XYServe) -> tuple[int, int]:
    """Live workers and draft workers."""
    status = handle.status()
    draft_workers = [worker for worker in status.draft_workers if not worker.silent]
    return len(status.workers), sum(psutil.pid_exists(worker.pid) for worker in draft_workers)


class Load:
    """How busy the workers are, by one status of the app."""

    def __init__(self, handle: XYServe) -> None:
        workers = handle.status().workers
        self.num_running = sum(worker.num_running for worker in workers)
        self.num_waiting = sum(worker.num_waiting for worker in workers)
        self.num_steps = {worker.worker_id: worker.num_steps for worker in workers}

    def steps_since(self, before: "Load") -> int:
        """The most steps that a worker has run since `before`."""
        return max(steps - before.num_steps[worker] for worker, steps in self.num_steps.items())


def wait_for_load(handle: XYServe, num_running: int, num_waiting: int = 0) -> Load:
    """The first load seen with these numbers."""
    give_up_s = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < give_up_s:
        load = Load(handle)
        if (load.num_running, load.num_waiting) == (num_running, num_waiting):
            return load
    pytest.fail(f"not {num_running} running and {num_waiting} waiting, but {vars(load)}")


def wait_for_placed(*num_requests: int) -> list[WorkerLoad]:
    """Wait until this is what the GlobalScheduler knows of the workers' requests, in any order."""
    return wait_for_loads(
        lambda loads: sorted(load.num_requests for load in loads) == [*num_requests]
    )


def wait_for_calm() -> None:
    """Wait until all workers are idle and equal in the eyes of the GlobalScheduler."""
    wait_for_loads(lambda loads: all((ld.num_requests, ld.slowness) < (1, 1.2) for ld in loads))


def wait_for_loads(condition: Callable[[list[WorkerLoad]], bool]) -> list[WorkerLoad]:
    """The first loads, as the GlobalScheduler knows them, of which `condition` is true."""
    scheduler = serve.get_deployment_handle("GlobalScheduler", "xyserve")
    give_up_s = time.monotonic() + ANSWER_TIMEOUT_S
    loads: list[WorkerLoad] = scheduler.loads.remote().result()
    while not condition(loads):
        assert time.monotonic() < give_up_s, loads
        time.sleep(0.05)
        loads = scheduler.loads.remote().result()
    return loads
