"""Where the app's actors run: on which of Ray's nodes."""

import re
from dataclasses import dataclass, field, fields

LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
"""A value of a label, as Ray takes it; it takes others for conditions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesConfig:
    """Labels that a node must have to run each kind of actor, as of `ray start --labels`."""

    __pydantic_config__ = {"extra": "forbid"}

    ingress: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes of ingresses, such as `{tier: front}`; `{}`: any node."""
    global_scheduler: dict[str, str] = field(default_factory=dict)
    """Labels of the node of the GlobalScheduler."""
    worker: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes of workers."""
    draft_worker: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes of draft workers."""

    def __post_init__(self) -> None:
        for role in fields(self):
            for label, value in getattr(self, role.name).items():
                if not LABEL.fullmatch(value):
                    raise ValueError(
                        f"{role.name}.{label} ({value!r}) must be a label's value: letters, "
                        "digits and ., _ or - between them"
                    )
