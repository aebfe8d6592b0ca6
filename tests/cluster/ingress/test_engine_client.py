import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import ANY

import msgspec
import pytest
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from cluster.errors import RequestRefused
from cluster.ingress import engine_client
from cluster.ingress.engine_client import (
    BUSY_S,
    MAX_ATTEMPTS,
    REPLACEMENT_S,
    EngineClient,
    Failure,
)
from cluster.ingress.live_request import NO_WORKER, PROGRESS_TOKENS
from cluster.ingress.observer import IngressObserver
from cluster.observe.request_history import RequestRecord
from scheduler.fair_shares import YIELDS
from scheduler.placement import Placed, RefusalReason, Refused, WorkerLoad
from scheduler.prefill_queue import Forecast
from scheduler.request import Request
from tests.cluster.ingress.fake_cluster import DRAINING, Call, FakeScheduler, FakeWorkers
from workers.engine_request import EngineRequest, Progress
from workers.errors import (
    ClientLost,
    EngineDead,
    EngineStalled,
    PoisonFound,
    StepFailed,
    WorkerDraining,
    WorkerError,
    WorkerSilent,
    WrongWorker,
)
from workers.token_stream import StreamReceiver

GARBAGE = [b"garbage"]
ALL = 1000
"""More output tokens than any request here has."""


@dataclass
class FakePrefillStats:
    """What vLLM tells of a prompt with its first token."""

    num_cached_tokens: int


@dataclass
class FakeOutput:
    """Some tokens of one request."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    prefill_stats: FakePrefillStats | None = None


@dataclass
class FakeOutputs:
    """What one step produced."""

    outputs: list[FakeOutput] = field(default_factory=list)


def decode(frames: list[bytes]) -> FakeOutputs:
    return FakeOutputs(msgspec.msgpack.decode(frames[0], type=list[FakeOutput]))


Client = EngineClient[FakeOutputs]


class Observer(IngressObserver):
    """Keeps the records of requests, and the reasons of their retries."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.retries: list[str] = []
        self.num_ended = 0

    def began(self, record: RequestRecord) -> None:
        self.records.append(record)

    def retried(self, record: RequestRecord, reason: str) -> None:
        self.retries.append(reason)

    def ended(self, record: RequestRecord) -> None:
        self.num_ended += 1


@pytest.fixture
async def workers() -> AsyncIterator[FakeWorkers]:
    workers = FakeWorkers()
    yield workers
    workers.close()


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
def observer() -> Observer:
    return Observer()


def make_client(
    workers: Any,
    scheduler: Any,
    observer: IngressObserver | None = None,
    placement_timeout_s: float = 60.0,
) -> Client:
    receiver = StreamReceiver("127.0.0.1")
    return EngineClient(
        workers, scheduler, scheduler, receiver, decode, observer, placement_timeout_s
    )


class SilentScheduler(FakeScheduler):
    """One that answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = self  # type: ignore[assignment]

    async def remote(self, *_: object) -> Any:
        await asyncio.Event().wait()


@pytest.fixture
async def client(
    workers: FakeWorkers, scheduler: FakeScheduler, observer: Observer
) -> AsyncIterator[Client]:
    client = make_client(workers, scheduler, observer)
    yield client
    await client.close()


def submit(client: Client, request_id: str) -> RequestRecord:
    return client.submit(as_sent(request_id), time.time())


def as_sent(request_id: str, num_engine_deaths: int = 0) -> EngineRequest:
    return EngineRequest(
        Request(
            request_id,
            num_prompt_tokens=10,
            max_tokens=5,
            num_engine_deaths=num_engine_deaths,
            num_attempts=int(request_id.partition(".")[2] or 0),
        ),
        [b"encoded"],
    )


async def next_outputs(client: Client) -> list[FakeOutput]:
    """The outputs of the next step, or a failure as outputs; what ends is finished."""
    outputs = await asyncio.wait_for(client.next_outputs(), 30)
    if isinstance(outputs, Failure):
        return [FakeOutput(outputs.request_id, [], f"error: {outputs.error}")]
    for output in outputs.outputs:
        if output.finish_reason:
            client.finish(output.request_id, output.finish_reason, ALL)
    return outputs.outputs


def die(call: Call, death: Exception) -> None:
    """End a call as the death does: a process that ends raises, a worker returns its error."""
    if isinstance(death, RayActorError):
        call.response.result.set_exception(death)
    else:
        call.response.result.set_result(death)


async def test_a_request_is_submitted_to_the_workers_under_the_id_of_its_attempt(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    call = await workers.called(1)

    assert call.request == as_sent("r.0")


async def test_only_placement_sees_what_blocks_a_prompt_has(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    ours = Request("r", 1, 9, block_hashes=bytes(80), prefix_format="format")
    record = client.submit(EngineRequest(ours, [b"core"]), 1.0)
    scheduler.answers = [Placed("a", "another")]
    assert client.prefix_format == ""
    call = await workers.called(1)

    assert scheduler.latest == dataclasses.replace(ours, request_id="r.0")
    assert call.request.request == Request("r.0", 1, 9)
    assert record.request == Request("r", 1, 9)
    assert client.prefix_format == "another"


async def test_what_was_predicted_is_noted_beside_what_came(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    forecast = Forecast(num_cached_tokens=64, ttft_s=0.5)
    scheduler.answers = [Placed("a", "format", forecast)]
    record = submit(client, "r")
    await workers.called(1)
    workers.send(FakeOutput("r.0", [1], None, FakePrefillStats(32)), FakeOutput("r.0", [2]))
    await next_outputs(client)

    [attempt] = record.attempts
    assert (attempt.forecast, attempt.num_cached_tokens) == (forecast, 32)
    assert attempt.began_s <= attempt.placed_s <= attempt.first_token_s <= time.time()


async def test_outputs_come_under_the_id_of_their_request(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    submit(client, "s")
    call = await workers.called(2)
    workers.send(FakeOutput("r.0", [1]), FakeOutput("s.0", [2]))
    workers.send(FakeOutput("r.0", [3], "stop"))
    call.response.result.set_result("stop")

    assert [await next_outputs(client), await next_outputs(client)] == [
        [FakeOutput("r", [1]), FakeOutput("s", [2])],
        [FakeOutput("r", [3], "stop")],
    ]
    assert client.num_live == 1


async def test_the_call_may_end_before_the_last_outputs_come(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    call = await workers.called(1)
    call.response.result.set_result("length")
    await asyncio.sleep(0)
    workers.send(FakeOutput("r.0", [1], "length"))

    assert await next_outputs(client) == [FakeOutput("r", [1], "length")]
    assert client.num_live == 0


async def test_a_request_whose_last_outputs_never_come_goes_on_elsewhere(
    client: Client, workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.ingress.engine_client.LOST_AFTER_S", 0.01)
    submit(client, "r")
    call = await workers.called(1)
    workers.send(FakeOutput("r.0", [7]))
    outputs = [await next_outputs(client)]
    call.response.result.set_result("length")
    again = await workers.called(2)
    workers.send(FakeOutput("r.0", [8], "length"))  # they come at last
    workers.send(FakeOutput("r.1", [8], "length"))
    outputs.append(await next_outputs(client))

    assert prior_tokens(again) == (7,)
    assert outputs == [[FakeOutput("r", [7])], [FakeOutput("r", [8], "length")]]
    assert client.num_live == 0


DEATHS = [
    RayActorError(),
    EngineDead("a step hangs"),
    StepFailed("a step failed"),
    WorkerDraining("draining"),
    ClientLost("unreachable"),
]
DEATHS_IDS = [
    "the worker died",
    "its engine failed",
    "in its step",
    "it takes no new requests",
    "it reached nobody",
]


def prior_tokens(call: Call) -> tuple[int, ...]:
    """The tokens behind which an attempt goes on."""
    return call.request.progress.output_token_ids if call.request.progress else ()


@pytest.mark.parametrize("death", DEATHS, ids=DEATHS_IDS)
async def test_a_request_that_loses_its_worker_before_its_first_token_is_placed_again(
    client: Client, workers: FakeWorkers, death: Exception
) -> None:
    submit(client, "r")
    first = await workers.called(1)
    die(first, death)
    second = await workers.called(2)
    workers.send(FakeOutput("r.0", [666]))  # late, from the worker that was given up
    workers.send(FakeOutput("r.1", [1], "stop"), FakeOutput("r.0", [666], "stop"))

    assert second.request == as_sent("r.1", num_engine_deaths=isinstance(death, StepFailed))
    assert await next_outputs(client) == [FakeOutput("r", [1], "stop")]
    assert client.num_live == 0


@pytest.mark.parametrize("death", DEATHS, ids=DEATHS_IDS)
async def test_a_request_that_loses_its_worker_goes_on_behind_its_last_token(
    client: Client, workers: FakeWorkers, death: Exception
) -> None:
    record = submit(client, "r")
    first = await workers.called(1)
    workers.send(FakeOutput("r.0", [1]), FakeOutput("r.0", [2, 3]))
    outputs = [*await next_outputs(client)]
    die(first, death)
    second = await workers.called(2)
    workers.send(FakeOutput("r.0", [4]))  # late, from the worker that was given up
    workers.send(FakeOutput("r.1", [4], "stop"))
    outputs += await next_outputs(client)

    assert second.request.progress == Progress((1, 2, 3), record.first_token_s, ANY)
    assert second.request.request.num_prior_tokens == 3
    assert [output.new_token_ids for output in outputs] == [[1], [2, 3], [4]]
    assert (list(record.output_token_ids), client.num_live) == ([1, 2, 3, 4], 0)


async def test_a_request_that_loses_one_worker_after_another_ends_with_an_error(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    death = EngineDead("a step hangs")
    for attempt in range(MAX_ATTEMPTS):
        die(await workers.called(attempt + 1), death)

    assert await next_outputs(client) == [FakeOutput("r", [], f"error: {death}")]
    assert (len(workers.calls), client.num_live) == (MAX_ATTEMPTS, 0)


@pytest.mark.parametrize("death", [RayActorError(), EngineDead("x"), ClientLost("x")])
async def test_losses_between_which_there_is_progress_do_not_add_up(
    client: Client, workers: FakeWorkers, death: Exception
) -> None:
    submit(client, "r")
    for attempt in range(3 * MAX_ATTEMPTS):
        call = await workers.called(attempt + 1)
        assert call.request.request.num_engine_deaths == 0
        workers.send(FakeOutput(f"r.{attempt}", list(range(PROGRESS_TOKENS))))
        await next_outputs(client)
        die(call, death)
    await workers.called(3 * MAX_ATTEMPTS + 1)
    workers.send(FakeOutput(f"r.{3 * MAX_ATTEMPTS}", [1], "stop"))

    assert await next_outputs(client) == [FakeOutput("r", [1], "stop")]


async def test_workers_that_drain_may_be_as_many_as_there_are(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    for attempt in range(3 * MAX_ATTEMPTS):
        die(await workers.called(attempt + 1), WorkerDraining("draining"))
    await workers.called(3 * MAX_ATTEMPTS + 1)
    workers.send(FakeOutput(f"r.{3 * MAX_ATTEMPTS}", [1], "stop"))

    assert await next_outputs(client) == [FakeOutput("r", [1], "stop")]


async def test_a_worker_whose_process_has_ended_is_known_to_be_dead_at_once(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    submit(client, "r")
    first = await workers.called(1)
    die(first, ActorDiedError())
    await workers.called(2)

    assert scheduler.bury.kept == {first.worker_id: "ActorDiedError"}


async def test_a_request_that_is_the_cause_of_a_failure_is_not_tried_again(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    request = as_sent("r")
    request = dataclasses.replace(
        request, request=dataclasses.replace(request.request, fingerprint="f")
    )
    client.submit(request, time.time())
    die(await workers.called(1), PoisonFound("shapes differ"))

    assert await next_outputs(client) == [
        FakeOutput("r", [], "error: a step with this request alone failed: shapes differ")
    ]
    assert (len(workers.calls), client.num_live) == (1, 0)
    assert scheduler.refuse.kept == {"f": "a step with this request alone failed: shapes differ"}


@pytest.mark.parametrize(
    ("loss", "num_engine_deaths"),
    [(WorkerSilent("x"), 0), (EngineStalled("x"), 1), (EngineDead("x"), 0)],
)
@pytest.mark.parametrize("tokens", [[], [5, 6]])
async def test_a_worker_that_makes_no_steps_is_given_up_though_its_call_goes_on(
    client: Client,
    workers: FakeWorkers,
    scheduler: FakeScheduler,
    monkeypatch: pytest.MonkeyPatch,
    loss: WorkerError,
    num_engine_deaths: int,
    tokens: list[int],
) -> None:
    monkeypatch.setattr("cluster.ingress.live_request.QUIET_S", 0.05)
    monkeypatch.setattr("cluster.ingress.engine_client.WATCH_S", 0.01)
    submit(client, "r")
    first = await workers.called(1)
    if tokens:
        workers.send(FakeOutput("r.0", tokens))
        await next_outputs(client)
    scheduler.losses_of = {first.worker_id: loss}
    second = await workers.called(2)
    workers.send(FakeOutput("r.0", [666], "stop"), FakeOutput("r.1", [7], "stop"))

    assert await next_outputs(client) == [FakeOutput("r", [7], "stop")]
    assert first.response.was_cancelled
    assert prior_tokens(second) == tuple(tokens)
    assert second.request.request.num_engine_deaths == num_engine_deaths


async def test_silent_workers_may_be_many_and_are_given_more_time_each_time(
    client: Client,
    workers: FakeWorkers,
    scheduler: FakeScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.ingress.live_request.QUIET_S", 0.02)
    monkeypatch.setattr("cluster.ingress.engine_client.WATCH_S", 0.005)
    scheduler.losses_of = {name: WorkerSilent("x") for name in scheduler.alive}
    record = submit(client, "r")
    await workers.called(MAX_ATTEMPTS + 2)
    waits_s = [
        after.began_s - before.began_s for before, after in itertools.pairwise(record.attempts)
    ]

    assert all(wait_s > 0.02 * 2**number for number, wait_s in enumerate(waits_s))


async def test_a_request_whose_tokens_come_is_never_asked_about(
    client: Client,
    workers: FakeWorkers,
    scheduler: FakeScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.ingress.live_request.QUIET_S", 10.0)
    monkeypatch.setattr("cluster.ingress.engine_client.WATCH_S", 0.01)
    submit(client, "r")
    scheduler.losses_of = {(await workers.called(1)).worker_id: WorkerSilent("x")}
    await asyncio.sleep(0.1)

    assert len(workers.calls) == 1


@pytest.mark.parametrize(
    ("deaths", "suspicions"),
    [
        ([StepFailed("x"), StepFailed("x")], [0, 1]),
        ([StepFailed("x"), RayActorError()], [0, 1]),
        ([RayActorError(), RayActorError(), RayActorError()], [0, 0, 1]),
        ([RayActorError(), StepFailed("x"), StepFailed("x")], [0, 0, 1]),
        ([EngineDead("x"), StepFailed("x"), RayActorError()], [0, 0, 1]),
    ],
    ids=[
        "twice in its step",
        "its answer was lost",
        "processes end",
        "one of each",
        "it only waited in the first",
    ],
)
async def test_a_request_under_which_engines_die_is_placed_as_a_suspect_and_then_given_up(
    client: Client, workers: FakeWorkers, deaths: list[Exception], suspicions: list[int]
) -> None:
    submit(client, "r")
    for attempt, death in enumerate(deaths):
        die(await workers.called(attempt + 1), death)
    [output] = await next_outputs(client)

    placed = [call.request.request.num_engine_deaths for call in workers.calls]
    assert (placed, client.num_live) == (suspicions, 0)
    if isinstance(deaths[-1], StepFailed):
        assert output.finish_reason == (
            "error: 2 engines died while they ran this request, so it is not tried again; the "
            "last one: x"
        )


async def test_a_request_that_its_worker_refuses_ends_with_an_error(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    die(await workers.called(1), ValueError("malformed"))

    assert await next_outputs(client) == [FakeOutput("r", [], "error: malformed")]
    assert (len(workers.calls), client.num_live) == (1, 0)


async def test_a_request_that_cannot_be_sent_ends_with_an_error(
    client: Client, workers: FakeWorkers
) -> None:
    workers.refusal = RuntimeError("Serve is shutting down")
    submit(client, "r")

    assert await next_outputs(client) == [FakeOutput("r", [], "error: Serve is shutting down")]
    assert client.num_live == 0


async def test_abort_cancels_the_call_and_nothing_more_comes(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    submit(client, "other")
    await workers.called(2)
    client.abort(["r", "unknown"])
    workers.send(FakeOutput("r.0", [1]))
    workers.send(FakeOutput("r.0", [2], "abort"), FakeOutput("other.0", [3]))

    assert await next_outputs(client) == [FakeOutput("other", [3])]
    assert [call.response.was_cancelled for call in workers.calls] == [True, False]
    assert client.num_live == 1


async def test_a_request_aborted_at_once_is_never_sent(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    client.abort(["r"])
    submit(client, "other")

    assert (await workers.called(1)).request == as_sent("other.0")
    assert client.num_live == 1


async def test_an_aborted_request_is_not_placed_again(client: Client, workers: FakeWorkers) -> None:
    submit(client, "r")
    call = await workers.called(1)
    call.response.result.set_exception(RayActorError())
    client.abort(["r"])
    submit(client, "other")
    await asyncio.sleep(0.01)

    assert [call.request.request.request_id for call in workers.calls] == ["r.0", "other.0"]


async def test_outputs_that_cannot_be_read_do_not_stop_those_that_can(
    client: Client, workers: FakeWorkers
) -> None:
    submit(client, "r")
    await workers.called(1)
    for frames in (GARBAGE, [], [b"\x91" * 100_000], [b"\xdd\xff\xff\xff\xff"]):
        workers.send_frames(frames)
    workers.send(FakeOutput("r.0", [1]))

    assert await next_outputs(client) == [FakeOutput("r", [1])]


async def test_closing_cancels_what_runs_and_leaves_no_task(workers: FakeWorkers) -> None:
    before = asyncio.all_tasks()
    client = make_client(workers, FakeScheduler())
    submit(client, "r")
    call = await workers.called(1)
    await client.close()
    async with asyncio.timeout(30):
        while asyncio.all_tasks() != before:
            await asyncio.sleep(0)

    assert (call.response.was_cancelled, client.num_live) == (True, 0)


# Placement


async def test_a_request_goes_to_the_worker_that_the_global_scheduler_chooses(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    scheduler.answers = [Placed("b")]
    submit(client, "r")

    assert (await workers.called(1)).worker_id == "b"
    assert scheduler.asked == [("r.0", ["a", "b", "c"])]


async def test_a_request_waits_while_no_worker_takes_new_ones(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler, observer: Observer
) -> None:
    scheduler.answers = [DRAINING] * 3
    submit(client, "r")

    assert (await workers.called(1)).worker_id == "a"
    assert scheduler.asked == [("r.0", ["a", "b", "c"])] * 4
    assert (client.num_live, observer.num_ended) == (1, 0)


QUEUED = Refused(RefusalReason.QUEUED, retry_after_s=0.001)


async def test_a_request_waits_for_its_turn_and_its_attempt_says_how_long(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    scheduler.answers = [QUEUED, QUEUED, Placed("b", yields=True)]
    record = submit(client, "r")
    call = await workers.called(1)

    assert call.worker_id == "b"
    assert call.request.request.priority == YIELDS
    assert scheduler.asked == [("r.0", ["a", "b", "c"])] * 3
    assert 0.002 <= record.attempts[0].queued_s < 30


async def test_what_waits_for_its_turn_does_so_while_the_scheduler_restarts(
    client: Client,
    workers: FakeWorkers,
    scheduler: FakeScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "TURN_RESTART_S", 0.001)
    scheduler.answers = [QUEUED, RayActorError(), RayActorError(), Placed("b")]
    submit(client, "r")

    assert (await workers.called(1)).worker_id == "b"


async def test_a_turn_that_does_not_come_in_time_is_answered_with_429(
    workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    client = make_client(workers, scheduler, placement_timeout_s=0.05)
    scheduler.answers = [QUEUED] * 1000
    record = submit(client, "r")
    failure = await client.next_outputs()
    await client.close()

    assert isinstance(failure, Failure)
    assert isinstance(failure.error, RequestRefused)
    assert failure.error.status == 429
    assert record.refused == Refused(RefusalReason.QUEUED, BUSY_S)


async def test_a_request_that_waits_for_a_worker_can_be_aborted(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    scheduler.answers = [DRAINING] * 2
    submit(client, "r")
    while len(scheduler.asked) < 2:
        await asyncio.sleep(0)
    client.abort(["r"])
    submit(client, "other")

    assert (await workers.called(1)).request == as_sent("other.0")
    assert client.num_live == 1


async def test_serve_holds_a_request_while_there_is_no_worker_at_all(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    scheduler.alive = []
    record = submit(client, "r")
    held = await workers.called(1)
    assert (held.worker_id, scheduler.asked) == (NO_WORKER, [("r.0", [])])
    scheduler.alive = ["new"]
    held.response.result.set_result(WrongWorker("this is new"))

    assert (await workers.called(2)).worker_id == "new"
    assert len(record.attempts) == 1


async def test_a_worker_that_serve_knows_and_the_directory_does_not_is_waited_for(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    scheduler.alive = []
    submit(client, "r")
    for count in (1, 2):
        held = await workers.called(count)
        held.response.result.set_result(WrongWorker("this is new"))
    await workers.called(3)

    assert len(scheduler.asked) == 5  # each time once more after a pause


async def test_workers_that_were_tried_are_asked_again_if_no_other_takes_the_request(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    scheduler.alive = ["a", "b"]
    scheduler.answers = [Placed("a"), DRAINING]
    submit(client, "r")
    call = await workers.called(1)
    call.response.result.set_result(WrongWorker("a does not answer"))

    assert (await workers.called(2)).worker_id == "a"
    assert [worker_ids for _, worker_ids in scheduler.asked] == [["a", "b"], ["b"], ["a", "b"]]


async def test_without_the_global_scheduler_requests_are_spread_over_the_workers(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    scheduler.answers = [RayActorError() for _ in range(4)]
    for number in range(4):
        submit(client, str(number))
        await workers.called(number + 1)

    assert [call.worker_id for call in workers.calls] == ["a", "b", "c", "a"]


async def test_a_suspect_waits_for_the_global_scheduler(
    client: Client,
    workers: FakeWorkers,
    scheduler: FakeScheduler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.ingress.engine_client.RESTART_S", 0.001)
    submit(client, "r")
    die(await workers.called(1), StepFailed("x"))
    scheduler.answers = [RayActorError(), RayActorError(), Placed("c")]

    assert (await workers.called(2)).worker_id == "c"
    assert len(scheduler.asked) == 4


async def test_a_global_scheduler_that_fails_fails_the_request(
    client: Client, scheduler: FakeScheduler
) -> None:
    scheduler.answers = [RayTaskError("place", "traceback", KeyError("worker"))]
    submit(client, "r")
    [output] = await next_outputs(client)

    assert output.request_id == "r"
    assert str(output.finish_reason).startswith("error: ")
    assert client.num_live == 0


@pytest.mark.parametrize("alive", [["a"], []], ids=["it drains", "there is none"])
@pytest.mark.parametrize("reason", [RefusalReason.NO_WORKER, RefusalReason.NO_IDLE_WORKER])
async def test_a_request_that_finds_no_worker_in_time_is_refused(
    workers: FakeWorkers, scheduler: FakeScheduler, alive: list[str], reason: RefusalReason
) -> None:
    client = make_client(workers, scheduler, placement_timeout_s=0.05)
    scheduler.alive = alive
    scheduler.answers = [Refused(reason, retry_after_s=0.001)] * 10_000
    record = submit(client, "r")

    assert await next_outputs(client) == [
        FakeOutput("r", [], f"error: {reason.text}; retry after {REPLACEMENT_S:g} s")
    ]
    assert record.refused == Refused(reason, REPLACEMENT_S)
    assert all(call.response.was_cancelled for call in workers.calls)
    assert client.num_live == 0
    await client.close()


async def test_the_time_on_a_worker_does_not_count_as_waiting_for_one(
    workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    client = make_client(workers, scheduler, placement_timeout_s=0.01)
    submit(client, "r")
    await workers.called(1)
    await asyncio.sleep(0.05)
    workers.send(FakeOutput("r.0", [1], "stop"))

    assert await next_outputs(client) == [FakeOutput("r", [1], "stop")]
    await client.close()


async def test_a_global_scheduler_that_does_not_answer_is_not_waited_for(
    workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.ingress.engine_client.HEALTH_TIMEOUT_S", 0.01)
    monkeypatch.setattr("cluster.ingress.engine_client.PLACE_TIMEOUT_S", 0.01)
    client = make_client(workers, scheduler := SilentScheduler(), placement_timeout_s=5)
    submit(client, "r")

    assert (await workers.called(1)).worker_id == "a"
    assert await client.has_workers()
    scheduler.alive = []
    assert not await client.has_workers()
    await client.close()


@pytest.mark.parametrize(
    ("loads", "alive", "serves"),
    [
        ([WorkerLoad("a", 0, 0)], ["a"], True),
        ([], ["new"], True),
        ([WorkerLoad("a", 0, 0)], [], False),
        ([WorkerLoad("a", 0, 0, dead=True)], ["a"], False),
        ([WorkerLoad("a", 0, 0, silent=True)], ["a"], False),
        ([WorkerLoad("a", 0, 0, draining=True)], ["a"], False),
        ([WorkerLoad("a", 0, 0, dead=True), WorkerLoad("b", 9, 9, slow=True)], ["a", "b"], True),
    ],
    ids=["one", "a new one", "gone", "dead", "silent", "draining", "another one"],
)
async def test_workers_serve_unless_they_are_gone_dead_silent_or_draining(
    client: Client,
    scheduler: FakeScheduler,
    loads: list[WorkerLoad],
    alive: list[str],
    serves: bool,
) -> None:
    scheduler.alive, scheduler.known = alive, loads

    assert await client.has_workers() == serves


async def test_a_final_refusal_ends_the_request_and_is_on_its_record(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler
) -> None:
    refused = Refused(RefusalReason.QUOTA, retry_after_s=7)
    scheduler.answers = [refused]
    record = submit(client, "r")

    assert await next_outputs(client) == [
        FakeOutput("r", [], "error: a quota of its tenant is used up; retry after 7 s")
    ]
    assert (record.refused, record.outcome) == (refused, "error")
    assert (workers.calls, client.num_live) == ([], 0)


async def test_a_worker_that_is_gone_costs_no_attempt_and_another_is_asked_for_at_once(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler, observer: Observer
) -> None:
    record = submit(client, "r")
    for number in range(2 * MAX_ATTEMPTS):
        scheduler.alive = [f"w{number}", f"w{number + 1}"]
        call = await workers.called(number + 1)
        if number < 2 * MAX_ATTEMPTS - 1:
            call.response.result.set_result(WrongWorker("w is gone"))

    assert [(call.request, call.worker_id) for call in workers.calls[1:]] == [
        (as_sent("r.0"), f"w{number}") for number in range(1, 2 * MAX_ATTEMPTS)
    ]
    assert [attempt.lost for attempt in record.attempts] == [""]
    assert observer.retries == []


async def test_a_request_that_lost_a_worker_is_placed_there_again_only_if_there_is_no_other(
    client: Client, workers: FakeWorkers, scheduler: FakeScheduler, observer: Observer
) -> None:
    scheduler.alive = ["a", "b"]
    submit(client, "r")
    for attempt in range(2):
        call = await workers.called(attempt + 1)
        die(call, WorkerDraining("draining"))
    await workers.called(3)

    assert scheduler.asked == [("r.0", ["a", "b"]), ("r.1", ["b"]), ("r.2", ["a", "b"])]
    assert observer.retries == ["WorkerDraining"] * 2


async def test_the_tokens_of_a_request_are_on_its_record(
    client: Client, workers: FakeWorkers, observer: Observer
) -> None:
    record = submit(client, "r")
    await workers.called(1)
    workers.send(FakeOutput("r.0", [1, 2]))
    workers.send(FakeOutput("r.0", [3], "stop"))
    await next_outputs(client)
    await next_outputs(client)

    assert (list(record.output_token_ids), record.num_output_tokens) == ([1, 2, 3], 3)
    assert (observer.records, observer.num_ended) == ([record], 1)


async def test_an_answer_that_is_complete_ends_its_request_on_the_worker(
    client: Client, workers: FakeWorkers, observer: Observer
) -> None:
    record = submit(client, "r")
    call = await workers.called(1)
    workers.send(FakeOutput("r.0", [1, 2, 3]))
    await next_outputs(client)

    client.finish("r", "stop", 2)
    client.abort(["r"])

    assert (record.outcome, list(record.output_token_ids)) == ("stop", [1, 2])
    assert (call.response.was_cancelled, client.num_live, observer.num_ended) == (True, 0, 1)


async def test_an_answer_may_end_otherwise_than_its_request_on_the_worker(
    client: Client, workers: FakeWorkers
) -> None:
    record = submit(client, "r")
    call = await workers.called(1)
    workers.send(FakeOutput("r.0", [1, 2, 3], "length"))
    await client.next_outputs()
    assert record.outcome == ""

    client.finish("r", "stop", 1)

    assert (record.outcome, list(record.output_token_ids)) == ("stop", [1])
    assert not call.response.was_cancelled


async def test_a_worker_that_dies_behind_the_last_token_harms_nobody(
    client: Client, workers: FakeWorkers, observer: Observer
) -> None:
    record = submit(client, "r")
    call = await workers.called(1)
    workers.send(FakeOutput("r.0", [1], "length"))
    await client.next_outputs()
    call.response.result.set_result(EngineDead("gone"))
    for _ in range(5):
        await asyncio.sleep(0)

    client.finish("r", "length", 1)

    assert (record.outcome, observer.retries, len(workers.calls)) == ("length", [], 1)


async def test_an_abort_because_of_an_error_is_no_leaving_of_the_client(
    client: Client, workers: FakeWorkers
) -> None:
    record = submit(client, "r")
    await workers.called(1)

    client.abort(["r"], "its sibling failed")

    assert (record.outcome, record.error) == ("error", "its sibling failed")
