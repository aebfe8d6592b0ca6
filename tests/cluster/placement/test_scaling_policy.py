import subprocess
import sys
import time
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.app import SCALING_POLICY
from cluster.config.scaling import autoscaling_of_serve
from cluster.placement.scaling_policy import ANSWERED, WANTED, num_replicas_wanted

DEPLOYMENT = DeploymentID("Worker", "xyserve")


def context(
    answers: dict[str, list[tuple[float, float]]],
    target: int = 2,
    policy_state: dict[str, Any] | None = None,
) -> AutoscalingContext:
    """What Serve hands a policy, with the numbers and times that each replica was answered."""

    def series(place: int) -> dict[ReplicaID, list[TimeStampedValue]]:
        return {
            ReplicaID(replica, DEPLOYMENT): [TimeStampedValue(9.0, pair[place]) for pair in pairs]
            for replica, pairs in answers.items()
        }

    found: dict[str, Any] = {WANTED: series(0), ANSWERED: series(1)} if answers else {}
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="Worker",
        app_name="xyserve",
        current_num_replicas=1,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics={},
        raw_metrics=found,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=9,
        policy_state=policy_state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=time.time(),
        config=None,
    )


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        ({}, 2),  # nobody has heard of the GlobalScheduler: as many as now
        ({"a": []}, 2),
        ({"a": [(1, 10.0), (3, 20.0)]}, 3),
        ({"a": [(4, 10.0)], "b": [(3, 20.0)]}, 3),  # a has not been answered since
    ],
)
def test_the_latest_answer_is_followed(
    answers: dict[str, list[tuple[float, float]]], wanted: int
) -> None:
    assert num_replicas_wanted(context(answers))[0] == wanted


def test_a_number_stays_when_the_replica_that_was_answered_it_goes() -> None:
    _, state = num_replicas_wanted(context({"a": [(2, 10.0)], "b": [(1, 20.0)]}))

    late, state = num_replicas_wanted(context({"a": [(2, 10.0)]}, policy_state=state))
    silent, state = num_replicas_wanted(context({}, policy_state=state))
    newer, _ = num_replicas_wanted(context({"a": [(3, 30.0)]}, policy_state=state))

    assert (late, silent, newer) == (1, 1, 3)


def test_serve_gives_our_policy_back_what_it_remembers() -> None:
    settings = autoscaling_of_serve({"max_replicas": 9}, SCALING_POLICY)
    policy = _apply_autoscaling_config(AutoscalingConfig(**settings).policy.get_policy())
    first = context({"b": [(1, 20.0)]})
    first.config = AutoscalingConfig(**settings)
    number, state = policy(first)
    then = context({"a": [(2, 10.0)]}, target=1, policy_state=state)
    then.config = first.config

    assert (number, policy(then)[0]) == (1, 1)


def test_serve_takes_our_policy_and_runs_a_copy_of_it_without_our_packages() -> None:
    settings = autoscaling_of_serve({"min_replicas": 1, "max_replicas": 9}, SCALING_POLICY)

    config = AutoscalingConfig(**settings)

    assert (config.upscale_delay_s, config.downscale_delay_s) == (0, 0)
    copy = cloudpickle.dumps((config.policy, context({"a": [(5, 10.0)]})))
    code = (
        "import sys, ray.cloudpickle; sys.modules['cluster'] = sys.modules['scheduler'] = None\n"
        "policy, context = ray.cloudpickle.load(sys.stdin.buffer)\n"
        "print(policy.get_policy()(context))"
    )
    found = subprocess.run([sys.executable, "-c", code], input=copy, capture_output=True)
    assert found.stdout.decode().startswith("(5, "), found.stderr
