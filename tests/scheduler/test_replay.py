"""Replaying a record decides the same."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.policy import StepPolicy
from scheduler.replay import replay
from scheduler.task import Limits, Stage, StageTask, StepView
from tests.scheduler.records import NOW, steady, tampered, write
from tests.scheduler.scenes import LIMITS, waiting
from tests.scheduler.test_policy import POLICIES, scenes

seconds = st.floats(1e-6, 10.0)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Limits, list[tuple[StepView, float]]]:
    limits, first = draw(scenes())
    views = [first, *(draw(scenes())[1] for _ in range(draw(st.integers(0, 4))))]
    return limits, [(view, draw(seconds)) for view in views]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@given(history=histories(), ahead=st.integers(0, 2))
@settings(deadline=None, max_examples=25)
def test_a_replay_plans_what_was_planned(
    policy: StepPolicy, history: tuple[Limits, list[tuple[StepView, float]]], ahead: int
) -> None:
    limits, steps = history

    lines, reports = write(policy, limits, steps, ahead=ahead)

    replayed = list(replay(lines))
    assert [report for report, _ in replayed] == reports
    assert [plan for _, plan in replayed] == [report.plan for report in reports]


def test_what_was_executed_teaches_not_what_was_planned() -> None:
    task = StageTask("a", Stage.PREFILL, 400, 400, True)
    lines, reports = write(StepPolicy(), LIMITS, steady(), executed=(task,))
    as_planned, _ = write(StepPolicy(), LIMITS, steady())

    assert [plan for _, plan in replay(lines)] == [report.plan for report in reports]
    assert reports[-1].plan != list(replay(as_planned))[-1][1]


@pytest.mark.parametrize(
    ("change", "first_wrong"),
    [
        ({"now": NOW + 500}, 4),
        ({"num_free_kv_blocks": 1}, 4),
        ({"waiting": []}, 4),
        ({"tasks": []}, 4),
        ({"predicted_s": 0.25}, 4),
        ({"measured_s": 0.001}, 5),  # teaches the next step another time
    ],
)
def test_a_changed_record_is_noticed(change: dict[str, Any], first_wrong: int) -> None:
    lines, _ = write(StepPolicy(), LIMITS, steady())

    wrong = [
        report.step for report, plan in replay(tampered(lines, 4, change)) if report.plan != plan
    ]

    assert wrong[0] == first_wrong


def test_a_last_line_that_was_cut_off_is_left_out() -> None:
    lines, reports = write(StepPolicy(), LIMITS, steady())

    assert len(list(replay([*lines[:-1], lines[-1][:50]]))) == len(reports) - 1
    with pytest.raises(ValueError, match="line 3 of the record is no JSON"):
        list(replay([*lines[:2], lines[2][:5], *lines[3:]]))


def test_infinite_times_come_back() -> None:
    lines, _ = write(StepPolicy(), LIMITS, [(StepView(1, [], [waiting("a")], 100), 0.1)])

    [(report, plan)] = replay(lines)

    assert report.plan.limit_s == plan.limit_s == math.inf


@pytest.mark.parametrize("lines", [[], ["{}"], ["[1]"], ['{"format": "another"}', "{}"]])
def test_what_is_no_record_is_refused(lines: list[str]) -> None:
    with pytest.raises(ValueError, match="no record of decisions"):
        list(replay(lines))
