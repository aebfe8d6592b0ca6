"""The logs of the replicas, where Ray keeps them."""

import re

from tests.e2e.conftest import Server

READY = {
    "GlobalScheduler": "GlobalScheduler ready",
    "Worker": "engine ready",
    "DraftWorker": "draft worker ready",
    "Ingress": "app ready",
}


def test_each_replica_says_in_one_line_that_it_is_ready(server: Server) -> None:
    logs = server.ray_folder / "session_latest" / "logs"
    replicas = server.replicas()
    found: dict[int, list[str]] = {}
    for pid, deployment in replicas.items():
        [log] = logs.glob(f"worker-*-{pid}.err")
        lines = log.read_text(errors="replace").splitlines()
        found[pid] = [line for line in lines if READY[deployment] in line]

    assert set(replicas.values()) == set(READY)
    for pid, deployment in replicas.items():
        [line] = found[pid]
        assert re.fullmatch(
            rf"\d{{4}}-\d\d-\d\dT[\d:.]+Z INFO {READY[deployment]}( \w+=(\".*\"|[^ \"]+))*"
            rf" app=xyserve deployment={deployment} replica=\w+",
            line,
        )
