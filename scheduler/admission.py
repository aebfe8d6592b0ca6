"""Which requests are refused at once, because they could not be served in time."""

import math
from dataclasses import dataclass

from scheduler.placement import Placement, RefusalReason, Refused
from scheduler.request import Request

MIN_RETRY_S = 1.0
"""Shortest time after which a refused client is asked to come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """The rule by which requests are refused.

    A request that would be late is of no use to its client, and what it takes is missing for
    others. One that is not refused is served, however late it gets.
    """

    __pydantic_config__ = {"extra": "forbid"}

    refuse_late: bool = True
    """Whether requests are refused whose first token is predicted to come too late on all
    workers."""
    refuse_unnamed: bool = False
    """Whether that holds for requests of the default class too that do not name it; otherwise those
    wait, as ones without a target do."""
    in_time: float = 0.75
    """Share that the predicted wait for a request's turn is of the wait that is reckoned with. The
    rest is for those that come later and take less: workers serve them first if not all can be on
    time."""
    max_queue_s: float = 300.0
    """Predicted seconds to the first token beyond which a request without a target is refused."""

    def __post_init__(self) -> None:
        if not 0 < self.in_time <= 1:
            raise ValueError(f"in_time ({self.in_time}) must be above 0 and at most 1")
        if not self.max_queue_s > 0:
            raise ValueError(f"max_queue_s ({self.max_queue_s}) must be positive")

    def refusal(
        self, request: Request, placement: Placement, wait_s: float = 0.0
    ) -> Refused | None:
        """Why a request is not served where it would be served best, after a wait for its turn;
        None if it is.

        One that was taken in before is not refused.
        """
        forecast = placement.chosen.forecast
        if not self.refuse_late or request.num_attempts:
            return None
        if forecast is None or not forecast.is_measured:
            return None
        ttft_s = forecast.ttft_s + wait_s
        is_strict = request.names_slo or self.refuse_unnamed
        target_s, in_time = self.max_queue_s, 1.0
        if is_strict and request.slo.ttft_s < target_s:
            target_s, in_time = request.slo.ttft_s, self.in_time
        excess_s = ttft_s + (forecast.wait_s + wait_s) * (1 / in_time - 1) - target_s
        if excess_s <= 0 and not (is_strict and forecast.is_late):
            return None
        if forecast.prefill_s > target_s:
            return Refused(
                RefusalReason.TOO_LONG,
                MIN_RETRY_S,
                f"its first token takes {forecast.prefill_s:.2g} s on an idle worker",
            )
        return Refused(
            RefusalReason.OVERLOAD,
            math.ceil(max(excess_s * in_time, MIN_RETRY_S)),
            f"its first token is predicted in {ttft_s:.2g} s",
        )
