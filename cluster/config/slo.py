"""Service classes and their targets, as configured."""

import re
from dataclasses import dataclass, field

CLASS_NAME = re.compile(r"[A-Za-z0-9._-]+")
"""Valid names of classes; they are sent in HTTP headers."""


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
            if value is not None and not value / 1000 > 0:  # NaN is not positive either
                raise ValueError(f"{name} ({value}) must be positive, or null for no target")


BUILT_IN_CLASSES = {
    "interactive": SloClass(ttft_ms=1000, tpot_ms=100),
    "standard": SloClass(ttft_ms=10_000, tpot_ms=250),
    "batch": SloClass(),
}
"""The classes that every app has, unless its config redefines them."""


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
                    f"classes: {name!r} cannot name a class; use letters, digits and . _ -"
                )
        if self.default not in self.all_classes:
            raise ValueError(
                f"default ({self.default}) is not a service class; use one of {self.known_classes}"
            )

    @property
    def all_classes(self) -> dict[str, SloClass]:
        """The configured classes and the built-in ones they do not replace, by name."""
        return BUILT_IN_CLASSES | self.classes

    @property
    def known_classes(self) -> str:
        """The names of all classes, for messages."""
        return ", ".join(sorted(self.all_classes))
