"""What a record keeps of its worker's requests and decisions."""

import io
import json

from scheduler.policy import StepPolicy
from scheduler.record import arrivals, read_record
from scheduler.replay import replay
from scheduler.request import Request, RequestState
from scheduler.step_planner import StepPlanner
from scheduler.task import Stage, StageTask, StepView
from tests.scheduler.records import steady, write
from tests.scheduler.scenes import LIMITS, cost_model, decoding, waiting


def test_a_record_is_strict_json_whose_requests_are_written_once() -> None:
    lines, _ = write(StepPolicy(), LIMITS, steady())

    def refuse(name: str) -> None:
        raise AssertionError(name)

    documents = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [document["request"][0] for document in documents if "request" in document] == [
        "a",
        "b",
        "c",
    ]


def test_a_request_that_ends_with_its_step_is_one_request() -> None:
    file = io.StringIO()
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model())
    planner.record(file)
    for number in range(3):
        view = StepView(number, [decoding("r", num_output_tokens=7 + number)], [], 100)
        step = planner.begin(view, planner.plan(view, 1.0), 1.0)
        if number == 2:
            planner.finish("r", 10)  # as vLLM does, before the step is over
        planner.end(step, 0.1, {})

    assert [row["output_length"] for row in arrivals(file.getvalue().splitlines())] == [10]


def test_states_may_change_while_their_step_runs() -> None:
    file, state = io.StringIO(), decoding("r", num_output_tokens=7)
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model())
    planner.record(file)
    view = StepView(1, [state], [], 100, {"r": 3})
    step = planner.begin(view, planner.plan(view, 1.0), 1.0)
    state.num_output_tokens, state.num_computed_tokens = 8, 107
    planner.end(step, 0.1, {})

    [recorded] = read_record(file.getvalue().splitlines()).steps

    assert recorded.view == StepView(1, [decoding("r", num_output_tokens=7)], [], 100, {"r": 3})


def test_a_request_that_came_too_late_for_the_view_of_its_first_step_is_recorded() -> None:
    file, late = io.StringIO(), waiting("late", 50, arrival_s=2.0)
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model())
    planner.record(file)
    empty = StepView(1, [], [], 100)
    computed = (StageTask("late", Stage.PREFILL, 50, 50, True),)
    plan = planner.plan(empty, 5.0)
    planner.end(planner.begin(empty, plan, 5.0, tasks=computed, late=[late]), 0.1, {"late": 1})
    running = decoding("late", num_prompt_tokens=50, num_output_tokens=1, arrival_s=2.0)
    view = StepView(2, [running], [], 100)
    planner.end(planner.begin(view, planner.plan(view, 6.0), 6.0), 0.1, {"late": 1})
    lines = file.getvalue().splitlines()

    first, second = read_record(lines).steps

    assert (first.view, first.plan, first.tasks) == (empty, plan, computed)
    assert second.view == view
    assert [row["input_length"] for row in arrivals(lines)] == [50]
    assert all(report.plan == plan for report, plan in replay(lines))


def test_arrivals_are_the_requests_in_their_order() -> None:
    file = io.StringIO()
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model())
    planner.record(file)
    states = [
        RequestState(Request("late", 30, 9, slo_class="chat"), 12.5),
        RequestState(Request("early", 20, 9), 10.0, num_output_tokens=2),
        RequestState(Request("unseen", 10, 9, slo_class="batch"), 11.0),
    ]
    view = StepView(1, states[1:2], [states[0], states[2]], 10)
    step = planner.begin(view, planner.plan(view, 20.0), 20.0)
    planner.end(step, 0.1, {})
    planner.finish("late", 7)
    planner.finish("never written", 3)

    assert list(arrivals(file.getvalue().splitlines())) == [
        {"arrival_s": 0.0, "input_length": 20, "output_length": 2, "class": ""},
        {"arrival_s": 1.0, "input_length": 10, "output_length": 1, "class": "batch"},
        {"arrival_s": 2.5, "input_length": 30, "output_length": 7, "class": "chat"},
    ]


def test_a_request_id_that_comes_again_is_another_request() -> None:
    first, second = waiting("a", 100), waiting("a", 50)
    steps = [(StepView(step, [], [state], 100), 0.1) for step, state in enumerate([first, second])]

    lines, reports = write(StepPolicy(), LIMITS, steps)

    assert [report for report, _ in replay(lines)] == reports
    assert [row["input_length"] for row in arrivals(lines)] == [100, 50]
