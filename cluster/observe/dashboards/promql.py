"""Expressions of PromQL, built from metrics so that no metric's name is typed twice."""

from cluster.observe.metrics import Metric, VllmMetric

RATE_INTERVAL = "$__rate_interval"
"""Grafana puts in a few intervals of scraping, and more the longer the time that is shown."""

QUANTILES = (0.5, 0.95, 0.99)
"""Those that panels show."""


def series(metric: Metric | VllmMetric, *matchers: str, part: str = "") -> str:
    """The series of a metric that `matchers` fit; `part` is `_bucket` or `_count` of a histogram.

    Never `_sum`: what Ray exports as the sum of a histogram is a guess from its buckets.
    """
    assert part != "_sum"
    return f"{metric.name}{part}{{{','.join(matchers)}}}" if matchers else metric.name + part


def shown(metric: Metric | VllmMetric, *matchers: str, part: str = "") -> str:
    """The series of a metric that the variables of a dashboard choose."""
    chosen = ['model_name=~"$model"']
    if isinstance(metric, Metric):  # vLLM's have no label for the app
        chosen.insert(0, 'application=~"$app"')
        chosen += [
            f'{name}=~"${name}"' for name in ("slo_class", "worker") if name in metric.labels
        ]
    return series(metric, *chosen, *matchers, part=part)


def of_workers(metric: Metric | VllmMetric, *matchers: str, part: str = "") -> str:
    """The same, of a metric that workers tell, which their replica's id names."""
    return shown(metric, 'replica=~"$worker"', *matchers, part=part)


def rate(counter: str, window: str = RATE_INTERVAL) -> str:
    """How fast a counter grows, per second."""
    return f"rate({counter}[{window}])"


def grown(counter: str, window: str) -> str:
    """How much a counter grew, its first increment included.

    A counter has no series before it is first incremented, so `increase` sees no change there; the
    look back of an hour tells a new series from one that a gap in scraping hides.
    """
    return (
        f"(({counter} unless last_over_time({counter}[1h] offset {window}))"
        f" or increase({counter}[{window}]))"
    )


def total(expr: str, *by: str) -> str:
    """The sum over all labels but `by`."""
    return _aggregated("sum", expr, by)


def largest(expr: str, *by: str) -> str:
    """The largest value over all labels but `by`."""
    return _aggregated("max", expr, by)


def smallest(expr: str, *by: str) -> str:
    """The smallest value over all labels but `by`."""
    return _aggregated("min", expr, by)


def number(expr: str, *by: str) -> str:
    """The number of series over all labels but `by`."""
    return _aggregated("count", expr, by)


def _aggregated(operator: str, expr: str, by: tuple[str, ...]) -> str:
    return f"{operator} by ({', '.join(by)}) ({expr})" if by else f"{operator}({expr})"


def quantile(share: float, buckets: str, *by: str) -> str:
    """A quantile of the values that a histogram got lately; `buckets` are its `_bucket` series."""
    return f"histogram_quantile({share:g}, {total(rate(buckets), 'le', *by)})"


def ratio(part: str, whole: str) -> str:
    """`part` over `whole`, label by label: 0 where the part has no series yet, none of nothing."""
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def share(part: str, *by: str) -> str:
    """The share that each of `by` has in the sum of all."""
    return f"{total(part, *by)} / on () group_left () ({total(part)} > 0)"
