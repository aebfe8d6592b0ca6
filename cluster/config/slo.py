"""Service classes and their targets, as configured."""

import re
from dataclasses import dataclass, field

CLASS_NAME = re.compile(r"[A-Za-z0-9._-]+")
"""Valid names of classes; they are sent in HTTP headers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClass:
    """The targets that all requests of one class have."""

    __pydantic_config__ = {"extra": "forbid"}

    ttft_ms: float | None = None
    """Target of the time to the first token, in milliseconds; null: none."""
    tpot_ms: float | None = None
    """Target of the time per output token after the first, in milliseconds; null: none."""

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
    """The service classes of the app: targets that requests choose by name."""

    __pydantic_config__ = {"extra": "forbid"}

    default: str = "standard"
    """Service class of the requests that name none."""
    classes: dict[str, SloClass] = field(default_factory=dict)
    """Service classes by name, in addition to the built-in `interactive`, `standard` and `batch`;
    one of the same name replaces a built-in class as a whole."""

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
