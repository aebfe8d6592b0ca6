from hypothesis import given
from hypothesis import strategies as st

from cluster.placement.standings import CLOSED, FULL, SILENT, SLOW, Standings

WORKERS = [f"w{number}" for number in range(8)]
STANDINGS = st.sampled_from([0, 0, FULL, SLOW, SLOW + FULL, SILENT, SILENT + SLOW, CLOSED])


@given(
    st.dictionaries(st.sampled_from(WORKERS), STANDINGS),
    st.lists(st.sampled_from(WORKERS), unique=True),
    st.none() | st.sampled_from(WORKERS),
)
def test_the_best_are_all_that_are_no_worse_than_the_second(
    noted: dict[str, int], listed: list[str], kept: str | None
) -> None:
    standings = Standings()
    for worker_id, standing in noted.items():
        standings.set(worker_id, CLOSED)
        standings.set(worker_id, standing)

    best = list(standings.best(listed, kept))

    of = {one: CLOSED if one == kept else noted.get(one, 0) for one in listed}
    second = sorted(of.values())[:2][-1:]
    assert best == [one for one in listed if of[one] <= second[0]]
    assert standings.num_closed(listed, kept) == list(of.values()).count(CLOSED)
