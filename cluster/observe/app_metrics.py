"""The metrics of a whole app on one page: what its replicas export, read from Ray's endpoints.

An ingress sees a part of the work, and has no engine; a scrape of the API's port meets any of them.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator

import httpx
import ray
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.errors import RequestFailed
from cluster.observe.metrics import START_TIME

logger = logging.getLogger(__name__)

FRESH_S = 2.0
"""Time for which a page is shown again; Ray itself collects new values every 10 s."""
TIMEOUT_S = 5.0
"""A node that does not answer within this time is left out, as if Prometheus had asked it."""
NAMES = {"ray_xyserve_": "xyserve_", "ray_vllm_": "vllm:"}
"""Ray's beginnings of our names and vLLM's, and their own; deploy/prometheus.yml says the same."""
OF_RAY = {
    *("Component", "NodeAddress", "SessionName", "Version", "WorkerId"),
    *("otel_scope_name", "otel_scope_schema_url", "otel_scope_version"),
}
"""Labels that Ray adds to every sample."""


class AppMetrics:
    """The page of one app; each ingress shows the same."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._gathering = asyncio.Lock()
        self._page = b""
        self._gathered_s = -FRESH_S

    async def page(self) -> bytes:
        """All series of the app's replicas in Prometheus' text format.

        RequestFailed if no node answers.
        """
        async with self._gathering:
            if time.monotonic() - self._gathered_s >= FRESH_S:
                texts = await _texts_of_nodes()
                self._page = await asyncio.to_thread(page_of, self._application, texts)
                self._gathered_s = time.monotonic()
            return self._page


async def _texts_of_nodes() -> list[str]:
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes
    ]
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        answers = await asyncio.gather(*map(client.get, urls), return_exceptions=True)
    texts = []
    for url, answer in zip(urls, answers, strict=True):
        if isinstance(answer, httpx.Response) and answer.is_success:
            texts.append(answer.text)
        else:
            logger.warning("a node shows no metrics", extra={"url": url, "answer": repr(answer)})
    if not texts:
        raise RequestFailed(f"none of Ray's metrics endpoints answers: {', '.join(urls)}", 503)
    return texts


class _Families(dict[str, Metric]):
    """Metrics by name, as `generate_latest` takes them."""

    def collect(self) -> Iterable[Metric]:
        return self.values()


def page_of(application: str, texts: Iterable[str]) -> bytes:
    """The page of one app, from those of the nodes.

    Without the sums of histograms, which Ray only estimates. Two apps may share a cluster: vLLM's
    metrics name their replica, and ours the replica and its app.
    """
    families = _Families()
    for text in texts:
        for family in text_string_to_metric_families("\n".join(_lines(text))):
            name = _own(family.name)
            metric = families.setdefault(name, Metric(name, family.documentation, family.type))
            for sample in family.samples:
                if not (family.type == "histogram" and sample.name.endswith("_sum")):
                    labels = {
                        key: value for key, value in sample.labels.items() if key not in OF_RAY
                    }
                    if "ReplicaId" in labels:  # vLLM's name for it
                        labels["replica"] = labels.pop("ReplicaId")
                    metric.add_sample(_own(sample.name), labels, sample.value)
    started = families.get(START_TIME.name)
    replicas = {
        sample.labels["replica"]
        for sample in (started.samples if started else ())
        if sample.labels["application"] == application
    }
    for metric in families.values():
        metric.samples = [one for one in metric.samples if one.labels["replica"] in replicas]
    return generate_latest(families)


def _lines(text: str) -> Iterator[str]:
    """The lines about our metrics and vLLM's; there are many more, and parsing them takes long."""
    for line in text.splitlines():
        name = line.split(" ", 3)[2] if line.startswith("# ") else line
        if name.startswith(tuple(NAMES)):
            yield line


def _own(name: str) -> str:
    for of_ray, own in NAMES.items():
        if name.startswith(of_ray):
            return own + name.removeprefix(of_ray)
    raise AssertionError(name)
