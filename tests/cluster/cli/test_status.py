import dataclasses
import io

import pytest
from rich.console import Console

from cluster.cli.status import _workers_table
from cluster.ingress.protocol import AppStatus
from scheduler.stage_policy import PolicyReason, WorkerPolicy
from workers.reports import WorkerStatus

WORKER = WorkerStatus(
    worker_id="w1",
    pid=7,
    cpus=(0,),
    num_running=1,
    num_waiting=0,
    num_outstanding_tokens=9,
    num_steps=5,
    kv_cache_usage=0.5,
    memory_bytes=1 << 30,
    draining=False,
)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "w1 "),
        ({"draining": True}, "w1 (draining)"),
        ({"silent": True, "on_trial": True}, "w1 (silent, on trial)"),
        (
            {"policy": WorkerPolicy(0.7, reason=PolicyReason.DECODES_LATE)},
            "w1 (prefills in 70% of a step: more decodes than prefills",
        ),
        ({"policy": WorkerPolicy(1.0, 2, 1, PolicyReason.FEW_LATE)}, "w1 (at most 2 drafts: "),
        ({"slow": True, "slowness": 3.42}, "w1 (slow: 3.4 times as predicted)"),
    ],
)
def test_the_table_says_why_a_worker_may_get_no_requests(
    state: dict[str, object], words: str
) -> None:
    worker = dataclasses.replace(WORKER, **state)  # type: ignore[arg-type]
    out = io.StringIO()

    Console(file=out, width=160).print(_workers_table("app", AppStatus("m", [worker], 0, [])))

    assert words in out.getvalue()
