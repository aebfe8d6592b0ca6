"""A client of Prometheus' HTTP API."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx

from cluster.errors import XYServeError
from cluster.observe.dashboards.promql import RATE_INTERVAL

TIMEOUT_S = 30.0
"""Limit for one query, so that a server that never answers is an error."""


class PrometheusFailed(XYServeError):
    """Prometheus cannot be reached, or rejected a query."""

    status = 502


@dataclass(frozen=True, slots=True)
class Period:
    """The period that a query covers, in seconds since the epoch."""

    begin_s: float
    end_s: float
    step_s: float
    """Time between two points."""
    rate_interval: str = "1m"
    """Value for Grafana's variable: several scrape intervals."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a response."""

    labels: Mapping[str, str]
    points: Mapping[float, float]
    """Values by time; times without a value are left out."""

    def legend(self, template: str) -> str:
        """The series' name: `template` with the values of its labels filled in."""
        return re.sub(r"{{(\w+)}}", lambda match: self.labels.get(match[1], ""), template)


class Prometheus:
    """One server."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(timeout=TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def query(self, expr: str, rate_interval: str = "1m") -> list[Line]:
        """The current value of each series of an expression."""
        found = self._get("query", {"query": _filled(expr, rate_interval)})
        return [Line(one["metric"], _points([one["value"]])) for one in found["result"]]

    def query_range(self, expr: str, period: Period) -> list[Line]:
        """The series of an expression over a period, without those that have no number."""
        found = self._get(
            "query_range",
            {
                "query": _filled(expr, period.rate_interval),
                "start": f"{period.begin_s:.3f}",
                "end": f"{period.end_s:.3f}",
                "step": f"{period.step_s:g}",
            },
        )
        lines = [Line(one["metric"], _points(one["values"])) for one in found["result"]]
        return [line for line in lines if line.points]

    def _get(self, path: str, params: dict[str, str]) -> dict[str, Any]:
        url = f"{self.url}/api/v1/{path}"
        try:
            answer = self._http.get(url, params=params)
            document = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PrometheusFailed(
                f"no Prometheus answers at {self.url} ({error}); start one with `prometheus "
                "--config.file=deploy/prometheus.yml`, or give another address with --prometheus"
            ) from error
        except ValueError as error:
            raise PrometheusFailed(
                f"the server at {self.url} is not a Prometheus (HTTP {answer.status_code}, no "
                "JSON); give its address with --prometheus"
            ) from error
        if not isinstance(document, dict) or document.get("status") != "success":
            reason = document.get("error") if isinstance(document, dict) else None
            raise PrometheusFailed(
                f"Prometheus at {self.url} rejected a query ({reason or answer.status_code}): "
                f"{params['query']}"
            )
        data: dict[str, Any] = document["data"]
        return data


def _filled(expr: str, rate_interval: str) -> str:
    """An expression with Grafana's variables replaced, so that it covers the whole cluster."""
    return re.sub(r"\$\w+", ".*", expr.replace(RATE_INTERVAL, rate_interval))


def _points(values: list[tuple[float, str]]) -> dict[float, float]:
    numbers = {time_s: float(text) for time_s, text in values}
    return {time_s: value for time_s, value in numbers.items() if abs(value) < float("inf")}
