"""The decisions of a record, made again."""

from collections import deque
from collections.abc import Iterable, Iterator

from scheduler.record import read_record
from scheduler.step_planner import StepInFlight, StepPlanner
from scheduler.task import BatchPlan, StepReport


def replay(lines: Iterable[str]) -> Iterator[tuple[StepReport, BatchPlan]]:
    """Plan each step of a record again; yields what was recorded and the plan made now.

    The cost model learns from the recorded times, so it is at each step what it was. ValueError
    if `lines` are not a record.
    """
    record = read_record(lines)
    reports: list[StepReport] = []
    planner = StepPlanner(record.limits, record.policy, record.cost_model, on_step=reports.append)
    in_flight: deque[tuple[StepInFlight, float, BatchPlan]] = deque()
    num_ended = 0

    def end() -> tuple[StepReport, BatchPlan]:
        step, measured_s, plan = in_flight.popleft()
        planner.end(step, measured_s, {})
        return reports.pop(), plan

    for step in record.steps:
        while num_ended < step.num_observed:
            yield end()
            num_ended += 1
        plan = planner.plan(step.view, step.began_s)
        begun = planner.begin(
            step.view, step.plan, step.began_s, tasks=step.tasks, decided_s=step.decided_s
        )
        in_flight.append((begun, step.measured_s, plan))
    while in_flight:
        yield end()
