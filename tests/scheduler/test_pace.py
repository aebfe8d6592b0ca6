import pytest

from scheduler.pace import RECOVERED_AFTER_S, Pace, SlowWatch


def take_steps(pace: Pace, ratio: float, step_s: float, began_s: float, until_s: float) -> float:
    """Steps without a pause; returns the time of the last one's end."""
    now = began_s
    while now < until_s:
        now += step_s
        pace.observe(ratio, step_s, now)
    return now


@pytest.mark.parametrize("step_s", [0.02, 0.5, 8.0])
def test_steps_that_take_long_for_long_make_a_worker_slow(step_s: float) -> None:
    pace = Pace()

    now = take_steps(pace, 5.0, step_s, 0.0, 200.0)

    assert pace.slowness(now) == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize(
    ("ratio", "step_s", "until_s"),
    [(100.0, 30.0, 30.0), (1e9, 0.1, 0.1), (5.0, 0.05, 2.0), (float("nan"), 1.0, 1.0)],
    ids=["one step", "a clock fault", "a burst of two seconds", "no number"],
)
def test_an_outlier_and_a_burst_do_not(ratio: float, step_s: float, until_s: float) -> None:
    pace = Pace()

    now = take_steps(pace, ratio, step_s, 0.0, until_s)

    assert pace.slowness(now) < 2.1


def test_the_pace_of_a_worker_that_takes_no_steps_is_forgotten() -> None:
    pace = Pace()
    now = take_steps(pace, 10.0, 0.1, 0.0, 100.0)

    assert pace.slowness(now) > pace.slowness(now + 5) > pace.slowness(now + 50) > 1.0
    assert pace.slowness(now + 500) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("slowness", "others", "slow"),
    [
        (4.0, [1.2, 2.0], True),
        (4.0, [], True),
        (2.5, [1.0], False),
        (4.0, [3.0, 2.0], False),
        (4.0, [0.5], True),
        (1.0, [0.2], False),
    ],
    ids=[
        "slower than predicted, and than another",
        "alone",
        "not by much",
        "all are",
        "others are faster than predicted",
        "as predicted",
    ],
)
def test_a_worker_is_slow_if_its_steps_take_long_and_those_of_another_do_not(
    slowness: float, others: list[float], slow: bool
) -> None:
    watch = SlowWatch()

    assert watch.observe(slowness, others, 0.0) == slow
    assert watch.slow == slow


def test_a_worker_stays_slow_until_it_clearly_is_not() -> None:
    watch = SlowWatch()

    changes = [watch.observe(slowness, [1.0], 0.0) for slowness in (2.9, 3.1, 2.1, 1.9, 2.9)]

    assert changes == [False, True, False, True, False]


def test_the_time_that_a_worker_is_slow_adds_up_until_it_has_recovered() -> None:
    watch = SlowWatch()
    slow_s = []
    now = 0.0
    for slowness, for_s in [
        (5.0, 30.0),
        (1.0, RECOVERED_AFTER_S / 2),
        (5.0, 30.0),
        (1.0, 2 * RECOVERED_AFTER_S),
    ]:
        end_s = now + for_s
        while now < end_s:
            now += 1.0
            watch.observe(slowness, [1.0], now)
        slow_s.append(watch.slow_s)

    assert slow_s == [29.0, 30.0, 59.0, 0.0]


def test_the_time_alone_says_nothing_of_the_worker() -> None:
    watch = SlowWatch()
    for now in range(100):
        watch.observe(5.0, [], float(now))

    assert (watch.slow, watch.slow_s) == (True, 0.0)
