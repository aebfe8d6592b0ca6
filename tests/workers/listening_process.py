"""What listens to streams, in processes of their own: strangers may do to it what they can."""

import asyncio
import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import zmq

from workers import sockets
from workers.config import DraftConfig
from workers.drafters.draft_worker import DraftWorker
from workers.drafters.drafter import ContextKey, Draft, Drafter, HiddenStates
from workers.drafters.suffix_drafter import SuffixDrafter
from workers.token_stream import StreamReceiver

HOST = "127.0.0.1"
VOCAB_SIZE, HIDDEN_SIZE = 1000, 4
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the process has less of than others."""

    handshake_ms: int = int(1000 * sockets.HANDSHAKE_S)
    max_fds: int | None = None


class Listening:
    """A process that runs `listen`, which first sends its address and then what it hears."""

    def __init__(
        self, listen: Callable[[Connection, Limits], None], limits: Limits = Limits()
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=listen, args=(theirs, limits), daemon=True)
        self._process.start()
        self.address = self.hear()

    def __enter__(self) -> "Listening":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def hear(self, timeout_s: float = TIMEOUT_S) -> Any:
        """The next that it sends; EOFError if it has died."""
        if not self._pipe.poll(timeout_s):
            raise TimeoutError
        return self._pipe.recv()

    def has_heard(self) -> bool:
        """Whether there is something to hear."""
        return self._pipe.poll()

    def ask(self) -> Any:
        """What it answers."""
        self._pipe.send(None)
        return self.hear()

    @property
    def memory_bytes(self) -> int:
        """Resident memory."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    @property
    def num_fds(self) -> int:
        """Open descriptors."""
        return int(psutil.Process(self._process.pid).num_fds())


def _limit(limits: Limits) -> None:
    if zmq.HANDSHAKE_IVL in sockets.LIMITS:
        sockets.LIMITS = {**sockets.LIMITS, zmq.HANDSHAKE_IVL: limits.handshake_ms}
    if limits.max_fds:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits.max_fds, limits.max_fds))


def receive_tokens(pipe: Connection, limits: Limits) -> None:
    """Send the frames of each message, with the number of messages that were dropped by then."""

    async def receive() -> None:
        receiver = StreamReceiver(HOST)
        pipe.send(receiver.address)
        while True:
            frames = await receiver.receive()
            pipe.send((frames, receiver.dropped.count))

    _limit(limits)
    asyncio.run(receive())


def draft(pipe: Connection, limits: Limits) -> None:
    """Answer with the number of messages dropped, while the drafting thread lives."""
    _limit(limits)
    drafters: dict[str, Drafter] = {"suffix": SuffixDrafter(10_000), "lookup": LookupDrafter()}
    worker = DraftWorker("d", DraftConfig(), lambda: drafters, lambda report: None, HOST)
    pipe.send(worker.address)
    while True:
        pipe.recv()
        worker.check_health()
        pipe.send(worker.dropped.count)


@dataclass
class LookupDrafter:
    """Takes the rows of its tokens from a table, like one with an embedding, and guesses none."""

    hidden_size: int = HIDDEN_SIZE
    vocab_size: int = VOCAB_SIZE
    table: Any = field(default_factory=lambda: np.zeros((VOCAB_SIZE, HIDDEN_SIZE), np.float16))

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        rows = self.table[token_ids]
        if hidden_states is not None:
            num_rows = min(len(rows), len(hidden_states))
            assert (rows[:num_rows] + hidden_states[:num_rows]).shape[1] == HIDDEN_SIZE

    def learn(self, token_ids: list[int]) -> None:
        """It learns nothing."""

    def forget(self, key: ContextKey) -> None:
        """It keeps nothing."""

    def has_work(self) -> bool:
        return False

    def step(self) -> dict[ContextKey, Draft]:
        return {}

    def shutdown(self) -> None:
        """It holds nothing."""
