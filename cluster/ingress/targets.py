"""Service classes: which targets a request has, by its class or by numbers of its own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from cluster.config.slo import SloConfig
from cluster.errors import RequestFailed
from cluster.ingress.protocol import Names
from scheduler.request import Slo


@dataclass(frozen=True, slots=True)
class Targets:
    """The service level objectives of one request, and the class that it came in."""

    slo: Slo
    slo_class: str
    is_named: bool = False
    """Whether the client asks for them, or for the class; otherwise they are the default."""


NO_TARGETS = Targets(Slo(), "")

NO_TARGET = ("none", "inf")
"""Values that lift the target of the class."""


def read_targets(config: SloConfig, given: Mapping[str, Any], names: Names) -> Targets:
    """The targets of a request: the numbers it gives, otherwise those of its class.

    `given` holds the call's headers or parameters, called `names`; None counts as absent.
    RequestFailed names the value that cannot be used, and the remedy.
    """
    name = given.get(names.slo_class)
    is_named = any(
        given.get(one) is not None for one in (names.slo_class, names.ttft_ms, names.tpot_ms)
    )
    name = config.default if name is None else _text(name)
    if (slo_class := config.all_classes.get(name)) is None:
        raise _refusal(
            f"{names.slo_class}: {name!r:.80} is no service class; known are {config.known_classes}"
        )
    return Targets(
        Slo(
            ttft_s=_target_s(given, names.ttft_ms, slo_class.ttft_ms),
            tpot_s=_target_s(given, names.tpot_ms, slo_class.tpot_ms),
        ),
        name,
        is_named,
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
