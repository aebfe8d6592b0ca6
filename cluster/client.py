"""The Python client handle: the app's API without HTTP, from any process of the Ray cluster."""

import asyncio
import contextlib
import uuid
from collections.abc import (
    AsyncGenerator,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from http import HTTPStatus
from typing import Any, TypeVar, overload

import msgspec
import ray
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ParsedChatCompletion
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from cluster.background_loop import BackgroundLoop
from cluster.call_parameters import (
    answer_type,
    check_timeout,
    check_type,
    encode_parameters,
    parse_answer,
)
from cluster.chunk_receiver import ChunkReceiver
from cluster.errors import AppNotFound, HandleClosed, RequestFailed
from cluster.ingress.protocol import Api, AppStatus
from cluster.observe.explanation import Explanation
from cluster.observe.request_history import Refusal
from cluster.ray_cluster import join_ray_cluster
from workers.reports import WorkerSteps
from workers.sockets import Ports, check_ports
from workers.timeline import Span
from workers.token_stream import LOST_AFTER_S

Prompt = str | list[int]
Messages = Sequence[Mapping[str, Any] | BaseModel]
T = TypeVar("T")

ASK_TIMEOUT_S = 30.0
"""Time that the app has to answer what is no request, such as `status`."""


class XYServe:
    """A handle on a running app; make one with `XYServe.connect`.

    Parameters of a call are those of the OpenAI API (`max_tokens`, `temperature`, `stop`, `n`,
    `logprobs`, `tools`, `response_format`, ...) and vLLM's additions to it (`top_k`,
    `structured_outputs`, `priority`, ...); results are the types of the `openai` package. Errors
    the server answers are raised as `RequestFailed` with its message and status; a parameter that
    there is not, or that cannot be used, is status 400. `timeout_s` bounds a whole call; when it
    is over the call is cancelled and TimeoutError raised.

    `slo_class` names the service class of a call, one of the app's config; `slo_ttft_ms` (time to
    the first token) and `slo_tpot_ms` (time per output token after it) replace single targets of
    the class, `math.inf` lifting one. The workers schedule their steps by these targets.
    `tenant` names one of the app's config, for whom the call is made, by default `default`: its
    quotas apply. `request_id` names a call, for `explain`, and `traceparent` is the trace that it
    belongs to.

    Synchronous and asynchronous methods may be mixed; the object is safe to share between
    threads. A pickled handle, as one that is given to a Ray task or actor, connects again where it
    arrives. After `close` every method raises HandleClosed.
    """

    def __init__(
        self,
        ingress: "DeploymentHandle[Any]",
        address: str | None = None,
        app: str = "xyserve",
        stream_ports: Ports | None = None,
    ) -> None:
        self._deployment = ingress
        self._worker_id = ray.get_runtime_context().get_worker_id() if address else ""
        """Of this process in the Ray cluster; it has another one after another `ray.init`."""
        self._address = address
        self._app = app
        self._loop = BackgroundLoop("xyserve-client")
        self._stream_ports = stream_ports
        self._chunks = ChunkReceiver(stream_ports)

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        app: str = "xyserve",
        stream_ports: Ports | None = None,
    ) -> "XYServe":
        """Connect to `app` on the Ray cluster at `address`, which is HOST:PORT.

        By default that is RAY_ADDRESS, or else the cluster of this machine. Streamed answers arrive
        at one of `stream_ports`, the first and the last of a range, by default at any that is free.
        ConnectionError within 5 s if no Ray cluster is there, AppNotFound if the app is not.
        """
        check_ports(stream_ports)
        if not ray.is_initialized():
            join_ray_cluster(address)
        try:
            here = ray.get_runtime_context().gcs_address
            return cls(serve.get_app_handle(app), here, app, stream_ports)
        except RayServeException:
            apps = ", ".join(serve.status().applications) or "none"
            raise AppNotFound(
                f"no app {app!r} on this Ray cluster (running: {apps}); start it with "
                "`serve deploy deploy/local.yaml`"
            ) from None

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        response_format: type[T],
        timeout_s: float | None = None,
        **params: Any,
    ) -> ParsedChatCompletion[T]: ...

    @overload
    def chat(
        self, messages: Messages, *, timeout_s: float | None = None, **params: Any
    ) -> ChatCompletion: ...

    def chat(
        self, messages: Messages, *, timeout_s: float | None = None, **params: Any
    ) -> ChatCompletion:
        """The model's answer to a conversation.

        `response_format` may be a type: a pydantic model, a dataclass or what else pydantic knows.
        Each message then has a `parsed` of this type, as with `parse` of the `openai` package,
        whose LengthFinishReasonError is raised if an answer is cut off.
        """
        return self._loop.wait(self._chat(messages, timeout_s, params))

    @overload
    async def chat_async(
        self,
        messages: Messages,
        *,
        response_format: type[T],
        timeout_s: float | None = None,
        **params: Any,
    ) -> ParsedChatCompletion[T]: ...

    @overload
    async def chat_async(
        self, messages: Messages, *, timeout_s: float | None = None, **params: Any
    ) -> ChatCompletion: ...

    async def chat_async(
        self, messages: Messages, *, timeout_s: float | None = None, **params: Any
    ) -> ChatCompletion:
        """`chat` for asyncio."""
        return await self._loop.wait_async(self._chat(messages, timeout_s, params))

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **params: Any
    ) -> Completion:
        """The model's continuation of a text or of token ids."""
        return self._loop.wait(self._generate(prompt, timeout_s, params))

    async def generate_async(
        self, prompt: Prompt, *, timeout_s: float | None = None, **params: Any
    ) -> Completion:
        """`generate` for asyncio."""
        return await self._loop.wait_async(self._generate(prompt, timeout_s, params))

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
            while (chunk := self._loop.wait(call.next_chunk())) is not None:
                yield chunk
        finally:
            self._loop.call(call.close)

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
            while (chunk := await self._loop.wait_async(call.next_chunk())) is not None:
                yield chunk
        finally:
            self._loop.call(call.close)

    def status(self) -> AppStatus:
        """The app's workers at this moment."""
        status: AppStatus = self._loop.wait(self._ask("status"))
        return status

    def spans(self, since_s: float) -> dict[str, list[Span]]:
        """What each worker and draft worker did since a time, by the wall clock.

        They keep their latest 20,000 steps and draftings. Steps of the policy `vllm` are not kept.
        """
        check_type("since_s", since_s, float)
        spans: dict[str, list[Span]] = self._loop.wait(self._ask("spans", since_s))
        return spans

    def steps(self, since_s: float = 0.0, most: int = 20) -> list[WorkerSteps]:
        """The latest `most` steps of each worker that ended after a time, by the wall clock."""
        check_type("since_s", since_s, float)
        check_type("most", most, int)
        steps: list[WorkerSteps] = self._loop.wait(self._ask("steps", since_s, most))
        return steps

    def explain(self, request_id: str) -> list[Explanation | Refusal]:
        """What happened to the requests whose ids contain `request_id`, and to refused calls.

        It is the id of an answer, or of its header x-request-id. Each ingress remembers its latest
        10,000 requests and refusals, each worker its latest 20,000 steps.
        """
        check_type("request_id", request_id, str)
        return self._loop.wait(self._explain(request_id))

    def close(self) -> None:
        """End the handle; calls under way are cancelled, and raise HandleClosed."""
        self._loop.close()

    def __enter__(self) -> "XYServe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        self._loop.check_usable()
        return XYServe.connect, (self._address, self._app, self._stream_ports)

    @property
    def _ingress(self) -> "DeploymentHandle[Any]":
        """The ingress; HandleClosed if it cannot be reached because Ray was shut down here.

        Serve would start a Ray of its own, and look for the ingress there for ever.
        """
        if self._worker_id and not (
            ray.is_initialized() and ray.get_runtime_context().get_worker_id() == self._worker_id
        ):
            raise HandleClosed(
                "Ray was shut down in this process; make another handle with `XYServe.connect`"
            )
        return self._deployment

    # What follows runs in the handle's own event loop.

    async def _chat(
        self, messages: Messages, timeout_s: float | None, params: dict[str, Any]
    ) -> ChatCompletion:
        body = await self._call("chat", {"messages": messages} | params, timeout_s)
        if (wanted := answer_type(params)) is None:
            return ChatCompletion.construct(**body)
        answer = ParsedChatCompletion[Any].construct(**body)
        parse_answer(answer, wanted)
        return answer

    async def _generate(
        self, prompt: Prompt, timeout_s: float | None, params: dict[str, Any]
    ) -> Completion:
        return Completion.construct(
            **await self._call("completion", {"prompt": prompt} | params, timeout_s)
        )

    async def _call(self, api: Api, params: dict[str, Any], timeout_s: float | None) -> Any:
        check_timeout(timeout_s)
        call = self._ingress.call.remote(api, encode_parameters(params))
        return msgspec.json.decode(await self._respond(call, timeout_s))

    async def _ask(self, method: str, *args: Any) -> Any:
        return await self._respond(getattr(self._ingress, method).remote(*args), ASK_TIMEOUT_S)

    async def _explain(self, request_id: str) -> list[Explanation | Refusal]:
        answers = self._ingress.broadcast("recall", request_id)
        with _failures_of_ray():
            of_ingresses = await answers.results_async(timeout_s=ASK_TIMEOUT_S)
        found: list[Explanation | Refusal] = []
        for records in of_ingresses:
            for record in records:
                if isinstance(record, Refusal):
                    found.append(record)
                    continue
                attempt_ids = [attempt.attempt_id for attempt in record.attempts]
                found.append(Explanation(record, await self._ask("attempt_traces", attempt_ids)))
        return found

    async def _respond(self, call: "DeploymentResponse[Any]", timeout_s: float | None) -> Any:
        """The result of a call of the ingress; raises the failure that may be in its place."""
        try:
            with _failures_of_ray():
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
        if isinstance(input, Iterator):
            input = list(input)
        is_chat = isinstance(input, Sequence) and any(
            isinstance(message, Mapping | BaseModel) for message in input[:1]
        )
        api: Api = "chat" if is_chat else "completion"
        check_timeout(timeout_s)
        payload = encode_parameters({"messages" if is_chat else "prompt": input} | params)
        return _StreamCall(self, api, payload, timeout_s)


@contextlib.contextmanager
def _failures_of_ray() -> Iterator[None]:
    """Raise what Ray says about a call as RequestFailed."""
    try:
        yield
    except RayTaskError as error:
        raise RequestFailed(f"the app failed: {error.cause!r}") from None
    except (RayError, RayServeException) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RequestFailed(
            f"the app cannot be reached: {reason}", HTTPStatus.SERVICE_UNAVAILABLE
        ) from None


class _StreamCall:
    """One streamed answer; used in the handle's event loop."""

    def __init__(self, handle: XYServe, api: Api, payload: str, timeout_s: float | None) -> None:
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
        self._handle._chunks.close(self._call_id)
        if self._call is not None:
            self._call.cancel()

    async def _run(self) -> None:
        handle = self._handle
        address = handle._chunks.open(self._call_id, self.chunks)
        call = handle._ingress.stream.remote(self._api, self._payload, self._call_id, address)
        await handle._respond(call, self._timeout_s)
