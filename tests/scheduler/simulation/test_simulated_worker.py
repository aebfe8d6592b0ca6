"""A simulated worker drives the same planner as an engine: what is recorded can be replayed."""

import io
from random import Random

import pytest

from scheduler.cost_model import CostModel
from scheduler.policy import StepPolicy
from scheduler.record import arrivals
from scheduler.replay import replay
from scheduler.request import RequestState
from scheduler.simulation.simulated_worker import LiveRequest, SimulatedWorker
from scheduler.step_planner import StepPlanner
from scheduler.task import StepReport
from tests.scheduler.simulation.test_simulator import device, workload

NUM_REQUESTS = 25


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("policy", ["hybrid", "static", "decode_first", "prefill_first"])
def test_its_record_is_planned_again(policy: str, learns: bool) -> None:
    # A KV cache so small that requests with shared prefixes are preempted.
    machine, file, reports = device(24, 6), io.StringIO(), list[StepReport]()
    planner = StepPlanner(
        machine.limits,
        StepPolicy(name=policy),  # type: ignore[arg-type]
        CostModel.from_dict(machine.cost_model.to_dict()),
        learns=learns,
        on_step=reports.append,
    )
    planner.record(file)
    worker = SimulatedWorker("w", machine, planner)

    serve(worker)

    replayed = list(replay(file.getvalue().splitlines()))
    assert all(report.plan == plan for report, plan in replayed)
    assert len(replayed) == len(reports) == worker.num_steps
    assert worker.num_preemptions > 0
    rows = list(arrivals(file.getvalue().splitlines()))
    assert [row["output_length"] for row in rows] == [
        arrival.num_output_tokens for arrival in workload(7, NUM_REQUESTS, 100.0)
    ]
    assert sum(sum(report.num_new_tokens.values()) for report in reports) == sum(
        row["output_length"] for row in rows
    )


def serve(worker: SimulatedWorker) -> None:
    """Have the worker serve a workload, whose requests arrive between two steps."""
    coming = workload(7, NUM_REQUESTS, 100.0)
    now = 0.0
    while coming or worker.live:
        while coming and (coming[0].arrival_s <= now or not worker.live):
            now = max(now, coming[0].arrival_s)
            add(worker, NUM_REQUESTS - len(coming), now)
            del coming[0]
        end_s = worker.begin(now)
        assert end_s is not None
        now = end_s
        worker.finish(now)


def add(worker: SimulatedWorker, index: int, now: float) -> None:
    arrival = workload(7, NUM_REQUESTS, 100.0)[index]
    holding = worker.kv.holding(
        arrival.hash_ids, arrival.hash_block_size, arrival.request.num_prompt_tokens
    )
    state = RequestState(arrival.request, now)
    worker.add(
        LiveRequest(
            arrival=arrival, index=index, state=state, holding=holding, random=Random(index)
        )
    )
