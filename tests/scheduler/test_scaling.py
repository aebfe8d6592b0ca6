import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.scaling import (
    FIRST_LIMIT,
    LOOK_S,
    MIN_LIMIT,
    DraftScaling,
    Scaling,
    ScalingDecision,
    ScalingObservation,
    ScalingReason,
    ScalingSettings,
)
from tests.bench.scaling import HOUR_S, Fixed, Ours, read, serve
from tests.workload import has_traces

SETTINGS = ScalingSettings(min_workers=1, max_workers=20)

Load = Callable[[float], float]
"""Work per second by the time."""


def run(
    load: Load,
    duration_s: int = 1800,
    *,
    num_ready: int = 1,
    start_s: float = 40.0,
    settings: ScalingSettings = SETTINGS,
    attained: Callable[[float, float], float] | None = None,
    queued_s: Callable[[float], float] = lambda now: 0.0,
) -> list[ScalingDecision]:
    """The decisions of each second of a fleet whose workers start in `start_s`.

    `attained` is the share of ten requests a second that meet their targets, by the load of a
    worker and the time.
    """
    scaling = Scaling(settings)
    found: list[ScalingDecision] = []
    ordered: list[float] = []
    for second in range(duration_s):
        now = 1000.0 + second
        starting = [time_s for time_s in ordered if now - time_s < start_s]
        num_ready += len(ordered) - len(starting)
        ordered = starting
        offered_s = load(second)
        met = 10 if attained is None else round(10 * attained(offered_s / num_ready, second))
        seen = ScalingObservation(
            offered_s,
            num_ready,
            queued_s(second),
            2.0,
            0 if attained is None else 10,
            0 if attained is None else met,
        )
        if (decision := scaling.wanted(seen, now)) is None:
            continue
        found.append(decision)
        more = decision.num_wanted - num_ready - len(ordered)
        ordered += [now] * more
        if more < 0:
            ordered = ordered[:more] if len(ordered) >= -more else []
            num_ready = min(num_ready, decision.num_wanted)
    return found


def numbers(decisions: Iterable[ScalingDecision]) -> list[int]:
    return [decision.num_wanted for decision in decisions]


def changes(decisions: Iterable[ScalingDecision]) -> list[int]:
    found = numbers(decisions)
    return [after - before for before, after in itertools.pairwise(found) if after != before]


def test_nothing_is_decided_before_all_workers_can_have_reported() -> None:
    assert len(run(lambda now: 5.0, round(LOOK_S))) == 0
    assert numbers(run(lambda now: 1.9, round(LOOK_S) + 1, num_ready=3)) == [3]


def test_workers_are_added_for_the_work_that_is_offered() -> None:
    decisions = run(lambda now: 3.0)

    assert decisions[-1].num_wanted == math.ceil(3.0 / FIRST_LIMIT)
    assert decisions[-1].reason is ScalingReason.LOAD
    assert str(decisions[-1]) == (
        "5 wanted, 5 ready: more work is foreseen than the workers can take (3.00 s of work per "
        "second, 3.00 foreseen in 50 s, 0.70 per worker, 0.0 s queued)"
    )


def test_they_are_added_before_growing_work_needs_them() -> None:
    load = 0.0002

    def exceeds(number: int) -> float:
        return number * FIRST_LIMIT / load

    decisions = run(lambda now: load * now, 9000)
    first = {d.num_wanted: LOOK_S + at for at, d in reversed([*enumerate(decisions)])}

    for number in (1, 2):
        assert exceeds(number) - 400 < first[number + 1] < exceeds(number) - 40


def test_fewer_are_wanted_only_after_a_while_of_less_work() -> None:
    decisions = run(lambda now: 3.0 if now < 600 else 1.0, 2400)
    found = numbers(decisions)
    fewer = next(at for at, number in enumerate(found) if number < 5) + LOOK_S

    assert fewer >= 600 + SETTINGS.hold_s
    assert found[-1] == 2
    assert decisions[-1].reason is ScalingReason.IDLE


@pytest.mark.parametrize("mean", [0.5, 0.68, 0.7, 0.72, 1.2, 3.5])
def test_noise_does_not_make_it_flap(mean: float) -> None:
    draw = random.Random(1)
    noise = [
        draw.expovariate(1 / mean) if draw.random() < 0.95 else 4 * mean for _ in range(14_400)
    ]

    found = changes(run(lambda now: noise[int(now)], 14_400))

    # In four hours one worker may go and come back in each half hour.
    turns = sum(a * b < 0 for a, b in itertools.pairwise(found))
    assert turns <= 8


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=20), st.integers(0, 20), st.floats(1, 3))
def test_more_work_never_gives_fewer_workers(loads: list[float], at: int, factor: float) -> None:
    def less(now: float) -> float:
        return loads[int(now / 60) % len(loads)]

    def more(now: float) -> float:
        return less(now) * (factor if now >= 60 * at else 1)

    fewer, most = (numbers(run(load, 1300, num_ready=20, start_s=0)) for load in (less, more))

    assert all(few <= many for few, many in zip(fewer, most, strict=True))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=20),
    st.integers(1, 5),
    st.integers(5, 9),
    st.floats(0, 1),
)
def test_the_number_stays_within_its_bounds(
    loads: list[float], least: int, most: int, attainment: float
) -> None:
    bounds = ScalingSettings(min_workers=least, max_workers=most, hold_s=30)

    found = run(
        lambda now: loads[int(now / 30) % len(loads)],
        900,
        num_ready=least,
        settings=bounds,
        attained=lambda load, now: attainment,
    )

    assert all(least <= number <= most for number in numbers(found))
    assert all(decision.limit >= MIN_LIMIT for decision in found)


def test_a_limit_that_is_too_high_is_cut_by_misses_and_learned_again() -> None:
    real = 0.2
    """What a worker can really take."""

    decisions = run(
        lambda now: 1.0,
        7200,
        attained=lambda load, now: 1.0 if load <= real else 0.5,
    )

    assert decisions[-1].num_wanted == pytest.approx(1.0 / real, abs=1)
    assert decisions[-1].num_wanted >= 1.0 / real
    assert decisions[-1].limit <= 1.5 * real
    assert ScalingReason.MISSES in {decision.reason for decision in decisions}


def test_a_limit_that_is_too_low_is_raised_while_targets_are_met() -> None:
    decisions = run(lambda now: 6.0, 14_400, attained=lambda load, now: 1.0 if load < 2 else 0.8)

    assert decisions[-1].limit > 1.2
    assert decisions[-1].num_wanted < 6.0 / FIRST_LIMIT - 2


def test_misses_that_more_workers_do_not_cure_add_no_more() -> None:
    decisions = run(lambda now: 1.3, 7200, attained=lambda load, now: 0.5)

    assert max(numbers(decisions)) <= 8
    assert numbers(decisions)[-1] <= 3


def test_misses_of_workers_that_still_start_are_not_counted_twice() -> None:
    decisions = run(
        lambda now: 2.0, 400, start_s=300, attained=lambda load, now: 0.0 if load > 0.7 else 1.0
    )

    assert max(numbers(decisions)) == math.ceil(2.0 / FIRST_LIMIT)


def test_a_queue_that_targets_do_not_allow_adds_workers() -> None:
    decisions = run(lambda now: 0.5, 200, queued_s=lambda now: 60.0 if now > 100 else 0.0)

    assert decisions[0].num_wanted == 1
    assert decisions[-1].num_wanted == 2
    assert decisions[-1].reason is ScalingReason.QUEUE


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"min_workers \(0\) must be at least 1"):
        ScalingSettings(min_workers=0)
    with pytest.raises(ValueError, match=r"target_attainment \(1.0\) must be between"):
        ScalingSettings(target_attainment=1.0)
    with pytest.raises(ValueError, match=r"hold_s \(-1\) must not be negative"):
        ScalingSettings(hold_s=-1)


def test_draft_workers_follow_how_busy_they_are() -> None:
    scaling = DraftScaling(ScalingSettings(max_workers=4, hold_s=60))
    num_workers, found = 1, []
    for second in range(900):
        busy = 1.5 if 100 < second < 400 else 0.2
        shares = [min(busy / num_workers, 1.0)] * num_workers
        num_workers = scaling.wanted(shares, 50.0 + second) or num_workers
        found.append(num_workers)

    assert (found[90], max(found), found[399], found[-1]) == (1, 3, 3, 1)


@pytest.mark.skipif(not has_traces(), reason="needs the full data sets")
def test_real_requests_meet_their_targets_on_about_as_few_workers_as_can_do_it() -> None:
    arrivals = read("servegen_m_small_arrivals", 8.0, HOUR_S)

    ours = serve("ours", Ours(), 2, 60.0, arrivals)
    fixed = [serve("fixed", Fixed(), number, 60.0, arrivals) for number in (1, 3)]

    assert fixed[0]["attained"] < 0.5
    assert ours["attained"] > 0.97
    assert ours["hours"] <= 1.25 * fixed[1]["hours"]
