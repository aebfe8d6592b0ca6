"""How requests are placed on workers."""

from dataclasses import dataclass, field
from typing import Literal

from scheduler.admission import Admission


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """The GlobalScheduler's choice of workers."""

    __pydantic_config__ = {"extra": "forbid"}

    policy: Literal["predicted", "least_tokens"] = "predicted"
    """What decides where a request goes: `predicted`, its time to first token, given what waits and
    what is cached on each worker, or `least_tokens`, the fewest tokens outstanding, for comparison.
    """
    stage_policy: bool = False
    """Whether the GlobalScheduler bounds the share of prefills in each worker's steps, and its
    drafts, from the view of all; it needs the step policy `hybrid`."""
    admission: Admission = field(default_factory=Admission)
    """Which requests are refused at once, by 503 with `Retry-After`; with `predicted` only."""
    record: str | None = None
    """Path of a record of all placements, written on the GlobalScheduler's node for
    `xyserve replay`, up to 1 GiB; null: no record."""
    learn_output_lengths: bool = True
    """Whether to learn from the requests that end how many tokens others of their tenant and kind
    will give; false: each is taken to need its `max_tokens`."""
