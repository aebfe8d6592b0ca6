"""What waits for the clients of streams that do not read them: bounded, and then given up.

A client that reads too slowly first fills the sockets, then the memory of Serve's proxy: nothing in
between stops an ingress. So the proxy tells it what has been taken (`cluster/ingress/proxy.py`).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.config.app_config import MIN_UNREAD_BYTES
from cluster.ingress.calls import Call, current_call

logger = logging.getLogger(__name__)

EXTENSION = "xyserve.taken"
"""The ASGI extension by which a proxy says that it tells what its clients take."""
TAKEN = "xyserve.taken"
"""Type of its messages; `num_bytes` of all answers' bodies have been taken so far."""
TELL_EVERY = MIN_UNREAD_BYTES // 2
"""Bytes from one such message to the next."""
LOOK_S = 0.5
"""Period at which it is looked how much has come for a client that reads nothing."""


class RequestsOfCalls(Protocol):
    """What makes the tokens of calls."""

    def hold(self, call: Call) -> None:
        """Make no more tokens, and leave the workers to others; to be repeated at will."""

    def go_on(self, call: Call) -> None:
        """Make tokens again, if they were held."""

    def give_up(self, call: Call, reason: str) -> None:
        """End with an error; without a reason, because the client left."""


class UnreadLimit:
    """Holds a stream back whose client does not read it, and ends it when that lasts.

    While `max_bytes` of it are on their way, no more is made of its tokens, which gather in vLLM's
    output processor. When those take half of `max_bytes`, its requests are taken from their workers
    until the client reads on. It ends when the client has taken nothing for `timeout_s`, or if the
    tokens take `max_bytes` all the same: the last event is an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        timeout_s: float,
        requests: RequestsOfCalls,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._requests = requests
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, if its proxy tells what is taken of the answer."""
        call = current_call.get()
        if call is None or EXTENSION not in scope.get("extensions", {}):
            await self._app(scope, receive, send)
            return
        answer = _Answer()
        reading = asyncio.create_task(answer.read(receive))

        async def limited(message: Message) -> None:
            await send(message)
            answer.num_sent += len(message.get("body", b""))
            if message.get("more_body") and not answer.given_up:
                await self._wait_for_room(call, answer)

        try:
            await self._app(scope, answer.received, limited)
        finally:
            reading.cancel()
            # A client that leaves while it is held back leaves the makers of its events behind,
            # which would go on until they are collected as garbage.
            self._requests.give_up(call, "")

    async def _wait_for_room(self, call: Call, answer: "_Answer") -> None:
        taken_s, num_taken = self._clock(), answer.num_taken
        num_before, is_held = _num_tokens(call), False
        while answer.num_sent - answer.num_taken > self._max_bytes:
            if answer.num_taken > num_taken:
                taken_s, num_taken = self._clock(), answer.num_taken
            silent_s = self._clock() - taken_s
            held_bytes = (_num_tokens(call) - num_before) * call.token_bytes
            if silent_s > self._timeout_s or held_bytes > self._max_bytes:
                answer.given_up = True
                if all(record.outcome for record in call.records):
                    return  # the rest has come, and is not more than this
                reason = (
                    f"the client does not read its stream: {answer.num_sent - answer.num_taken} "
                    f"bytes wait for it, and tokens of about {held_bytes} more; it has taken "
                    f"nothing for {silent_s:.0f} s (ingress.max_unread_bytes, "
                    "ingress.unread_timeout_s)"
                )
                logger.warning(
                    "a stream that is not read was ended",
                    extra={"call_id": call.call_id, "error": reason},
                )
                self._requests.give_up(call, reason)
                return
            if held_bytes > self._max_bytes / 2:
                self._requests.hold(call)
                is_held = True
            await answer.wait(LOOK_S)
        if is_held:
            self._requests.go_on(call)


class _Answer:
    """An answer on its way, and what its client sends meanwhile."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.num_taken = 0
        self.given_up = False
        self._taken = asyncio.Event()
        self._messages: asyncio.Queue[Message | Exception] = asyncio.Queue()
        self._last: Message | Exception | None = None

    async def read(self, receive: Receive) -> None:
        """Take in what the proxy tells, and keep the app's messages, to the last one."""
        try:
            while True:
                message = await receive()
                if message["type"] == TAKEN:
                    self.num_taken = message["num_bytes"]
                    self._taken.set()
                    continue
                self._messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    return
        except Exception as error:  # any kind: the app gets it in place of a message
            self._messages.put_nowait(error)

    async def received(self) -> Message:
        """The app's next message; the last one again and again."""
        if self._last is None:
            message = await self._messages.get()
            if isinstance(message, Exception) or message["type"] == "http.disconnect":
                self._last = message
        else:
            message = self._last
        if isinstance(message, Exception):
            raise message
        return message

    async def wait(self, most_s: float) -> None:
        """Wait until the client has taken more, but not for long."""
        self._taken.clear()
        try:
            async with asyncio.timeout(most_s):
                await self._taken.wait()
        except TimeoutError:
            pass


def _num_tokens(call: Call) -> int:
    return sum(record.num_output_tokens for record in call.records)
