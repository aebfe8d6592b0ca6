"""The engine's thread: takes requests, steps the engine, sends what each step produced."""

import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from scheduler.request import Request
from workers.engine import Engine, EngineStats
from workers.token_stream import StreamAddress, StreamSenders

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.2
"""How long an idle loop sleeps before it looks after its streams."""
EMPTY_STEP_WAIT_S = 0.001
"""Pause after a step that found nothing to compute, e.g. while a grammar compiles."""

T = TypeVar("T")


class EngineDead(RuntimeError):
    """The engine failed or hangs; its worker must be replaced."""


class ClientLost(RuntimeError):
    """The client of a request has taken no tokens for a long time."""


@dataclass(slots=True)
class LiveRequest:
    """A request on the engine."""

    request: Request
    client: StreamAddress
    done: concurrent.futures.Future[str]
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoopState:
    """The loop and its engine at one moment between two steps."""

    engine: EngineStats
    num_steps: int
    outstanding: dict[str, int]
    """Tokens that each live request may still need, by request id."""


@dataclass(slots=True)
class _Progress:
    num_steps: int = 0
    step_began_s: float | None = None
    finished: list[str] = field(default_factory=list)


class EngineLoop:
    """Runs an engine in one thread. Every method may be called from any thread.

    `make_engine` runs in that thread too, which alone touches the engine; if it raises, so does
    the constructor. `on_change` is called there after requests came, went or progressed.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], on_change: Callable[["EngineLoop"], None]
    ) -> None:
        self._on_change = on_change
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._live: dict[str, LiveRequest] = {}
        self._streams = StreamSenders()
        self._progress = _Progress()
        self._stopping = False
        self._failure: BaseException | None = None
        made: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(make_engine, made), name="engine", daemon=True
        )
        self._thread.start()
        made.result()

    def add(
        self, request: Request, engine_request: list[bytes], client: StreamAddress
    ) -> concurrent.futures.Future[str]:
        """Start a request; the future gives its finish reason, or fails with its error."""
        live = LiveRequest(request, client, concurrent.futures.Future())
        self._inbox.put(lambda: self._add(live, engine_request))
        return live.done

    def abort(self, request_ids: list[str]) -> None:
        """Free the slots of these requests before the next step; unknown ids are ignored."""
        self._inbox.put(lambda: self._abort(request_ids))

    def state(self) -> concurrent.futures.Future[LoopState]:
        """The state after the step that is running now."""
        state: concurrent.futures.Future[LoopState] = concurrent.futures.Future()
        self._inbox.put(
            lambda: state.set_result(
                LoopState(self._engine.stats(), self._progress.num_steps, self.outstanding())
            )
        )
        return state

    def check(self, step_timeout_s: float) -> None:
        """Raise EngineDead if the thread ended, or one step runs longer than `step_timeout_s`."""
        if self._failure is not None or not self._thread.is_alive():
            raise EngineDead(f"the engine stopped: {self._failure!r}")
        began = self._progress.step_began_s
        if began is not None and (took := time.monotonic() - began) > step_timeout_s:
            raise EngineDead(f"a step has been running for {took:.0f} s")

    def stop(self) -> None:
        """End the thread after the current step and shut the engine down."""
        self._stopping = True
        self._inbox.put(lambda: None)
        self._thread.join()

    # What follows runs in the engine thread, or in `on_change`, which does.

    def outstanding(self) -> dict[str, int]:
        """Tokens that each live request may still need, by request id."""
        return {
            request_id: live.request.num_outstanding_tokens(live.num_output_tokens)
            for request_id, live in self._live.items()
        }

    def take_finished(self) -> tuple[str, ...]:
        """The requests that ended since the last call."""
        finished = tuple(self._progress.finished)
        self._progress.finished.clear()
        return finished

    def _run(
        self, make_engine: Callable[[], Engine], made: concurrent.futures.Future[None]
    ) -> None:
        try:
            self._engine = make_engine()
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(None)
        try:
            while not self._stopping:
                self._take_inbox()
                self._tend_streams()
                if self._engine.has_requests():
                    self._step()
                self._on_change(self)
        except Exception as error:
            logger.exception("the engine failed; its worker must be replaced")
            self._failure = error
        finally:
            for live in self._live.values():
                live.done.set_exception(EngineDead(f"the engine stopped: {self._failure!r}"))
            self._live.clear()
            self._engine.shutdown()
            self._streams.close()

    def _take_inbox(self) -> None:
        try:
            self._inbox.get(timeout=0 if self._live else IDLE_WAIT_S)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _step(self) -> None:
        self._progress.step_began_s = time.monotonic()
        outputs, model_ran = self._engine.step()
        self._progress.step_began_s = None
        self._progress.num_steps += model_ran
        for client, output in outputs.items():
            self._streams.send(client, output.frames, time.monotonic())
            for request_id, num_new_tokens in output.num_new_tokens.items():
                if live := self._live.get(request_id):
                    live.num_output_tokens += num_new_tokens
            for request_id, finish_reason in output.finish_reasons.items():
                self._finish(request_id, finish_reason)
        if not model_ran:
            time.sleep(EMPTY_STEP_WAIT_S)

    def _tend_streams(self) -> None:
        for client in self._streams.tend(time.monotonic()):
            error = ClientLost(f"{client.endpoint} took nothing; is it reachable from this node?")
            logger.warning("%s", error)
            gone = [r for r, live in self._live.items() if live.client == client]
            self._engine.abort_requests(gone)
            for request_id in gone:
                self._finish(request_id, error)

    def _add(self, live: LiveRequest, engine_request: list[bytes]) -> None:
        if not live.done.set_running_or_notify_cancel():
            return
        try:
            self._engine.add_request(live.request, engine_request, live.client)
        except Exception as error:
            logger.warning("request %s was refused: %r", live.request.request_id, error)
            live.done.set_exception(error)
            return
        self._live[live.request.request_id] = live

    def _abort(self, request_ids: list[str]) -> None:
        self._engine.abort_requests(request_ids)
        for request_id in request_ids:
            self._finish(request_id, "abort")

    def _finish(self, request_id: str, outcome: str | Exception) -> None:
        if (live := self._live.pop(request_id, None)) is None:
            return
        self._progress.finished.append(request_id)
        if isinstance(outcome, Exception):
            live.done.set_exception(outcome)
        else:
            live.done.set_result(outcome)
