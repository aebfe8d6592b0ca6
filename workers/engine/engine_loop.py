"""The engine's thread: takes requests, steps the engine, sends what each step produced."""

import concurrent.futures
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from scheduler.prefill_queue import QueuedPrefill, QueueReport
from scheduler.prefix_index import PrefixDelta
from scheduler.request import Request, Slo
from scheduler.stage_policy import StageReport, WorkerPolicy
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.engine.engine import Engine, EngineStats
from workers.engine_request import EngineRequest, Grammar
from workers.errors import ClientLost, EngineDead, PoisonFound, StepFailed
from workers.reports import Stall, TargetCounts
from workers.token_stream import StreamAddress, StreamSenders

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
"""Max wait for the end of the engine."""
IDLE_WAIT_S = 0.2
"""Period at which an idle loop polls its streams."""
EMPTY_STEP_WAIT_S = 0.001
"""Pause after a step that found nothing to compute, e.g. while a grammar compiles."""
STALL_S = 2.0
"""A step that takes longer than this, and than `STALL_RATIO` times what was expected, seems to
hang."""
STALL_RATIO = 4.0
LONGEST_HALF_LIFE = 200
"""Steps in which half of the longest step's time is forgotten."""
FLUSH_S = 5.0
"""Max wait of an ending loop for the acknowledgement of its last outputs."""
ENDED_BY_ITSELF = frozenset({"stop", "length", "repetition"})
"""Finish reasons of requests whose number of tokens is their length."""


@dataclass(slots=True)
class _OnEngine:
    """A request on the engine."""

    request: Request
    client: StreamAddress
    done: concurrent.futures.Future[str]
    added_s: float
    num_output_tokens: int = 0
    first_token_s: float = math.inf


@dataclass(frozen=True, slots=True)
class LoopState:
    """The loop and its engine at one moment between two steps."""

    engine: EngineStats
    num_steps: int
    outstanding: dict[str, int]
    """Tokens that each live request may still need, by request id."""
    finished: Mapping[str, int | None] = field(default_factory=dict)
    """Requests that ended since the last report, with the tokens that they gave here, None for one
    that was aborted or failed; only in a report."""
    on_trial: bool = False
    """Whether an engine has died under one of the live requests."""
    prefix: PrefixDelta | None = None
    """What has changed in the prefix cache since the last report; only in a report."""
    queue: QueueReport = field(default_factory=QueueReport)
    """What placement is to know of the requests; only in a report."""
    stages: StageReport = field(default_factory=StageReport)
    """What the stage policy is to know of them; only in a report."""
    targets: TargetCounts = field(default_factory=TargetCounts)


class LoopOwner(Protocol):
    """Takes the loop's reports."""

    def report_load(self, state: LoopState) -> None:
        """Take a report; called in the engine's thread."""

    def report_death(self, reason: str) -> None:
        """Take the last report, before the calls fail; called in any thread."""


@dataclass(frozen=True, slots=True)
class _Call:
    work: Callable[[], object]
    done: concurrent.futures.Future[Any]
    """Future that fails if the engine thread ends before it takes the call."""


@dataclass(slots=True)
class _Progress:
    num_steps: int = 0
    step_began_s: float | None = None
    longest_step_s: float = 0.0
    """Of late, decaying."""
    finished: dict[str, int | None] = field(default_factory=dict)
    targets: TargetCounts = field(default_factory=TargetCounts)


class EngineLoop:
    """Runs an engine in one thread. Every method may be called from any thread.

    `make_engine` runs in that thread too, which alone touches the engine; if it raises, so does
    the constructor. A report is due every `report_interval_s` seconds of `clock`.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        owner: LoopOwner,
        report_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owner = owner
        self._report_interval_s = report_interval_s
        self._clock = clock
        self._reported_s = -math.inf
        self._inbox: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._live: dict[str, _OnEngine] = {}
        self._preparing: dict[str, Request] = {}
        """Requests whose grammars are being compiled; changed in another thread."""
        self._streams = StreamSenders()
        self._progress = _Progress()
        self._suspects: frozenset[str] = frozenset()
        """Requests in the step that failed."""
        self._stopping = False
        self._ended = False
        self._failure: Exception | None = None
        self._flushed = threading.Event()
        made: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(make_engine, made), name="engine", daemon=True
        )
        self._thread.start()
        made.result()

    async def prepare(self, request: Request, grammar: Grammar) -> None:
        """Compile the grammar of a request while the engine makes its steps; GrammarRefused if it
        cannot be. Meanwhile the request counts as one that waits."""
        self._preparing[request.request_id] = request
        try:
            await self._engine.prepare(grammar)
        finally:
            del self._preparing[request.request_id]

    def add(self, request: EngineRequest, client: StreamAddress) -> concurrent.futures.Future[str]:
        """Start a request; the future gives its finish reason, or fails with its error."""
        live = _OnEngine(request.request, client, concurrent.futures.Future(), time.monotonic())
        self._call(lambda: self._add(live, request), live.done)
        return live.done

    def abort(self, request_ids: list[str]) -> None:
        """Free the slots of these requests before the next step; unknown ids are ignored."""
        self._call(lambda: self._abort(request_ids), concurrent.futures.Future())

    def assign_draft_worker(self, draft_worker: DraftWorkerAddress | None) -> None:
        """Take drafts from this draft worker from the next step on."""
        self._call(
            lambda: self._engine.assign_draft_worker(draft_worker), concurrent.futures.Future()
        )

    def follow_policy(self, policy: WorkerPolicy | None) -> None:
        """Keep to these bounds from the next step on; None if nobody sets them."""
        self._call(lambda: self._engine.follow_policy(policy), concurrent.futures.Future())

    def resync_prefix(self) -> None:
        """Have the next report tell all that the prefix cache has."""
        self._call(self._engine.resync_prefix, concurrent.futures.Future())

    def state(self) -> concurrent.futures.Future[LoopState]:
        """The state after the step that is running now."""
        state: concurrent.futures.Future[LoopState] = concurrent.futures.Future()
        self._call(lambda: state.set_result(self._state()), state)
        return state

    def check(self, step_timeout_s: float) -> None:
        """Raise EngineDead if the thread ended.

        A step that runs longer than `step_timeout_s` is given up: all calls fail, and the thread is
        left to itself.
        """
        began_s = self._progress.step_began_s
        took_s = 0.0 if began_s is None else time.monotonic() - began_s
        if took_s > step_timeout_s and not self._ended:
            error = EngineDead(f"a step has been running for {took_s:.0f} s")
            logger.error(
                "the engine hangs; its worker must be replaced", extra={"error": str(error)}
            )
            self._fail(error)
            self._flushed.set()  # as far as can be: only its thread may use the streams
        if self._ended or self._failure:
            raise self._death()

    def stall(self) -> Stall | None:
        """The current step, if it takes much longer than expected."""
        if (began_s := self._progress.step_began_s) is None or self._ended:
            return None
        took_s = time.monotonic() - began_s
        expected_s = max(self._progress.longest_step_s, self._engine.predicted_step_s())
        if took_s <= max(STALL_S, STALL_RATIO * expected_s):
            return None
        suspects = (
            request_id
            for request_id in self._engine.running()
            if (live := self._live.get(request_id)) and not live.num_output_tokens
        )
        return Stall(took_s, expected_s, frozenset(suspects))

    @property
    def has_failed(self) -> bool:
        """Whether the engine has failed or was given up."""
        return self._failure is not None

    def stop(self) -> None:
        """End the thread after the current step and shut the engine down; a hung step is left."""
        self._stopping = True
        self._call(lambda: None, concurrent.futures.Future())  # wakes an idle loop
        self._thread.join(STOP_TIMEOUT_S)

    def wait_flushed(self) -> None:
        """Wait until the clients of an engine that failed have its last outputs."""
        self._flushed.wait(FLUSH_S)

    def _call(self, work: Callable[[], object], done: concurrent.futures.Future[Any]) -> None:
        self._inbox.put(_Call(work, done))
        if self._ended:  # the engine thread may have read the inbox for the last time
            self._fail_inbox()

    def _fail_inbox(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                call = self._inbox.get_nowait()
                if call.done.set_running_or_notify_cancel():
                    call.done.set_exception(self._death())

    def _death(self) -> EngineDead:
        return EngineDead(_reason(self._failure))

    def _fail(self, error: Exception) -> None:
        """End all calls because of `error`, under which those in the step fail by StepFailed."""
        if self._progress.step_began_s is not None and not self._suspects:
            self._suspects = frozenset(self._engine.running())
        self._failure, self._ended = error, True
        try:
            self._owner.report_death(_reason(error))
        finally:
            self._fail_live()
            self._fail_inbox()

    def _fail_live(self) -> None:
        # The engine's thread may come back from a step that was given up.
        with contextlib.suppress(KeyError):
            while True:
                request_id, live = self._live.popitem()
                death = (
                    StepFailed(str(self._death()))
                    if request_id in self._suspects
                    else self._death()
                )
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    live.done.set_exception(death)

    # What follows runs in the engine thread.

    def _state(self) -> LoopState:
        outstanding = {
            request_id: request.num_outstanding_tokens()
            for request_id, request in self._preparing.copy().items()
        } | {
            request_id: live.request.num_outstanding_tokens(live.num_output_tokens)
            for request_id, live in self._live.items()
        }
        on_trial = any(live.request.num_engine_deaths for live in self._live.values())
        return LoopState(
            self._engine.stats(),
            self._progress.num_steps,
            outstanding,
            on_trial=on_trial,
            targets=self._progress.targets,
        )

    def _queue(self) -> QueueReport:
        """The engine's queue, and the requests whose grammars are being compiled."""
        queue = self._engine.queue()
        if not (preparing := self._preparing.copy()):
            return queue
        prefills = dict(queue.prefills)
        for request_id, request in preparing.items():
            num_tokens = request.num_prefill_tokens
            prefills[request_id] = QueuedPrefill(
                num_tokens, num_tokens, request.slo.ttft_s, request.priority
            )
        num_tokens = sum(prefills[request_id].num_tokens for request_id in preparing)
        return replace(queue, prefills=prefills, num_tokens=queue.num_tokens + num_tokens)

    def _report_if_due(self) -> None:
        now = self._clock()
        if now - self._reported_s >= self._report_interval_s or self._engine.prefix_is_due():
            self._reported_s = now
            finished, self._progress.finished = self._progress.finished, {}
            queue = self._queue()
            report = replace(
                self._state(),
                finished=finished,
                prefix=self._engine.take_prefix(),
                queue=queue,
                stages=self._engine.stages(queue),
            )
            self._owner.report_load(report)

    def _run(
        self, make_engine: Callable[[], Engine], made: concurrent.futures.Future[None]
    ) -> None:
        try:
            self._engine = make_engine()
        except BaseException as error:
            self._streams.close()
            made.set_exception(error)
            return
        made.set_result(None)
        try:
            while not self._stopping:
                self._take_inbox()
                self._poll_streams()
                if self._engine.has_requests():
                    self._step()
                self._report_if_due()
        except Exception as error:
            logger.exception("the engine failed; its worker must be replaced")
            self._fail(error)
        finally:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._fail_live()
        self._fail_inbox()
        self._flush_streams()
        self._streams.close()
        self._flushed.set()
        self._engine.shutdown()
        logger.info("engine stopped", extra={"num_steps": self._progress.num_steps})

    def _take_inbox(self) -> None:
        wait_s = 0.0 if self._engine.has_requests() else IDLE_WAIT_S
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._inbox.get(timeout=wait_s))
                wait_s = 0.0

    def _take(self, call: _Call) -> None:
        if not call.done.set_running_or_notify_cancel():
            return
        try:
            call.work()
        except Exception as error:
            self._failure = error
            call.done.set_exception(self._death())
            raise

    def _step(self) -> None:
        progress = self._progress
        progress.step_began_s = began_s = time.monotonic()
        try:
            outputs, model_ran = self._engine.step()
        except Exception as error:
            self._recover(error)
            return
        progress.step_began_s = None
        progress.num_steps += model_ran
        progress.longest_step_s *= 0.5 ** (1 / LONGEST_HALF_LIFE)
        progress.longest_step_s = max(progress.longest_step_s, time.monotonic() - began_s)
        for client, output in outputs.items():
            self._streams.send(client, output.frames, time.monotonic())
            for request_id, num_new_tokens in output.num_new_tokens.items():
                if live := self._live.get(request_id):
                    live.num_output_tokens += num_new_tokens
                    live.first_token_s = min(live.first_token_s, time.monotonic())
            for request_id, finish_reason in output.finish_reasons.items():
                self._finish(request_id, finish_reason)
        if not model_ran:
            time.sleep(EMPTY_STEP_WAIT_S)

    def _recover(self, error: Exception) -> None:
        """Go on after a step that failed, without the requests that are the cause; or raise."""
        self._suspects = frozenset(self._engine.running())
        causes = self._engine.recover(error)
        self._progress.step_began_s, self._suspects = None, frozenset()
        for request_id in causes:
            self._finish(request_id, PoisonFound(f"{type(error).__name__}: {error}"))

    def _poll_streams(self) -> None:
        for client in self._streams.poll(time.monotonic()):
            error = ClientLost(
                f"the client at {client.endpoint} is not reading its stream; is it reachable from "
                "this node?"
            )
            gone = [r for r, live in self._live.items() if live.client == client]
            logger.warning(
                "a client is not reading its stream; is it reachable from this node?",
                extra={"client": client.endpoint, "num_requests": len(gone)},
            )
            self._engine.abort_requests(gone)
            for request_id in gone:
                self._finish(request_id, error)

    def _flush_streams(self) -> None:
        give_up_s = time.monotonic() + FLUSH_S
        while not self._streams.is_idle() and (now := time.monotonic()) < give_up_s:
            self._streams.poll(now)
            time.sleep(EMPTY_STEP_WAIT_S)

    def _add(self, live: _OnEngine, request: EngineRequest) -> None:
        request_id = live.request.request_id
        try:
            self._engine.add_request(request, live.client)
        except Exception as error:
            logger.warning(
                "the engine refused a request",
                extra={"request_id": request_id, "error": repr(error)},
            )
            self._progress.finished[request_id] = None
            live.done.set_exception(error)
            return
        self._live[request_id] = live

    def _abort(self, request_ids: list[str]) -> None:
        self._engine.abort_requests(request_ids)
        for request_id in request_ids:
            self._finish(request_id, "abort")

    def _finish(self, request_id: str, outcome: str | Exception) -> None:
        if (live := self._live.pop(request_id, None)) is None:
            self._progress.finished.setdefault(request_id, None)
            return  # aborted before it arrived, or after it ended
        is_length = isinstance(outcome, str) and outcome in ENDED_BY_ITSELF
        self._progress.finished[request_id] = live.num_output_tokens if is_length else None
        if is_length:
            self._progress.targets += _judge(live, time.monotonic())
        if isinstance(outcome, Exception):
            live.done.set_exception(outcome)
        else:
            live.done.set_result(outcome)


def _judge(live: _OnEngine, ended_s: float) -> TargetCounts:
    """Whether a request that has ended met its targets; its earlier attempts count as good."""
    request = live.request
    if request.slo == Slo() or not live.num_output_tokens:
        return TargetCounts()
    in_time = request.num_prior_tokens or live.first_token_s - live.added_s <= request.slo.ttft_s
    tpot_s = (ended_s - live.first_token_s) / max(live.num_output_tokens - 1, 1)
    return TargetCounts(1, int(in_time and tpot_s <= request.slo.tpot_s))


def _reason(failure: Exception | None) -> str:
    if isinstance(failure, EngineDead):
        return str(failure)
    return f"the engine failed: {failure!r}" if failure else "the engine was stopped"
