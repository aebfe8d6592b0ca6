"""Who may call the app, and what each tenant may use."""

import ipaddress
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.keys import Right
from scheduler.quota import Quota

TENANT_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Valid names of tenants; they are labels of metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """Who may call the HTTP API. Without keys, only programs on the machines of its proxies."""

    __pydantic_config__ = {"extra": "forbid"}

    keys_file: str | None = None
    """File with the hashes of the API keys, of `xyserve keys add`, on each node of an ingress;
    changes are read within seconds. null: no keys, and callers on loopback only."""
    anonymous: tuple[Right, ...] = ()
    """Rights of all callers that show no key, wherever they are: `[metrics]`, for example, or
    `[infer, metrics]` where something else guards the app."""

    def __post_init__(self) -> None:
        if self.keys_file is not None and not self.path.is_absolute():
            raise ValueError(
                f"keys_file ({self.keys_file}) must be an absolute path or begin with ~: an "
                "ingress runs in a folder of its own"
            )

    @property
    def path(self) -> Path:
        """The file with the keys."""
        assert self.keys_file
        return Path(self.keys_file).expanduser()


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantConfig:
    """What one tenant may use."""

    __pydantic_config__ = {"extra": "forbid"}

    requests_per_minute: float | None = None
    """Calls per minute; null: any number."""
    tokens_per_minute: float | None = None
    """Prompt and output tokens per minute; null: any number."""
    max_concurrency: int | None = None
    """Calls at the same time; null: any number."""
    burst_s: float = 3.0
    """What a quiet tenant saves up, in seconds of its rates; at least one call."""
    private_cache: bool = False
    """Whether its prompts share no prefix cache with those of others, who could otherwise tell by
    the time to first token what it has asked before."""
    weight: float = 1.0
    """Its part of busy workers' time, relative to other tenants that wait for them; what one does
    not use is the others'."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "max_concurrency"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:  # NaN is not positive either
                raise ValueError(f"{name} ({value}) must be positive, or null for no quota")
        for name in ("burst_s", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")

    @property
    def quota(self) -> Quota:
        """The same by the second."""
        return Quota(
            _per_s(self.requests_per_minute),
            _per_s(self.tokens_per_minute),
            math.inf if self.max_concurrency is None else self.max_concurrency,
            self.burst_s,
        )

    def explain(self, lacking: str) -> str:
        """The key and the value of a quota, by its field of `Quota`."""
        key = lacking.replace("_per_s", "_per_minute")
        return f"{key} is {getattr(self, key):g}"


def _per_s(per_minute: float | None) -> float:
    return math.inf if per_minute is None else per_minute / 60


def check_tenants(tenants: Iterable[str]) -> None:
    """Raise ValueError for a name that no tenant can have."""
    for name in tenants:
        if not TENANT_NAME.fullmatch(name):
            raise ValueError(
                f"tenants: {name!r} cannot name a tenant; use at most 64 letters, digits and . _ -"
            )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means the machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
