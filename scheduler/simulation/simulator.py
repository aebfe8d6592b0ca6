"""A discrete-event simulation of a cluster around the live schedulers.

    result = simulate(arrivals, device, SimulationConfig(num_workers=8))
    result.summary.goodput_rps

`arrivals` come from `scheduler.simulation.traces.read_trace` or are made by hand, `device` comes
from `scheduler.simulation.device.read_device`. Requests are placed by `place`, the steps of each
worker are planned by its own `StepPlanner`, and a step takes as long as the device's cost model
predicts. Equal arguments give equal results.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from scheduler.cost_model import CostModel
from scheduler.fair_shares import yielding
from scheduler.fleet import Fleet
from scheduler.placement import Refused, WorkerLoad
from scheduler.policy import StepPolicy
from scheduler.prefix_index import pack
from scheduler.request import Request, RequestState
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.device import DeviceProfile
from scheduler.simulation.noise import Noise
from scheduler.simulation.placers import Placer, PredictedSeconds, ReportedPlacer
from scheduler.simulation.simulated_worker import (
    LiveRequest,
    SimulatedWorker,
    SimulationError,
    StepRecord,
)
from scheduler.simulation.summary import Outcome, Summary, summarise
from scheduler.stage_policy import StagePolicy, StageView, WorkerPolicy
from scheduler.step_planner import StepPlanner

REPORT_INTERVAL_S = 0.25
"""Interval of a worker's load reports to placement, as in a live cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Number of drafts, and how often they are accepted."""

    num_drafts: int
    """Drafts at hand in each decode."""
    acceptance_rate: float = 0.7
    """Chance that a draft is accepted if all before it were; mean over the requests."""
    spread: float = 0.0
    """Standard deviation of that chance between requests: normal, clipped to between 0 and 1."""

    def __post_init__(self) -> None:
        if self.num_drafts < 0 or self.spread < 0 or not 0 <= self.acceptance_rate <= 1:
            raise ValueError(
                f"{self}: drafts and spread must not be negative, the rate between 0 and 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """The cluster that a simulation builds from a device."""

    policy: StepPolicy = field(default_factory=StepPolicy)
    num_workers: int = 1
    scheduler_cost_model: CostModel | None = None
    """Cost model that the schedulers predict with; None means the device's own."""
    learns: bool = False
    """Whether each worker corrects its copy of that model after each step."""
    noise: float = 0.0
    """Standard deviation of the logarithm of a step's seconds."""
    speculation: Speculation | None = None
    seed: int = 0
    """Seed of the noise and of which drafts are accepted."""
    fast_forward: bool = True
    """Whether steady steps are taken together: faster, with the same result."""
    log_steps: bool = False
    """Whether the result has each step."""
    report_interval_s: float = REPORT_INTERVAL_S
    placer: Callable[[], Placer] = PredictedSeconds
    """Makes what chooses the workers."""
    stage_policy: Callable[[], StagePolicy] | None = None
    """Makes what sets the workers' policies; None leaves each to itself."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers ({self.num_workers}) must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """What became of all requests."""

    policy: str
    outcomes: list[Outcome]
    """Every request, in the order of the arrivals."""
    summary: Summary
    """Figures over all requests."""
    by_class: dict[str, Summary]
    """Figures over the requests of each service class, if there are several; figures about workers
    are over all requests."""
    steps: dict[str, list[StepRecord]]
    """Each worker's steps by its id, if they were logged."""

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
    config: SimulationConfig | None = None,
    *,
    on_progress: Callable[[float], None] = lambda share: None,
) -> SimulationResult:
    """Serve `arrivals` on workers like `device`, until all have finished.

    `on_progress` is called with the share of finished requests, about once per percent.
    ValueError for arrivals that can never be served.
    """
    listed = list(arrivals)
    _check(listed, device)
    cluster = _Cluster(listed, device, config or SimulationConfig())
    return cluster.run(on_progress)


def _check(arrivals: Sequence[Arrival], device: DeviceProfile) -> None:
    known = {arrival.request.request_id for arrival in arrivals}
    if len(known) < len(arrivals):
        raise ValueError("two arrivals have the same request id")
    for arrival in arrivals:
        name, request = arrival.request.request_id, arrival.request
        if arrival.after is not None and arrival.after not in known:
            raise ValueError(f"request {name} follows {arrival.after}, which is not in the list")
        if request.num_prompt_tokens < 1:
            raise ValueError(f"request {name} has an empty prompt")
        if not 1 <= arrival.num_output_tokens <= request.max_tokens:
            raise ValueError(
                f"request {name} generates {arrival.num_output_tokens} tokens; it must be 1 to "
                f"its max_tokens, {request.max_tokens}"
            )
        num_tokens = request.num_prompt_tokens + arrival.num_output_tokens
        if num_tokens > device.num_kv_tokens:
            raise ValueError(
                f"request {name} needs {num_tokens} tokens of KV cache and {device.name} has "
                f"{device.num_kv_tokens}; clip the lengths, or take another device"
            )


STEP_ENDS, REQUEST_ARRIVES, REQUEST_ASKS_AGAIN, STEP_BEGINS = range(4)
"""Kinds of events, in the order in which simultaneous events happen."""


@dataclass(slots=True)
class _Cluster:
    """The workers of a simulation, and its events in the order of their time."""

    arrivals: list[Arrival]
    device: DeviceProfile
    config: SimulationConfig

    workers: list[SimulatedWorker] = field(init=False)
    loads: list[WorkerLoad] = field(init=False)
    fleet: Fleet = field(init=False, default_factory=Fleet)
    placer: Placer = field(init=False)
    stage_policy: StagePolicy | None = field(init=False)
    views: dict[str, StageView] = field(init=False)
    """What the stage policy knows of each worker."""
    policies: dict[str, WorkerPolicy] = field(init=False, default_factory=dict)
    """What it has decided."""
    ended: list[dict[str, int]] = field(init=False)
    """Output tokens of the requests of each worker that have ended since its last report, by id."""
    index_of: dict[str, int] = field(init=False)
    format: str = field(init=False, default="")
    """What the hashes of blocks are of, for all arrivals."""
    events: list[tuple[float, int, int, int]] = field(init=False, default_factory=list)
    """Each has time, kind, index of the worker or arrival, and version of the worker's step."""
    arrived_s: dict[int, float] = field(init=False, default_factory=dict)
    """When the arrivals that have no worker yet came, by index."""
    last_report: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        self.workers = [self._make_worker(index) for index in range(self.config.num_workers)]
        for worker in self.workers if self.device.crowded_cost_model else ():
            worker.neighbours = [other for other in self.workers if other is not worker]
        self.loads = [self._load(worker, 0, 0) for worker in self.workers]
        self.placer = self.config.placer()
        self.stage_policy = self.config.stage_policy and self.config.stage_policy()
        self.views = {worker.worker_id: StageView() for worker in self.workers}
        for arrival in self.arrivals:
            if size := self.workers[0].kv.entry_tokens(arrival.hash_block_size):
                self.format = _format(size)
                break
        self.ended = [{} for _ in self.workers]
        self.index_of = {worker.worker_id: i for i, worker in enumerate(self.workers)}

    def _make_worker(self, index: int) -> SimulatedWorker:
        config = self.config
        cost_model = config.scheduler_cost_model or self.device.cost_model
        if config.learns:
            cost_model = CostModel.from_dict(cost_model.to_dict())
        return SimulatedWorker(
            # Padded, because among equal workers placement takes the smaller id.
            f"worker-{index:0{len(str(config.num_workers - 1))}}",
            self.device,
            StepPlanner(self.device.limits, config.policy, cost_model, learns=config.learns),
            noise=Noise(config.noise, [config.seed, index]) if config.noise else None,
            # With drafts, each step advances by another number of tokens.
            fast_forward=config.fast_forward and config.speculation is None,
            log=[] if config.log_steps else None,
        )

    def run(self, on_progress: Callable[[float], None]) -> SimulationResult:
        """Process all events, including those that they cause."""
        outcomes: list[Outcome | None] = [None] * len(self.arrivals)
        followers: dict[str, list[int]] = {}
        first_arrivals = []
        for index, arrival in enumerate(self.arrivals):
            if arrival.after is None:
                first_arrivals.append((arrival.arrival_s, REQUEST_ARRIVES, index, 0))
            else:
                followers.setdefault(arrival.after, []).append(index)
        first_arrivals.sort(reverse=True)
        events = self.events
        if first_arrivals:
            events.append(first_arrivals.pop())
        num_done, num_reported, one_percent = 0, 0, max(1, len(self.arrivals) // 100)

        def follow(index: int, now: float) -> None:
            for follower in followers.get(self.arrivals[index].request.request_id, ()):
                arrives_s = now + self.arrivals[follower].arrival_s
                heapq.heappush(events, (arrives_s, REQUEST_ARRIVES, follower, 0))

        while events:
            now, kind, index, version = heapq.heappop(events)
            self._report_until(now)
            if kind in (REQUEST_ARRIVES, REQUEST_ASKS_AGAIN):
                if kind == REQUEST_ARRIVES:
                    self.arrived_s[index] = now
                    if self.arrivals[index].after is None and first_arrivals:
                        heapq.heappush(events, first_arrivals.pop())
                if not self._place(index, now):
                    outcomes[index] = _refused(self.arrivals[index].request, now)
                    num_done += 1
                    follow(index, now)
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
                ended_id = live.arrival.request.request_id
                self.ended[index][ended_id] = live.state.num_output_tokens
                num_done += 1
                follow(live.index, now)
            if events and events[0][0] <= now:
                self._begin_soon(index, now)
            else:
                self._begin(index, now)
            if num_done - num_reported >= one_percent:
                num_reported = num_done
                on_progress(num_done / len(self.arrivals))
        finished = [outcome for outcome in outcomes if outcome is not None]
        if len(finished) < len(self.arrivals):
            raise SimulationError(
                f"{len(self.arrivals) - len(finished)} of {len(self.arrivals)} requests never "
                f"finish under {self.config.policy}"
            )
        return self._result(finished)

    def _begin(self, index: int, now: float) -> None:
        worker = self.workers[index]
        end_s = worker.begin(now)
        if end_s is not None:
            worker.version += 1
            heapq.heappush(self.events, (end_s, STEP_ENDS, index, worker.version))

    def _begin_soon(self, index: int, now: float) -> None:
        """Begin a step after all other events of this time."""
        worker = self.workers[index]
        if not worker.begins_soon:
            worker.begins_soon = True
            heapq.heappush(self.events, (now, STEP_BEGINS, index, 0))

    def _place(self, index: int, now: float) -> bool:
        """Place a request, or let it ask again; False if it is refused."""
        arrival = self.arrivals[index]
        request = self._request(arrival)
        answer = self.placer.choose(request, self.loads, self.fleet, now)
        if isinstance(answer, Refused) and not answer.is_final:
            heapq.heappush(self.events, (now + answer.retry_after_s, REQUEST_ASKS_AGAIN, index, 0))
            return True
        arrived_s = self.arrived_s.pop(index)
        if isinstance(answer, Refused):
            return False
        worker_id, request = answer.worker_id, yielding(request, answer.yields)
        self.fleet.place(worker_id, request, now)
        at = self.index_of[worker_id]
        worker, load = self.workers[at], self.loads[at]
        num_tokens = load.num_outstanding_tokens + arrival.request.num_outstanding_tokens()
        self.loads[at] = self._load(worker, num_tokens, load.num_requests + 1)
        worker.add(self._live(index, worker, request.priority, arrived_s))
        if (end_s := worker.cut_jump(now)) is not None:
            worker.version += 1
            heapq.heappush(self.events, (end_s, STEP_ENDS, at, worker.version))
        if not worker.is_busy:
            self._begin_soon(at, now)
        return True

    def _request(self, arrival: Arrival) -> Request:
        """The request of an arrival, with the hashes of its blocks."""
        holding = self.workers[0].kv.holding(
            arrival.hash_ids, arrival.hash_block_size, arrival.request.num_prompt_tokens - 1
        )
        if not holding.keys:
            return arrival.request
        return replace(
            arrival.request,
            block_hashes=pack(holding.keys),
            prefix_format=_format(holding.entry_tokens),
        )

    def _live(
        self, index: int, worker: SimulatedWorker, priority: int, arrived_s: float
    ) -> LiveRequest:
        arrival = self.arrivals[index]
        request = arrival.request
        if priority != request.priority:
            request = replace(request, priority=priority)
        state = RequestState(request, arrived_s)
        holding = worker.kv.holding(
            arrival.hash_ids, arrival.hash_block_size, arrival.request.num_prompt_tokens
        )
        random: Random | None = None
        draft_chances: tuple[float, ...] = ()
        speculation = self.config.speculation
        if speculation is not None:
            random = Random(f"{self.config.seed} {arrival.request.request_id}")
            rate = random.gauss(speculation.acceptance_rate, speculation.spread)
            draft_chances = (min(max(rate, 0.0), 1.0),) * speculation.num_drafts
        return LiveRequest(
            arrival=arrival,
            index=index,
            state=state,
            holding=holding,
            random=random,
            draft_chances=draft_chances,
        )

    def _report_until(self, now: float) -> None:
        """Take the workers' reports of the last regular time before `now`; the stage policy, which
        goes by steps, sees those of all such times."""
        report = int(now // self.config.report_interval_s)
        if report == self.last_report:
            return
        first = report
        if self.stage_policy and not self._is_at_rest():
            first = self.last_report + 1
        self.last_report = report
        for number in range(first, report + 1):
            self._report(number * self.config.report_interval_s)

    def _is_at_rest(self) -> bool:
        """Whether nothing is on any worker, and no policy bounds what comes."""
        return not any(worker.live for worker in self.workers) and all(
            policy.is_free for policy in self.policies.values()
        )

    def _report(self, report_s: float) -> None:
        for index, worker in enumerate(self.workers):
            if not (worker.live or self.ended[index]):
                continue
            load = self.loads[index]
            outstanding = worker.outstanding_at(report_s)
            num_requests = len(worker.live)
            if outstanding != load.num_outstanding_tokens or num_requests != load.num_requests:
                self.loads[index] = self._load(worker, outstanding, num_requests)
            queue, stages = worker.reports(report_s)
            self.fleet.report(
                worker.worker_id,
                queue,
                [*worker.live, *self.ended[index]],
                worker.kv.take_delta(self.format),
                report_s,
            )
            self.views[worker.worker_id] = StageView(stages)
            if isinstance(self.placer, ReportedPlacer):
                self.placer.report(worker.worker_id, worker.live, self.ended[index], report_s)
            self.ended[index].clear()
        if self.stage_policy:
            self.policies = self.stage_policy.decide(self.views, report_s)
            for worker in self.workers:
                worker.policy.follow(self.policies[worker.worker_id], report_s)

    def _load(self, worker: SimulatedWorker, num_tokens: int, num_requests: int) -> WorkerLoad:
        max_num_seqs = self.device.limits.max_num_seqs
        return WorkerLoad(worker.worker_id, num_tokens, num_requests, max_num_seqs=max_num_seqs)

    def _result(self, outcomes: list[Outcome]) -> SimulationResult:
        workers = self.workers
        num_steps = sum(worker.num_steps for worker in workers)
        summary = summarise(
            outcomes,
            num_workers=len(workers),
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
        return SimulationResult(
            policy=self.config.policy.name,
            outcomes=outcomes,
            summary=summary,
            by_class=by_class,
            steps=steps,
        )


def _format(entry_tokens: int) -> str:
    return f"trace//{entry_tokens}"


def _refused(request: Request, now: float) -> Outcome:
    return Outcome(
        request_id=request.request_id,
        slo_class=request.slo_class,
        slo=request.slo,
        worker_id="",
        arrival_s=now,
        ttft_s=0.0,
        tpot_s=0.0,
        finish_s=now,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=0,
        num_preemptions=0,
        num_cached_tokens=0,
        is_refused=True,
    )


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
