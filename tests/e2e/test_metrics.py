import time

import httpx
import openai
import pytest
import ray

from cluster.client import XYServe
from tests.e2e.conftest import MODEL, Server

EXPORT_TIMEOUT_S = 60
"""Ray gathers metrics every few seconds."""


@pytest.mark.parametrize(
    "name",
    ["xyserve_step_seconds", "xyserve_step_decision_seconds", "xyserve_step_prediction_error"],
)
def test_the_steps_are_counted(
    server: Server, handle: XYServe, client: openai.OpenAI, name: str
) -> None:
    client.completions.create(model=MODEL, prompt="One, two,", max_tokens=8)
    [node] = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    give_up_s = time.monotonic() + EXPORT_TIMEOUT_S
    while f"ray_{name}_count" not in (text := httpx.get(url).text):
        assert time.monotonic() < give_up_s, sorted(
            line.split("{")[0] for line in text.splitlines() if "xyserve" in line
        )
        time.sleep(1)

    [line, *_] = (line for line in text.splitlines() if line.startswith(f"ray_{name}_count"))
    assert 'deployment="Worker"' in line
    assert float(line.rpartition(" ")[2]) > 0
