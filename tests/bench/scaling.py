"""A day of ServeGen's requests on a fleet that is scaled by predicted work, by Ray Serve, or not.

    python -m tests.bench.scaling --json scaling.json

A simulation of its own, coarser than `xyserve simulate`: in each half second a worker makes steps
of `BASE_S` and `DECODE_S` for each request that decodes, and prefills with the rest of the time
that `PACE_S` leaves, first come, first served, `PREFILL_S` a token. Nothing is cached, no KV cache
is full, and all requests that decode get equally many tokens. A worker takes requests `--start-s`
after it was ordered, and is paid for from then until the last of its requests has ended. Requests
go to the worker with the least predicted work left. A request meets its targets if its first token
comes within `TTFT_S` and three times the time that its prefill takes alone, and the others within
`TPOT_S` each on average.

`scaling.Scaling` sees what it would see live: predicted lengths of outputs, learned on the way,
with the time of a token in a full prefill step for each token. Serve's policy sees the requests in
flight, mean of 30 s, decides every 10 s, and has its default delays of 30 s up and 600 s down; it
is run with several `target_ongoing_requests`, as nobody knows the right one. `fixed N` are N
workers all day.

Columns: `attained` is the share of the requests that met their targets, `worst hour` that of the
worst hour, `hours` worker-hours, `changes` changes of the number wanted.

Keys of the summary: `TRACE_attained` and `TRACE_hours` of ours; `TRACE_saved_fixed` and
`TRACE_saved_serve`, the share of the hours saved against the cheapest fixed fleet, and the cheapest
setting of Serve's policy, that attains at least as much; -1 if none does.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from scheduler.output_length import OutputLengths
from scheduler.scaling import Scaling, ScalingObservation, ScalingSettings
from scheduler.simulation.arrivals import Arrival, with_max_tokens
from scheduler.simulation.servegen import draw_servegen
from tests.bench.output_length import in_order
from tests.bench.report import make_parser, publish, say_row
from tests.workload import find_trace, has_traces

TICK_S = 0.5
BASE_S, DECODE_S, PREFILL_S = 0.02, 0.0006, 0.0005
MAX_NUM_SEQS = 128
TTFT_S, TPOT_S = 2.0, 0.1
PACE_S = 0.8 * TPOT_S
"""Time between the tokens of a request while others prefill."""
MAX_TOKENS = 4096
MAX_WORKERS, FIRST_WORKERS = 40, 6
HOUR_S = 3600.0


@dataclass(slots=True)
class Job:
    """A request in the fleet."""

    arrival: Arrival
    work_s: float
    """Predicted seconds of full steps."""
    left_s: float
    """Seconds of its prefill that are left."""
    first_s: float = math.nan

    @property
    def due_s(self) -> float:
        """Time of its first token at the latest."""
        alone_s = PREFILL_S * self.arrival.request.num_prompt_tokens
        return self.arrival.arrival_s + TTFT_S + 3 * alone_s


@dataclass(slots=True)
class SimulatedWorker:
    """One worker."""

    ready_s: float
    waiting: deque[Job] = field(default_factory=deque)
    decoding: list[tuple[float, int, Job]] = field(default_factory=list)
    """Heap by the number of tokens after which each is done, as `num_tokens` counts."""
    num_tokens: float = 0.0
    """Tokens that a request would have got which decoded from the beginning."""
    outstanding_s: float = 0.0
    draining: bool = False

    @property
    def num_requests(self) -> int:
        """Requests that it has."""
        return len(self.waiting) + len(self.decoding)

    def tick(self, now: float, serial: "itertools.count[int]") -> list[tuple[Job, float]]:
        """Compute for `TICK_S`; the requests that ended, with their times."""
        if not self.num_requests:
            return []
        step_s = BASE_S + DECODE_S * len(self.decoding)
        left_s = TICK_S
        if self.waiting and len(self.decoding) < MAX_NUM_SEQS:
            # Steps as few as the targets allow, and prefills in all that is left of the time.
            left_s = max(TICK_S - step_s * TICK_S / PACE_S, 0.0) if self.decoding else TICK_S
            spent_s = 0.0
            while self.waiting and len(self.decoding) < MAX_NUM_SEQS and spent_s < left_s:
                job = self.waiting[0]
                took_s = min(job.left_s, left_s - spent_s)
                spent_s, job.left_s = spent_s + took_s, job.left_s - took_s
                if job.left_s <= 0:
                    self.waiting.popleft()
                    job.first_s = now + spent_s / left_s * TICK_S
                    done_at = self.num_tokens + job.arrival.num_output_tokens
                    heapq.heappush(self.decoding, (done_at, next(serial), job))
            left_s = TICK_S - spent_s
        before = self.num_tokens
        self.num_tokens += left_s / (BASE_S + DECODE_S * len(self.decoding))
        ended = []
        while self.decoding and self.decoding[0][0] <= self.num_tokens:
            done_at, _, job = heapq.heappop(self.decoding)
            part = (done_at - before) / (self.num_tokens - before)
            ended.append((job, max(now + part * TICK_S, job.first_s)))
            self.outstanding_s -= job.work_s
        return ended


class Policy(Protocol):
    """Decides on the number of workers."""

    def wanted(self, fleet: "Fleet", now: float) -> int:
        """The number from now on; asked once per `TICK_S`."""


class Fleet:
    """Workers and their requests."""

    def __init__(self, policy: Policy, num_workers: int, start_s: float) -> None:
        self.workers = [SimulatedWorker(0.0) for _ in range(num_workers)]
        self.offered_s = 0.0
        """Predicted work of all requests that came."""
        self.num_judged = self.num_met = 0
        self.num_wanted = num_workers
        self.num_changes = 0
        self.worker_s = 0.0
        self.by_hour: dict[int, list[bool]] = {}
        self._policy = policy
        self._start_s = start_s
        self._serial = itertools.count()

    def run(self, arrivals: list[tuple[Arrival, float]]) -> None:
        """Serve all arrivals, whose predicted work is known."""
        coming = deque(arrivals)
        for tick in itertools.count():
            now = tick * TICK_S
            while coming and coming[0][0].arrival_s < now + TICK_S:
                self._place(*coming.popleft(), now)
            for worker in self.workers:
                for job, ended_s in worker.tick(now, self._serial):
                    self._end(job, ended_s)
            if not coming and not any(worker.num_requests for worker in self.workers):
                return
            self._scale(self._policy.wanted(self, now), now)
            self.workers = [w for w in self.workers if w.num_requests or not w.draining]
            self.worker_s += TICK_S * len(self.workers)

    def ready(self, now: float) -> list[SimulatedWorker]:
        """Workers that take requests."""
        return [w for w in self.workers if w.ready_s <= now and not w.draining]

    def _place(self, arrival: Arrival, work_s: float, now: float) -> None:
        self.offered_s += work_s
        worker = min(self.ready(now), key=lambda worker: worker.outstanding_s)
        prefill_s = PREFILL_S * arrival.request.num_prompt_tokens
        worker.waiting.append(Job(arrival, work_s, prefill_s))
        worker.outstanding_s += work_s

    def _end(self, job: Job, ended_s: float) -> None:
        num_tokens = job.arrival.num_output_tokens
        # Within a tick nobody knows when what was computed.
        tpot_s = (ended_s - job.first_s - TICK_S) / max(num_tokens - 1, 1)
        met = job.first_s <= job.due_s and tpot_s <= TPOT_S
        self.num_judged += 1
        self.num_met += met
        self.by_hour.setdefault(int(job.arrival.arrival_s / HOUR_S), []).append(met)

    def _scale(self, num_wanted: int, now: float) -> None:
        self.num_changes += num_wanted != self.num_wanted
        self.num_wanted = num_wanted
        staying = [worker for worker in self.workers if not worker.draining]
        for _ in range(num_wanted - len(staying)):
            self.workers.append(SimulatedWorker(now + self._start_s))
        # Serve stops those first that have not started, then any.
        staying.sort(key=lambda worker: (worker.ready_s <= now, worker.num_requests))
        for worker in staying[: max(len(staying) - num_wanted, 0)]:
            worker.draining = True


class Ours:
    """`Scaling`, asked once a second."""

    def __init__(self) -> None:
        self._scaling = Scaling(ScalingSettings(max_workers=MAX_WORKERS))
        self._seen = (0.0, 0, 0)
        self._next_s = 0.0

    def wanted(self, fleet: Fleet, now: float) -> int:
        """The number from now on."""
        if now < self._next_s:
            return fleet.num_wanted
        self._next_s = now + 1
        offered_s, num_judged, num_met = self._seen
        self._seen = (fleet.offered_s, fleet.num_judged, fleet.num_met)
        waiting = [job for worker in fleet.workers for job in worker.waiting]
        decision = self._scaling.wanted(
            ScalingObservation(
                fleet.offered_s - offered_s,
                len(fleet.ready(now)),
                sum(job.left_s for job in waiting),
                TTFT_S if waiting else math.inf,
                fleet.num_judged - num_judged,
                fleet.num_met - num_met,
            ),
            now,
        )
        return decision.num_wanted if decision else fleet.num_wanted


class Serves:
    """Ray Serve's own policy, with its default delays."""

    UP_S, DOWN_S, LOOK_BACK_S, PERIOD_S = 30.0, 600.0, 30.0, 10.0

    def __init__(self, target_ongoing_requests: float) -> None:
        self._target = target_ongoing_requests
        self._ongoing: deque[int] = deque(maxlen=round(self.LOOK_BACK_S / TICK_S))
        self._since: tuple[int, float] | None = None
        """Direction of the change that it waits to make, and since when."""
        self._next_s = 0.0

    def wanted(self, fleet: Fleet, now: float) -> int:
        """The number from now on."""
        self._ongoing.append(sum(worker.num_requests for worker in fleet.workers))
        if now < self._next_s:
            return fleet.num_wanted
        self._next_s = now + self.PERIOD_S
        ongoing = sum(self._ongoing) / len(self._ongoing)
        desired = min(max(math.ceil(ongoing / self._target), 1), MAX_WORKERS)
        direction = (desired > fleet.num_wanted) - (desired < fleet.num_wanted)
        if not direction:
            self._since = None
            return fleet.num_wanted
        if self._since is None or self._since[0] != direction:
            self._since = direction, now
        if now - self._since[1] < (self.UP_S if direction > 0 else self.DOWN_S):
            return fleet.num_wanted
        self._since = None
        return desired


class Fixed:
    """Always as many as at the beginning."""

    def wanted(self, fleet: Fleet, now: float) -> int:
        """The number from now on."""
        return fleet.num_wanted


def read(trace: str, rate_rps: float, duration_s: float) -> list[tuple[Arrival, float]]:
    """The requests of a trace from its busiest ten minutes on, which have `rate_rps`, each with its
    predicted work."""
    drawn = draw_servegen(find_trace(trace), rate_rps=rate_rps, duration_s=duration_s)
    lengths, works = OutputLengths(), {}
    for ended, arrival in in_order(with_max_tokens(drawn, MAX_TOKENS), TPOT_S):
        request = arrival.request
        if ended:
            lengths.observe(request, arrival.num_output_tokens)
        else:
            num_tokens = request.num_prompt_tokens + lengths.predict(request).mean
            works[request.request_id] = (arrival, PREFILL_S * num_tokens)
    return [*works.values()]


def serve(
    name: str,
    policy: Policy,
    num_workers: int,
    start_s: float,
    arrivals: list[tuple[Arrival, float]],
) -> dict[str, Any]:
    """The figures of one fleet."""
    fleet = Fleet(policy, num_workers, start_s)
    fleet.run(arrivals)
    worst = min(sum(met) / len(met) for met in fleet.by_hour.values() if len(met) >= 100)
    return {
        "fleet": name,
        "attained": fleet.num_met / fleet.num_judged,
        "worst hour": worst,
        "hours": fleet.worker_s / HOUR_S,
        "changes": fleet.num_changes,
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--rate", type=float, default=16.0, help="requests/s in the busiest window")
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--start-s", type=float, default=60.0)
    parser.add_argument("--trace", nargs="+", default=["servegen_m_small_arrivals"])
    options = parser.parse_args()
    if not has_traces():
        raise SystemExit("needs the traces; see tests/README.md, Data")
    rows, summary = [], {}
    for trace in options.trace:
        arrivals = read(trace, options.rate, options.hours * HOUR_S)
        name = trace.removesuffix("_arrivals")
        found: list[dict[str, Any]] = []

        def add(fleet: str, make: Callable[[], Policy], num_workers: int) -> dict[str, Any]:
            row = serve(fleet, make(), num_workers, options.start_s, arrivals)  # noqa: B023
            found.append({"trace": name} | row)  # noqa: B023
            say_row(found[-1])  # noqa: B023
            return row

        ours = add("by predicted work", Ours, FIRST_WORKERS)
        for num_workers in itertools.count(1):
            row = add(f"fixed {num_workers}", Fixed, num_workers)
            if row["attained"] >= max(ours["attained"], 0.99) or num_workers == MAX_WORKERS:
                break
        for target in (1, 2, 3, 4, 8, 16, 32):
            add(f"Serve, {target} ongoing", lambda t=target: Serves(t), FIRST_WORKERS)  # type: ignore[misc]
        summary[f"{name}_attained"] = ours["attained"]
        summary[f"{name}_hours"] = ours["hours"]
        for kind in ("fixed", "Serve"):
            as_good = [
                row["hours"]
                for row in found
                if row["fleet"].startswith(kind) and row["attained"] >= ours["attained"] - 0.001
            ]
            saved = 1 - ours["hours"] / min(as_good) if as_good else -1.0
            summary[f"{name}_saved_{kind.lower()}"] = saved
        rows += found
    publish("A day on a fleet that is scaled", rows, summary, options.json)


if __name__ == "__main__":
    main()
