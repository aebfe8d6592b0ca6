"""PromQL expressions, built from the metrics so that no metric's name is typed twice."""

from cluster.observe.metrics import Metric, RayMetric, VllmMetric

RATE_INTERVAL = "$__rate_interval"
"""Grafana's variable: a few scrape intervals, more for longer periods."""


def series(metric: Metric | VllmMetric | RayMetric, *matchers: str, part: str = "") -> str:
    """The series of a metric that match; `part` is `_bucket` or `_count` for a histogram.

    Never `_sum`: what Ray exports as a histogram's sum is estimated from its buckets.
    """
    assert part != "_sum"
    return f"{metric.name}{part}{{{','.join(matchers)}}}" if matchers else metric.name + part


def shown(metric: Metric | VllmMetric, *matchers: str, part: str = "") -> str:
    """The series of a metric that the variables of a dashboard select."""
    chosen = ['model_name=~"$model"']
    if isinstance(metric, Metric):  # vLLM's metrics have no label for the app
        chosen.insert(0, 'application=~"$app"')
        chosen += [
            f'{name}=~"${name}"' for name in ("slo_class", "worker") if name in metric.labels
        ]
    return series(metric, *chosen, *matchers, part=part)


def of_workers(metric: Metric | VllmMetric, *matchers: str, part: str = "") -> str:
    """The selected series of a metric that workers export, labelled with their replica's id."""
    return shown(metric, 'replica=~"$worker"', *matchers, part=part)


def rate(counter: str, window: str = RATE_INTERVAL) -> str:
    """How fast a counter grows, per second."""
    return f"rate({counter}[{window}])"


def grown(counter: str, window: str) -> str:
    """How much a counter grew within a window; its first increment counts if it began at zero."""
    return f"increase({counter}[{window}])"


def total(expr: str, *by: str) -> str:
    """The sum over all labels except `by`."""
    return _aggregated("sum", expr, by)


def largest(expr: str, *by: str) -> str:
    """The largest value over all labels except `by`."""
    return _aggregated("max", expr, by)


def smallest(expr: str, *by: str) -> str:
    """The smallest value over all labels except `by`."""
    return _aggregated("min", expr, by)


def number(expr: str, *by: str) -> str:
    """The number of series over all labels except `by`."""
    return _aggregated("count", expr, by)


def _aggregated(operator: str, expr: str, by: tuple[str, ...]) -> str:
    return f"{operator} by ({', '.join(by)}) ({expr})" if by else f"{operator}({expr})"


def quantile(share: float, buckets: str, *by: str) -> str:
    """A quantile of a histogram's recent values; `buckets` are its `_bucket` series."""
    return f"histogram_quantile({share:g}, {total(rate(buckets), 'le', *by)})"


def ratio(part: str, whole: str) -> str:
    """`part` over `whole`, by label: 0 if `part` has no series yet, no value if `whole` is 0."""
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def share(part: str, *by: str) -> str:
    """Each series' share of the total, by the labels `by`."""
    return f"{total(part, *by)} / on () group_left () ({total(part)} > 0)"
