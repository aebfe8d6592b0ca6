"""Places requests on workers and gathers what their steps produce."""

import asyncio
import contextvars
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from scheduler.request import Request
from workers.engine_loop import EngineDead
from workers.token_stream import LOST_AFTER_S, StreamReceiver
from workers.worker import WorkerDraining

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Workers that may die under a request before its first token."""


class RequestOutput(Protocol):
    """What a step added to one request, as far as this file reads it."""

    request_id: str
    new_token_ids: list[int]

    @property
    def finished(self) -> bool: ...  # noqa: D102


class StepOutputs(Protocol):
    """What one step of one worker produced for this client."""

    outputs: list[Any]


Outputs = TypeVar("Outputs", bound=StepOutputs)


@dataclass(slots=True)
class _Live:
    """A request that was submitted and has not ended."""

    request: Request
    encode: Callable[[str], list[bytes]]
    attempt: int = 0
    has_output: bool = False
    response: DeploymentResponse[str] | None = None
    task: asyncio.Task[None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def attempt_id(self) -> str:
        """The id on the worker; a new one each attempt fences off a lost worker's outputs."""
        return f"{self.request.request_id}.{self.attempt}"


class EngineClient(Generic[Outputs]):
    """A client of all workers; used from one event loop.

    `decode` turns the frames of a step into its outputs; `failed` makes the outputs that end a
    request with an error.
    """

    def __init__(
        self,
        workers: "DeploymentHandle[Any]",
        receiver: StreamReceiver,
        decode: Callable[[list[bytes]], Outputs],
        failed: Callable[[str, Exception], Outputs],
    ) -> None:
        self._workers = workers
        self._receiver = receiver
        self._decode = decode
        self._failed = failed
        self._live: dict[str, _Live] = {}
        self._attempts: dict[str, _Live] = {}
        self._outputs: asyncio.Queue[Outputs] = asyncio.Queue()
        self._receiving: asyncio.Task[None] | None = None

    def submit(self, request: Request, encode: Callable[[str], list[bytes]]) -> None:
        """Start a request; `encode` gives it in the engine's encoding under a given id."""
        if self._receiving is None:
            self._receiving = asyncio.create_task(self._receive())
        live = self._live[request.request_id] = _Live(request, encode)
        # In a context of its own: Serve names its calls after the HTTP request in the context, and
        # its router keeps only one of two calls of the same name, as n=2 makes.
        live.task = asyncio.create_task(self._run(live), context=contextvars.Context())

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests wherever they are; nothing more comes from them."""
        for request_id in request_ids:
            if live := self._forget(request_id):
                if live.response is not None:
                    live.response.cancel()
                if live.task is not None:
                    live.task.cancel()

    async def next_outputs(self) -> Outputs:
        """What the next step of any worker produced for this client's requests."""
        return await self._outputs.get()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    async def close(self) -> None:
        """Abort what runs and stop listening."""
        self.abort(list(self._live))
        if self._receiving is not None:
            self._receiving.cancel()
        self._receiver.close()

    async def _run(self, live: _Live) -> None:
        """Keep the request on some worker until it ends."""
        while True:
            self._attempts[live.attempt_id] = live
            attempt = dataclasses.replace(live.request, request_id=live.attempt_id)
            try:
                response: Any = self._workers.generate.remote(
                    attempt, live.encode(live.attempt_id), self._receiver.address
                )
                live.response = response
                if await response == "abort":  # not by this client
                    raise RuntimeError("the request was aborted on its worker")
                await self._last_outputs(live)
                return
            except (RayActorError, EngineDead, WorkerDraining) as error:
                self._attempts.pop(live.attempt_id, None)
                if live.response is not None:
                    live.response.cancel()  # the worker may only have been out of reach
                live.attempt += 1
                if live.has_output or live.attempt == MAX_ATTEMPTS:
                    self._fail(live, error)
                    return
                logger.warning("%s lost its worker and is placed again", live.request.request_id)
            except Exception as error:
                self._fail(live, error)
                return

    async def _last_outputs(self, live: _Live) -> None:
        """Wait for what comes by the stream, and so may come after the call's result."""
        try:
            await asyncio.wait_for(live.ended.wait(), LOST_AFTER_S)
        except TimeoutError:
            raise TimeoutError("the last outputs of the request did not arrive") from None

    def _fail(self, live: _Live, error: Exception) -> None:
        if self._forget(live.request.request_id):
            logger.error("%s failed: %r", live.request.request_id, error)
            self._outputs.put_nowait(self._failed(live.request.request_id, error))

    async def _receive(self) -> None:
        while True:
            frames = await self._receiver.receive()
            try:
                step = self._decode(frames)
            except Exception:
                logger.exception("a worker sent outputs that cannot be read")
                continue
            kept = []
            for output in step.outputs:
                if (live := self._attempts.get(output.request_id)) is None:
                    continue  # aborted here, or from a worker that was given up
                output.request_id = live.request.request_id
                live.has_output = True
                kept.append(output)
                if output.finished:
                    self._forget(live.request.request_id)
            if kept:
                step.outputs = kept
                self._outputs.put_nowait(step)

    def _forget(self, request_id: str) -> _Live | None:
        if (live := self._live.pop(request_id, None)) is not None:
            self._attempts.pop(live.attempt_id, None)
            live.ended.set()
        return live
