import math
from collections.abc import Iterator

import pytest

from cluster.config.app_config import parse_args
from cluster.config.observe import TracingConfig
from cluster.errors import ConfigError
from cluster.observe.tracing import Tracing, traceparent_of
from tests.collector import Collector, collecting

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


def tracing(collector: Collector, sample_ratio: float = 1.0) -> Tracing:
    config = TracingConfig(endpoint=collector.endpoint, sample_ratio=sample_ratio)
    return Tracing(config, "ingress", "r1")


def test_a_call_is_a_child_of_the_clients_span_and_the_parent_of_what_follows(
    collector: Collector,
) -> None:
    mine = tracing(collector)

    with mine.call("ingress", SAMPLED, {"id": "x"}) as span:
        mine.add("queue", traceparent_of(span), began_s=10.0, ended_s=12.5, attributes={"n": 3})
    mine.shut_down()

    queue, ingress = sorted(collector.spans, key=lambda span: span.began_s)
    assert (ingress.name, ingress.trace_id, ingress.parent_id) == ("ingress", TRACE, PARENT)
    assert ingress.service == "xyserve.ingress"
    assert ingress.attributes == {"id": "x"}
    assert (queue.name, queue.trace_id, queue.parent_id) == ("queue", TRACE, ingress.span_id)
    assert (queue.began_s, queue.ended_s, queue.attributes) == (10.0, 12.5, {"n": 3})


def test_a_call_of_a_client_that_traces_nothing_begins_a_trace(collector: Collector) -> None:
    mine = tracing(collector)

    with mine.call("ingress", "", {}):
        pass
    mine.shut_down()

    [span] = collector.spans
    assert span.parent_id == ""
    assert span.trace_id != TRACE


@pytest.mark.parametrize(
    ("traceparent", "sample_ratio", "num_spans"),
    [(UNSAMPLED, 1.0, 0), (SAMPLED, 0.0, 2), ("", 0.0, 0), ("", 1.0, 2), ("not one", 1.0, 2)],
)
def test_the_client_decides_what_is_traced_and_else_the_ratio(
    collector: Collector, traceparent: str, sample_ratio: float, num_spans: int
) -> None:
    mine = tracing(collector, sample_ratio)

    with mine.call("ingress", traceparent, {}) as span:
        mine.add("queue", traceparent_of(span), began_s=10.0, ended_s=12.5)
    mine.shut_down()

    assert len(collector.spans) == num_spans


def test_what_never_ended_makes_no_span(collector: Collector) -> None:
    mine = tracing(collector)

    mine.add("retry", SAMPLED, began_s=10.0, ended_s=math.inf)
    mine.add("retry", SAMPLED, began_s=10.0, ended_s=9.0)
    mine.add("retry", "", began_s=10.0, ended_s=11.0)
    mine.shut_down()

    assert collector.spans == []


def test_an_error_is_the_status_of_the_span(collector: Collector) -> None:
    mine = tracing(collector)

    mine.add("admission", SAMPLED, began_s=10.0, ended_s=11.0, error="no such model")
    mine.shut_down()

    [span] = collector.spans
    assert span.error == "no such model"


def test_without_a_config_nothing_is_traced() -> None:
    mine = Tracing(None, "ingress", "r1")

    with mine.call("ingress", SAMPLED, {}) as span:
        assert not span.is_recording()
        assert traceparent_of(span) == ""
        mine.add("queue", SAMPLED, began_s=1.0, ended_s=2.0)
    mine.shut_down()

    assert not mine.is_on


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"endpoint": ""}, "tracing: endpoint is empty"),
        (
            {"endpoint": "x", "sample_ratio": 2},
            r"tracing: sample_ratio \(2.0\) must be from 0 to 1",
        ),
        ({"endpoint": "x", "protocol": "udp"}, "tracing.protocol"),
        ({"endpoint": "x", "sampel_ratio": 1}, "did you mean sample_ratio"),
        ({}, "tracing.endpoint"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_name(
    args: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_args({"tracing": args})
