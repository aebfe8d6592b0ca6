"""A Ray cluster whose nodes are hosts of their own, and an app on it: front and workers apart.

It is started as deploy/README.md says, behind a firewall that opens the ports of the table there.
The head has the ingress, the GlobalScheduler and the draft worker, every other node one worker.
"""

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.e2e.conftest import WORKER, Server
from tests.nodes.network import Host, network
from tests.plugins import faults

ROOT = Path(__file__).resolve().parents[2]
RAY_PORT, DASHBOARD_PORT, HTTP_PORT = 6379, 8265, 8000
STREAM_PORTS = (20000, 20009)
READY_S = 600.0
README = (ROOT / "deploy" / "README.md").read_text()
RAY_PORTS = re.findall(r"--[a-z-]+-port=[0-9]+", README)
"""Options of `ray start` that choose its ports."""
RAY_SETTINGS = dict(re.findall(r"(RAY_grpc_\w+)=([0-9]+)", README))
"""Settings of Ray, by environment variable."""
FRONT, BACK = {"tier": "front"}, {"tier": "back"}


def open_ports(is_head: bool) -> list[str]:
    """The ports that a node opens to others, by the table in the README."""
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in README.partition("| what | on | address |")[2].splitlines()[2:]
    ]
    rows = rows[: rows.index([""])]
    ports = {
        port
        for _, on, _, where, _, open_to in rows
        if open_to != "nobody" and (is_head or on == "every node")
        for port in re.findall(r"[0-9]+(?:-[0-9]+)?", where)
    }
    return sorted(ports)


@dataclass(frozen=True)
class Replica:
    """A replica of the app, as Serve knows it."""

    replica_id: str
    deployment: str
    address: str
    """Address of its node."""
    state: str
    pid: int


@dataclass(frozen=True)
class RayNodes:
    """A running app on several nodes."""

    head: Host
    others: list[Host]
    server: Server
    env: dict[str, str]

    @property
    def hosts(self) -> list[Host]:
        """All its nodes."""
        return [self.head, *self.others]

    def start(self, host: Host) -> None:
        """Start Ray on one of the other hosts, and let it join."""
        options = (f"--address={self.server.ray_address}", "--num-cpus=1", "--labels=tier=back")
        _ray(self.env, host, self.server.ray_folder, *options)

    def run(self, host: Host, *args: str) -> "subprocess.CompletedProcess[str]":
        """Run a program on a host, in the folder of the server's config."""
        return subprocess.run(
            host.command(*args),
            env=self.env,
            cwd=self.server.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def examine_links(self) -> tuple[int, str]:
        """The exit status and the words of `xyserve doctor --links` on the head."""
        done = self.run(
            self.head,
            *(sys.executable, "-P", "-m", "cluster.cli.main", "doctor", str(self.server.config)),
            *("--links", "--address", self.server.ray_address),
        )
        return done.returncode, " ".join(done.stdout.split())

    def wait_until_healed(self) -> None:
        """Wait until what was sent before has arrived, and all workers answer."""
        give_up_s = time.monotonic() + READY_S
        while any(host.has_unsent() for host in self.hosts) or self.examine_links()[0] != 0:
            assert time.monotonic() < give_up_s
            time.sleep(0.5)

    def replicas(self) -> list[Replica]:
        """The replicas that Serve believes there are."""
        return [
            Replica(
                replica["replica_id"],
                name,
                replica.get("node_ip") or "",
                replica["state"],
                replica.get("pid") or 0,
            )
            for name, deployment in self._app().get("deployments", {}).items()
            for replica in deployment["replicas"]
        ]

    def wait_until_running(self, num_workers: int) -> None:
        """Wait until Serve calls the app running, with this many workers."""
        give_up_s = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                app, replicas = self._app(), self.replicas()
                running = [r for r in replicas if r.state == "RUNNING"]
                num = sum(replica.deployment == "Worker" for replica in running)
                if app.get("status") == "RUNNING" and num == num_workers:
                    return
                assert app.get("status") != "DEPLOY_FAILED", app
            assert time.monotonic() < give_up_s, self._app()
            time.sleep(0.5)

    def _app(self) -> dict[str, Any]:
        token = self.env["RAY_AUTH_TOKEN"]
        answer = httpx.get(
            f"{self.server.dashboard}/api/serve/applications/",
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
            trust_env=False,
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["applications"].get("xyserve", {})
        return found


@contextlib.contextmanager
def ray_nodes(folder: Path, num_others: int, **args: Any) -> Iterator[RayNodes]:
    """An app with these args and a worker on each of the other nodes; `folder` has its config."""
    ray_folder = Path(f"/tmp/xyn{os.getpid()}")  # Ray's sockets need a short path
    shutil.rmtree(ray_folder, ignore_errors=True)
    ray_folder.mkdir()
    settings = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = (
        settings
        | RAY_SETTINGS
        | {
            "PYTHONPATH": f"{ROOT}:{faults.FOLDER}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Workers claim cores here, so that a server on this machine may have them as well.
            "TMPDIR": str(ray_folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # for a busy machine
        }
    )
    try:
        with network(1 + num_others) as net:
            head, *others = net.hosts
            dashboard = f"http://{head.address}:{DASHBOARD_PORT}"
            server = Server(
                url=f"http://{head.address}:{HTTP_PORT}",
                dashboard=dashboard,
                ray_address=f"{head.address}:{RAY_PORT}",
                config=folder / "app.yaml",
                folder=folder,
                ray_folder=ray_folder,
            )
            nodes = RayNodes(head, others, server, env)
            for host in net.hosts:
                host.close_ports(open_ports(is_head=host is head))
            _write_config(server.config, num_others, args)
            _ray(
                env,
                head,
                ray_folder,
                *("--head", f"--port={RAY_PORT}", "--num-cpus=0", "--labels=tier=front"),
                *(f"--dashboard-host={head.address}", f"--dashboard-port={DASHBOARD_PORT}"),
                f"--temp-dir={ray_folder}",
            )
            for host in others:
                nodes.start(host)
            done = nodes.run(
                head, *_command("serve", "deploy", str(server.config), "-a", dashboard)
            )
            assert done.returncode == 0, done.stdout
            nodes.wait_until_running(num_others)
            yield nodes
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def _write_config(path: Path, num_workers: int, args: dict[str, Any]) -> None:
    app = {
        "name": "xyserve",
        "route_prefix": "/",
        "import_path": "cluster.app:build_app",
        "args": {
            "num_workers": num_workers,
            "auth": {"anonymous": ["infer", "metrics"]},  # callers are on another host
            "worker": WORKER,
            "draft": {"drafters": ["suffix"]},
            "nodes": {
                **dict.fromkeys(("ingress", "global_scheduler", "draft_worker"), FRONT),
                "worker": BACK,
            },
            "stream_ports": list(STREAM_PORTS),
            "ingress": {"max_request_bytes": 200_000, "placement_timeout_s": 300},
        }
        | args,
    }
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "0.0.0.0", "port": HTTP_PORT},
        "applications": [app],
    }
    path.write_text(yaml.safe_dump(document))


def _ray(env: dict[str, str], host: Host, folder: Path, *options: str) -> None:
    """`ray start` on a host."""
    command = [
        *_command("ray", "start", f"--node-ip-address={host.address}", *RAY_PORTS, *options),
        f"--object-store-memory={100 << 20}",
    ]
    log = folder / f"{host.name}.log"
    with log.open("w") as out:
        done = subprocess.run(
            host.command(*command), env=env, cwd=folder, stdout=out, stderr=subprocess.STDOUT
        )
    assert done.returncode == 0, log.read_text()


def _command(name: str, *args: str) -> list[str]:
    """A command that was installed with this Python."""
    return [str(Path(sys.executable).with_name(name)), *args]
