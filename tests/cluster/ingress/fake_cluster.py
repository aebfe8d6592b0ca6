"""The cluster behind an ingress, as its client sees it: handles of workers and scheduler."""

import asyncio
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from ray.serve.exceptions import RequestCancelledError

from scheduler.placement import Placed, RefusalReason, Refused, WorkerLoad
from scheduler.request import Request
from workers.engine_request import EngineRequest
from workers.errors import WorkerError
from workers.token_stream import StreamAddress, StreamSenders


class FakeResponse:
    """A call of a worker, awaited and cancelled as Serve's response is."""

    def __init__(self) -> None:
        self.result: asyncio.Future[str | Exception] = asyncio.get_running_loop().create_future()
        self.was_cancelled = False

    def cancel(self) -> None:
        self.was_cancelled = True
        self.result.cancel()

    def __await__(self) -> Generator[Any, None, str | Exception]:
        try:
            return (yield from self.result.__await__())
        except asyncio.CancelledError:
            if self.was_cancelled:
                raise RequestCancelledError("call") from None
            raise


@dataclass
class Call:
    """One call of `generate`."""

    worker_id: str
    request: EngineRequest
    response: FakeResponse


class FakeWorkers:
    """The handle of the workers, and the stream on which the tokens come from them."""

    def __init__(self) -> None:
        self.generate = self
        self.calls: list[Call] = []
        self.refusal: Exception | None = None
        self._senders = StreamSenders()
        self._reply_to: StreamAddress | None = None

    def remote(
        self, worker_id: str, request: EngineRequest, reply_to: StreamAddress
    ) -> FakeResponse:
        if self.refusal is not None:
            raise self.refusal
        self._reply_to = reply_to
        self.calls.append(Call(worker_id, request, FakeResponse()))
        return self.calls[-1].response

    async def called(self, count: int) -> Call:
        """The last of `count` calls, once it is made."""
        async with asyncio.timeout(30):
            while len(self.calls) < count:
                await asyncio.sleep(0)
        assert len(self.calls) == count
        return self.calls[-1]

    def send(self, *outputs: object) -> None:
        """Send what one step produced."""
        self.send_frames([msgspec.msgpack.encode(outputs)])

    def send_frames(self, frames: list[bytes]) -> None:
        assert self._reply_to is not None
        self._senders.send(self._reply_to, frames, now=0.0)

    def close(self) -> None:
        self._senders.close()


Answer = Placed | Refused | Exception


class _Loads:
    def __init__(self, scheduler: "FakeScheduler") -> None:
        self._scheduler = scheduler

    async def remote(self) -> list[WorkerLoad]:
        return self._scheduler.known


class _Losses:
    def __init__(self, scheduler: "FakeScheduler") -> None:
        self._scheduler = scheduler

    async def remote(self, attempts: Mapping[str, str]) -> dict[str, WorkerError]:
        found = self._scheduler.losses_of
        return {name: found[worker] for name, worker in attempts.items() if worker in found}


class _Notes:
    """Keeps what it is told of a worker or a fingerprint."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def remote(self, name: str, text: str) -> None:
        self.kept[name] = text


class FakeScheduler:
    """The handle of the GlobalScheduler, and the directory of the workers that it chooses from."""

    def __init__(self) -> None:
        self.place = self
        self.loads = _Loads(self)
        self.losses = _Losses(self)
        self.refuse = _Notes()
        self.bury = _Notes()
        self.losses_of: dict[str, WorkerError] = {}
        """Why attempts on a worker are lost, by its id."""
        self.known: list[WorkerLoad] = []
        self.alive = ["a", "b", "c"]
        self.answers: list[Answer] = []
        """Its next answers; after them it chooses the first worker."""
        self.asked: list[tuple[str, list[str]]] = []
        """The requests that it was asked to place, and where."""
        self.latest: Request | None = None
        """The latest of them."""

    def worker_ids(self) -> list[str]:
        return self.alive

    async def remote(self, request: Request, worker_ids: list[str]) -> Placed | Refused:
        self.asked.append((request.request_id, worker_ids))
        self.latest = request
        await asyncio.sleep(0)
        if not self.answers:
            return Placed(worker_ids[0]) if worker_ids else DRAINING
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


DRAINING = Refused(RefusalReason.NO_WORKER, retry_after_s=0.001)
