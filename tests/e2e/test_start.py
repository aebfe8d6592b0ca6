"""What a running app says of its workers' start."""

from cluster.client import XYServe
from tests.e2e.conftest import Server
from workers.start import StartPhase


def test_each_worker_tells_how_long_its_start_took(server: Server, handle: XYServe) -> None:
    logs = (server.ray_folder / "session_latest" / "logs").glob("worker-*.err")
    lines = [line for log in logs for line in log.read_text().splitlines()]
    workers = handle.status().workers

    assert len(workers) == 2
    for worker in workers:
        assert list(worker.start) == [phase.value for phase in StartPhase]
        assert all(time.took_s >= 0 and time.cpu_s >= 0 for time in worker.start.values())
        assert worker.start["imports"].took_s > 0
        [started] = [ln for ln in lines if "worker started" in ln and worker.worker_id in ln]
        assert all(f" {phase}_s=" in started for phase in StartPhase)
