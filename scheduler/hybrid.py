"""Plans one step of one worker by deadlines and predicted time."""

import heapq
import math

from scheduler.cost_model import CostModel, StepShape
from scheduler.fair_shares import MAX_PRIORITY
from scheduler.request import RequestState
from scheduler.speculation import add_drafts
from scheduler.step import Step
from scheduler.task import BatchPlan, Limits, Reason, StepView

TTFT_SHARE = 0.25
"""Cap on a step without decodes, as a share of the tightest time to first token: requests that
arrive during a step wait for its end."""
MARGIN = 0.99
"""Share of the available time that is planned; the rest is for the work between two steps."""
MAX_LATENESS = 0.5
"""Upper bound of the lateness that is planned for; more would leave no time for prefills."""
TURN = 10
"""Every TURN-th step starts with the oldest prefill that was passed over."""
TURN_TOKENS = 16
"""Minimum chunk of such a prefill, even if a target is missed for it."""
STARVATION_S = 60.0
"""A request that has waited this long gets the next free KV blocks."""
PUT_OFF_S = 0.25
"""Time since its last token after which a decode without a target is not put off again."""
YIELDING_STEP_S, YIELDING_STRETCH = 0.1, 2.0
"""While all prefills yield to those of other tenants, a step is no longer than this, or than that
many times its decodes alone: a request that comes during the step waits for its end."""
MAX_STRETCH = 10.0
"""Cap on how much decodes are assumed to slow a prefill down."""


class HybridScheduler:
    """Takes decodes, then prefills by deadline, then drafts, while the predicted time allows.

    A step may last until the earliest deadline of the decodes in it. Prefills go in the order that
    lets most of them be on time. A request that has no targets, or can no longer meet them, gets
    what the others leave, but it makes progress: every step has the oldest decode, and every
    `TURN`-th step starts with the oldest prefill. Without any targets the steps are those of
    `DecodeFirst`. The view's policy may bound the prefills beside decodes, and the drafts.
    """

    def __init__(self, limits: Limits, cost_model: CostModel) -> None:
        self._limits = limits
        self._cost_model = cost_model

    def plan(self, view: StepView, now: float) -> BatchPlan:
        """Make the next step."""
        return _Planning(self._limits, self._cost_model, view, now).plan()


class _Planning:
    """One plan in the making.

    A request is `on_time` while it has targets and could still meet them. `firm_s` is how long the
    step may last without making a decode late that is on time. `soft_s` is at most that, and short
    enough that late decodes get their next tokens in time too, where that is still possible.
    """

    def __init__(self, limits: Limits, cost_model: CostModel, view: StepView, now: float) -> None:
        self._limits = limits
        self._cost_model = cost_model
        self._view = view
        self._now = now
        self._margin = MARGIN / (1 + min(cost_model.lateness, MAX_LATENESS))
        self._token_s = self._alone_s(1, 1)
        self._decodes = [state for state in view.running if state.is_decoding]
        self._prefills = [state for state in view.running if not state.is_decoding]
        self._waiting = {state.request.request_id for state in view.waiting}
        self._prefill_s: dict[str, float] = {}
        """Cache of the seconds that a request's prefill would take alone, by request id."""
        self._on_time = {
            state.request.request_id
            for states in (view.running, view.waiting)
            for state in states
            if self._can_be_on_time(state)
        }
        self._full: Reason = Reason.TIME
        """Why a prefill gets nothing in a step that is as long as it may be."""
        self._closed: Reason | None = None
        """Why no more requests are admitted; None while they are."""
        self._filled_s = 0.0
        """Longest time limit, in seconds, for which the step was found full."""
        self._first = self._first_in_line()
        """Highest priority of a prefill that can be computed, the smallest number; infinite without
        one."""
        self._enough_s = math.inf
        """Seconds beyond which prefills that yield to another one must not lengthen the step."""
        self._future: StepShape | None = None
        """Shape of a step in which all requests on time decode, admitted ones too; None until
        used."""
        self._future_tpot_s = math.inf
        self._step = Step(view, limits, cost_model, victim_order=self._victim_order)

    def plan(self) -> BatchPlan:
        put_off_s = self._put_off_decodes()
        firm_s = min(self._take_decodes(), put_off_s)
        soft_s = min(firm_s, self._slack_of_late())
        if firm_s == math.inf:
            firm_s = TTFT_SHARE * self._tightest_ttft_s()
        if MAX_PRIORITY <= self._first < math.inf:
            seconds = self._cost_model.predict(self._step.shape)
            firm_s = min(firm_s, max(YIELDING_STEP_S, YIELDING_STRETCH * seconds))
            soft_s = min(soft_s, firm_s)
        prefill_firm_s, prefill_soft_s = firm_s, soft_s
        if self._view.policy.prefill_share < 1.0 and not self._step.is_empty:
            prefill_firm_s = self._shared(firm_s)
            prefill_soft_s = min(prefill_firm_s, self._shared(soft_s))
            self._full = Reason.SHARE if prefill_firm_s < firm_s else Reason.TIME
        urgent, rest = self._by_deadline(prefill_firm_s)
        if rest and self._view.step % TURN == 0:
            self._take_prefill(min(rest, key=_arrival), prefill_firm_s, min_tokens=TURN_TOKENS)
        if (starved := self._starved(rest)) is not None:
            self._take_prefill(starved, soft_s)
            self._closed = Reason.KV
        for state in urgent:
            self._take_prefill(state, prefill_firm_s, keep_tpot=True)
        for state in rest:
            if self._take_prefill(state, prefill_soft_s) is Reason.KV:
                self._closed = Reason.BEHIND
        if self._step.is_empty:
            self._closed = None  # nothing runs, so no room or turn needs keeping
        for state in (*urgent, *rest):
            if not self._step.is_empty:
                break
            self._take_prefill(state, math.inf)  # misses its target, but an empty step helps nobody
        max_drafts = self._view.policy.max_drafts
        add_drafts(self._step, self._decodes, self._cost_model, firm_s, max_drafts)
        return self._step.plan(firm_s)

    def _shared(self, limit_s: float) -> float:
        """How long prefills may make a step with decodes that may last `limit_s`.

        The policy gives them a share of that time; where nothing limits it, the tokens of a step
        do. Without decodes nobody would gain by a shorter step.
        """
        shape = self._step.shape
        if limit_s == math.inf:
            num_tokens = max(1, self._step.num_tokens_left)
            limit_s = self._cost_model.predict(shape.plus(num_tokens, num_tokens, 1))
        share = self._view.policy.prefill_share
        return min(limit_s, self._cost_model.predict(shape) + share * limit_s)

    def _first_in_line(self) -> float:
        view, limits = self._view, self._limits
        first = min((state.request.priority for state in self._prefills), default=math.inf)
        if len(view.running) >= limits.max_num_seqs:
            return first
        for state in view.waiting:
            num_blocks = limits.num_blocks(state.num_tokens)
            if state.request.priority < first and num_blocks <= view.num_free_kv_blocks:
                first = state.request.priority
        return first

    def _is_behind(self, state: RequestState) -> bool:
        """Whether a request yields to a prefill of another tenant."""
        return self._first < MAX_PRIORITY <= state.request.priority

    def _put_off_decodes(self) -> float:
        """Leave decodes that yield to a prefill to the next step, if they are in time there;
        returns how long this step may last for that."""
        behind = [state for state in self._decodes if self._is_behind(state)]
        if not behind:
            return math.inf
        shape = self._cost_model.shape()
        for state in self._decodes:
            shape.add(1, state.num_tokens, 1)
        next_s = self._cost_model.predict(shape)
        put_off_s, put_off = math.inf, set()
        for state in behind:
            due_s = state.last_token_s + PUT_OFF_S
            if self._is_on_time(state):
                due_s = min(state.due_s, due_s)
            left_s = self._margin * (due_s - self._now) - next_s
            if left_s >= next_s:
                put_off_s = min(put_off_s, left_s)
                put_off.add(state.request.request_id)
                self._step.defer(state, Reason.BEHIND)
        self._decodes = [
            state for state in self._decodes if state.request.request_id not in put_off
        ]
        return put_off_s

    def _can_be_on_time(self, state: RequestState) -> bool:
        """Whether the request has targets, and would meet them if it ran alone from now on."""
        slo = state.request.slo
        if slo.ttft_s == slo.tpot_s == math.inf:
            return False
        if state.num_output_tokens == 0:
            due_s = state.arrival_s + slo.ttft_s
            return (
                self._now < due_s  # first, because it settles most cases when many wait
                and self._token_s <= slo.tpot_s
                and self._now + self._time_to_prefill(state) <= due_s
            )
        num_left = state.request.max_tokens - state.num_output_tokens
        end_s = state.first_token_s + (state.request.max_tokens - 1) * slo.tpot_s
        return (
            state.first_token_s <= state.arrival_s + slo.ttft_s
            and self._now + num_left * self._token_s <= end_s
        )

    def _time_to_prefill(self, state: RequestState) -> float:
        request_id = state.request.request_id
        if request_id not in self._prefill_s:
            self._prefill_s[request_id] = self._alone_s(state.num_new_tokens, state.num_tokens)
        return self._prefill_s[request_id]

    def _alone_s(self, num_tokens: int, seq_len: int) -> float:
        shape = self._cost_model.shape()
        shape.add(num_tokens, seq_len, 1)
        return self._cost_model.predict(shape)

    def _is_on_time(self, state: RequestState) -> bool:
        return state.request.request_id in self._on_time

    def _victim_order(self, state: RequestState) -> tuple[int, bool, float]:
        return state.request.priority, not self._is_on_time(state), state.arrival_s

    def _take_decodes(self) -> float:
        """Take all decodes that are on time, and the others that fit; returns `firm_s`."""
        step, cost_model = self._step, self._cost_model
        for state in filter(self._is_on_time, self._decodes):
            step.take_running(state, 1)
        seconds = cost_model.predict(step.shape)
        firm_s = self._margin * min(
            (self._slack_s(state, seconds) for state in self._decodes if self._is_on_time(state)),
            default=math.inf,
        )
        others = sorted(
            (state for state in self._decodes if not self._is_on_time(state)), key=_arrival
        )
        for index, state in enumerate(others):
            longer = step.shape.plus(1, state.num_tokens, 1)
            # The oldest is always taken, so that no request starves.
            if index > 0 and cost_model.predict(longer) > firm_s:
                step.defer_rest(others, Reason.OVERDUE)
                break
            step.take_running(state, 1)
        return firm_s

    def _slack_s(self, state: RequestState, seconds: float) -> float:
        """How long the step may last for a decode, if it lasts `seconds` without prefills.

        While a decode lags behind its deadline, prefills get half of what its target leaves them,
        and it catches up by the other half.
        """
        half_way_s = (seconds + max(seconds, state.request.slo.tpot_s)) / 2
        return max(state.due_s - self._now, half_way_s)

    def _slack_of_late(self) -> float:
        """How long the step may last so that late decodes get their next tokens in time too."""
        seconds = self._cost_model.predict(self._step.shape)
        gaps = (
            self._margin * (state.last_token_s + state.request.slo.tpot_s - self._now)
            for state in self._decodes
            if not self._is_on_time(state)
        )
        return min((gap_s for gap_s in gaps if gap_s >= seconds), default=math.inf)

    def _tightest_ttft_s(self) -> float:
        return min(
            (
                state.request.slo.ttft_s
                for states in (self._prefills, self._view.waiting)
                for state in states
                if self._is_on_time(state)
            ),
            default=math.inf,
        )

    def _by_deadline(self, limit_s: float) -> tuple[list[RequestState], list[RequestState]]:
        """The prefills that can be on time, in their best order, and the others by rank.

        Steps may last `limit_s`. J. M. Moore's and T. J. Hodgson's algorithm (1968), which makes
        the fewest jobs late: take them by deadline, and whenever one would be late, defer the
        longest taken so far.
        """
        seconds = self._cost_model.predict(self._step.shape)
        # Prefills get only the part of each step that decodes leave.
        stretch = 1.0
        if limit_s < math.inf and seconds > 0:
            stretch = min(limit_s / max(limit_s - seconds, limit_s / MAX_STRETCH), MAX_STRETCH)
        candidates = [*self._prefills, *self._view.waiting]
        on_time = sorted(filter(self._is_on_time, candidates), key=_deadline)
        taken: list[tuple[int, float, int]] = []
        deferred: list[tuple[int, float, int]] = []
        end_s = self._now
        for index, state in enumerate(on_time):
            work_s = self._time_to_prefill(state) * stretch
            heapq.heappush(taken, (-state.request.priority, -work_s, index))
            end_s += work_s
            if state.num_output_tokens == 0 and end_s > state.due_s:
                longest = heapq.heappop(taken)
                deferred.append(longest)
                end_s += longest[1]
        kept = sorted(index for *_, index in taken)
        late = [index for *_, index in sorted(deferred, reverse=True)]
        rest = sorted(
            (state for state in candidates if not self._is_on_time(state)),
            key=lambda state: (state.request.request_id in self._waiting, *_rank(state)),
        )
        return [on_time[index] for index in (*kept, *late)], rest

    def _starved(self, rest: list[RequestState]) -> RequestState | None:
        """The oldest that waits, if for longer than `STARVATION_S` and all that run are on time."""
        waiting = [state for state in rest if state.request.request_id in self._waiting]
        if not waiting or any(not self._is_on_time(state) for state in self._view.running):
            return None
        oldest = min(waiting, key=_arrival)
        return oldest if self._now - oldest.arrival_s > STARVATION_S else None

    def _take_prefill(
        self, state: RequestState, limit_s: float, *, min_tokens: int = 0, keep_tpot: bool = False
    ) -> Reason | None:
        """Take as many of the request's tokens as `limit_s` allows; returns why none were taken."""
        step = self._step
        if state in step:
            return None
        is_waiting = state.request.request_id in self._waiting
        if self._is_behind(state) and not min_tokens:
            limit_s = min(limit_s, self._enough_s)
        reason: Reason | None = None
        if limit_s <= self._filled_s and not min_tokens:
            reason = self._full
        elif is_waiting and self._closed:
            reason = self._closed
        elif is_waiting and keep_tpot and not self._keeps_tpot(state):
            reason = Reason.TPOT
        else:
            num_tokens = min(state.num_new_tokens, step.num_tokens_left)
            chunk = self._cost_model.longest_chunk(
                step.shape, state.num_computed_tokens, num_tokens, limit_s
            )
            chunk = max(chunk, min(min_tokens, num_tokens))
            if num_tokens > 0 and chunk == 0:
                reason, self._filled_s = self._full, limit_s
            elif not is_waiting:
                step.take_running(state, chunk)
            elif (reason := step.admit(state, chunk)) is None and self._is_on_time(state):
                self._add_to_future(state)
        if reason is not None:
            step.defer(state, reason)
        elif state.request.priority < MAX_PRIORITY:
            self._enough_s = self._cost_model.predict(step.shape)
        return reason

    def _keeps_tpot(self, state: RequestState) -> bool:
        """Whether all requests on time could decode in time once this prefill is over."""
        if self._future is None:
            self._future = self._cost_model.shape()
            for other in filter(self._is_on_time, self._view.running):
                self._add_to_future(other)
        if self._future.num_spans == 0:
            return True
        longer_s = self._cost_model.predict(self._future.plus(1, state.num_tokens + 1, 1))
        return longer_s <= self._margin * min(self._future_tpot_s, state.request.slo.tpot_s)

    def _add_to_future(self, state: RequestState) -> None:
        if self._future is not None:
            self._future.add(1, state.num_tokens + 1, 1)
            self._future_tpot_s = min(self._future_tpot_s, state.request.slo.tpot_s)


def _arrival(state: RequestState) -> float:
    return state.arrival_s


def _rank(state: RequestState) -> tuple[int, float]:
    return state.request.priority, state.arrival_s


def _deadline(state: RequestState) -> tuple[int, float]:
    """Sort key: requests preempted after their first token go before all others of a priority."""
    return state.request.priority, state.due_s if state.num_output_tokens == 0 else -math.inf
