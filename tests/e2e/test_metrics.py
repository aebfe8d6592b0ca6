import time

import httpx
import openai
import ray

from cluster.client import XYServe
from cluster.observe import metrics
from cluster.observe.metrics import METRICS, Kind
from tests.e2e.conftest import MODEL, Server

EXPORT_TIMEOUT_S = 60
"""Ray gathers metrics every few seconds."""

NEEDS_TROUBLE = {metrics.RETRIES, metrics.DRAFT_COLLAPSES, metrics.DEFERRALS}


def test_every_metric_is_on_rays_endpoint_with_its_labels(
    server: Server, handle: XYServe, client: openai.OpenAI
) -> None:
    client.completions.create(
        model=MODEL, prompt="one two three four " * 8, max_tokens=40, temperature=0
    )
    [node] = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        f"ray_{metric.name}{'_bucket' if metric.kind is Kind.HISTOGRAM else ''}": metric
        for metric in METRICS.values()
        if metric not in NEEDS_TROUBLE
    }

    give_up_s = time.monotonic() + EXPORT_TIMEOUT_S
    while True:
        samples = {line.partition("{")[0]: line for line in httpx.get(url).text.splitlines()}
        if wanted.keys() <= samples.keys():
            break
        assert time.monotonic() < give_up_s, sorted(wanted.keys() - samples.keys())
        time.sleep(1)

    for name, metric in wanted.items():
        for label in (*metric.labels, "application", "deployment", "replica"):
            assert f'{label}="' in samples[name], samples[name]
        assert f'model_name="{MODEL}"' in samples[name]
