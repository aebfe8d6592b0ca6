"""The short form of `python -m tests.fuzz`, against the server of the session."""

import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cluster.client import XYServe
from cluster.observe.exporter import ADMISSION_OUTCOMES, DRAFT_OUTCOMES, REQUEST_OUTCOMES
from tests.e2e.conftest import MODEL, Server, wait_for_load
from tests.fuzz.__main__ import Fuzz
from tests.fuzz.parameters import PARAMETERS

NUM_INPUTS, RAW_AT_ONCE = 240, 78
"""Some minute's worth; every kind of raw client six times."""


def test_nothing_that_comes_in_breaks_the_server_or_stays(
    server: Server, handle: XYServe, http: httpx.Client
) -> None:
    before = server.replicas(), server.tracebacks()

    report = Fuzz(server.url, MODEL, seed=0).run(NUM_INPUTS, RAW_AT_ONCE)

    assert report.faults == []
    assert report.num_inputs >= NUM_INPUTS
    wait_for_load(handle, num_running=0)
    assert (server.replicas(), server.tracebacks()) == before
    assert handle.status().num_live_requests == 0
    assert strange_labels(http.get("/metrics").text) == []


OURS = {
    "handler": r"none|/[a-z0-9_/.-]*(\{\w+:path\})?",
    "method": r"[A-Z]+|other",
    "status": r"\d{3}",
    "slo_class": "interactive|standard|batch",
    "outcome": "|".join((*ADMISSION_OUTCOMES, *REQUEST_OUTCOMES, *DRAFT_OUTCOMES)),
    "target": "ttft|tpot|all",
    "kind": "prompt|output|predicted|found|placed",
}
"""The values of labels that have to do with what a client sends."""


def strange_labels(page: str) -> list[tuple[str, str]]:
    """Labels of our metrics with values that are not ours: a client could make any number."""
    samples = (
        sample
        for family in text_string_to_metric_families(page)
        if family.name.startswith("xyserve_")
        for sample in family.samples
    )
    return sorted(
        {
            (name, value)
            for sample in samples
            for name, value in sample.labels.items()
            if name in OURS and not re.fullmatch(OURS[name], value)
        }
    )


def test_every_parameter_of_the_routes_that_generate_is_drawn() -> None:
    """So that a new one of vLLM's is not forgotten."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    known = {*PARAMETERS, *NO_SAMPLING}
    for request in (ChatCompletionRequest, CompletionRequest):
        assert sorted(request.model_fields.keys() - known) == []


NO_SAMPLING = {
    *("model", "messages", "prompt", "prompt_embeds", "documents", "chat_template"),
    *("mm_processor_kwargs", "media_io_kwargs", "mm_payload", "return_mm_kwargs", "cache_salt"),
}
"""What a request is about; schemathesis draws it."""
