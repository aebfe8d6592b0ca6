"""A real Prometheus for tests, configured by deploy/prometheus.yml."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.programs import free_port, require

DEPLOY = Path(__file__).parents[1] / "deploy"
DISCOVERY_FILE = "/tmp/ray/prom_metrics_service_discovery.json"
SCRAPE_INTERVAL = "scrape_interval: 10s"
READY_TIMEOUT_S = 60


@contextmanager
def prometheus_server(
    folder: Path, discovery_file: Path, scrape_interval: str, evaluation_interval: str = "15s"
) -> Iterator[str]:
    """The address of a Prometheus that scrapes the targets in `discovery_file`."""
    config = (DEPLOY / "prometheus.yml").read_text()
    assert DISCOVERY_FILE in config
    assert SCRAPE_INTERVAL in config
    config = config.replace(DISCOVERY_FILE, str(discovery_file))
    config = config.replace(SCRAPE_INTERVAL, f"scrape_interval: {scrape_interval}")
    config = config.replace(
        "evaluation_interval: 15s", f"evaluation_interval: {evaluation_interval}"
    )
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(DEPLOY / "alerts.yml", folder)
    address = f"127.0.0.1:{free_port()}"
    log = folder / "prometheus.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                require("prometheus", "prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(f"http://{address}", process, log)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up_s = time.monotonic() + READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up_s:
        try:
            if httpx.get(f"{url}/-/ready").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.1)
    pytest.fail(f"Prometheus did not come up:\n{log.read_text()}")
