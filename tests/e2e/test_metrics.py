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
    [
        "xyserve_step_seconds_count",
        "xyserve_step_decision_seconds_count",
        "xyserve_step_prediction_error_count",
        "xyserve_draft_tokens_total",
        "xyserve_draft_accepted_tokens_total",
        "xyserve_draft_acceptance_ratio",
        "xyserve_draft_tokens_per_decode",
    ],
)
def test_steps_and_drafts_are_counted(
    server: Server, handle: XYServe, client: openai.OpenAI, name: str
) -> None:
    client.completions.create(
        model=MODEL, prompt="one two three four " * 8, max_tokens=40, temperature=0
    )
    [node] = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    give_up_s = time.monotonic() + EXPORT_TIMEOUT_S
    while f"ray_{name}{{" not in (text := httpx.get(url).text):
        assert time.monotonic() < give_up_s, sorted(
            line.split("{")[0] for line in text.splitlines() if "xyserve" in line
        )
        time.sleep(1)

    [line, *_] = (line for line in text.splitlines() if line.startswith(f"ray_{name}{{"))
    assert 'deployment="Worker"' in line
    assert float(line.rpartition(" ")[2]) > 0
