"""A discrete-event simulation of a cluster around the live schedulers.

    result = simulate(arrivals, device, policy=StepPolicy("hybrid"), num_workers=8)
    result.summary.goodput_rps

`arrivals` come from `scheduler.simulation.trace.read_trace` or are made by hand, `device` from
`scheduler.simulation.device.read_device`. Requests are placed by `place`, the steps of each worker
are planned by its own `StepScheduler`, and a step takes as long as the device's cost model says.
Equal arguments give equal results.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

from scheduler.cost_model import CostModel
from scheduler.placement import WorkerLoad, place
from scheduler.policy import StepPolicy
from scheduler.request import RequestState
from scheduler.simulation.device import DeviceProfile
from scheduler.simulation.noise import Noise
from scheduler.simulation.simulated_worker import (
    LiveRequest,
    SimulatedWorker,
    SimulationError,
    StepRecord,
)
from scheduler.simulation.summary import Outcome, Summary, summarise
from scheduler.simulation.trace import Arrival
from scheduler.step_planner import StepPlanner

REPORT_INTERVAL_S = 0.25
"""How often workers report their load to whoever places requests, as they do live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Drafts, and how often they are right."""

    num_drafts: int
    """Drafts at hand for each next token."""
    acceptance_rate: float = 0.7
    """Mean over the requests of the chance that a draft is accepted if those before it were."""
    spread: float = 0.0
    """Standard deviation of that chance between requests; normal, clipped to 0 to 1."""

    def __post_init__(self) -> None:
        if self.num_drafts < 0 or self.spread < 0 or not 0 <= self.acceptance_rate <= 1:
            raise ValueError(
                f"{self}: drafts and spread must not be negative, the rate between 0 and 1"
            )


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What came of a simulation."""

    policy: str
    outcomes: list[Outcome]
    """Every request, in the order of the arrivals."""
    summary: Summary
    """Over all requests."""
    by_class: dict[str, Summary]
    """The same for each service class, if there is more than one; of the workers' own figures
    only those that requests bring along."""
    steps: dict[str, list[StepRecord]]
    """Of each worker its steps, if they were to be logged."""

    def to_dict(self) -> dict[str, object]:
        """The figures as JSON can hold them, without the steps; infinite ones are None."""
        return {
            "policy": self.policy,
            "summary": self.summary.to_dict(),
            "by_class": {name: summary.to_dict() for name, summary in self.by_class.items()},
            "requests": [outcome.to_dict() for outcome in self.outcomes],
        }


def simulate(
    arrivals: Iterable[Arrival],
    device: DeviceProfile,
    *,
    policy: StepPolicy | None = None,
    num_workers: int = 1,
    scheduler_cost_model: CostModel | None = None,
    learns: bool = False,
    noise: float = 0.0,
    speculation: Speculation | None = None,
    seed: int = 0,
    fast_forward: bool = True,
    log_steps: bool = False,
    report_interval_s: float = REPORT_INTERVAL_S,
    on_progress: Callable[[float], None] | None = None,
) -> SimulationResult:
    """Serve `arrivals` on `num_workers` workers that are like `device`, until all have finished.

    The schedulers predict with `scheduler_cost_model`, the device's own if there is none; with
    `learns` each worker corrects its copy after each step. `noise` is the standard deviation of the
    logarithm of a step's seconds. `fast_forward` takes steady steps at once; without it the same
    comes out, more slowly. `on_progress` gets the share of requests that are done, now and then.
    ValueError for arrivals that can never be served.
    """
    listed = list(arrivals)
    _check(listed, device, num_workers)
    cluster = _Cluster(
        listed,
        device,
        policy or StepPolicy(),
        num_workers,
        believed=scheduler_cost_model or device.cost_model,
        learns=learns,
        noise=noise,
        speculation=speculation,
        seed=seed,
        fast_forward=fast_forward,
        log_steps=log_steps,
        report_interval_s=report_interval_s,
    )
    return cluster.run(on_progress or _no_progress)


def _no_progress(share: float) -> None:
    pass


def _check(arrivals: Sequence[Arrival], device: DeviceProfile, num_workers: int) -> None:
    if num_workers < 1:
        raise ValueError(f"num_workers ({num_workers}) must be at least 1")
    known = {arrival.request.request_id for arrival in arrivals}
    if len(known) < len(arrivals):
        raise ValueError("two arrivals have the same request id")
    for arrival in arrivals:
        name, request = arrival.request.request_id, arrival.request
        if arrival.after is not None and arrival.after not in known:
            raise ValueError(f"request {name} follows {arrival.after}, which is not there")
        if request.num_prompt_tokens < 1:
            raise ValueError(f"request {name} has an empty prompt")
        if not 1 <= arrival.num_output_tokens <= request.max_tokens:
            raise ValueError(
                f"request {name} gives {arrival.num_output_tokens} tokens; it must be 1 to its "
                f"max_tokens, {request.max_tokens}"
            )
        num_tokens = request.num_prompt_tokens + arrival.num_output_tokens
        if num_tokens > device.num_kv_tokens:
            raise ValueError(
                f"request {name} needs {num_tokens} tokens of KV cache and {device.name} has "
                f"{device.num_kv_tokens}; clip the lengths, or take another device"
            )


STEP_ENDS, REQUEST_COMES, STEP_BEGINS = range(3)
"""What happens, in the order in which it does at one time."""


@dataclass(slots=True)
class _Cluster:
    """The events of a simulation."""

    arrivals: list[Arrival]
    device: DeviceProfile
    policy: StepPolicy
    num_workers: int
    believed: CostModel
    learns: bool
    noise: float
    speculation: Speculation | None
    seed: int
    fast_forward: bool
    log_steps: bool
    report_interval_s: float

    workers: list[SimulatedWorker] = field(init=False)
    loads: list[WorkerLoad] = field(init=False)
    index_of: dict[str, int] = field(init=False)
    events: list[tuple[float, int, int, int]] = field(init=False, default_factory=list)
    """Time, kind, index of the worker or arrival, version of the worker's step."""
    last_report: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        self.workers = [self._make_worker(index) for index in range(self.num_workers)]
        for worker in self.workers if self.device.crowded_cost_model else ():
            worker.neighbours = [other for other in self.workers if other is not worker]
        self.loads = [WorkerLoad(worker.worker_id, 0, 0) for worker in self.workers]
        self.index_of = {worker.worker_id: i for i, worker in enumerate(self.workers)}

    def _make_worker(self, index: int) -> SimulatedWorker:
        believed = CostModel.from_dict(self.believed.to_dict()) if self.learns else self.believed
        return SimulatedWorker(
            # Padded, because among equals placement takes the smaller id.
            f"worker-{index:0{len(str(self.num_workers - 1))}}",
            self.device,
            StepPlanner(self.device.limits, self.policy, believed, learns=self.learns),
            noise=Noise(self.noise, [self.seed, index]) if self.noise else None,
            # Each verify advances by another number of tokens.
            fast_forward=self.fast_forward and self.speculation is None,
            log=[] if self.log_steps else None,
        )

    def run(self, on_progress: Callable[[float], None]) -> SimulationResult:
        """Let all happen."""
        outcomes: list[Outcome | None] = [None] * len(self.arrivals)
        followers: dict[str, list[int]] = {}
        first_to_come = []
        for index, arrival in enumerate(self.arrivals):
            if arrival.after is None:
                first_to_come.append((arrival.arrival_s, REQUEST_COMES, index, 0))
            else:
                followers.setdefault(arrival.after, []).append(index)
        first_to_come.sort(reverse=True)
        events = self.events
        if first_to_come:
            events.append(first_to_come.pop())
        num_done, num_told, one_percent = 0, 0, max(1, len(self.arrivals) // 100)
        while events:
            now, kind, index, version = heapq.heappop(events)
            self._report_until(now)
            if kind == REQUEST_COMES:
                if self.arrivals[index].after is None and first_to_come:
                    heapq.heappush(events, first_to_come.pop())
                self._place(index, now)
                continue
            worker = self.workers[index]
            if kind == STEP_BEGINS:
                worker.begins_soon = False
                self._begin(index, now)
                continue
            if version != worker.version:
                continue
            for live in worker.finish(now):
                outcomes[live.index] = _outcome(live, worker.worker_id)
                num_done += 1
                for follower in followers.get(live.arrival.request.request_id, ()):
                    comes_s = now + self.arrivals[follower].arrival_s
                    heapq.heappush(events, (comes_s, REQUEST_COMES, follower, 0))
            if events and events[0][0] <= now:
                self._begin_soon(index, now)
            else:
                self._begin(index, now)
            if num_done - num_told >= one_percent:
                num_told = num_done
                on_progress(num_done / len(self.arrivals))
        finished = [outcome for outcome in outcomes if outcome is not None]
        if len(finished) < len(self.arrivals):
            raise SimulationError(
                f"{len(self.arrivals) - len(finished)} of {len(self.arrivals)} requests never "
                f"finish under {self.policy}"
            )
        return self._result(finished)

    def _begin(self, index: int, now: float) -> None:
        worker = self.workers[index]
        end_s = worker.begin(now)
        if end_s is not None:
            worker.version += 1
            heapq.heappush(self.events, (end_s, STEP_ENDS, index, worker.version))

    def _begin_soon(self, index: int, now: float) -> None:
        """Begin a step once all that happens at this time has happened."""
        worker = self.workers[index]
        if not worker.begins_soon:
            worker.begins_soon = True
            heapq.heappush(self.events, (now, STEP_BEGINS, index, 0))

    def _place(self, index: int, now: float) -> None:
        arrival = self.arrivals[index]
        placement = place(arrival.request, self.loads)
        assert placement is not None  # none is draining
        worker_id = placement.chosen.worker_id
        at = self.index_of[worker_id]
        worker, load = self.workers[at], self.loads[at]
        self.loads[at] = WorkerLoad(
            worker_id,
            load.num_outstanding_tokens + arrival.request.num_outstanding_tokens(),
            load.num_requests + 1,
        )
        worker.add(self._live(index, worker, now))
        if (end_s := worker.cut_jump(now)) is not None:
            worker.version += 1
            heapq.heappush(self.events, (end_s, STEP_ENDS, at, worker.version))
        if not worker.is_busy:
            self._begin_soon(at, now)

    def _live(self, index: int, worker: SimulatedWorker, now: float) -> LiveRequest:
        arrival = self.arrivals[index]
        state = RequestState(arrival.request, now)
        holding = worker.kv.holding(
            arrival.hash_ids, arrival.hash_block_size, arrival.request.num_prompt_tokens
        )
        random: Random | None = None
        draft_chances: tuple[float, ...] = ()
        if self.speculation is not None:
            random = Random(f"{self.seed} {arrival.request.request_id}")
            rate = random.gauss(self.speculation.acceptance_rate, self.speculation.spread)
            draft_chances = (min(max(rate, 0.0), 1.0),) * self.speculation.num_drafts
        return LiveRequest(arrival, index, state, holding, random, draft_chances)

    def _report_until(self, now: float) -> None:
        """Let the workers report at the last of the regular times before `now`."""
        report = int(now // self.report_interval_s)
        if report == self.last_report:
            return
        self.last_report = report
        report_s = report * self.report_interval_s
        for index, worker in enumerate(self.workers):
            load = self.loads[index]
            outstanding = worker.outstanding_at(report_s)
            num_requests = len(worker.live)
            if outstanding != load.num_outstanding_tokens or num_requests != load.num_requests:
                self.loads[index] = WorkerLoad(worker.worker_id, outstanding, num_requests)

    def _result(self, outcomes: list[Outcome]) -> SimulationResult:
        workers = self.workers
        num_steps = sum(worker.num_steps for worker in workers)
        summary = summarise(
            outcomes,
            num_workers=self.num_workers,
            busy_s=math.fsum(worker.busy_s for worker in workers),
            num_steps=num_steps,
            num_spans=sum(worker.num_spans for worker in workers),
            num_query_tokens=sum(worker.num_query_tokens for worker in workers),
        )
        classes = sorted({outcome.slo_class for outcome in outcomes})
        by_class = {}
        if len(classes) > 1:
            by_class = {
                name: summarise([o for o in outcomes if o.slo_class == name], like=summary)
                for name in classes
            }
        steps = {worker.worker_id: worker.log for worker in workers if worker.log is not None}
        return SimulationResult(self.policy.name, outcomes, summary, by_class, steps)


def _outcome(live: LiveRequest, worker_id: str) -> Outcome:
    state, request = live.state, live.state.request
    num_gaps = state.num_output_tokens - 1
    return Outcome(
        request_id=request.request_id,
        slo_class=request.slo_class,
        slo=request.slo,
        worker_id=worker_id,
        arrival_s=state.arrival_s,
        ttft_s=state.first_token_s - state.arrival_s,
        tpot_s=(state.last_token_s - state.first_token_s) / num_gaps if num_gaps else 0.0,
        finish_s=state.last_token_s,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=state.num_output_tokens,
        num_preemptions=live.num_preemptions,
        num_cached_tokens=live.num_cached_tokens,
    )
