"""The worker actor: one engine on one device, its tokens leaving by the token stream."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from scheduler.prefill_queue import QueueReport
from workers.config import WorkerConfig
from workers.cpus import CpuClaim, claim_cpus
from workers.engine.engine import Engine
from workers.engine.engine_loop import EngineLoop, LoopState
from workers.engine_request import EngineRequest
from workers.errors import EngineDead, GrammarRefused, WorkerDraining, WorkerUnfit, WrongWorker
from workers.reports import ReportAnswer, Stall, WorkerObserver, WorkerReport, WorkerStatus
from workers.start import Start, StartPhase
from workers.token_stream import StreamAddress

logger = logging.getLogger(__name__)

WATCH_S = 0.25
"""Period at which a worker looks whether its engine lives."""
REPORT_HEARTBEAT_S = 2.0
"""Interval of reports while nothing changes."""
MOVE_AFTER_S = 5.0
"""Time that requests have for their end on a worker which drains: to go on elsewhere, their tokens
are computed again."""


class Worker:
    """Runs requests on an engine."""

    def __init__(
        self,
        worker_id: str,
        config: WorkerConfig,
        make_engine: Callable[[], Engine],
        observer: WorkerObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        start: Start | None = None,
    ) -> None:
        """`clock` times the reports, `start` what comes before requests."""
        self.worker_id = worker_id
        self._config = config
        self._observer = observer or WorkerObserver()
        self._clock = clock
        self._start = start or Start()
        self._reported: WorkerReport | None = None
        self._reported_s = -math.inf
        self._draining = False
        self._draining_since_s = math.inf
        self._calls: set[asyncio.Future[str]] = set()
        """The results that calls wait for."""
        self._unfit = ""
        self._has_policy = False
        """Whether the last answer set a policy."""
        self._cpus: CpuClaim | None = None
        if config.runs_on_cpu:
            self._cpus = claim_cpus(config.cpus)
            self._cpus.pin_process()
        try:
            self._engine_loop = EngineLoop(
                lambda: self._recorded(make_engine()), self, config.report_interval_s, clock
            )
        except BaseException:
            self._release_cpus()
            raise

    async def generate(
        self, worker_id: str, request: EngineRequest, reply_to: StreamAddress
    ) -> str:
        """Run `request`, its tokens going to `reply_to`; returns the finish reason at the end.

        The call lasts as long as its request, so that the death of either side is noticed by
        the other, and a replica that is to stop waits for the requests it runs. Cancelling the
        call aborts the request. Raises ValueError for a malformed request, WrongWorker if it was
        placed on another one, WorkerDraining, after the first tokens too when others are to go on
        with it, EngineDead (StepFailed, if it was in the step that failed), ClientLost when the
        client no longer reads its stream, and GrammarRefused.
        """
        if worker_id != self.worker_id:
            raise WrongWorker(f"worker {worker_id} is gone, and this is {self.worker_id}")
        self._check_takes_new()
        self._engine_loop.check(self._config.step_timeout_s)
        try:
            if request.grammar is not None:
                await self._engine_loop.prepare(request.request, request.grammar)
                self._check_takes_new()
            return await self._result(self._engine_loop.add(request, reply_to))
        except (asyncio.CancelledError, GrammarRefused, WorkerDraining):
            self._engine_loop.abort([request.request.request_id])
            raise

    async def _result(self, running: concurrent.futures.Future[str]) -> str:
        """The finish reason of a request; WorkerDraining if it is to go on elsewhere."""
        result = asyncio.wrap_future(running)
        self._calls.add(result)
        try:
            await asyncio.wait([result])
            if result.cancelled():
                raise WorkerDraining(f"worker {self.worker_id} leaves, and another one serves")
            return result.result()
        finally:
            self._calls.discard(result)
            result.cancel()

    def _check_takes_new(self) -> None:
        if self._draining:
            raise WorkerDraining(f"worker {self.worker_id} is draining")

    async def status(self) -> WorkerStatus:
        """The worker's load and place on its node."""
        state = await asyncio.wrap_future(self._engine_loop.state())
        return WorkerStatus(
            worker_id=self.worker_id,
            pid=os.getpid(),
            cpus=self._cpus.cpus if self._cpus else (),
            num_running=state.engine.num_running,
            num_waiting=state.engine.num_waiting,
            num_outstanding_tokens=sum(state.outstanding.values()),
            num_steps=state.num_steps,
            kv_cache_usage=state.engine.kv_cache_usage,
            memory_bytes=psutil.Process().memory_info().rss,
            draining=self._draining,
            drafts=state.engine.drafts,
            slowness=state.engine.slowness,
            policy=state.engine.policy,
            start={str(phase): time for phase, time in self._start.times.items()},
        )

    def follow(self, answer: ReportAnswer) -> None:
        """Take drafts from the draft worker that the answer to a report names, be replaced if it
        says so, keep to the policy that it sets, tell all of the prefix cache if it asks, and,
        when this worker has drained for a while, let others go on with its requests if it says that
        they can."""
        if StartPhase.REPORT not in self._start.times:
            self._start.ended(StartPhase.REPORT)
            logger.info("worker started", extra=self._start.summary())
        self._unfit = answer.unfit
        if answer.others_serve and self._clock() - self._draining_since_s >= MOVE_AFTER_S:
            for call in self._calls:
                call.cancel()
        if answer.policy or self._has_policy:
            self._engine_loop.follow_policy(answer.policy)
            self._has_policy = answer.policy is not None
        if answer.resync_prefix:
            self._engine_loop.resync_prefix()
        if self._reported and self._reported.drafts:
            self._engine_loop.assign_draft_worker(answer.draft_worker)

    def drain(self) -> None:
        """Take nothing new from now on, as this worker is to stop when its calls have ended."""
        if not self._draining:
            self._draining, self._draining_since_s = True, self._clock()

    def report_load(self, state: LoopState) -> None:
        """Report the state of the engine's loop if it has changed or a heartbeat is due."""
        report = WorkerReport(
            self.worker_id,
            state.outstanding,
            state.finished,
            self._draining,
            state.engine.drafts,
            state.on_trial,
            state.engine.token_s,
            round(state.engine.slowness, 1),
            prefix=state.prefix,
            queue=state.queue,
            stages=state.stages,
            targets=state.targets,
        )
        now = self._clock()
        # Its time goes by in any case, and the GlobalScheduler counts on.
        lasting = dataclasses.replace(report, queue=_timeless(report.queue))
        if lasting != self._reported or now - self._reported_s >= REPORT_HEARTBEAT_S:
            # What has changed once is no change of the next report.
            rest = state.prefix.settled() if state.prefix else None
            self._reported, self._reported_s = dataclasses.replace(lasting, prefix=rest), now
            self._observer.reported(report)

    def report_death(self, reason: str) -> None:
        """Report that the engine is dead, so that nothing more is placed here."""
        self._observer.reported(WorkerReport(self.worker_id, {}, {}, self._draining, death=reason))

    def stall(self) -> Stall | None:
        """The engine's step, if it takes much longer than expected."""
        return self._engine_loop.stall()

    def check_health(self) -> None:
        """Raise EngineDead if the engine ended or hangs, WorkerUnfit if it is to be replaced."""
        self._engine_loop.check(self._config.step_timeout_s)
        if self._unfit:
            raise WorkerUnfit(self._unfit)

    async def until_dead(self) -> None:
        """Return when the engine has failed or hangs, and the clients have its last outputs."""
        while not self._engine_loop.has_failed:
            await asyncio.sleep(WATCH_S)
            with contextlib.suppress(EngineDead):
                self._engine_loop.check(self._config.step_timeout_s)
        await asyncio.to_thread(self._engine_loop.wait_flushed)

    def shutdown(self) -> None:
        """End the engine and give the cores back."""
        self._engine_loop.stop()
        self._release_cpus()

    def _recorded(self, engine: Engine) -> Engine:
        if self._config.record is not None:
            engine.record(Path(f"{self._config.record}.{self.worker_id}.jsonl"))
        return engine

    def _release_cpus(self) -> None:
        if self._cpus:
            self._cpus.release()


def _timeless(queue: QueueReport) -> QueueReport:
    """The queue without the time that its requests have left."""
    return dataclasses.replace(
        queue,
        prefills={
            request_id: prefill._replace(due_in_s=0.0)
            for request_id, prefill in queue.prefills.items()
        },
    )
