"""The ingress: answers HTTP and client handles, and sends the work to the workers."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections import defaultdict
from typing import Any

import msgspec
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from cluster.config.app_config import AppConfig
from cluster.errors import RequestFailed
from cluster.ingress import vllm_seams
from cluster.ingress.auth import Doorkeeper, watch
from cluster.ingress.calls import Calls
from cluster.ingress.engine_client import EngineClient
from cluster.ingress.http_metrics import HttpMetrics
from cluster.ingress.memory import give_back_memory
from cluster.ingress.protocol import Api, AppStatus, Chunk
from cluster.ingress.telemetry import IngressTelemetry
from cluster.ingress.tenants import Tenants
from cluster.keys import Keyring
from cluster.models.model import resolve_model
from cluster.observe.app_metrics import AppMetrics
from cluster.observe.explanation import AttemptTrace
from cluster.observe.exporter import Exporter, RequestMetrics
from cluster.observe.replica import Replica, replica_context
from cluster.observe.request_history import Refusal, RequestHistory, RequestRecord
from cluster.placement import ray_seams
from cluster.placement.directory import WorkerDirectory
from scheduler.placement import WorkerLoad
from workers.reports import WorkerStatus, WorkerSteps
from workers.timeline import Span
from workers.token_stream import StreamAddress, StreamReceiver, StreamSenders

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.2
"""Period at which the streams to client handles are polled."""
ASK_TIMEOUT_S = 60.0
"""A replica that does not answer within this time is taken to hang, and left out."""


class Ingress(Replica):
    """One replica of the front end; stateless except for the requests in flight."""

    def __init__(
        self,
        config: AppConfig,
        workers: "DeploymentHandle[Any]",
        scheduler: "DeploymentHandle[Any]",
        draft_workers: "DeploymentHandle[Any] | None" = None,
    ) -> None:
        super().__init__(config, "ingress")
        ray_seams.check_seams()
        vllm_seams.check_seams()
        # vLLM takes long to import, and is checked first.
        from cluster.ingress.vllm_frontend import Frontend, decode_outputs

        self._config = config
        self._workers = workers
        self._scheduler = scheduler
        self._draft_workers = draft_workers
        self._history = RequestHistory()
        metrics = RequestMetrics(
            Exporter(config.model_name, config.metrics), config.slo, config.all_tenants
        )
        observer = IngressTelemetry(metrics, self._tracing, self._history)
        receiver = StreamReceiver(get_node_ip_address(), config.stream_ports)
        self._stream_endpoint = receiver.address.endpoint
        self._client = EngineClient(
            workers,
            WorkerDirectory(workers),
            scheduler,
            receiver,
            decode_outputs(),
            observer,
            config.ingress.placement_timeout_s,
        )
        self._keyring = Keyring(config.auth.path) if config.auth.keys_file else None
        self._frontend = Frontend(
            config,
            resolve_model(config.model),
            self._client,
            Calls(
                config.slo,
                self._tracing,
                observer,
                Tenants(
                    config.all_tenants,
                    scheduler.draw.remote,
                    self._replica_id,
                    config.num_ingresses,
                ),
            ),
            Doorkeeper(
                config.auth, config.all_tenants, self._keyring, config.ingress.allowed_origins
            ),
            HttpMetrics(metrics, AppMetrics(replica_context()["app"])) if config.metrics else None,
        )
        self._senders = StreamSenders()
        self._chunks: defaultdict[StreamAddress, list[Chunk]] = defaultdict(list)
        self._lost: defaultdict[StreamAddress, set[asyncio.Event]] = defaultdict(set)
        """For each stream to a client handle, whether its client no longer reads."""
        self._polling: asyncio.Task[None] | None = None

    @property
    def stream_endpoint(self) -> str:
        """Where workers send the tokens."""
        return self._stream_endpoint

    async def __serve_build_asgi_app__(self) -> Any:
        """Serve's hook for the HTTP app."""
        await self._frontend.start()
        self._watch_keys()
        give_back_memory()
        logger.info("app ready", extra={"model": self._config.model_name})
        return self._frontend.asgi_app

    def _watch_keys(self) -> None:
        """Have the keys read again when their file changes, and say who may call."""
        if self._keyring is not None:
            self._watching = asyncio.create_task(watch(self._keyring, self._config.all_tenants))
        elif not self._config.auth.anonymous:
            logger.warning(
                "without keys (auth.keys_file) the HTTP API answers programs on this machine only"
            )

    async def check_health(self) -> None:
        """Serve's hook: it replaces this replica when this raises."""
        self._frontend.check_health()

    async def call(self, api: Api, payload: str) -> str | RequestFailed:
        """Answer a client handle, whose parameters are JSON. Cancelling the call frees its slots.

        A failure is returned: Serve would log it as a crash of this replica if it were raised.
        """
        try:
            return await self._frontend.complete(api, json.loads(payload))
        except RequestFailed as failure:
            return failure

    async def stream(
        self, api: Api, payload: str, call_id: str, reply_to: StreamAddress
    ) -> RequestFailed | None:
        """`call` with the answer sent to `reply_to` in chunks; returns after the last one."""
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll_senders())
        lost = asyncio.Event()
        self._lost[reply_to].add(lost)
        try:
            async with contextlib.aclosing(
                self._frontend.stream(api, json.loads(payload))
            ) as chunks:
                async for data in chunks:
                    if lost.is_set():
                        raise RequestFailed("the client does not read its stream", 408)
                    self._send(reply_to, Chunk(call_id, data))
        except RequestFailed as failure:
            return failure
        finally:
            self._lost[reply_to].discard(lost)
            if not self._lost[reply_to]:
                del self._lost[reply_to]
        self._send(reply_to, Chunk(call_id, ""))
        return None

    async def status(self) -> AppStatus:
        """The state of all workers, and of draft workers as they last reported it."""
        workers = await _ask_all(self._workers, "status")
        loads = {load.worker_id: load for load in await self._scheduler.loads.remote()}
        return AppStatus(
            self._config.model_name,
            [
                _as_placed(worker, loads.get(worker.worker_id))
                for worker in sorted(workers, key=lambda worker: worker.worker_id)
            ],
            self._client.num_live,
            await self._scheduler.draft_workers.remote(),
            await self._client.has_workers(),
            await self._scheduler.scaling.remote(),
        )

    async def spans(self, since_s: float) -> dict[str, list[Span]]:
        """What each worker and draft worker did since a time, by the wall clock."""
        workers = await _ask_all(self._workers, "spans", since_s)
        spans = {f"worker {worker_id}": own for worker_id, own in workers}
        if self._draft_workers:
            draft_workers = await _ask_all(self._draft_workers, "spans", since_s)
            spans |= {f"draft worker {worker_id}": own for worker_id, own in draft_workers}
        return spans

    async def steps(self, since_s: float, most: int) -> list[WorkerSteps]:
        """The latest `most` steps of each worker that ended after a time, by the wall clock."""
        found: list[WorkerSteps] = await _ask_all(self._workers, "steps", since_s, most)
        return sorted(found, key=lambda of_worker: of_worker.worker_id)

    async def recall(self, query: str) -> list[RequestRecord | Refusal]:
        """The calls and requests of this ingress whose ids contain `query`."""
        return self._history.find(query)

    async def attempt_traces(self, attempt_ids: list[str]) -> list[AttemptTrace]:
        """Where each attempt at a request was placed, and its steps there."""
        placements = await self._scheduler.placements.remote(attempt_ids)
        steps = await _ask_all(self._workers, "steps_of", attempt_ids)
        return [
            AttemptTrace(
                placements.get(attempt_id),
                {worker_id: found[attempt_id] for worker_id, found in steps if attempt_id in found},
            )
            for attempt_id in attempt_ids
        ]

    def _send(self, reply_to: StreamAddress, chunk: Chunk) -> None:
        # What one step produced for one client leaves as one message: the streams that it
        # wakes all run before the flush.
        if not self._chunks:
            asyncio.get_running_loop().call_soon(self._flush)
        self._chunks[reply_to].append(chunk)

    def _flush(self) -> None:
        for reply_to, chunks in self._chunks.items():
            self._senders.send(reply_to, [msgspec.msgpack.encode(chunks)], time.monotonic())
        self._chunks.clear()

    async def _poll_senders(self) -> None:
        while True:
            for address in self._senders.poll(time.monotonic()):
                logger.warning(
                    "a client handle does not read its streams",
                    extra={"client": address.endpoint, "num_streams": len(self._lost[address])},
                )
                for lost in self._lost.pop(address):
                    lost.set()
            await asyncio.sleep(POLL_INTERVAL_S)


def _as_placed(worker: WorkerStatus, load: WorkerLoad | None) -> WorkerStatus:
    """A worker's status with what placement knows of it."""
    if load is None:
        return worker
    return dataclasses.replace(worker, silent=load.silent, on_trial=load.on_trial, slow=load.slow)


async def _ask_all(replicas: "DeploymentHandle[Any]", method: str, *args: Any) -> list[Any]:
    """The answers of all replicas; one that dies or hangs is left out."""
    response = replicas.broadcast(method, *args)
    try:
        answers = await response.results_async(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
    except DeploymentUnavailableError:  # it has no replica now
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]
