"""How an app logs and traces, as configured."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """The logs of the replicas."""

    __pydantic_config__ = {"extra": "forbid"}

    format: Literal["text", "json"] = "text"
    """Format of the lines, one per event: `key=value` for people, or one JSON object for
    machines."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum level of the events that are logged; `debug` includes every request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingConfig:
    """The export of OpenTelemetry spans by OTLP."""

    __pydantic_config__ = {"extra": "forbid"}

    endpoint: str
    """URL of a collector, for example `http://127.0.0.1:4318/v1/traces`; with gRPC `host:4317`."""
    protocol: Literal["http", "grpc"] = "http"
    """Transport of OTLP: protobuf over HTTP, or gRPC."""
    sample_ratio: float = 1.0
    """Fraction of the calls to trace, from 0 to 1, where the client's `traceparent` does not
    decide."""

    def __post_init__(self) -> None:
        if not self.endpoint:
            raise ValueError("endpoint is empty; give a collector's URL or leave tracing out")
        if not 0 <= self.sample_ratio <= 1:
            raise ValueError(f"sample_ratio ({self.sample_ratio}) must be from 0 to 1")
