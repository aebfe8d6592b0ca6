"""Spans of a request, from the client's own down to the worker's, as a collector gets them."""

import secrets
import time

import httpx
import openai

from cluster.client import XYServe
from tests.collector import CollectedSpan, Collector
from tests.e2e.conftest import MODEL

PARENT = "00f067aa0ba902b7"
OF_A_REQUEST = {"ingress", "admission", "placement", "queue", "prefill", "decode"}


def names(spans: list[CollectedSpan]) -> set[str]:
    return {span.name for span in spans}


def test_a_traced_request_has_a_span_of_each_part_below_the_clients(
    client: openai.OpenAI, collector: Collector
) -> None:
    trace_id = secrets.token_hex(16)

    client.completions.create(
        model=MODEL,
        prompt="one two three four " * 8,
        max_tokens=30,
        extra_headers={"traceparent": f"00-{trace_id}-{PARENT}-01", "x-slo-class": "interactive"},
    )

    spans = {
        span.name: span
        for span in collector.trace(trace_id, lambda found: names(found) >= OF_A_REQUEST)
    }
    assert spans.keys() == OF_A_REQUEST
    ingress = spans["ingress"]
    assert ingress.parent_id == PARENT
    assert all(span.parent_id == ingress.span_id for span in spans.values() if span is not ingress)
    assert {name: span.service for name, span in spans.items()} == {
        "ingress": "xyserve.ingress",
        "admission": "xyserve.ingress",
        "placement": "xyserve.scheduler",
        "queue": "xyserve.worker",
        "prefill": "xyserve.worker",
        "decode": "xyserve.worker",
    }
    order = ["ingress", "admission", "placement", "queue", "prefill", "decode"]
    begins = [spans[name].began_s for name in order]
    assert begins == sorted(begins)
    assert all(span.ended_s <= ingress.ended_s for span in spans.values())
    assert spans["prefill"].ended_s == spans["decode"].began_s
    assert spans["admission"].attributes["xyserve.slo_class"] == "interactive"
    assert spans["placement"].attributes["xyserve.reason"]
    decode = spans["decode"].attributes
    assert decode["xyserve.num_tokens"] - decode["xyserve.num_drafts"] <= 29
    assert decode["xyserve.outcome"] == "length"


def test_a_call_of_the_handle_is_traced_too(handle: XYServe, collector: Collector) -> None:
    trace_id = secrets.token_hex(16)

    for _ in handle.stream("Hello", max_tokens=3, traceparent=f"00-{trace_id}-{PARENT}-01"):
        pass

    spans = collector.trace(trace_id, lambda found: names(found) >= OF_A_REQUEST)
    assert names(spans) == OF_A_REQUEST


def test_the_admission_span_of_a_refused_call_has_the_error(
    http: httpx.Client, collector: Collector
) -> None:
    trace_id = secrets.token_hex(16)

    http.post(
        "/v1/completions",
        json={"model": MODEL, "prompt": "x", "max_tokens": -1},
        headers={"traceparent": f"00-{trace_id}-{PARENT}-01"},
    )

    spans = collector.trace(trace_id, lambda found: len(found) >= 2)
    assert names(spans) == {"ingress", "admission"}
    assert all("max_tokens" in span.error for span in spans)


def test_what_the_client_does_not_trace_is_not_traced(
    client: openai.OpenAI, collector: Collector
) -> None:
    began_s = time.time()
    client.completions.create(model=MODEL, prompt="Hello", max_tokens=2)
    client.completions.create(
        model=MODEL,
        prompt="Hello",
        max_tokens=2,
        extra_headers={"traceparent": f"00-{'ab' * 16}-{PARENT}-00"},
    )

    # A traced one after them: what they sent would be there before it.
    trace_id = secrets.token_hex(16)
    client.completions.create(
        model=MODEL,
        prompt="Hello",
        max_tokens=2,
        extra_headers={"traceparent": f"00-{trace_id}-{PARENT}-01"},
    )
    collector.trace(trace_id, lambda found: names(found) >= OF_A_REQUEST)
    assert {span.trace_id for span in collector.spans if span.began_s > began_s} == {trace_id}
