"""How an app logs and traces, as configured."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What replicas log, and how."""

    __pydantic_config__ = {"extra": "forbid"}

    format: Literal["text", "json"] = "text"
    """One event a line: for people, or one JSON object for machines."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important events that are logged; `debug` has each request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingConfig:
    """Where spans go, by OTLP."""

    __pydantic_config__ = {"extra": "forbid"}

    endpoint: str
    """URL of a collector, e.g. `http://127.0.0.1:4318/v1/traces`, or `host:4317` with gRPC."""
    protocol: Literal["http", "grpc"] = "http"
    """OTLP over HTTP with protobuf, or over gRPC."""
    sample_ratio: float = 1.0
    """Share of the calls that are traced, of those whose client does not decide it."""

    def __post_init__(self) -> None:
        if not self.endpoint:
            raise ValueError("endpoint is empty; give a collector's URL or leave tracing out")
        if not 0 <= self.sample_ratio <= 1:
            raise ValueError(f"sample_ratio ({self.sample_ratio}) must be from 0 to 1")
