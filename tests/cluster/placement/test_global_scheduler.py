import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement.global_scheduler import GlobalScheduler
from cluster.placement.observer import SchedulerObserver
from cluster.placement.suspects import (
    MAX_POISONS,
    NO_WORKER_RETRY_S,
    REFUSE_S,
    SUSPECT_GONE_AFTER_S,
)
from cluster.placement.worker_views import (
    MAX_REPLACEMENT_S,
    SILENT_AFTER_S,
    SUSPECT_AFTER_S,
)
from scheduler.admission import Admission
from scheduler.drafting import CollapseReason
from scheduler.placement import (
    Placed,
    Placement,
    PlacementReason,
    RefusalReason,
    Refused,
    WorkerLoad,
)
from scheduler.prefill_queue import FORGET_AFTER_S, PrefillCost, QueuedPrefill, QueueReport
from scheduler.request import Request, Slo
from tests.workers.fake_clock import FakeClock
from workers.drafts.draft_client import DraftCounts
from workers.errors import EngineStalled, WorkerSilent
from workers.reports import DraftStats, Stall, WorkerReport

A_REQUEST = Request("r", num_prompt_tokens=10, max_tokens=5)
NO_WORKER = Refused(RefusalReason.NO_WORKER, NO_WORKER_RETRY_S)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1000.0)


@pytest.fixture
def scheduler(clock: FakeClock) -> GlobalScheduler:
    return GlobalScheduler(clock)


def request(request_id: str) -> Request:
    return Request(request_id, num_prompt_tokens=10, max_tokens=5)


async def place(
    scheduler: GlobalScheduler, request: Request, worker_ids: list[str]
) -> Placed | Refused:
    """The answer, whatever is predicted."""
    answer = await scheduler.place(request, worker_ids)
    return Placed(answer.worker_id) if isinstance(answer, Placed) else answer


async def choose(scheduler: GlobalScheduler, request_id: str, worker_ids: list[str]) -> str:
    answer = await place(scheduler, request(request_id), worker_ids)
    assert isinstance(answer, Placed)
    return answer.worker_id


def report(
    worker_id: str,
    outstanding: dict[str, int] | None = None,
    finished: Iterable[str] = (),
    draining: bool = False,
) -> WorkerReport:
    return WorkerReport(worker_id, outstanding or {}, dict.fromkeys(finished), draining)


async def test_requests_are_spread_over_workers_that_have_not_reported_yet(
    scheduler: GlobalScheduler,
) -> None:
    chosen = [await choose(scheduler, str(number), ["a", "b"]) for number in range(4)]

    assert chosen == ["a", "b", "a", "b"]


async def test_a_request_goes_to_the_worker_that_reports_least_outstanding(
    clock: FakeClock,
) -> None:
    scheduler = GlobalScheduler(clock, predicts=False)
    await scheduler.report(report("a", {"x": 100}))
    await scheduler.report(report("b", {"y": 20}))
    chosen = [await choose(scheduler, str(number), ["a", "b"]) for number in range(7)]

    assert chosen == ["b"] * 6 + ["a"]  # 20 + 5 * 15 < 100, 20 + 6 * 15 > 100


async def test_a_placed_request_counts_until_its_worker_accounts_for_it(
    scheduler: GlobalScheduler,
) -> None:
    await place(scheduler, request("r"), ["a"])
    loads = await scheduler.loads()
    for account in (report("a"), report("a", {"r": 4}), report("a", finished=["r"])):
        await scheduler.report(account)
        loads += await scheduler.loads()

    assert loads == [
        WorkerLoad("a", 15, 1),
        WorkerLoad("a", 15, 1),  # the report was on its way before the request
        WorkerLoad("a", 4, 1),
        WorkerLoad("a", 0, 0),
    ]


async def test_a_request_that_ends_between_two_reports_is_no_longer_counted(
    scheduler: GlobalScheduler,
) -> None:
    await place(scheduler, request("r"), ["a"])
    await scheduler.report(report("a", finished=["r"]))

    assert await scheduler.loads() == [WorkerLoad("a", 0, 0)]


async def test_the_lengths_of_outputs_are_learned_from_requests_that_ended_by_themselves(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    asked = Request("next", num_prompt_tokens=10, max_tokens=1000)
    resumed = dataclasses.replace(asked, num_prior_tokens=30)
    untaught = GlobalScheduler(clock, learn_output_lengths=False)
    for one in (scheduler, untaught):
        for number in range(20):
            # Its earlier attempt gave 30 tokens, and this one 10.
            name = str(number)
            await one.place(dataclasses.replace(resumed, request_id=name), ["a"])
            await one.report(report("a", {name: 900}))
            await one.report(WorkerReport("a", {}, {name: 10}, draining=False))
        await one.place(dataclasses.replace(asked, request_id="aborted"), ["a"])
        await one.report(WorkerReport("a", {}, {"aborted": None, "unknown": 7}, draining=False))

    accuracy = scheduler.output_lengths.accuracies[""]
    assert accuracy.num_requests == pytest.approx(20, rel=0.05)
    assert scheduler.output_lengths.predict(asked).median == pytest.approx(40, rel=0.2)
    assert untaught.output_lengths.predict(asked).median == 1000


async def test_a_request_that_ends_where_it_is_not_expected_teaches_nothing(
    scheduler: GlobalScheduler,
) -> None:
    await scheduler.place(request("r"), ["a"])
    await scheduler.report(WorkerReport("b", {}, {"r": 3}, draining=False))  # not placed there
    await scheduler.report(report("a", {"r": 4}))
    await scheduler.report(report("a"))  # it left
    await scheduler.report(WorkerReport("a", {}, {"r": 3}, draining=False))

    assert len(scheduler.output_lengths) == 0


async def test_a_placement_that_never_arrives_is_dropped(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await place(scheduler, request("r"), ["a"])
    loads = []
    for clock.now in (1000.0 + FORGET_AFTER_S, 1000.1 + FORGET_AFTER_S):
        await scheduler.report(report("a"))
        loads += await scheduler.loads()

    assert loads == [WorkerLoad("a", 15, 1), WorkerLoad("a", 0, 0)]


async def test_a_silent_worker_is_the_last_resort(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await scheduler.report(report("hung"))
    clock.now += SILENT_AFTER_S + 0.1
    await scheduler.report(report("busy", {"x": 1000}))

    assert [
        await place(scheduler, A_REQUEST, ["hung", "busy"]),
        await place(scheduler, A_REQUEST, ["hung"]),
    ] == [Placed("busy"), Placed("hung")]


async def test_a_silent_worker_that_serve_no_longer_lists_is_forgotten(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await scheduler.report(report("dead", {"x": 100}))
    clock.now += SILENT_AFTER_S + 0.1
    await place(scheduler, A_REQUEST, ["a"])

    assert await scheduler.loads() == [WorkerLoad("a", 15, 1)]


async def test_a_draining_worker_gets_no_requests(scheduler: GlobalScheduler) -> None:
    await scheduler.report(report("a", draining=True))

    assert [
        await place(scheduler, A_REQUEST, ["a", "b"]),
        await place(scheduler, A_REQUEST, ["a"]),
        await place(scheduler, A_REQUEST, []),
    ] == [Placed("b"), NO_WORKER, NO_WORKER]


async def test_a_worker_is_told_whether_another_one_could_go_on_with_its_requests(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    answers = [await scheduler.report(report("a", draining=True))]
    answers += [
        await scheduler.report(report("b", draining=draining)) for draining in (True, False)
    ]
    answers += [await scheduler.report(report("a", draining=True))]
    clock.now += SILENT_AFTER_S + 0.1
    answers.append(await scheduler.report(report("a", draining=True)))

    assert [answer.others_serve for answer in answers] == [False, False, False, True, False]


async def test_a_dead_worker_gets_no_requests_whatever_it_reports_later(
    scheduler: GlobalScheduler,
) -> None:
    await scheduler.report(report("a", {"x": 100}))
    await scheduler.report(WorkerReport("b", {}, {}, False, death="device gone"))
    await scheduler.report(report("b"))

    assert [
        await place(scheduler, A_REQUEST, ["a", "b"]),
        await place(scheduler, A_REQUEST, ["b"]),
    ] == [Placed("a"), NO_WORKER]


NO_IDLE_WORKER = Refused(RefusalReason.NO_IDLE_WORKER, NO_WORKER_RETRY_S)


def suspect(request_id: str) -> Request:
    return dataclasses.replace(request(request_id), num_engine_deaths=1)


async def test_a_suspect_waits_until_a_worker_is_idle_and_has_it_alone(
    scheduler: GlobalScheduler,
) -> None:
    await scheduler.report(report("a", {"x": 100}))
    await scheduler.report(report("b", {"y": 10}))
    answers = [await place(scheduler, suspect("s"), ["a", "b"])]
    answers += [await place(scheduler, request("other"), ["a", "b"])]  # b is kept for the suspect
    await scheduler.report(report("b", finished=["y"]))
    answers += [await place(scheduler, suspect("s"), ["a", "b"])]
    answers += [await place(scheduler, request("another"), ["a", "b"])]
    await scheduler.report(WorkerReport("b", {"s": 15}, {}, False, on_trial=True))
    answers += [await place(scheduler, suspect("t"), ["a", "b"])]
    answers += [await place(scheduler, request("a third"), ["a", "b"])]
    await scheduler.report(report("b", finished=["s"]))
    answers += [await place(scheduler, suspect("t"), ["a", "b"])]

    assert answers == [
        NO_IDLE_WORKER,
        Placed("a"),
        Placed("b"),
        Placed("a"),
        NO_IDLE_WORKER,
        Placed("a"),
        Placed("b"),
    ]
    assert (await scheduler.placements(["s"]))["s"].reason is PlacementReason.TRIAL


async def test_the_only_worker_is_not_kept_from_others_for_a_suspect(
    scheduler: GlobalScheduler,
) -> None:
    await scheduler.report(report("a", {"x": 100}))

    assert [
        await place(scheduler, suspect("s"), ["a"]),
        await place(scheduler, request("other"), ["a"]),
        await place(scheduler, suspect("s"), []),
    ] == [NO_IDLE_WORKER, Placed("a"), NO_WORKER]


async def test_a_suspect_does_not_risk_the_last_worker_while_another_one_is_replaced(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    dead = WorkerReport("a", {}, {}, False, death="device gone")
    await scheduler.report(report("b"))
    await scheduler.report(dead)
    answers = [await place(scheduler, suspect("s"), ["a", "b"])]
    await scheduler.report(report("c"))  # the replacement
    answers += [await place(scheduler, suspect("s"), ["b"])]
    await scheduler.report(report("b", finished=["s"]))
    await scheduler.report(dead)
    answers += [await place(scheduler, suspect("t"), ["b"])]
    clock.now += MAX_REPLACEMENT_S  # it never came
    await scheduler.report(report("b"))
    answers += [await place(scheduler, suspect("t"), ["b"])]

    assert answers == [NO_IDLE_WORKER, Placed("b"), NO_IDLE_WORKER, Placed("b")]


async def test_a_worker_is_no_longer_kept_for_a_suspect_that_has_gone(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await scheduler.report(report("a", {"x": 100}))
    await scheduler.report(report("b", {"y": 10}))
    await place(scheduler, suspect("s"), ["a", "b"])
    clock.now += SUSPECT_GONE_AFTER_S + 0.1

    assert await place(scheduler, request("other"), ["a", "b"]) == Placed("b")


async def test_after_a_restart_a_trial_goes_on_alone(clock: FakeClock) -> None:
    restarted = GlobalScheduler(clock)
    await restarted.report(WorkerReport("b", {"s": 1}, {}, False, on_trial=True))

    assert await restarted.place(request("other"), ["b"]) == NO_WORKER


async def test_a_request_goes_to_a_free_slot_rather_than_to_a_queue(clock: FakeClock) -> None:
    scheduler = GlobalScheduler(clock, max_num_seqs=2)
    await scheduler.report(report("a", {"x": 1, "y": 1}))
    await scheduler.report(report("b", {"z": 1000}))

    chosen = [await choose(scheduler, str(number), ["a", "b"]) for number in range(2)]
    assert chosen == ["b", "a"]


async def slow_report(scheduler: GlobalScheduler, worker_id: str, slowness: float) -> str:
    work = {f"of {worker_id}": 5}
    answer = await scheduler.report(WorkerReport(worker_id, work, {}, False, slowness=slowness))
    return answer.unfit


async def test_a_slow_worker_is_spared_and_replaced_if_it_lasts(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = GlobalScheduler(clock, slow_timeout_s=100.0)
    unfit = []
    for _ in range(55):
        await slow_report(scheduler, "b", 1.2)
        unfit.append(await slow_report(scheduler, "a", 5.0))
        clock.now += 2

    assert await place(scheduler, A_REQUEST, ["a", "b"]) == Placed("b")
    assert [load.slow for load in await scheduler.loads()] == [True, False]
    assert sum(record.message == "worker is slow" for record in caplog.records) == 1
    assert (unfit[50], unfit[51]) == ("", "its steps have taken 5.0 times as long as predicted")


@pytest.mark.parametrize("slowness_of_b", [4.0, 6.0])
async def test_no_worker_is_replaced_while_all_are_slow(
    clock: FakeClock, slowness_of_b: float
) -> None:
    scheduler = GlobalScheduler(clock, slow_timeout_s=100.0)
    unfit = set()
    for _ in range(100):
        unfit.add(await slow_report(scheduler, "b", slowness_of_b))
        unfit.add(await slow_report(scheduler, "a", 5.0))
        clock.now += 2

    assert unfit == {""}


async def test_slow_workers_are_replaced_one_at_a_time(clock: FakeClock) -> None:
    scheduler = GlobalScheduler(clock, slow_timeout_s=100.0)
    unfit = {}
    for _ in range(100):
        await slow_report(scheduler, "c", 1.0)
        for worker_id in "ab":
            unfit[worker_id] = await slow_report(scheduler, worker_id, 9.0)
        clock.now += 2

    assert [bool(why) for why in unfit.values()] == [True, False]


@pytest.mark.parametrize("others", [[], ["idle"]])
async def test_a_worker_that_works_alone_may_be_slow_and_is_not_replaced(
    clock: FakeClock, others: list[str]
) -> None:
    scheduler = GlobalScheduler(clock, slow_timeout_s=100.0)
    unfit = set()
    for _ in range(100):
        for worker_id in others:
            await scheduler.report(report(worker_id))
        unfit.add(await slow_report(scheduler, "a", 5.0))
        clock.now += 2

    slow = [load.worker_id for load in await scheduler.loads() if load.slow]
    assert (unfit, slow) == ({""}, ["a"])


class Placements(SchedulerObserver):
    """Keeps the placements."""

    def __init__(self) -> None:
        self.made: list[tuple[Request, Placement, float]] = []

    def placed(self, request: Request, placement: Placement, took_s: float) -> None:
        self.made.append((request, placement, took_s))


async def test_what_would_be_late_everywhere_is_refused_and_leaves_no_trace(
    clock: FakeClock,
) -> None:
    scheduler = GlobalScheduler(clock, admission=Admission())
    cost = PrefillCost(token_s=0.01, is_measured=True)
    busy = QueueReport({"q": QueuedPrefill(1000, 1000, 100.0)}, cost)
    for worker_id in ("a", "b"):
        await scheduler.report(dataclasses.replace(report(worker_id, {"q": 1000}), queue=busy))
    urgent = dataclasses.replace(request("r"), slo=Slo(ttft_s=5.0), num_prompt_tokens=100)
    patient = dataclasses.replace(urgent, slo=Slo(ttft_s=20.0))

    refused = await place(scheduler, dataclasses.replace(urgent, priority=1), ["a", "b"])

    assert isinstance(refused, Refused)
    assert (refused.reason, refused.is_final) == (RefusalReason.OVERLOAD, True)
    assert refused.retry_after_s >= 7
    assert [load.num_requests for load in await scheduler.loads()] == [1, 1]
    assert isinstance(await place(scheduler, patient, ["a", "b"]), Placed)


async def test_every_placement_is_observed(clock: FakeClock) -> None:
    observed = Placements()
    scheduler = GlobalScheduler(clock, observed)
    await place(scheduler, A_REQUEST, [])
    await place(scheduler, A_REQUEST, ["a"])

    placements = await scheduler.placements(["r"])
    assert observed.made == [(A_REQUEST, placements["r"], 0.0)]


async def test_other_text_is_a_note_in_the_log_and_a_silent_draft_worker_a_warning(
    scheduler: GlobalScheduler, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cluster")

    async def accepted(rate: float, num_verified: int, silent_s: float = 0.0) -> None:
        counts = DraftCounts(proposed=num_verified, verified=num_verified)
        drafts = DraftStats({"suffix": counts}, rate, 1.5, "d", silent_s)
        await scheduler.report(WorkerReport("w", {}, {}, False, drafts))

    await accepted(0.8, 10)
    await accepted(0.8, 200)
    await accepted(0.1, 300)
    await accepted(0.8, 400)
    await accepted(0.8, 500, silent_s=60.0)

    assert [
        (record.levelname, record.__dict__["reason"])
        for record in caplog.records
        if record.msg == "drafts are no longer accepted"
    ] == [("INFO", CollapseReason.CONTENT.text), ("WARNING", CollapseReason.SILENT.text)]


async def test_only_a_worker_that_serve_lists_is_chosen(scheduler: GlobalScheduler) -> None:
    await scheduler.report(report("gone"))
    await scheduler.report(report("a", {"x": 100}))

    assert await place(scheduler, A_REQUEST, ["a"]) == Placed("a")


async def test_after_a_restart_reports_restore_the_view(clock: FakeClock) -> None:
    restarted = GlobalScheduler(clock)
    await restarted.report(report("b", {"y": 7}, draining=True))
    await restarted.report(report("a", {"x": 100, "z": 1}))

    assert await restarted.loads() == [WorkerLoad("a", 101, 2), WorkerLoad("b", 7, 1, True)]


@dataclass
class FakeWorker:
    """Runs the requests that reach it, and reports them as a worker does."""

    worker_id: str
    in_flight: list[Request] = field(default_factory=list)
    running: dict[str, tuple[Request, int]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)

    def take(self) -> None:
        for request in self.in_flight:
            self.running[request.request_id] = (request, 0)
        self.in_flight.clear()

    def step(self) -> None:
        for request_id, (request, num_output_tokens) in list(self.running.items()):
            self.running[request_id] = (request, num_output_tokens + 1)
            if num_output_tokens + 1 == request.max_tokens:
                self.finished.append(request_id)
                del self.running[request_id]

    def report(self) -> WorkerReport:
        outstanding = {
            request_id: request.num_outstanding_tokens(num_output_tokens)
            for request_id, (request, num_output_tokens) in self.running.items()
        }
        finished, self.finished = self.finished, []
        return report(self.worker_id, outstanding, finished)


EVENTS = st.lists(
    st.sampled_from(["place", "restart", "wait"])
    | st.tuples(st.sampled_from(["take", "step", "report", "report late"]), st.integers(0, 2)),
    max_size=60,
)


@given(EVENTS, st.lists(st.integers(1, 4), min_size=60, max_size=60))
@settings(deadline=None)
async def test_whatever_happens_no_load_is_negative_and_in_the_end_all_are_zero(
    events: list[str | tuple[str, int]], max_tokens: list[int]
) -> None:
    clock = FakeClock()
    scheduler = GlobalScheduler(clock)
    workers = {name: FakeWorker(name) for name in "abc"}
    late: list[WorkerReport] = []
    for number, event in enumerate(events):
        match event:
            case "place":
                new = Request(str(number), num_prompt_tokens=3, max_tokens=max_tokens[number])
                answer = await place(scheduler, new, list(workers))
                assert isinstance(answer, Placed)
                workers[answer.worker_id].in_flight.append(new)
            case "restart":
                scheduler = GlobalScheduler(clock)
            case "wait":
                clock.now += FORGET_AFTER_S / 2
            case ("take", index):
                workers["abc"[index]].take()
            case ("step", index):
                workers["abc"[index]].step()
            case ("report", index):
                await scheduler.report(workers["abc"[index]].report())
            case ("report late", index):  # Serve may deliver reports in another order
                late.append(workers["abc"[index]].report())
        loads = await scheduler.loads()
        assert all(load.num_outstanding_tokens >= load.num_requests >= 0 for load in loads)

    for late_report in late:
        await scheduler.report(late_report)
    for worker in workers.values():
        worker.take()
        while worker.running:
            worker.step()
        await scheduler.report(worker.report())

    assert await scheduler.loads() == [WorkerLoad(name, 0, 0) for name in workers]


async def test_attempts_on_a_worker_that_is_not_heard_are_made_elsewhere(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await scheduler.report(report("a", {"r": 5}))
    await scheduler.report(report("b"))
    clock.now += SILENT_AFTER_S + 0.1
    alone = await scheduler.losses({"r": "a"})
    await scheduler.beat("b", None)
    with_another = await scheduler.losses({"r": "a", "s": "b", "t": "unheard of"})
    await scheduler.beat("a", None)
    heard_again = await scheduler.losses({"r": "a"})

    assert (alone, heard_again) == ({}, {})
    assert repr(with_another.pop("r")) == "WorkerSilent('worker a was last heard 2.1 s ago')"
    assert repr(with_another) == "{'s': WorkerSilent('worker b knows nothing of this request')}"


async def test_a_worker_that_is_often_late_is_given_more_time(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await scheduler.report(report("a", {"r": 5}))
    clock.now += 1.0
    await scheduler.beat("a", None)
    for silent_s, is_lost in ((3.9, False), (4.1, True), (10.0, True)):
        clock.now += silent_s
        await scheduler.report(report("b"))
        losses = await scheduler.losses({"r": "a"})
        clock.now -= silent_s

        assert ("r" in losses) == is_lost


async def test_a_long_silence_is_no_measure_for_the_next(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await scheduler.report(report("a", {"r": 5}))
    clock.now += 60.0  # it was stopped
    await scheduler.beat("a", None)
    clock.now += 4.1
    await scheduler.report(report("b"))

    assert list(await scheduler.losses({"r": "a"})) == ["r"]


async def test_attempts_on_an_engine_that_stalls_or_is_dead_are_made_elsewhere(
    scheduler: GlobalScheduler,
) -> None:
    """At once those that are not the cause; those that may be, when that is sure."""
    await scheduler.report(report("a", {"r": 5, "suspect": 5}))
    await scheduler.report(report("b", {"s": 5}))
    asked = {"r": "a", "suspect": "a", "s": "b"}
    losses = []
    for took_s in (3.0, SUSPECT_AFTER_S + 0.1):
        await scheduler.beat("a", Stall(took_s, 0.5, frozenset({"suspect"})))
        losses.append(await scheduler.losses(asked))
    placed = await place(scheduler, A_REQUEST, ["a", "b"])
    await scheduler.beat("a", None)
    goes_on = await scheduler.losses(asked)
    await scheduler.report(WorkerReport("a", {}, {}, False, death="it failed"))

    assert [{name: type(error) for name, error in found.items()} for found in losses] == [
        {"r": WorkerSilent},
        {"r": WorkerSilent, "suspect": EngineStalled},
    ]
    assert str(losses[0]["r"]) == (
        "worker a stalls: a step has been running for 3.0 s, expected 0.50 s"
    )
    assert (placed, goes_on) == (Placed("b"), {})
    assert repr(await scheduler.losses({"r": "a"})) == (
        "{'r': EngineDead('the engine of worker a is dead')}"
    )


async def test_a_worker_whose_process_has_ended_gets_nothing_and_is_soon_forgotten(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await scheduler.report(report("a"))
    await scheduler.report(report("b", {"s": 5}))
    await scheduler.bury("a", "it has ended")
    await scheduler.bury("unheard of", "it has ended")
    placed = await place(scheduler, A_REQUEST, ["a", "b"])
    clock.now += SILENT_AFTER_S + 0.1
    await scheduler.beat("b", None)

    assert placed == Placed("b")
    assert [load.worker_id for load in await scheduler.loads()] == ["b"]


async def test_a_request_that_its_worker_never_reports_is_lost_after_a_while(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    await scheduler.report(report("a"))
    await place(scheduler, A_REQUEST, ["a"])
    lost = []
    for clock.now in (1000.0 + FORGET_AFTER_S, 1000.1 + FORGET_AFTER_S):
        await scheduler.report(report("a"))
        lost.append(list(await scheduler.losses({A_REQUEST.request_id: "a"})))

    assert lost == [[], [A_REQUEST.request_id]]


async def test_requests_equal_to_one_that_made_engines_fail_are_refused_for_a_while(
    scheduler: GlobalScheduler, clock: FakeClock
) -> None:
    poison = dataclasses.replace(A_REQUEST, fingerprint="p")
    await scheduler.refuse("p", "it failed")
    refused = await place(scheduler, poison, ["a"])
    clock.now += REFUSE_S

    assert refused == Refused(RefusalReason.POISON, REFUSE_S, "it failed")
    assert refused.is_final
    assert await place(scheduler, A_REQUEST, ["a"]) == Placed("a")
    assert await place(scheduler, poison, ["b"]) == Placed("b")


async def test_only_so_many_of_them_are_remembered(scheduler: GlobalScheduler) -> None:
    for number in range(MAX_POISONS + 1):
        await scheduler.refuse(str(number), "it failed")
    answers = [
        await place(scheduler, dataclasses.replace(A_REQUEST, fingerprint=name), ["a"])
        for name in ("0", str(MAX_POISONS))
    ]

    assert [type(answer) for answer in answers] == [Placed, Refused]


def of_tenant(tenant: str, request_id: str, **more: Any) -> Request:
    return Request(request_id, num_prompt_tokens=10, max_tokens=50, tenant=tenant, **more)


@pytest.fixture
def shared(clock: FakeClock) -> GlobalScheduler:
    """One that two tenants share, whose workers have eight seats."""
    return GlobalScheduler(clock, max_num_seqs=8, weights={"a": 1.0, "b": 1.0})


async def flood(scheduler: GlobalScheduler, num: int = 20) -> list[Placed | Refused]:
    """What requests of tenant a are answered; the first ones have a seat."""
    return [await scheduler.place(of_tenant("a", f"a{n}"), ["w"]) for n in range(num)]


async def test_a_flood_waits_before_all_seats_are_taken(shared: GlobalScheduler) -> None:
    answers = await flood(shared)

    placed = [answer for answer in answers if isinstance(answer, Placed)]
    queued = [answer for answer in answers if isinstance(answer, Refused)]
    assert [answer.yields for answer in placed] == [False] + [True] * 6  # the first is alone
    assert {answer.reason for answer in queued} == {RefusalReason.QUEUED}
    assert not any(answer.is_final for answer in queued)
    assert shared.shares()["a"].num_waiting == 13


async def test_another_tenants_requests_pass_those_that_wait(
    shared: GlobalScheduler, clock: FakeClock
) -> None:
    await flood(shared)
    answers = [await shared.place(of_tenant("b", f"b{n}"), ["w"]) for n in range(2)]

    assert [answer for answer in answers if isinstance(answer, Placed) and not answer.yields]
    assert len([answer for answer in answers if isinstance(answer, Placed)]) == 2
    await shared.report(report("w", {f"a{n}": 9 for n in range(1, 7)}, ["a0"]))
    assert isinstance(await shared.place(of_tenant("a", "a7"), ["w"]), Refused)


async def test_without_other_tenants_nothing_waits(clock: FakeClock) -> None:
    scheduler = GlobalScheduler(clock, max_num_seqs=8)

    assert all(
        isinstance(answer, Placed) and not answer.yields for answer in await flood(scheduler)
    )


async def test_a_request_that_lost_its_worker_does_not_wait(shared: GlobalScheduler) -> None:
    await flood(shared)

    lost = of_tenant("a", "lost", num_attempts=1)
    assert isinstance(await shared.place(lost, ["w"]), Placed)


async def test_a_tenant_is_charged_for_what_its_requests_gave(
    shared: GlobalScheduler, clock: FakeClock
) -> None:
    for request_id in ("whole", "aborted", "lost"):
        await shared.place(of_tenant("a", request_id), ["w"])
    outstanding = dict.fromkeys(("whole", "aborted", "lost"), 30)  # of 50, after the prompt
    await shared.report(dataclasses.replace(report("w", outstanding), token_s=0.1))
    await shared.place(of_tenant("a", "next"), ["w"])
    finished = {"whole": 40, "aborted": None}
    await shared.report(WorkerReport("w", {"next": 50}, finished, False, token_s=0.1))
    before, token_s = shared.shares()["a"], 0.001  # of the guess, as nothing was known yet
    await shared.bury("w", "killed")

    assert before.attained_s == pytest.approx((10 + 40 + 10 + 20) * token_s)
    assert shared.shares()["a"].running_s == 0


async def test_a_request_that_would_wait_too_long_is_refused_at_once(clock: FakeClock) -> None:
    scheduler = GlobalScheduler(
        clock, max_num_seqs=8, weights={"a": 1.0, "b": 1.0}, admission=Admission(in_time=0.75)
    )
    await scheduler.report(
        dataclasses.replace(
            report("w"), queue=QueueReport(cost=PrefillCost(token_s=0.001, is_measured=True))
        )
    )
    slo = Slo(ttft_s=2.0)
    answers = [await scheduler.place(of_tenant("a", f"a{n}", slo=slo), ["w"]) for n in range(60)]

    reasons = [answer.reason for answer in answers if isinstance(answer, Refused)]
    assert set(reasons) == {RefusalReason.QUEUED, RefusalReason.OVERLOAD}
    assert reasons.index(RefusalReason.OVERLOAD) > 5
    first = reasons.index(RefusalReason.OVERLOAD)
    assert set(reasons[first:]) == {RefusalReason.OVERLOAD}
