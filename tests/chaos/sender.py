"""Sends calls as clients do, and notes when each part of an answer came."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from cluster.client import XYServe
from cluster.errors import RequestFailed
from tests.chaos.answer import Answer
from tests.chaos.kinds import PATHS, Call

CALL_TIMEOUT_S = 180.0
"""Time after which a call that has not ended counts as lost."""


@dataclass(slots=True)
class Sent:
    """One call that was sent, as its client saw it."""

    call: Call
    call_id: str
    began_s: float = field(default_factory=time.monotonic)
    answer: Answer = field(default_factory=Answer)
    chunk_s: list[float] = field(default_factory=list)
    """Times of the chunks of its stream."""
    broken: str = ""
    """Why it has no whole answer, as the connection or the status says."""
    ended_s: float = 0.0

    def fault(self) -> str:
        """What is wrong with its answer; empty if nothing is, but that it may be unequal."""
        return self.broken or self.answer.fault(self.call.kind)

    def gaps(self) -> list[tuple[float, float]]:
        """When each wait for a chunk after the first began, and how long it was."""
        pairs = zip(self.chunk_s, self.chunk_s[1:], strict=False)
        return [(before, after - before) for before, after in pairs]


class Sender:
    """Two clients of one app: HTTP and the Python handle."""

    def __init__(self, url: str, model: str, handle: XYServe) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=CALL_TIMEOUT_S)
        self._model = model
        self._handle = handle

    async def close(self) -> None:
        await self._http.aclose()

    async def send(self, call: Call, call_id: str) -> Sent:
        """The answer to a call, however it ends."""
        sent = Sent(call, call_id)
        try:
            if call.kind.by_handle:
                await self._by_handle(sent)
            else:
                await self._by_http(sent)
        except httpx.TimeoutException as error:
            sent.broken = f"lost: {error!r} after {CALL_TIMEOUT_S:g} s"
        except (httpx.TransportError, json.JSONDecodeError) as error:
            sent.broken = f"failed: {error!r}"
        except TimeoutError as error:
            sent.broken = f"lost: {error!r}"
        except RequestFailed as error:
            sent.broken = f"failed: {error.status} {error}"
        sent.ended_s = time.monotonic()
        return sent

    async def _by_http(self, sent: Sent) -> None:
        kind = sent.call.kind
        async with self._http.stream(
            "POST",
            PATHS[kind.api],
            json=sent.call.body(self._model),
            headers={"x-request-id": sent.call_id},
        ) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                sent.broken = f"failed: {response.status_code} {text[:300]}"
            elif not kind.streams:
                sent.answer.take(json.loads(await response.aread()))
                sent.answer.num_ends += 1
            else:
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        self._take(sent, line.removeprefix("data:").strip())

    def _take(self, sent: Sent, data: str) -> None:
        sent.chunk_s.append(time.monotonic())
        if data != "[DONE]":
            sent.answer.take(json.loads(data))
        elif sent.call.kind.api != "responses":
            sent.answer.num_ends += 1

    async def _by_handle(self, sent: Sent) -> None:
        params: dict[str, Any] = sent.call.body(self._model)
        del params["model"]
        chat, is_stream = params.pop("messages", None), params.pop("stream", False)
        params |= {"request_id": sent.call_id, "timeout_s": CALL_TIMEOUT_S}
        if not is_stream:
            whole = (
                await self._handle.chat_async(chat, **params)
                if chat
                else await self._handle.generate_async(params.pop("prompt"), **params)
            )
            sent.answer.take(whole.to_dict())
        else:
            given = chat or params.pop("prompt")
            async for chunk in self._handle.stream_async(given, **params):
                sent.chunk_s.append(time.monotonic())
                sent.answer.take(chunk.to_dict())
        sent.answer.num_ends += 1
