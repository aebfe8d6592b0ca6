"""The Python client handle: the app's API without HTTP, from any process of the Ray cluster."""

import asyncio
import concurrent.futures
import contextlib
import threading
import uuid
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, TypeVar, overload

import msgspec
import ray
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.util import get_node_ip_address

from cluster.errors import AppNotFound, RequestFailed
from cluster.ingress.protocol import Api, AppStatus, Chunk
from cluster.observe.explanation import Explanation
from cluster.observe.request_history import Refusal
from cluster.ray_cluster import join_ray_cluster
from workers.reports import WorkerSteps
from workers.timeline import Span
from workers.token_stream import LOST_AFTER_S, StreamReceiver

Prompt = str | list[int]
Messages = list[dict[str, Any]]
T = TypeVar("T")

_decode_chunks = msgspec.msgpack.Decoder(list[Chunk]).decode


class XYServe:
    """A handle on a running app; make one with `XYServe.connect`.

    Parameters of a call are those of the OpenAI API (`max_tokens`, `temperature`, `stop`, `n`,
    `logprobs`, `tools`, `response_format`, ...) and vLLM's additions to it (`top_k`,
    `structured_outputs`, `priority`, ...); results are the types of the `openai` package. Errors
    the server answers are raised as `RequestFailed` with its message and status. `timeout_s`
    bounds a whole call; when it is over the call is cancelled and TimeoutError raised.

    `slo_class` names the service class of a call, one of the app's config; `slo_ttft_ms` (time to
    the first token) and `slo_tpot_ms` (time per output token after it) replace single targets of
    the class, `math.inf` lifting one. The workers schedule their steps by these targets.
    `request_id` names a call, for `explain`, and `traceparent` is the trace that it belongs to.

    Synchronous and asynchronous methods may be mixed; the object is safe to share between
    threads.
    """

    def __init__(self, ingress: "DeploymentHandle[Any]") -> None:
        self._ingress = ingress
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="xyserve-client", daemon=True
        )
        self._thread.start()
        self._receiver: StreamReceiver | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._streams: dict[str, _StreamCall] = {}

    @classmethod
    def connect(cls, address: str | None = None, app: str = "xyserve") -> "XYServe":
        """Connect to `app` on the Ray cluster at `address`, which is HOST:PORT.

        By default that is RAY_ADDRESS, or else the cluster of this machine. ConnectionError within
        5 s if no Ray cluster is there, AppNotFound if the app is not.
        """
        if not ray.is_initialized():
            join_ray_cluster(address)
        try:
            return cls(serve.get_app_handle(app))
        except RayServeException:
            apps = ", ".join(serve.status().applications) or "none"
            raise AppNotFound(
                f"no app {app!r} on this Ray cluster (running: {apps}); start it with "
                "`serve deploy deploy/local.yaml`"
            ) from None

    def chat(
        self, messages: Messages, *, timeout_s: float | None = None, **params: Any
    ) -> ChatCompletion:
        """The model's answer to a conversation."""
        return self._wait(self._chat(messages, timeout_s, params))

    async def chat_async(
        self, messages: Messages, *, timeout_s: float | None = None, **params: Any
    ) -> ChatCompletion:
        """`chat` for asyncio."""
        return await self._wait_async(self._chat(messages, timeout_s, params))

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **params: Any
    ) -> Completion:
        """The model's continuation of a text or of token ids."""
        return self._wait(self._generate(prompt, timeout_s, params))

    async def generate_async(
        self, prompt: Prompt, *, timeout_s: float | None = None, **params: Any
    ) -> Completion:
        """`generate` for asyncio."""
        return await self._wait_async(self._generate(prompt, timeout_s, params))

    @overload
    def stream(
        self, input: Messages, *, timeout_s: float | None = None, **params: Any
    ) -> Generator[ChatCompletionChunk]: ...

    @overload
    def stream(
        self, input: Prompt, *, timeout_s: float | None = None, **params: Any
    ) -> Generator[Completion]: ...

    def stream(
        self, input: Messages | Prompt, *, timeout_s: float | None = None, **params: Any
    ) -> Generator[ChatCompletionChunk] | Generator[Completion]:
        """`chat` or `generate`, piece by piece, from the first iteration on.

        Leaving the loop and closing the iterator cancels the call.
        """
        call = self._stream_call(input, timeout_s, params)
        try:
            while (chunk := self._wait(call.next_chunk())) is not None:
                yield chunk
        finally:
            self._abandon(call)

    @overload
    def stream_async(
        self, input: Messages, *, timeout_s: float | None = None, **params: Any
    ) -> AsyncGenerator[ChatCompletionChunk]: ...

    @overload
    def stream_async(
        self, input: Prompt, *, timeout_s: float | None = None, **params: Any
    ) -> AsyncGenerator[Completion]: ...

    async def stream_async(
        self, input: Messages | Prompt, *, timeout_s: float | None = None, **params: Any
    ) -> AsyncGenerator[Any]:
        """`stream` for asyncio."""
        call = self._stream_call(input, timeout_s, params)
        try:
            while (chunk := await self._wait_async(call.next_chunk())) is not None:
                yield chunk
        finally:
            self._abandon(call)

    def status(self) -> AppStatus:
        """The app's workers at this moment."""
        status: AppStatus = self._wait(self._respond(self._ingress.status.remote(), 30.0))
        return status

    def spans(self, since_s: float) -> dict[str, list[Span]]:
        """What each worker and draft worker did since a time, by the wall clock.

        They keep their latest 20,000 steps and draftings. Steps of the policy `vllm` are not kept.
        """
        call = self._ingress.spans.remote(since_s)
        spans: dict[str, list[Span]] = self._wait(self._respond(call, 30.0))
        return spans

    def steps(self, since_s: float = 0.0, most: int = 20) -> list[WorkerSteps]:
        """The latest `most` steps of each worker that ended after a time, by the wall clock."""
        call = self._ingress.steps.remote(since_s, most)
        steps: list[WorkerSteps] = self._wait(self._respond(call, 30.0))
        return steps

    def explain(self, request_id: str) -> list[Explanation | Refusal]:
        """What happened to the requests whose ids contain `request_id`, and to refused calls.

        It is the id of an answer, or of its header x-request-id. Each ingress remembers its latest
        10,000 requests and refusals, each worker its latest 20,000 steps.
        """
        return self._wait(self._explain(request_id))

    def close(self) -> None:
        """End the handle; calls under way are cancelled."""
        if self._loop.is_closed():
            return
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "XYServe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What follows runs in the handle's own event loop, or brings work there.

    async def _chat(
        self, messages: Messages, timeout_s: float | None, params: dict[str, Any]
    ) -> ChatCompletion:
        call = self._ingress.call.remote("chat", {"messages": messages} | params)
        return ChatCompletion.construct(**msgspec.json.decode(await self._respond(call, timeout_s)))

    async def _generate(
        self, prompt: Prompt, timeout_s: float | None, params: dict[str, Any]
    ) -> Completion:
        call = self._ingress.call.remote("completion", {"prompt": prompt} | params)
        return Completion.construct(**msgspec.json.decode(await self._respond(call, timeout_s)))

    async def _explain(self, request_id: str) -> list[Explanation | Refusal]:
        answers = self._ingress.broadcast("recall", request_id)
        found: list[Explanation | Refusal] = []
        for records in await answers.results_async(timeout_s=30.0):
            for record in records:
                if isinstance(record, Refusal):
                    found.append(record)
                    continue
                attempt_ids = [attempt.attempt_id for attempt in record.attempts]
                attempt_traces = await self._respond(
                    self._ingress.attempt_traces.remote(attempt_ids), 30.0
                )
                found.append(Explanation(record, attempt_traces))
        return found

    async def _respond(self, call: "DeploymentResponse[Any]", timeout_s: float | None) -> Any:
        """The result of a call of the ingress; raises the failure that may be in its place."""
        try:
            async with asyncio.timeout(timeout_s):
                result = await call
        except TimeoutError:
            call.cancel()
            raise TimeoutError(f"no complete answer within {timeout_s} s") from None
        except asyncio.CancelledError:
            call.cancel()
            raise
        if isinstance(result, RequestFailed):
            raise result
        return result

    def _stream_call(
        self, input: Messages | Prompt, timeout_s: float | None, params: dict[str, Any]
    ) -> "_StreamCall":
        if isinstance(input, list) and input and isinstance(input[0], dict):
            return _StreamCall(self, "chat", {"messages": input} | params, timeout_s)
        return _StreamCall(self, "completion", {"prompt": input} | params, timeout_s)

    def _abandon(self, call: "_StreamCall") -> None:
        with contextlib.suppress(RuntimeError):  # the handle was closed, and the call with it
            self._loop.call_soon_threadsafe(call.close)

    async def _receive(self) -> None:
        assert self._receiver is not None
        while True:
            for frame in await self._receiver.receive():
                for chunk in _decode_chunks(frame):
                    if call := self._streams.get(chunk.call_id):
                        call.chunks.put_nowait(chunk.data)

    async def _close(self) -> None:
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        if self._receiver is not None:
            self._receiver.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # e.g. on Ctrl-C
            raise

    async def _wait_async(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(self._start(work))

    def _start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this handle is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)


class _StreamCall:
    """One streamed answer; used in the handle's event loop."""

    def __init__(
        self, handle: XYServe, api: Api, payload: dict[str, Any], timeout_s: float | None
    ) -> None:
        self._handle = handle
        self._api: Api = api
        self._payload = payload
        self._timeout_s = timeout_s
        self._call_id = uuid.uuid4().hex
        self._call: asyncio.Task[None] | None = None
        self.chunks: asyncio.Queue[str] = asyncio.Queue()

    async def next_chunk(self) -> Any:
        """The next chunk; None after the last."""
        if self._call is None:
            self._call = asyncio.create_task(self._run())
        getting = asyncio.create_task(self.chunks.get())
        await asyncio.wait({getting, self._call}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and self._call.exception():
            getting.cancel()
            self._call.result()
        # The call has ended or a chunk is there; what still comes was sent before the end.
        if not (data := await asyncio.wait_for(getting, LOST_AFTER_S)):
            return None
        cls = ChatCompletionChunk if self._api == "chat" else Completion
        return cls.construct(**msgspec.json.decode(data))

    def close(self) -> None:
        """Stop the call if it still runs."""
        self._handle._streams.pop(self._call_id, None)
        if self._call is not None:
            self._call.cancel()

    async def _run(self) -> None:
        handle = self._handle
        if handle._receiver is None:
            handle._receiver = StreamReceiver(get_node_ip_address())
            handle._receiving = asyncio.create_task(handle._receive())
        handle._streams[self._call_id] = self
        call = handle._ingress.stream.remote(
            self._api, self._payload, self._call_id, handle._receiver.address
        )
        await handle._respond(call, self._timeout_s)
