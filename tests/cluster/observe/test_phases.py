from itertools import pairwise
from math import inf

import pytest

from cluster.observe.phases import phases
from scheduler.task import Reason, Stage, StageTask
from workers.step_history import RequestStep


def step(
    number: int,
    what: Stage | Reason,
    num_tokens: int = 0,
    new: int = 0,
    preempted: bool = False,
) -> RequestStep:
    """The step `number`, which begins as many seconds after 0 and takes one."""
    task = StageTask("r", what, num_tokens, 50, True) if isinstance(what, Stage) else None
    return RequestStep(
        step=number,
        began_s=float(number),
        measured_s=1.0,
        predicted_s=0.9,
        limit_s=inf,
        num_others=3,
        task=task,
        reason=what if isinstance(what, Reason) else None,
        num_new_tokens=new,
        preempted=preempted,
    )


STEPS = [
    step(1, Reason.SEATS),
    step(2, Reason.KV),
    step(3, Stage.PREFILL, 16),
    step(4, Reason.TIME),
    step(5, Stage.PREFILL, 8, new=1),
    step(6, Stage.DECODE, 1, new=1),
    step(7, Stage.VERIFY, 5, new=3),
    step(8, Reason.PREEMPTED, preempted=True),
    step(9, Reason.KV),
    step(11, Stage.PREFILL, 30, new=1),
]


def test_a_request_waits_is_prefilled_and_decodes() -> None:
    found = phases(STEPS, arrived_s=0.5)

    assert [(p.name, p.began_s, p.ended_s) for p in found] == [
        ("queue", 0.5, 3.0),
        ("prefill", 3.0, 6.0),
        ("decode", 6.0, 12.0),
    ]
    assert [p.waited_s for p in found] == [
        {Reason.SEATS: 1.0, Reason.KV: 1.0},
        {Reason.TIME: 1.0},
        {Reason.PREEMPTED: 1.0, Reason.KV: 1.0},
    ]
    assert [p.num_tokens for p in found] == [0, 24, 36]
    assert [(p.num_drafts, p.num_accepted) for p in found] == [(0, 0), (0, 0), (4, 2)]
    assert [p.num_preemptions for p in found] == [0, 0, 1]


@pytest.mark.parametrize(
    ("num_steps", "names"),
    [
        (0, ["queue"]),
        (2, ["queue"]),
        (3, ["queue", "prefill"]),
        (5, ["queue", "prefill"]),
        (6, ["queue", "prefill", "decode"]),
    ],
)
def test_an_unfinished_request_has_fewer_phases(num_steps: int, names: list[str]) -> None:
    assert [phase.name for phase in phases(STEPS[:num_steps], 0.5)] == names


def test_one_that_began_at_once_has_a_queue_of_no_steps() -> None:
    queue, prefill = phases(STEPS[4:5], arrived_s=4.75)

    assert (queue.seconds, queue.steps) == (0.25, ())
    assert prefill.ended_s == 6.0


def test_the_phases_leave_no_gap() -> None:
    found = phases(STEPS, 0.5)

    assert all(one.ended_s == next_.began_s for one, next_ in pairwise(found))


def test_the_attributes_of_a_span_name_each_wait() -> None:
    queue, _, decode = (phase.attributes() for phase in phases(STEPS, 0.5))

    assert queue["xyserve.waited_s.seats"] == 1.0
    assert (decode["xyserve.num_drafts"], decode["xyserve.num_accepted"]) == (4, 2)
    assert decode["xyserve.num_steps"] == 3
