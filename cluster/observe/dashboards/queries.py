"""Queries that several dashboards use."""

from cluster.observe.dashboards.panels import Query
from cluster.observe.dashboards.promql import grown, of_workers, quantile, rate, shown, total
from cluster.observe.metrics import Metric, VllmMetric

QUANTILES = (0.5, 0.95, 0.99)
"""Quantiles that panels show."""


def quantiles(histogram: Metric | VllmMetric, *, of_worker: bool = False) -> tuple[Query, ...]:
    """The usual quantiles of a histogram; `of_worker` if workers export it."""
    buckets = (of_workers if of_worker else shown)(histogram, part="_bucket")
    return tuple(Query(quantile(q, buckets), f"p{100 * q:g}") for q in QUANTILES)


def rate_of_workers(metric: Metric | VllmMetric, *by: str, part: str = "") -> str:
    """Growth per second of a counter that workers export."""
    return total(rate(of_workers(metric, part=part)), *by)


def events(counter: Metric, label: str, *matchers: str) -> tuple[Query, ...]:
    """Growth of a counter in five minutes; for counters of rare events."""
    return (Query(total(grown(shown(counter, *matchers), "5m"), label), f"{{{{{label}}}}}"),)
