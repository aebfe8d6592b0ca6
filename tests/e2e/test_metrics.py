"""The metrics of the running app, on Ray's endpoint and on the API's port."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import openai
import ray
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cluster.client import XYServe
from cluster.observe.metrics import (
    MAX_DRAFTS,
    METRICS,
    OFFERED_WORK,
    PREFILL_SHARE,
    WORKER_CAPACITY,
    WORKERS_READY,
    WORKERS_WANTED,
    Kind,
)
from tests.e2e.conftest import MODEL, Load, Server, wait_for_load

EXPORT_TIMEOUT_S = 60
"""Ray gathers metrics every few seconds."""
OFF = (
    *(WORKERS_WANTED, WORKERS_READY, OFFERED_WORK, WORKER_CAPACITY),  # autoscaling
    *(PREFILL_SHARE, MAX_DRAFTS),  # placement.stage_policy
)
"""Metrics of what the app under test has not switched on."""


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
        if metric not in OFF
    }

    def found() -> dict[str, str]:
        return {line.partition("{")[0]: line for line in httpx.get(url).text.splitlines()}

    wait_until(lambda: wanted.keys() <= found().keys())

    samples = found()
    for name, metric in wanted.items():
        for label in (*metric.labels, "application", "deployment", "replica"):
            assert f'{label}="' in samples[name], samples[name]
        assert f'model_name="{MODEL}"' in samples[name]


class Page:
    """What `/metrics` shows at one time."""

    def __init__(self, http: httpx.Client) -> None:
        text = http.get("/metrics").raise_for_status().text
        self.samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def total(self, name: str) -> float:
        """The sum of all series of a name."""
        return sum(sample.value for sample in self.of(name))

    def of(self, name: str) -> list[Sample]:
        """All series of a name."""
        return [sample for sample in self.samples if sample.name == name]


def wait_until(condition: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + EXPORT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_s, condition
        time.sleep(1)


@contextmanager
def streams(client: openai.OpenAI, number: int) -> Iterator[None]:
    """Long streams, which are left in the end."""
    leaving = threading.Event()

    def read() -> None:
        with client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=4000,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            for _ in stream:
                if leaving.is_set():
                    return

    threads = [threading.Thread(target=read) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        leaving.set()
        for thread in threads:
            thread.join()


def test_what_runs_waits_and_is_cached_is_on_the_page_as_in_the_status(
    handle: XYServe, http: httpx.Client, client: openai.OpenAI
) -> None:
    """Each worker has 16 seats."""

    def shows(load: Load) -> bool:
        page = Page(http)
        running, waiting = (
            page.total(f"vllm:num_requests_{state}") for state in ("running", "waiting")
        )
        return (running, waiting) == (load.num_running, load.num_waiting)

    with streams(client, 35):
        load = wait_for_load(handle, 32, 3)
        before = {worker.worker_id: worker.kv_cache_usage for worker in handle.status().workers}
        wait_until(lambda: shows(load))
        wait_until(
            lambda: all(
                before[one.labels["replica"]] <= one.value
                for one in Page(http).of("vllm:kv_cache_usage_perc")
            )
        )
        page = Page(http)
        after = {worker.worker_id: worker.kv_cache_usage for worker in handle.status().workers}
        used = {one.labels["replica"]: one.value for one in page.of("vllm:kv_cache_usage_perc")}
        assert used.keys() == after.keys()
        assert all(before[worker] <= used[worker] <= after[worker] for worker in used)
        # Each replica exports at a time of its own.
        wait_until(lambda: Page(http).total("xyserve_live_requests") == 35)
        wait_until(lambda: Page(http).total("xyserve_worker_requests") == 35)

    idle = wait_for_load(handle, 0, 0)
    wait_until(lambda: shows(idle))


def test_requests_tokens_and_answers_are_counted_once(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    names = (
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
    )

    def counts() -> tuple[dict[str, float], Counter[tuple[str, ...]]]:
        page = Page(http)
        answers: Counter[tuple[str, ...]] = Counter()
        for one in page.of("xyserve_http_requests_total"):
            if one.labels["handler"] != "/metrics":
                labels = tuple(one.labels[name] for name in ("handler", "method", "status"))
                answers[labels] += int(one.value)
        return {name: page.total(name) for name in names}, answers

    before, answered_before = counts()
    while True:  # until what came before has arrived
        time.sleep(15)
        now = counts()
        if now == (before, answered_before):
            break
        before, answered_before = now
    usage = client.completions.create(model=MODEL, prompt="1 2 3", max_tokens=5).usage
    list(client.completions.create(model=MODEL, prompt="1 2 3", max_tokens=5, stream=True))
    for path in ("nowhere/1", "nowhere/2", f"models/{MODEL}", "models/none"):
        http.get(f"/v1/{path}")
    http.put("/v1/completions")
    http.post("/v1/completions", json={"prompt": "1", "max_tokens": -1})

    assert usage
    wanted = dict(zip(names, (2 * usage.prompt_tokens, 10, 2), strict=True))
    wait_until(lambda: {name: counts()[0][name] - before[name] for name in names} == wanted)
    wait_until(lambda: (counts()[1] - answered_before).total() >= 8)
    assert counts()[1] - answered_before == {
        ("/v1/completions", "POST", "200"): 2,
        ("/v1/completions", "POST", "400"): 1,
        ("/v1/completions", "PUT", "405"): 1,
        ("/v1/models/{model_id:path}", "GET", "200"): 1,
        ("/v1/models/{model_id:path}", "GET", "404"): 1,
        ("none", "GET", "404"): 2,
    }


def test_the_page_has_no_series_twice_and_nothing_of_the_process_that_answers(
    http: httpx.Client,
) -> None:
    page = Page(http)
    keys = Counter((one.name, tuple(sorted(one.labels.items()))) for one in page.samples)

    assert [key for key, number in keys.items() if number > 1] == []
    assert {one.name.partition("_")[0].partition(":")[0] for one in page.samples} == {
        "vllm",
        "xyserve",
    }
    assert all(one.labels["replica"] for one in page.samples)
