import dataclasses
from collections.abc import Iterable

import pytest

from scheduler.drafting import (
    BUSIER,
    MIN_VERIFIED,
    RESTART_MEMORY_S,
    CollapseReason,
    DraftReport,
    DraftWatch,
    DraftWorkerLoad,
    choose_draft_worker,
)

START_S = 100.0


@dataclasses.dataclass
class Watched:
    """A watch and the reports of its worker, one per second."""

    draft_worker: str | None = "d1"
    now: float = START_S
    watch: DraftWatch = dataclasses.field(default_factory=DraftWatch)
    _num_proposed: int = 0
    _num_verified: int = 0
    _num_late: int = 0

    def report(
        self,
        rate: float,
        *,
        num_verified: int = 20,
        num_proposed: int = 20,
        num_late: int = 0,
        is_answered: bool = True,
    ) -> CollapseReason | None:
        """One report; its numbers count from the report before."""
        self.now += 1
        self._num_proposed += num_proposed
        self._num_verified += num_verified
        self._num_late += num_late
        return self.watch.observe(
            DraftReport(
                acceptance_rate=rate,
                num_proposed=self._num_proposed,
                num_verified=self._num_verified,
                num_late=self._num_late,
                draft_worker=self.draft_worker,
                is_answered=is_answered,
            ),
            self.now,
        )

    def run(self, rates: Iterable[float]) -> list[CollapseReason]:
        """The events of reports with these rates."""
        return [event for rate in rates if (event := self.report(rate))]


def usual(rate: float = 0.6) -> Watched:
    """A worker that has drafted with this rate for a while."""
    watched = Watched()
    assert watched.run([rate] * 20) == []
    return watched


def load(
    name: str, busy_share: float = 0.0, num_workers: int = 0, silent: bool = False
) -> DraftWorkerLoad:
    return DraftWorkerLoad(name, num_workers, busy_share, silent)


@pytest.mark.parametrize(
    ("draft_workers", "chosen"),
    [
        ([], None),
        ([load("a", silent=True)], None),
        ([load("a", 0.9)], "a"),
        ([load("a", 0.9), load("b", 0.1, 5)], "b"),
        ([load("a", 0.5, 2), load("b", 0.5, 1)], "b"),
        ([load("b"), load("a")], "a"),
        ([load("a", 0.0, silent=True), load("b", 0.9)], "b"),
    ],
)
def test_a_worker_gets_the_least_busy_draft_worker_that_is_not_silent(
    draft_workers: list[DraftWorkerLoad], chosen: str | None
) -> None:
    assert choose_draft_worker(None, draft_workers) == chosen


@pytest.mark.parametrize(
    ("current", "chosen"),
    [
        (load("a", 0.5, 2), "a"),
        (load("a", 0.5 + BUSIER - 0.01, 2), "a"),
        (load("a", 0.5 + BUSIER + 0.01, 2), "b"),
        (load("a", 1.0, 1), "a"),  # the other would be as busy with it
        (load("a", 0.0, 1, silent=True), "b"),
    ],
)
def test_a_worker_keeps_its_draft_worker_unless_another_is_much_less_busy(
    current: DraftWorkerLoad, chosen: str
) -> None:
    assert choose_draft_worker("a", [load("b", 0.5), current]) == chosen


def test_a_worker_whose_draft_worker_is_gone_gets_another() -> None:
    assert choose_draft_worker("gone", [load("a", 0.9), load("b", 0.8)]) == "b"


def test_a_worker_gets_no_draft_worker_if_all_are_silent() -> None:
    assert choose_draft_worker("a", [load("a", silent=True)]) is None


def test_workers_that_choose_in_turn_share_the_draft_workers_and_keep_them() -> None:
    of_worker: dict[str, str | None] = dict.fromkeys("wxyz")
    history = []
    for _ in range(3):
        for worker, current in of_worker.items():
            counts = {name: list(of_worker.values()).count(name) for name in ("a", "b")}
            loads = [load(name, 0.3 * count, count) for name, count in counts.items()]
            of_worker[worker] = choose_draft_worker(current, loads)
        history.append(list(of_worker.values()))

    assert history == [["a", "b", "a", "b"]] * 3


def test_a_rate_near_the_usual_one_is_no_collapse() -> None:
    assert usual().run([0.5, 0.65, 0.55, 0.6] * 20) == []


def test_a_rate_that_falls_by_itself_is_due_to_the_content() -> None:
    watched = usual()

    assert watched.run([0.1]) == [CollapseReason.CONTENT]
    assert watched.watch.reason is CollapseReason.CONTENT


def test_a_rate_that_falls_while_most_drafts_are_late_is_due_to_lateness() -> None:
    assert usual().report(0.1, num_proposed=20, num_late=11) is CollapseReason.LATE


def test_late_drafts_are_not_the_reason_unless_they_are_most() -> None:
    assert usual().report(0.1, num_proposed=20, num_late=10) is CollapseReason.CONTENT


def test_a_rate_that_falls_with_a_new_draft_worker_is_due_to_its_restart() -> None:
    watched = usual()
    watched.draft_worker = "d2"

    assert watched.run([0.5, 0.4, 0.1]) == [CollapseReason.RESTARTED]


def test_late_drafts_of_a_new_draft_worker_are_due_to_its_restart() -> None:
    watched = usual()
    watched.draft_worker = "d2"

    assert watched.report(0.1, num_late=20) is CollapseReason.RESTARTED


def test_a_draft_worker_is_not_new_for_ever() -> None:
    watched = usual()
    watched.draft_worker = "d2"
    steady = watched.run([0.6] * int(RESTART_MEMORY_S))

    assert (steady, watched.run([0.1])) == ([], [CollapseReason.CONTENT])


def test_a_draft_worker_that_does_not_answer_is_the_reason_whatever_the_rate() -> None:
    watched = usual()

    assert watched.report(0.6, is_answered=False) is CollapseReason.SILENT


def test_a_draft_worker_that_does_not_answer_is_noticed_even_if_nothing_is_verified() -> None:
    watched = usual()

    assert watched.report(0.6, num_verified=0, is_answered=False) is CollapseReason.SILENT


def test_a_silent_draft_worker_that_answers_again_has_recovered() -> None:
    watched = usual()
    events = [watched.report(0.6, num_verified=0, is_answered=False) for _ in range(3)]
    events.append(watched.report(0.6))

    assert events == [CollapseReason.SILENT, None, None, None]
    assert watched.watch.reason is None


def test_each_silence_is_an_event_of_its_own() -> None:
    watched = usual()
    answers = [False, True, False, False, True]

    assert [watched.report(0.6, is_answered=answer) for answer in answers] == [
        CollapseReason.SILENT,
        None,
        CollapseReason.SILENT,
        None,
        None,
    ]


def test_the_usual_rate_is_not_learnt_during_silence() -> None:
    watched = usual()
    for _ in range(100):
        watched.report(0.0, is_answered=False)

    assert watched.run([0.1]) == [CollapseReason.CONTENT]


def test_silence_during_a_collapse_is_an_event_of_its_own() -> None:
    watched = usual()

    assert [watched.report(0.1), watched.report(0.1, is_answered=False)] == [
        CollapseReason.CONTENT,
        CollapseReason.SILENT,
    ]


def test_a_collapse_is_one_event_however_long_it_lasts() -> None:
    watched = usual()

    assert watched.run([0.1] * 20) == [CollapseReason.CONTENT]
    assert watched.watch.reason is CollapseReason.CONTENT


def test_a_collapse_ends_near_the_usual_rate_and_not_before() -> None:
    watched = usual()
    watched.run([0.1])
    reasons = []
    for rate in (0.2, 0.4, 0.55):
        assert watched.report(rate) is None
        reasons.append(watched.watch.reason)

    assert reasons == [CollapseReason.CONTENT, CollapseReason.CONTENT, None]


def test_a_rate_that_crosses_the_limit_again_and_again_is_one_event() -> None:
    assert usual().run([0.28, 0.32] * 5) == [CollapseReason.CONTENT]


def test_after_a_recovery_the_next_collapse_is_an_event_again() -> None:
    watched = usual()

    assert watched.run([0.1, 0.6, 0.6, 0.1]) == [CollapseReason.CONTENT, CollapseReason.CONTENT]


def test_a_rate_that_sinks_slowly_is_the_new_usual() -> None:
    watched = usual(0.8)
    events = watched.run(0.8 - step / 500 for step in range(350))

    assert (events, watched.report(0.1)) == ([], None)


def test_a_low_rate_that_lasts_is_the_new_usual() -> None:
    watched = usual()
    events = watched.run([0.2] * 200)

    assert (events, watched.watch.reason) == ([CollapseReason.CONTENT], None)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1])
def test_a_rate_that_was_never_high_cannot_collapse(rate: float) -> None:
    assert usual(0.14).run([rate] * 5) == []


@pytest.mark.parametrize(("fallen", "events"), [(0.31, []), (0.29, [CollapseReason.CONTENT])])
def test_a_collapse_is_less_than_half_the_usual_rate(
    fallen: float, events: list[CollapseReason]
) -> None:
    assert usual(0.6).run([fallen]) == events


def test_nothing_collapses_before_a_usual_rate_is_known() -> None:
    watched = Watched()
    watched.report(0.9, num_verified=1)
    events = [watched.report(rate, num_verified=1) for rate in (0.9, 0.0) * (MIN_VERIFIED // 2 - 1)]

    assert set(events) == {None}


def test_the_first_rates_make_the_usual_one_quickly() -> None:
    watched = Watched()
    watched.report(0.0, num_verified=0)
    # A rate may begin anywhere; where it settles within the first drafts is the usual one.
    for rate in (1.0, 0.2, 0.2, 0.2, 0.2, 0.2):
        watched.report(rate, num_verified=10)

    assert watched.run([0.2] * 5) == []


def test_a_rate_without_verified_drafts_is_ignored() -> None:
    watched = usual()

    assert [watched.report(0.0, num_verified=0) for _ in range(5)] == [None] * 5


def test_what_a_worker_did_before_its_first_report_is_not_judged() -> None:
    watched = Watched()

    assert watched.report(0.0, num_verified=1000, num_late=1000, is_answered=False) is None
    assert watched.watch.reason is None
