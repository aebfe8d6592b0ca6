"""Asks Prometheus, by its HTTP API."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx

from cluster.errors import XYServeError
from cluster.observe.dashboards.promql import RATE_INTERVAL

TIMEOUT_S = 30.0


class PrometheusFailed(XYServeError):
    """Prometheus cannot be asked, or did not understand."""

    status = 502


@dataclass(frozen=True, slots=True)
class Period:
    """The time that a query is about, in seconds since the epoch."""

    begin_s: float
    end_s: float
    step_s: float
    """Between two points."""
    rate_interval: str = "1m"
    """Takes the place of Grafana's variable: some times the interval of scraping."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series of an answer."""

    labels: Mapping[str, str]
    points: Mapping[float, float]
    """Value by time; no entry where there is none."""

    def legend(self, template: str) -> str:
        """Its name, with the values of its labels put into `template`."""
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
        """The series that an expression gives now, each with one point."""
        found = self._get("query", {"query": _filled(expr, rate_interval)})
        return [Line(one["metric"], _points([one["value"]])) for one in found["result"]]

    def query_range(self, expr: str, period: Period) -> list[Line]:
        """The series that an expression gives over a time, without those that have no number."""
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
                f"what answers at {self.url} is no Prometheus (HTTP {answer.status_code}, no "
                "JSON); give its address with --prometheus"
            ) from error
        if not isinstance(document, dict) or document.get("status") != "success":
            reason = document.get("error") if isinstance(document, dict) else None
            raise PrometheusFailed(
                f"Prometheus at {self.url} did not answer ({reason or answer.status_code}): "
                f"{params['query']}"
            )
        data: dict[str, Any] = document["data"]
        return data


def _filled(expr: str, rate_interval: str) -> str:
    """An expression with all of the cluster in the place of Grafana's variables."""
    return re.sub(r"\$\w+", ".*", expr.replace(RATE_INTERVAL, rate_interval))


def _points(values: list[tuple[float, str]]) -> dict[float, float]:
    numbers = {time_s: float(text) for time_s, text in values}
    return {time_s: value for time_s, value in numbers.items() if abs(value) < float("inf")}
