"""Our placement with fair shares of tenants, as the GlobalScheduler has them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from scheduler.fair_shares import FairShares, device_time, yielding
from scheduler.fleet import Fleet
from scheduler.placement import Placed, RefusalReason, Refused, WorkerLoad, place
from scheduler.request import Request
from scheduler.simulation.placers import RETRY_S


@dataclass(slots=True)
class FairPlacer:
    """Where it is on time, harms nobody and takes least, once it is the turn of its tenant."""

    shares: FairShares = field(default_factory=FairShares)
    token_s: float | None = None
    """Seconds of a token in a full step."""
    num_asked: int = 0
    """Requests that asked, again or not."""

    def choose(
        self, request: Request, loads: Sequence[WorkerLoad], fleet: Fleet, now: float
    ) -> Placed | Refused:
        """The worker that gets a request, or when it is to ask again."""
        self.num_asked += 1
        yields = self.shares.yields(request, now)
        request = yielding(request, yields)
        loads = [replace(load, token_s=self.token_s) for load in loads]
        ranked = fleet.loads_for(request, loads, now)
        if (wait_s := self.shares.wait_s(request, ranked, now)) is not None:
            return self.shares.wait(request, wait_s, now)
        if (placement := place(request, ranked)) is None:
            return Refused(RefusalReason.NO_WORKER, RETRY_S)
        chosen = placement.chosen
        self.shares.place(request, chosen.worker_id, device_time(request, chosen), now)
        return Placed(chosen.worker_id, yields=yields)

    def report(
        self, worker_id: str, live: Collection[str], ended: Mapping[str, int], now: float
    ) -> None:
        """Settle what requests took that have ended."""
        for request_id, num_tokens in ended.items():
            self.shares.end(request_id, num_tokens)
        self.shares.sweep(worker_id, live, now)
