"""Records of small scenes, written by a planner."""

import io
import json
from collections import deque
from typing import Any

from scheduler.policy import StepPolicy
from scheduler.request import Slo
from scheduler.step_planner import StepInFlight, StepPlanner
from scheduler.task import Limits, StageTask, StepReport, StepView
from tests.scheduler.scenes import cost_model, decoding, waiting

NOW = 100.0


def write(
    policy: StepPolicy,
    limits: Limits,
    steps: list[tuple[StepView, float]],
    *,
    ahead: int = 0,
    executed: tuple[StageTask, ...] | None = None,
) -> tuple[list[str], list[StepReport]]:
    """A record of these views and the times that their steps took, and the reports of the steps.

    `ahead` steps are planned while others run, as under async scheduling; `executed` is computed
    in each instead of the plan.
    """
    file, reports = io.StringIO(), list[StepReport]()
    planner = StepPlanner(limits, policy, cost_model(1e-6), on_step=reports.append)
    planner.record(file)
    in_flight: deque[tuple[StepInFlight, float]] = deque()
    for number, (view, measured_s) in enumerate(steps):
        now = NOW + number / 3
        plan = planner.plan(view, now)
        step = planner.begin(view, plan, now, tasks=executed, decided_s=1e-4 / 3)
        in_flight.append((step, measured_s))
        if len(in_flight) > ahead:
            planner.end(*in_flight.popleft(), {})
    while in_flight:
        planner.end(*in_flight.popleft(), {})
    return file.getvalue().splitlines(), reports


def steady() -> list[tuple[StepView, float]]:
    """Ten steps that decode two requests while a third waits, on a machine that gets slower."""
    steps = []
    for step in range(10):
        running = [decoding("a", num_output_tokens=5 + step), decoding("b", slo=Slo(1.0, 0.05))]
        view = StepView(step, running, [waiting("c", 700, slo=Slo(200.0, 0.1))], 100)
        steps.append((view, 0.02 + 0.002 * step))
    return steps


def tampered(lines: list[str], step: int, change: dict[str, Any]) -> list[str]:
    """A record with other values in one of its steps."""
    documents = [json.loads(line) for line in lines]
    next(document for document in documents if document.get("step") == step).update(change)
    return [json.dumps(document) for document in documents]
