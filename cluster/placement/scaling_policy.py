"""Serve's autoscaling policy for workers: as many as the GlobalScheduler wants.

Serve's controller runs a copy of this file, which therefore imports nothing of ours.
"""

from typing import Any

from ray.serve.config import AutoscalingContext

WANTED = "num_wanted"
"""Metric of a replica: the number that the GlobalScheduler answered to its latest report."""
ANSWERED = "answered_s"
"""Metric of a replica: when it did, by the wall clock."""


def num_replicas_wanted(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The number in the latest answer to any replica; before the first, as many as now.

    The replica that had it may be the one that goes, so it is remembered. Serve keeps the number
    within `min_replicas` and `max_replicas`.
    """
    metrics, before = context.raw_metrics or {}, context.policy_state
    wanted, answered = metrics.get(WANTED, {}), metrics.get(ANSWERED, {})
    answers = [
        (answered[replica][-1].value, numbers[-1].value)
        for replica, numbers in wanted.items()
        if numbers and answered.get(replica)
    ]
    if ANSWERED in before:
        answers.append((before[ANSWERED], before[WANTED]))
    if not answers:
        return context.target_num_replicas, {}
    answered_s, num_wanted = max(answers)
    return int(num_wanted), {ANSWERED: answered_s, WANTED: num_wanted}
