"""Service classes: which targets a request has, by its class or by numbers of its own."""

import contextvars
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple

from cluster.errors import RequestFailed
from scheduler.request import Slo

CLASS_NAME = re.compile(r"[A-Za-z0-9._-]+")
"""What a class may be called: its name travels in headers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClass:
    """The targets that the requests of one class share; None where there is none."""

    __pydantic_config__ = {"extra": "forbid"}

    ttft_ms: float | None = None
    """Time to the first token, in milliseconds."""
    tpot_ms: float | None = None
    """Time per output token after the first, in milliseconds."""

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms"):
            value = getattr(self, name)
            if value is not None and not value / 1000 > 0:  # NaN is not either
                raise ValueError(f"{name} ({value}) must be positive, or null for no target")


BUILT_IN_CLASSES = {
    "interactive": SloClass(ttft_ms=1000, tpot_ms=100),
    "standard": SloClass(ttft_ms=10_000, tpot_ms=250),
    "batch": SloClass(),
}
"""The classes of every app, unless its config gives the name another meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SloConfig:
    """The service classes of the app."""

    __pydantic_config__ = {"extra": "forbid"}

    default: str = "standard"
    """Class of the requests that name none."""
    classes: dict[str, SloClass] = field(default_factory=dict)
    """Classes by name; they come beside the built-in ones, or replace those of the same name."""

    def __post_init__(self) -> None:
        for name in self.classes:
            if not CLASS_NAME.fullmatch(name):
                raise ValueError(
                    f"classes: {name!r} cannot be a class's name; use letters, digits and . _ -"
                )
        object.__setattr__(self, "classes", BUILT_IN_CLASSES | self.classes)
        if self.default not in self.classes:
            raise ValueError(
                f"default ({self.default}) is no service class; known are {self.known_classes}"
            )

    @property
    def known_classes(self) -> str:
        """The names of all classes, for messages."""
        return ", ".join(sorted(self.classes))


@dataclass(frozen=True, slots=True)
class Targets:
    """What one request is held to, and the class that it came in."""

    slo: Slo
    slo_class: str


NO_TARGETS = Targets(Slo(), "")


class Names(NamedTuple):
    """What a request's class and targets are called where it brings them."""

    slo_class: str
    ttft_ms: str
    tpot_ms: str


HEADERS = Names("x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms")
"""Of an HTTP request."""

PARAMETERS = Names("slo_class", "slo_ttft_ms", "slo_tpot_ms")
"""Of a call of the client handle."""

NO_TARGET = ("none", "inf")
"""Values that lift the target of the class."""

current_targets = contextvars.ContextVar("current_targets", default=NO_TARGETS)
"""Targets of the call that is being answered; vLLM's code between has no place for them."""


def read_targets(config: SloConfig, given: Mapping[str, Any], names: Names) -> Targets:
    """The targets of a request: those of its class but for the numbers it brings itself.

    `given` holds what it brought under `names`, None counting as nothing. RequestFailed names
    what cannot be used, and the remedy.
    """
    name = given.get(names.slo_class)
    name = config.default if name is None else _text(name)
    if (slo_class := config.classes.get(name)) is None:
        raise _refusal(
            f"{names.slo_class}: {name!r:.80} is no service class; known are {config.known_classes}"
        )
    return Targets(
        Slo(
            ttft_s=_target_s(given, names.ttft_ms, slo_class.ttft_ms),
            tpot_s=_target_s(given, names.tpot_ms, slo_class.tpot_ms),
        ),
        name,
    )


def _target_s(given: Mapping[str, Any], name: str, of_class_ms: float | None) -> float:
    if (value := given.get(name)) is None:
        return _seconds(of_class_ms)
    text = _text(value)
    if text.strip().lower() in NO_TARGET:
        return math.inf
    try:
        seconds = _seconds(float(text))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise _refusal(
            f"{name}: {text!r:.80} is no target; give a positive number of milliseconds, or "
            "`none` for no target"
        )
    return seconds


def _seconds(ms: float | None) -> float:
    return math.inf if ms is None else ms / 1000


def _text(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(value).__name__}"


def _refusal(message: str) -> RequestFailed:
    return RequestFailed(message, HTTPStatus.BAD_REQUEST)
