"""Workers that answer each request with the same steps, behind a real engine client."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.types import Message, Receive, Scope, Send
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.serial_utils import MsgpackEncoder

from cluster.config.app_config import AppConfig
from cluster.ingress.auth import Doorkeeper
from cluster.ingress.calls import Calls
from cluster.ingress.engine_client import EngineClient
from cluster.ingress.http_metrics import HttpMetrics
from cluster.ingress.observer import IngressObserver
from cluster.ingress.tenants import Tenants
from cluster.ingress.vllm_frontend import Frontend, decode_outputs
from cluster.keys import Keyring
from cluster.models.default_model import fetch_default_model
from cluster.observe.request_history import Refusal, RequestRecord
from cluster.placement.global_scheduler import GlobalScheduler
from tests.cluster.ingress.fake_cluster import Call, FakeResponse, FakeScheduler, FakeWorkers
from workers.engine_request import EngineRequest
from workers.token_stream import StreamAddress, StreamReceiver

Step = tuple[Sequence[int], FinishReason | None] | Exception


class AnsweringWorkers(FakeWorkers):
    """Answers requests with steps of tokens, the last of which ends it; an exception is a death."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[list[Step]] = []
        self.num_answered = 0
        self.head_sent = asyncio.Event()
        """Whether a client has the head of its answer; steps behind the first wait for it."""
        self.waits = False
        self._answering: set[asyncio.Task[None]] = set()

    def play(self, *scripts: list[Step], waits: bool = False) -> None:
        """Set the steps of the next requests in turn; the last list is also for all further ones.

        If it `waits`, the steps behind the first come when the client has the head of its answer.
        """
        self.scripts, self.waits, self.num_answered = list(scripts), waits, 0
        self.head_sent.clear()
        self.calls.clear()

    def remote(
        self, worker_id: str, request: EngineRequest, reply_to: StreamAddress
    ) -> FakeResponse:
        response = super().remote(worker_id, request, reply_to)
        script = self.scripts[min(self.num_answered, len(self.scripts) - 1)]
        self.num_answered += 1
        task = asyncio.create_task(self._answer(self.calls[-1], script))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        return response

    async def _answer(self, call: Call, script: list[Step]) -> None:
        request_id = call.request.request.request_id
        for number, step in enumerate(script):
            if number and self.waits:
                await self.head_sent.wait()
            if isinstance(step, Exception):
                call.response.result.set_exception(step)
                return
            token_ids, reason = step
            output = EngineCoreOutput(request_id, list(token_ids), finish_reason=reason)
            frames: Any = MsgpackEncoder().encode(EngineCoreOutputs(outputs=[output]))
            self.send_frames([bytes(frame) for frame in frames])
            if reason is not None:
                call.response.result.set_result(str(reason))


class Records(IngressObserver):
    """Keeps the ends of requests and the refusals."""

    def __init__(self) -> None:
        self.ended_ones: list[RequestRecord] = []
        self.refusals: list[Refusal] = []

    def refused(self, refusal: Refusal) -> None:
        self.refusals.append(refusal)

    def ended(self, record: RequestRecord) -> None:
        self.ended_ones.append(record)

    def take(self) -> list[tuple[str, int]]:
        """Outcome and number of output tokens of what ended since the last call."""
        ended, self.ended_ones = self.ended_ones, []
        return [(record.outcome, record.num_output_tokens) for record in ended]


class Uncounted:
    """Takes what is counted, and has no page of it."""

    def count_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count one answer."""


class Server:
    """vLLM's front end over such workers, with a client of its HTTP side."""

    def __init__(
        self,
        config: AppConfig,
        keyring: Keyring | None = None,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self.workers = AnsweringWorkers()
        self.scheduler = FakeScheduler()
        self.records = Records()
        workers: Any = self.workers
        scheduler: Any = self.scheduler
        receiver = StreamReceiver("127.0.0.1")
        self.client = EngineClient(
            workers, scheduler, scheduler, receiver, decode_outputs(), self.records
        )
        quotas = {name: tenant.quota for name, tenant in config.all_tenants.items()}
        tenants = Tenants(config.all_tenants, GlobalScheduler(quotas=quotas).draw, "ingress", 1)
        calls = Calls(config.slo, observer=self.records, tenants=tenants)
        uncounted: Any = Uncounted()
        self.frontend = Frontend(
            config,
            str(fetch_default_model()),
            self.client,
            calls,
            doorkeeper
            or Doorkeeper(config.auth, config.all_tenants, keyring, config.ingress.allowed_origins),
            HttpMetrics(uncounted, uncounted),
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.asgi_app, raise_app_exceptions=False),
            base_url="http://localhost",
        )

    async def asgi_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The front end's app, whose workers see when the head of an answer is sent."""

        async def seen(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                self.workers.head_sent.set()

        await self.frontend.asgi_app(scope, receive, seen)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text."""
        tokenizer = self.frontend._llm.get_tokenizer()
        return list(tokenizer.encode(text, add_special_tokens=False))


@asynccontextmanager
async def serving(
    config: AppConfig, keyring: Keyring | None = None, doorkeeper: Doorkeeper | None = None
) -> AsyncIterator[Server]:
    """A server that is closed at the end."""
    server = Server(config, keyring, doorkeeper)
    try:
        await server.frontend.start()
        async with server.http:
            yield server
    finally:
        await server.client.close()
        server.workers.close()
