"""Places requests on workers and gathers what their steps produce."""

import asyncio
import contextvars
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.serve.handle import DeploymentHandle

from cluster.errors import EnginesDied, RequestFailed, RequestFailsSteps, RequestRefused
from cluster.ingress.live_request import NO_WORKER, LiveRequest
from cluster.ingress.observer import IngressObserver
from cluster.observe.request_history import RequestRecord
from cluster.placement.directory import WorkerDirectory
from scheduler.placement import Placed, RefusalReason, Refused
from scheduler.request import Request
from workers.engine_request import EngineRequest
from workers.errors import GrammarRefused, OutputsLost, PoisonFound, WorkerError, WrongWorker
from workers.token_stream import LOST_AFTER_S, StreamReceiver

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Workers that a request may lose one after another without any progress."""
MAX_ENGINE_DEATHS = 2
"""Engines that may die under a request, which is alone on the last one."""
REPLACEMENT_S = 30.0
"""Time after which a call may find a worker again: about what the start of one takes."""
WATCH_S = 0.25
"""Period at which quiet requests are looked for."""
HEALTH_TIMEOUT_S = 5.0
"""Time that the GlobalScheduler has to say how the workers are."""
PLACE_TIMEOUT_S = 1.0
"""Time that the GlobalScheduler has to place a request; then this client places it."""
RESTART_S = 0.1
"""Pause before a GlobalScheduler that died is asked again."""
TURN_KEPT_S = 10.0
"""Time for which a request that waits for its tenant's turn goes on to, if nobody answers it."""
TURN_RESTART_S = 1.0
"""Pause before such a one asks again: there may be many."""
BUSY_S = 10.0
"""Time after which a call may find busy workers less so."""
HELD = "its client did not read the stream"
"""Why an attempt ended whose request was held."""


class StepOutputs(Protocol):
    """What one step of one worker produced for this client, in vLLM's form."""

    outputs: list[Any]
    """One for each request, with `request_id`, `new_token_ids` and `finish_reason`, and with the
    first token `prefill_stats`, which says what was cached."""


Outputs = TypeVar("Outputs", bound=StepOutputs)


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a request by an error."""

    request_id: str
    error: Exception


class EngineClient(Generic[Outputs]):
    """A client of all workers; used from one event loop.

    `decode` turns the frames of a step into its outputs. A request that has no worker for
    `placement_timeout_s` is refused.
    """

    def __init__(
        self,
        workers: "DeploymentHandle[Any]",
        directory: WorkerDirectory,
        scheduler: "DeploymentHandle[Any]",
        receiver: StreamReceiver,
        decode: Callable[[list[bytes]], Outputs],
        observer: IngressObserver | None = None,
        placement_timeout_s: float = math.inf,
    ) -> None:
        # Serve makes the router, which the directory needs, when a method is first named.
        self._generate = workers.generate
        self._directory = directory
        self._scheduler = scheduler
        self._place = scheduler.place
        self._loads = scheduler.loads
        self._losses = scheduler.losses
        self._receiver = receiver
        self._decode = decode
        self._observer = observer or IngressObserver()
        self._placement_timeout_s = placement_timeout_s
        self.prefix_format = ""
        """What the hashes of the blocks of a worker are of that a request was placed on."""
        self._live: dict[str, LiveRequest] = {}
        self._attempts: dict[str, LiveRequest] = {}
        self._outputs: asyncio.Queue[Outputs | Failure] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    def submit(self, request: EngineRequest, arrived_s: float) -> RequestRecord:
        """Start a request; `arrived_s` is by the wall clock. Returns the record of its progress."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]
        live = LiveRequest(RequestRecord(request.request.without_hashes(), arrived_s), request)
        self._live[live.request_id] = live
        self._observer.began(live.record)
        # In an empty context: Serve names its calls after the HTTP request in the context, and its
        # router keeps only one of two calls with the same name, such as those of n=2.
        live.task = asyncio.create_task(self._run(live), context=contextvars.Context())
        return live.record

    def abort(self, request_ids: list[str], error: str = "", outcome: str = "error") -> None:
        """Stop requests wherever they are, because the client left or because of an `error`.

        Nothing more comes from them.
        """
        for request_id in request_ids:
            self._stop(request_id, outcome if error else "abort", error)

    def hold(self, request_ids: list[str]) -> None:
        """Take requests from their workers; what they have so far is kept for `go_on`."""
        for request_id in request_ids:
            live = self._live.get(request_id)
            if live is None or live.task is None or live.ended.is_set():
                continue
            attempt = live.record.attempts[-1] if live.record.attempts else None
            if attempt:
                self._attempts.pop(attempt.attempt_id, None)
                attempt.lost = HELD
            if live.response is not None:
                live.response.cancel()
            live.task.cancel()
            live.task = None

    def go_on(self, request_ids: list[str]) -> None:
        """Place requests again that were held."""
        for request_id in request_ids:
            live = self._live.get(request_id)
            if live is not None and live.task is None and not live.ended.is_set():
                live.tried.clear()
                live.task = asyncio.create_task(self._run(live), context=contextvars.Context())

    def finish(self, request_id: str, outcome: str, num_output_tokens: int) -> None:
        """End a request whose answer is complete, with a number of output tokens.

        A worker may still be at it, and have computed more tokens: it does not know of stop
        strings. Those tokens are not the answer's, and are not counted.
        """
        if live := self._live.get(request_id):
            del live.record.output_token_ids[num_output_tokens:]
            self._stop(request_id, outcome)

    async def next_outputs(self) -> Outputs | Failure:
        """The next outputs of a step for this client's requests, or the failure of one of them."""
        return await self._outputs.get()

    async def has_workers(self) -> bool:
        """Whether a request that came now would be placed on a worker that reports."""
        alive = self._directory.worker_ids()
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                loads = {load.worker_id: load for load in await self._loads.remote()}
        except (TimeoutError, RayActorError):
            return bool(alive)  # this client would place it
        return any(worker_id not in loads or loads[worker_id].is_serving for worker_id in alive)

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    async def close(self) -> None:
        """Abort all requests and stop listening."""
        self.abort(list(self._live))
        for task in self._tasks:
            task.cancel()
        self._receiver.close()

    async def _run(self, live: LiveRequest) -> None:
        """Keep the request on some worker until it ends."""
        try:
            while not await self._attempt(live):
                logger.warning(
                    "request lost its worker and is placed again",
                    extra={
                        "request_id": live.request_id,
                        "error": live.record.attempts[-1].lost,
                    },
                )
        except Exception as error:  # any kind: nothing else would end the request
            self._fail(live, error)

    async def _attempt(self, live: LiveRequest) -> bool:
        """Run the request on one worker; False if it lost that worker and is to be retried."""
        attempt = live.begin_attempt()
        attempt_id = attempt.request.request_id
        self._attempts[attempt_id] = live
        try:
            if await self._result(live, attempt) == "abort":  # not by this client
                raise OutputsLost("the request was aborted on its worker")
            await self._last_outputs(live)
        except RayTaskError:
            raise  # the worker has failed in its own code, and would again
        except (RayError, WorkerError) as error:
            if live.ended.is_set():
                return True
            self._attempts.pop(attempt_id, None)
            if live.response is not None:
                live.response.cancel()  # the worker may only have been out of reach
            self._note_loss(live, error)
            return False
        return True

    def _note_loss(self, live: LiveRequest, error: Exception) -> None:
        """Note why a request has lost its worker; raises if it is not to be placed again."""
        record, name = live.record, type(error).__name__
        record.attempts[-1].lost = f"{name}: {error}"
        live.count_loss(error)
        if isinstance(error, ActorDiedError):  # it may take seconds until Serve knows
            self._scheduler.bury.remote(live.worker_id, name)
        if isinstance(error, PoisonFound):
            self._refuse(live.request, RequestFailsSteps(str(error)))
        if live.num_engine_deaths == MAX_ENGINE_DEATHS:
            self._refuse(live.request, EnginesDied(MAX_ENGINE_DEATHS, str(error)))
        if live.num_fruitless >= MAX_ATTEMPTS:
            raise error
        self._observer.retried(record, name)

    def _refuse(self, request: EngineRequest, found: RequestFailed) -> NoReturn:
        """Fail a request that is the cause of failures, and have equal ones refused."""
        if fingerprint := request.request.fingerprint:
            self._scheduler.refuse.remote(fingerprint, str(found))
        raise found

    async def _result(self, live: LiveRequest, attempt: EngineRequest) -> str:
        """The finish reason of an attempt on the worker that it is placed on.

        RequestRefused if it has none when its time is up.
        """
        try:
            async with asyncio.timeout(self._placement_timeout_s) as placing:
                give_up_s = placing.when()
                while True:
                    worker_id = await self._worker_for(live, attempt.request)
                    live.tried.add(worker_id)
                    response: Any = self._generate.remote(
                        worker_id, attempt.for_worker(live.yields), self._receiver.address
                    )
                    live.response = response
                    placing.reschedule(give_up_s if worker_id == NO_WORKER else None)
                    result = await self._unless_lost(live, worker_id, response)
                    if isinstance(result, WrongWorker):  # from another worker, if it is gone
                        placing.reschedule(give_up_s)
                    elif isinstance(result, Exception):
                        raise result
                    else:
                        return str(result)
        except TimeoutError:
            if not placing.expired():
                raise
            if live.response is not None:
                live.response.cancel()
            if live.num_engine_deaths:
                self._refuse(live.request, EnginesDied(1, live.record.attempts[-2].lost))
            is_busy = live.waits_for is RefusalReason.QUEUED
            live.record.refused = Refused(live.waits_for, BUSY_S if is_busy else REPLACEMENT_S)
            raise RequestRefused(live.record.refused) from None

    async def _unless_lost(self, live: LiveRequest, worker_id: str, response: Any) -> Any:
        """What the call of a worker gives; raises why if the attempt is given up before."""
        live.worker_id, live.heard_s = worker_id, time.monotonic()
        live.lost = asyncio.get_running_loop().create_future()
        call = asyncio.ensure_future(response)
        # Cancelled or not, a worker that does not answer may end it at any time.
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.wait({call, live.lost}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise live.lost.result()
            return call.result()
        finally:
            call.cancel()

    async def _worker_for(self, live: LiveRequest, request: Request) -> str:
        """The worker that the GlobalScheduler chooses; raises RequestRefused if it refuses."""
        attempt = live.record.attempts[-1]
        asked_s, queued_s = time.monotonic(), -math.inf
        while True:
            alive = self._directory.worker_ids()
            untried = [worker_id for worker_id in alive if worker_id not in live.tried]
            is_queued = time.monotonic() - queued_s < TURN_KEPT_S
            answer = await self._place_or_choose(request, untried or alive, is_queued)
            if isinstance(answer, Placed):
                self.prefix_format = answer.prefix_format or self.prefix_format
                attempt.forecast, attempt.placed_s = answer.forecast, time.time()
                if queued_s > -math.inf:
                    attempt.queued_s += time.monotonic() - asked_s
                live.yields = answer.yields
                return answer.worker_id
            if answer.is_final:
                live.record.refused = answer
                raise RequestRefused(answer)
            live.waits_for = answer.reason
            if answer.reason is RefusalReason.QUEUED:
                queued_s = time.monotonic()
            if not alive and NO_WORKER not in live.tried:
                return NO_WORKER
            live.tried.clear()
            await asyncio.sleep(answer.retry_after_s)

    async def _place_or_choose(
        self, request: Request, worker_ids: Sequence[str], is_queued: bool
    ) -> Placed | Refused:
        """The GlobalScheduler's answer; if there is none, the worker with fewest requests of this
        client. A request under which an engine died waits: only the GlobalScheduler can keep a
        worker for it. So does one that is queued: those of a flood would all go at once."""
        try:
            async with asyncio.timeout(PLACE_TIMEOUT_S):
                answer: Placed | Refused = await self._place.remote(request, worker_ids)
                return answer
        except (RayActorError, TimeoutError) as error:
            logger.warning("the GlobalScheduler does not answer", extra={"error": repr(error)})
        if request.num_engine_deaths or not worker_ids or is_queued:
            return Refused(RefusalReason.NO_WORKER, TURN_RESTART_S if is_queued else RESTART_S)
        counts = Counter(live.worker_id for live in self._attempts.values())
        return Placed(min(worker_ids, key=lambda worker_id: counts[worker_id]))

    async def _last_outputs(self, live: LiveRequest) -> None:
        """Wait for the last outputs: the stream may deliver them after the call's result."""
        try:
            await asyncio.wait_for(live.ended.wait(), LOST_AFTER_S)
        except TimeoutError:
            raise OutputsLost("the last outputs of the request did not arrive") from None

    def _fail(self, live: LiveRequest, error: Exception) -> None:
        if not live.ended.is_set() and self._end(live.request_id, "error", repr(error)):
            extra = {"request_id": live.request_id, "error": repr(error)}
            if isinstance(error, RequestRefused | GrammarRefused):
                logger.info("request refused", extra=extra)
            else:
                logger.error("request failed", extra=extra)
            self._outputs.put_nowait(Failure(live.request_id, error))

    async def _receive(self) -> None:
        while True:
            frames = await self._receiver.receive()
            try:
                step = self._decode(frames)
            except Exception as error:  # any kind: vLLM's decoder says nothing of what it raises
                self._receiver.dropped.add(error)
                continue
            kept, now = [], time.time()
            for output in step.outputs:
                attempt_id = output.request_id
                if (live := self._attempts.get(attempt_id)) is None:
                    continue  # aborted by this client, or from a worker that was given up
                output.request_id = live.request_id
                stats = output.prefill_stats
                live.record.deliver(output.new_token_ids, now, stats and stats.num_cached_tokens)
                live.heard_s = time.monotonic()
                kept.append(output)
                if output.finish_reason is not None:
                    # It remains for the front end to say how the answer ends, by `finish`.
                    self._attempts.pop(attempt_id, None)
                    live.ended.set()
            if kept:
                step.outputs = kept
                self._outputs.put_nowait(step)

    async def _watch(self) -> None:
        """Give up attempts on workers that make no steps, do not know them or cannot be reached."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            quiet = {
                attempt_id: live.worker_id
                for attempt_id, live in self._attempts.items()
                if live.is_quiet(now)
            }
            if not quiet:
                continue
            try:
                async with asyncio.timeout(HEALTH_TIMEOUT_S):
                    losses = await self._losses.remote(quiet)
            except Exception as failure:  # any kind: nobody else would notice workers that hang
                logger.warning("the GlobalScheduler did not answer", extra={"error": repr(failure)})
                continue
            for attempt_id, error in losses.items():
                live = self._attempts.get(attempt_id)
                if live and live.lost and not live.lost.done() and live.is_quiet(now):
                    live.lost.set_result(error)

    def _stop(self, request_id: str, outcome: str, error: str = "") -> None:
        """End a request, also on its worker unless it has ended there."""
        live = self._live.get(request_id)
        on_worker = live is not None and not live.ended.is_set()
        if (live := self._end(request_id, outcome, error)) and on_worker:
            if live.response is not None:
                live.response.cancel()
            if live.task is not None:
                live.task.cancel()

    def _end(self, request_id: str, outcome: str, error: str = "") -> LiveRequest | None:
        if (live := self._live.pop(request_id, None)) is not None:
            record = live.record
            if record.attempts:
                self._attempts.pop(record.attempts[-1].attempt_id, None)
            record.outcome, record.error = outcome, error
            live.ended.set()
            self._observer.ended(record)
        return live
