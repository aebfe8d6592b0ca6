import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.placement import WorkerLoad, place
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


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([WorkerLoad("a", 9, 1), WorkerLoad("b", 8, 5)], "b"),
        ([WorkerLoad("a", 9, 2), WorkerLoad("b", 9, 1)], "b"),
        ([WorkerLoad("b", 9, 1), WorkerLoad("a", 9, 1)], "a"),
        ([WorkerLoad("a", 0, 0, draining=True), WorkerLoad("b", 9, 1)], "b"),
        ([WorkerLoad("a", 0, 0, silent=True), WorkerLoad("b", 9, 1)], "b"),
    ],
    ids=[
        "fewest tokens",
        "then fewest requests",
        "then smallest id",
        "never a draining one",
        "a silent one last",
    ],
)
def test_a_request_goes_where_least_is_outstanding(loads: list[WorkerLoad], chosen: str) -> None:
    assert place(REQUEST, loads) == chosen


@pytest.mark.parametrize("loads", [[], [WorkerLoad("a", 0, 0, draining=True)]])
def test_without_a_worker_that_takes_requests_none_is_chosen(loads: list[WorkerLoad]) -> None:
    assert place(REQUEST, loads) is None


@given(LOADS)
@settings(deadline=None)
def test_no_open_worker_has_less_to_do_than_the_chosen_one(loads: list[WorkerLoad]) -> None:
    outstanding = {w.worker_id: w.num_outstanding_tokens for w in loads if not w.draining}

    assert outstanding.get(place(REQUEST, loads) or "") == min(outstanding.values(), default=None)


@given(LOADS.flatmap(lambda loads: st.tuples(st.just(loads), st.permutations(loads))))
@settings(deadline=None)
def test_the_order_of_the_workers_does_not_matter(
    orders: tuple[list[WorkerLoad], list[WorkerLoad]],
) -> None:
    one, other = orders

    assert place(REQUEST, one) == place(REQUEST, other)
