import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.placement import (
    Placement,
    PlacementReason,
    WorkerLoad,
    keep_for_trial,
    place,
)
from scheduler.request import Request

REQUEST = Request("r", num_prompt_tokens=10, max_tokens=10)

LOADS = st.lists(
    st.builds(
        WorkerLoad,
        worker_id=st.text(alphabet="abcdef", min_size=1, max_size=3),
        num_outstanding_tokens=st.integers(0, 5),
        num_requests=st.integers(0, 3),
        draining=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda load: load.worker_id,
)


A, B = WorkerLoad("a", 9, 1), WorkerLoad("b", 9, 1)


@pytest.mark.parametrize(
    ("loads", "chosen", "reason"),
    [
        ([A, WorkerLoad("b", 8, 5)], "b", PlacementReason.SOONEST),
        ([A, WorkerLoad("b", 16, 1, tokens_per_decode=2.0)], "b", PlacementReason.SOONEST),
        ([WorkerLoad("a", 9, 2), B], "b", PlacementReason.FEWEST_REQUESTS),
        ([B, A], "a", PlacementReason.TIE),
        ([A], "a", PlacementReason.ONLY),
        ([WorkerLoad("a", 0, 0, slowness=3.0), B], "b", PlacementReason.SOONEST),
        (
            [WorkerLoad("a", 9, 1, token_s=0.2), WorkerLoad("b", 30, 1, token_s=0.1)],
            "b",
            PlacementReason.SOONEST,
        ),
        (
            [WorkerLoad("a", 9, 1), WorkerLoad("b", 9, 1, token_s=0.1)],
            "a",
            PlacementReason.TIE,
        ),
        (
            [WorkerLoad("a", 9, 4, max_num_seqs=4), WorkerLoad("b", 90, 3, max_num_seqs=4)],
            "b",
            PlacementReason.OTHERS_FULL,
        ),
        ([WorkerLoad("a", 0, 0, slow=True), B], "b", PlacementReason.OTHERS_SLOW),
        ([WorkerLoad("a", 0, 0, slow=True)], "a", PlacementReason.ONLY),
        ([WorkerLoad("a", 0, 0, draining=True), B], "b", PlacementReason.ONLY),
        ([WorkerLoad("a", 0, 0, dead=True), B], "b", PlacementReason.ONLY),
        ([WorkerLoad("a", 9, 1, on_trial=True), B], "b", PlacementReason.ONLY),
        (
            [WorkerLoad("a", 9, 1, slow=True), WorkerLoad("b", 9, 1, silent=True)],
            "a",
            PlacementReason.OTHERS_SILENT,
        ),
        ([WorkerLoad("a", 0, 0, silent=True), B], "b", PlacementReason.OTHERS_SILENT),
        (
            [WorkerLoad("a", 3, 1, silent=True), WorkerLoad("b", 2, 1, silent=True)],
            "b",
            PlacementReason.ALL_SILENT,
        ),
    ],
    ids=[
        "fewest tokens",
        "drafts make tokens count for less",
        "then fewest requests",
        "then smallest id",
        "the only one",
        "longer steps make tokens count for more, also on an idle worker",
        "a faster device makes them count for less",
        "one without a profile is taken to be as fast as the others",
        "none waits for a slot while another worker has one",
        "a slow one last",
        "a slow one rather than none",
        "never a draining one",
        "never a dead one",
        "never one on trial",
        "a silent one after a slow one",
        "a silent one last",
        "all silent",
    ],
)
def test_a_request_goes_where_least_is_outstanding_and_says_why(
    loads: list[WorkerLoad], chosen: str, reason: PlacementReason
) -> None:
    placement = place(REQUEST, loads)

    assert placement is not None
    assert (placement.chosen.worker_id, placement.reason) == (chosen, reason)


def test_the_runner_up_is_who_would_be_chosen_without_the_chosen_one() -> None:
    draining = WorkerLoad("c", 0, 0, draining=True)
    loads = [WorkerLoad("d", 10, 1), A, WorkerLoad("b", 8, 5), draining]

    placement = place(REQUEST, loads)

    assert placement == Placement(loads[2], A, PlacementReason.SOONEST, num_closed=1)


SUSPECT = dataclasses.replace(REQUEST, num_engine_deaths=1)


def test_a_request_under_which_an_engine_died_is_tried_on_an_idle_worker_alone() -> None:
    kept = WorkerLoad("c", 0, 0, on_trial=True)

    placement = place(SUSPECT, [A, B, kept])

    assert placement == Placement(kept, None, PlacementReason.TRIAL, num_closed=2)
    assert place(SUSPECT, [A, WorkerLoad("c", 20, 1, on_trial=True)]) is None


def test_the_worker_with_least_to_do_is_kept_for_a_trial_while_another_serves() -> None:
    silent, dead = WorkerLoad("c", 0, 0, silent=True), WorkerLoad("d", 0, 0, dead=True)
    short = WorkerLoad("b", 1, 1)

    assert keep_for_trial(SUSPECT, [A, short, silent, dead]) == short
    assert keep_for_trial(SUSPECT, [A, silent, dead]) is None


@pytest.mark.parametrize(
    "loads", [[], [WorkerLoad("a", 0, 0, draining=True), WorkerLoad("b", 0, 0, dead=True)]]
)
def test_without_a_worker_that_takes_requests_none_is_chosen(loads: list[WorkerLoad]) -> None:
    assert place(REQUEST, loads) is None


@given(LOADS)
@settings(deadline=None)
def test_no_open_worker_has_less_to_do_than_the_chosen_one(loads: list[WorkerLoad]) -> None:
    outstanding = {w.worker_id: w.num_outstanding_tokens for w in loads if not w.draining}

    placement = place(REQUEST, loads)

    fewest = placement and outstanding[placement.chosen.worker_id]
    assert fewest == min(outstanding.values(), default=None)


@given(LOADS.flatmap(lambda loads: st.tuples(st.just(loads), st.permutations(loads))))
@settings(deadline=None)
def test_the_order_of_the_workers_does_not_matter(
    orders: tuple[list[WorkerLoad], list[WorkerLoad]],
) -> None:
    one, other = orders

    assert place(REQUEST, one) == place(REQUEST, other)
