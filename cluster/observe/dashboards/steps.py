"""What workers do."""

from cluster.observe import metrics
from cluster.observe.dashboards.panels import Dashboard, Kind, Panel, Query, Row, Thresholds, Unit
from cluster.observe.dashboards.promql import grown, largest, of_workers, quantile, shown, total
from cluster.observe.dashboards.queries import quantiles, rate_of_workers
from cluster.observe.metrics import Metric

_MEASURED = rate_of_workers(metrics.STEP_MEASURED_SECONDS, "replica")
_PREDICTED = rate_of_workers(metrics.STEP_PREDICTED_SECONDS, "replica")


def _in_a_step(counter: Metric, label: str) -> str:
    num_steps = rate_of_workers(metrics.STEP_SECONDS, part="_count")
    return f"{rate_of_workers(counter, label)} / on () group_left () ({num_steps} > 0)"


def _peak_share(counter: Metric, peak: Metric) -> str:
    """Of the time in steps, so that a worker without work is not held to be slow."""
    in_steps = f"{rate_of_workers(counter, 'replica')} / ({_MEASURED} > 0)"
    return f"{in_steps} / {largest(of_workers(peak), 'replica')}"


STEPS = Dashboard(
    "xyserve-steps",
    "XY-Serve: steps",
    "What the workers do: what is in their steps, how long those take, and how good the plan is.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Busy",
                    "Share of their time that the workers spend in steps, in the mean. Near 100 % "
                    "they are full, which is good as long as the targets are met.",
                    Unit.SHARE,
                    (Query(f"avg({_MEASURED})", "busy"),),
                    Kind.STAT,
                ),
                Panel(
                    "Step time, p95",
                    "19 of 20 steps took no longer. No request gets its tokens faster than a step "
                    "takes, but for drafts.",
                    Unit.SECONDS,
                    (
                        Query(
                            quantile(0.95, of_workers(metrics.STEP_SECONDS, part="_bucket")), "p95"
                        ),
                    ),
                    Kind.STAT,
                ),
                Panel(
                    "Predicted / measured",
                    "Predicted over measured time of all steps. Good is 90 % to 110 %: below, "
                    "steps last longer than planned and targets break; above, steps are emptier "
                    "than they need be.",
                    Unit.SHARE,
                    (Query(f"sum({_PREDICTED}) / (sum({_MEASURED}) > 0)", "predicted"),),
                    Kind.STAT,
                ),
                Panel(
                    "Running",
                    "Requests that are in the workers' steps: at most `max_num_seqs` on each.",
                    Unit.COUNT,
                    (Query(total(of_workers(metrics.VLLM_NUM_REQUESTS_RUNNING)), "running"),),
                    Kind.STAT,
                ),
                Panel(
                    "Waiting",
                    "Requests that workers have not begun. Good is near zero; if it stays high, "
                    "add workers.",
                    Unit.COUNT,
                    (Query(total(of_workers(metrics.VLLM_NUM_REQUESTS_WAITING)), "waiting"),),
                    Kind.STAT,
                    Thresholds(8, 32),
                ),
                Panel(
                    "KV cache, fullest",
                    "Share of the KV cache in use, on the worker where it is highest. Above 95 % "
                    "requests wait for room, or are preempted.",
                    Unit.SHARE,
                    (Query(largest(of_workers(metrics.VLLM_KV_CACHE_USAGE)), "in use"),),
                    Kind.STAT,
                    Thresholds(0.85, 0.95),
                ),
            ),
        ),
        Row(
            "What is in a step",
            (
                Panel(
                    "Tokens in a step",
                    "Mean number of tokens in a step, by stage. Decodes bring one for each "
                    "request, verifying its drafts as well; prefill fills what time the targets "
                    "leave. Steps of decodes only leave most of the device idle.",
                    Unit.COUNT,
                    (Query(_in_a_step(metrics.STEP_TOKENS, "stage"), "{{stage}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Tokens computed",
                    "Tokens that steps compute each second, by stage. Verified drafts that are "
                    "not accepted are in here and not in the output.",
                    Unit.TOKENS_PER_S,
                    (Query(rate_of_workers(metrics.STEP_TOKENS, "stage"), "{{stage}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Deferred requests",
                    "Mean number of requests that get nothing in a step, by reason: time, tpot or "
                    "overdue (the targets of others, or their own, leave none), tokens or seats "
                    "(limits of a step), kv and preempted (no room in the cache), behind (another "
                    "one goes first). Some are normal under load. kv asks for more cache, seats "
                    "and tokens for larger limits, the others for more workers.",
                    Unit.COUNT,
                    (Query(_in_a_step(metrics.DEFERRALS, "reason"), "{{reason}}"),),
                    may_be_empty="every request was in every step",
                ),
            ),
        ),
        Row(
            "Time",
            (
                Panel(
                    "Step time",
                    "How long steps take. p99 follows long prompts; if p50 grows with the same "
                    "load, something else uses the device.",
                    Unit.SECONDS,
                    quantiles(metrics.STEP_SECONDS, of_worker=True),
                ),
                Panel(
                    "Busy, by worker",
                    "Share of its time that each worker spends in steps. All should be alike: one "
                    "that stands out has got long requests, or is slower. One at zero with "
                    "requests running hangs: restart it.",
                    Unit.SHARE,
                    (Query(_MEASURED, "{{replica}}"),),
                ),
                Panel(
                    "Use of the time there is",
                    "Predicted time of a step over what the targets of its requests leave it. "
                    "Near 100 % the step is as full as it may be. Above, targets could not be "
                    "kept: less load, wider targets, or more workers.",
                    Unit.SHARE,
                    quantiles(metrics.STEP_BUDGET_USE, of_worker=True),
                    thresholds=Thresholds(1.0, 1.25),
                ),
            ),
        ),
        Row(
            "The plan",
            (
                Panel(
                    "Predicted and measured",
                    "Seconds in steps in each second, as predicted and as measured, over all "
                    "workers. The lines should lie on each other.",
                    Unit.SECONDS,
                    (
                        Query(f"sum({_PREDICTED})", "predicted"),
                        Query(f"sum({_MEASURED})", "measured"),
                    ),
                ),
                Panel(
                    "Error of the prediction",
                    "Difference between predicted and measured time of a step, over the measured. "
                    "Good is a p50 below 10 %. If it stays high, run `xyserve calibrate`; if it "
                    "is high on one worker, another process uses its cores.",
                    Unit.SHARE,
                    quantiles(metrics.STEP_PREDICTION_ERROR, of_worker=True),
                    thresholds=Thresholds(0.2, 0.5),
                ),
                Panel(
                    "Time to decide",
                    "How long planning a step took, which is part of the step. Good is below 1 "
                    "ms, or 1 % of the step; it grows with the number of requests on a worker.",
                    Unit.SECONDS,
                    quantiles(metrics.STEP_DECISION_SECONDS, of_worker=True),
                    thresholds=Thresholds(0.005, 0.025),
                ),
            ),
        ),
        Row(
            "The device",
            (
                Panel(
                    "Arithmetic in use (MFU)",
                    "Operations that the model's shape asks for, in the time of steps, over the "
                    "fastest arithmetic measured on the device. Prefill brings it up. Low with "
                    "much decode is normal: memory is the limit then.",
                    Unit.SHARE,
                    (Query(_peak_share(metrics.STEP_FLOPS, metrics.PEAK_FLOPS), "{{replica}}"),),
                ),
                Panel(
                    "Memory bandwidth in use (MBU)",
                    "Bytes that the model's shape has steps move, in the time of steps, over the "
                    "fastest reading measured on the device. Decodes bring it up. When this and "
                    "the arithmetic are both low, steps wait: see the time to decide.",
                    Unit.SHARE,
                    (
                        Query(
                            _peak_share(metrics.STEP_MEMORY_BYTES, metrics.PEAK_MEMORY_BANDWIDTH),
                            "{{replica}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "The engine",
            (
                Panel(
                    "Running and waiting",
                    "Requests in the workers' steps, and those not begun. Waiting ones with a KV "
                    "cache that is not full wait for their turn in the step.",
                    Unit.COUNT,
                    (
                        Query(total(of_workers(metrics.VLLM_NUM_REQUESTS_RUNNING)), "running"),
                        Query(total(of_workers(metrics.VLLM_NUM_REQUESTS_WAITING)), "waiting"),
                    ),
                ),
                Panel(
                    "KV cache in use",
                    "Share of each worker's KV cache that requests hold. Above 95 % new ones wait "
                    "for room: raise `worker.engine.kv_cache_gib`, or add workers.",
                    Unit.SHARE,
                    (
                        Query(
                            largest(of_workers(metrics.VLLM_KV_CACHE_USAGE), "replica"),
                            "{{replica}}",
                        ),
                    ),
                    thresholds=Thresholds(0.85, 0.95),
                ),
                Panel(
                    "Preemptions",
                    "Requests in the last 5 minutes that had to give up their room in the KV "
                    "cache and compute it anew. Good is none; each costs its prompt once more.",
                    Unit.COUNT,
                    (Query(total(grown(shown(metrics.VLLM_NUM_PREEMPTIONS), "5m")), "preempted"),),
                    Kind.BARS,
                    may_be_empty="no request was preempted",
                ),
            ),
        ),
    ),
)
