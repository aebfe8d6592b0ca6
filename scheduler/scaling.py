"""How many workers there should be, by the work that is offered and whether targets are met.

The work of a request is predicted in seconds of a worker's full steps. `limit` is how much of it
one worker takes per second and still meets the targets of its requests: it is learned, cut to what
a worker had when targets were missed and raised while it has nearly that and they are met. So
nobody has to know how many requests a worker can take, and a prediction that is always off by the
same factor does no harm.

A worker is added as soon as the work that is foreseen for the time of its start exceeds the limits
of those there are, or requests wait so long that they are about to miss their targets. Some go only
when the fewer would have been enough, with room, at every moment of the last `hold_s` seconds: what
noise adds, it does not take away again.
"""

import math
from collections import deque
from dataclasses import dataclass

from scheduler.worded import Worded

FIRST_LIMIT = 0.7
"""Limit before anything was seen."""
MIN_LIMIT, MAX_LIMIT = 0.1, 4.0
"""A worker of prefix hits and accepted drafts can take more than it is predicted to."""
MIN_CUT, MAX_CUT = 0.7, 0.95
"""Bounds of the limit after misses, relative to what a worker had then."""
RAISE, NEARLY = 1.05, 0.7
"""Growth of the limit, once in `SETTLE_S`, while a worker takes nearly so much."""
SETTLE_S = 60.0
"""Time after a change of the limit, and after workers have started, in which nothing is made of
misses: they are of the time before."""
FUTILE = 0.5
"""Part of the work for each worker with which targets must be met better, or it is not the work
that makes requests miss them."""
FUTILE_S = 3600.0
"""Time in which nothing is made of misses then."""
MIN_JUDGED = 8.0
"""Requests with targets, decaying, from which on their attainment says something."""
JUDGED_S = 60.0
"""Time constant of the attainment."""
FAST_S = 60.0
"""Time constant of the mean of the offered work."""
SLOW_S = 300.0
"""Time constant of another one: between them it grows by their difference in that of the times."""
MAX_GROWTH = 2.0
"""Foreseen work relative to that of now, at most."""
ROOM = 0.15
"""Share of their limits that fewer workers must have left."""
MAX_WAIT_S = 120.0
"""Time for which requests without a target may wait."""
FIRST_START_S = 60.0
MAX_START_S = 900.0
"""Bounds of what the start of a worker takes."""
LOOK_S = 30.0
"""Time after the first observation before the first decision: not all workers have reported."""
BUSY_LIMIT = 0.6
"""Share of its time for which a draft worker may be busy: drafts that wait are late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSettings:
    """Bounds of the number of workers, and what it is to achieve."""

    min_workers: int = 1
    max_workers: int = 1
    target_attainment: float = 0.95
    """Share of the requests with targets that should meet them."""
    hold_s: float = 600.0
    """Time for which fewer workers must have been enough."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(
                f"min_workers ({self.min_workers}) must be at least 1 and at most max_workers "
                f"({self.max_workers})"
            )
        if not 0 < self.target_attainment < 1:
            raise ValueError(
                f"target_attainment ({self.target_attainment}) must be between 0 and 1"
            )
        if not self.hold_s >= 0:
            raise ValueError(f"hold_s ({self.hold_s}) must not be negative")


@dataclass(frozen=True, slots=True)
class ScalingObservation:
    """What has come and gone since the last observation, and the state now."""

    offered_s: float
    """Predicted work of the requests that came, in seconds of one worker's full steps."""
    num_ready: int
    """Workers that take requests."""
    queue_s: float = 0.0
    """Predicted work of all requests that wait for their first token."""
    wait_s: float = math.inf
    """Shortest time in which a waiting request is to get its first token."""
    num_judged: int = 0
    """Requests with targets that ended."""
    num_met: int = 0
    """Those of them that met all of theirs."""


class ScalingReason(Worded):
    """Why there should be another number of workers, or not."""

    LOAD = "load", "more work is foreseen than the workers can take"
    QUEUE = "queue", "requests wait nearly as long as their targets allow"
    MISSES = "misses", "targets were missed at this load of a worker"
    IDLE = "idle", "fewer workers would have been enough for a while"
    HOLD = "hold", "the workers are enough, and fewer would not be"


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many workers there should be, with the numbers that it follows from."""

    num_wanted: int
    reason: ScalingReason
    """Reason of the last change."""
    load: float
    """Work offered per second."""
    foreseen: float
    """Work that is foreseen to be offered per second when a worker that starts now is ready."""
    limit: float
    """Work per second that one worker can take."""
    queue_s: float
    attainment: float | None
    """Share of the requests that met their targets of late; None if too few had any."""
    num_ready: int
    start_s: float
    """What the start of a worker is thought to take."""

    def __str__(self) -> str:
        met = "" if self.attainment is None else f", {self.attainment:.0%} meet their targets"
        return (
            f"{self.num_wanted} wanted, {self.num_ready} ready: {self.reason.text} ("
            f"{self.load:.2f} s of work per second, {self.foreseen:.2f} foreseen in "
            f"{self.start_s:.0f} s, {self.limit:.2f} per worker, {self.queue_s:.1f} s queued{met})"
        )


class Scaling:
    """Decides on the number of workers. Its state is soft: it begins with those there are."""

    def __init__(self, settings: ScalingSettings) -> None:
        self._attainment = settings.target_attainment
        self._limit = _Limit(settings.target_attainment)
        self._staircase = Staircase(settings)
        self._fast, self._slow = _Rate(FAST_S), _Rate(SLOW_S)
        self._judged, self._settled = _Attainment(), _Attainment()
        """Of all requests, and of those that ended with the workers there are now."""
        self._starts = _Starts()
        self._began_s: float | None = None
        self._last_s = 0.0
        self._reason = ScalingReason.HOLD

    def wanted(self, seen: ScalingObservation, now: float) -> ScalingDecision | None:
        """The number of workers from now on; None while too little was seen."""
        if self._began_s is None:
            self._began_s = self._last_s = now
            return None
        past_s, self._last_s = now - self._last_s, now
        if past_s <= 0:
            return None
        load = self._fast.add(seen.offered_s, past_s)
        foreseen = self._foreseen(load, self._slow.add(seen.offered_s, past_s))
        attainment = self._judged.add(seen.num_judged, seen.num_met, past_s)
        if now - self._began_s < LOOK_S:
            return None
        before = self._staircase.num_wanted or seen.num_ready
        was_cut = self._learn(seen, load, before, past_s, now)
        need = foreseen / self._limit.value
        extra = _extra(seen, self._starts.start_s)
        num_wanted = self._staircase.move(need + extra, seen.num_ready, now)
        if num_wanted > before:
            by_queue = _ceil(need) <= before
            by_load = ScalingReason.MISSES if was_cut else ScalingReason.LOAD
            self._reason = ScalingReason.QUEUE if by_queue else by_load
        elif num_wanted < before:
            self._reason = ScalingReason.IDLE
        return ScalingDecision(
            num_wanted,
            self._reason,
            load,
            foreseen,
            self._limit.value,
            seen.queue_s,
            attainment,
            seen.num_ready,
            self._starts.start_s,
        )

    def _learn(
        self, seen: ScalingObservation, load: float, num_wanted: int, past_s: float, now: float
    ) -> bool:
        """Learn from misses what a worker takes; whether it is less than was thought."""
        if not self._starts.note(seen.num_ready, num_wanted, now):
            self._settled.forget()
        attainment = self._settled.add(seen.num_judged, seen.num_met, past_s)
        was_cut = self._limit.learn(attainment, load / max(seen.num_ready, 1), now)
        if was_cut:
            self._settled.forget()
        return was_cut

    def _foreseen(self, load: float, slow: float) -> float:
        """The work offered when a worker that starts now is ready, if it goes on growing."""
        growth = max(load - slow, 0) / (SLOW_S - FAST_S) * (FAST_S + self._starts.start_s)
        return min(load + growth, MAX_GROWTH * load)


class DraftScaling:
    """Decides on the number of draft workers, by how busy they are."""

    def __init__(self, settings: ScalingSettings) -> None:
        self._staircase = Staircase(settings)
        self._busy = _Rate(FAST_S)
        self._began_s: float | None = None
        self._last_s = 0.0

    def wanted(self, busy_shares: list[float], now: float) -> int | None:
        """The number of draft workers from now on; None while too little was seen."""
        if self._began_s is None:
            self._began_s = self._last_s = now
            return None
        past_s, self._last_s = now - self._last_s, now
        if past_s <= 0:
            return None
        busy = self._busy.add(sum(busy_shares) * past_s, past_s)
        if now - self._began_s < LOOK_S:
            return None
        return self._staircase.move(busy / BUSY_LIMIT, len(busy_shares), now)


class Staircase:
    """A number that follows a need up at once, and down when it has been lower for a while."""

    def __init__(self, settings: ScalingSettings) -> None:
        self._settings = settings
        self.num_wanted: int | None = None
        """None before the first move."""
        self._began_s = 0.0
        self._peaks: deque[tuple[float, float]] = deque()
        """Needs of the last `hold_s`, with their times, each greater than all after it."""

    def move(self, need: float, num_ready: int, now: float) -> int:
        """The number that is wanted for a need of so many workers; it begins at `num_ready`."""
        settings, peaks = self._settings, self._peaks
        if self.num_wanted is None:
            self.num_wanted, self._began_s = num_ready, now
        while peaks and peaks[-1][1] <= need:
            peaks.pop()
        peaks.append((now, need))
        while peaks[0][0] < now - settings.hold_s:
            peaks.popleft()
        wanted = max(self.num_wanted, _ceil(need))
        if now - self._began_s >= settings.hold_s:
            enough = _ceil(peaks[0][1] / (1 - ROOM))
            wanted = min(wanted, max(enough, _ceil(need)))
        self.num_wanted = min(max(wanted, settings.min_workers), settings.max_workers)
        return self.num_wanted


class _Limit:
    """How much work one worker takes per second and still meets the targets."""

    def __init__(self, target_attainment: float) -> None:
        self.value = FIRST_LIMIT
        self._target = target_attainment
        self._changed_s = -math.inf
        self._before: tuple[float, float, float] | None = None
        """The limit, the attainment and the load of a worker when it began to be cut."""
        self._futile_until_s = -math.inf

    def learn(self, attainment: float | None, worker_load: float, now: float) -> bool:
        """Take the attainment at the load that each worker has; whether the limit was cut."""
        if attainment is None or now - self._changed_s < SETTLE_S:
            return False
        if attainment >= self._target:
            self._before = None
            if worker_load > NEARLY * self.value:
                self._change(min(self.value * RAISE, MAX_LIMIT), now)
            return False
        if now < self._futile_until_s:
            return False
        if self._before and self._did_not_help(*self._before, attainment, worker_load):
            self._change(self._before[0], now)
            self._before, self._futile_until_s = None, now + FUTILE_S
            return False
        cut = min(max(attainment / self._target, MIN_CUT), MAX_CUT)
        lower = max(min(self.value, cut * worker_load), MIN_LIMIT)
        if lower >= self.value:
            return False
        self._before = self._before or (self.value, attainment, worker_load)
        self._change(lower, now)
        return True

    def _did_not_help(
        self, _: float, attainment_then: float, load_then: float, attainment: float, load: float
    ) -> bool:
        """Whether workers that have much less to do since then miss about as many targets."""
        halfway = (attainment_then + self._target) / 2
        return load < FUTILE * load_then and attainment < halfway

    def _change(self, value: float, now: float) -> None:
        self.value, self._changed_s = value, now


class _Starts:
    """What starts of workers take, and whether one is under way."""

    def __init__(self) -> None:
        self.start_s = FIRST_START_S
        self._since_s: float | None = None
        self._ready_s = -math.inf

    def note(self, num_ready: int, num_wanted: int, now: float) -> bool:
        """Take the number of workers that are ready; whether all have been for a while."""
        if num_ready < num_wanted:
            if self._since_s is None:
                self._since_s = now
            return False
        if self._since_s is not None:
            took_s = min(now - self._since_s, MAX_START_S)
            self.start_s = (self.start_s + took_s) / 2
            self._since_s, self._ready_s = None, now
        return now - self._ready_s >= SETTLE_S


class _Rate:
    """A mean per second, in which what is older than the time constant hardly counts."""

    def __init__(self, time_s: float) -> None:
        self._time_s = time_s
        self._sum = 0.0
        self._weight = 0.0

    def add(self, amount: float, past_s: float) -> float:
        """Take what came in the past seconds; the mean."""
        kept = math.exp(-past_s / self._time_s)
        self._sum = kept * self._sum + amount / past_s * (1 - kept)
        self._weight = kept * self._weight + 1 - kept
        return self._sum / self._weight


class _Attainment:
    """Share of the requests of late that met their targets."""

    def __init__(self) -> None:
        self._num_judged = 0.0
        self._num_met = 0.0

    def add(self, num_judged: int, num_met: int, past_s: float) -> float | None:
        """Take the requests of the past seconds; the share, None if they are too few."""
        kept = math.exp(-past_s / JUDGED_S)
        self._num_judged = kept * self._num_judged + num_judged
        self._num_met = kept * self._num_met + num_met
        if self._num_judged < MIN_JUDGED:
            return None
        return self._num_met / self._num_judged

    def forget(self) -> None:
        """Begin anew: what comes now is judged under another number of workers."""
        self._num_judged = self._num_met = 0.0


def _extra(seen: ScalingObservation, start_s: float) -> float:
    """Workers that would do, by the time they are ready, what waits too long."""
    wait_s = min(seen.wait_s, MAX_WAIT_S)
    too_much_s = seen.queue_s - seen.num_ready * wait_s / 2
    return max(too_much_s, 0.0) / max(wait_s, start_s)


def _ceil(need: float) -> int:
    return math.ceil(need - 1e-9)
