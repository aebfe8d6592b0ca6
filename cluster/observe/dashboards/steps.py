"""The dashboard of what workers do."""

from cluster.observe import metrics
from cluster.observe.dashboards.panels import (
    Dashboard,
    Kind,
    Panel,
    Query,
    Row,
    Thresholds,
    Unit,
    in_words,
)
from cluster.observe.dashboards.promql import grown, largest, of_workers, quantile, shown, total
from cluster.observe.dashboards.queries import quantiles, rate_of_workers
from cluster.observe.metrics import Metric
from scheduler.task import Reason

_MEASURED = rate_of_workers(metrics.STEP_MEASURED_SECONDS, "replica")
_PREDICTED = rate_of_workers(metrics.STEP_PREDICTED_SECONDS, "replica")


def _in_a_step(counter: Metric, label: str) -> str:
    num_steps = rate_of_workers(metrics.STEP_SECONDS, part="_count")
    return f"{rate_of_workers(counter, label)} / on () group_left () ({num_steps} > 0)"


def _peak_share(counter: Metric, peak: Metric) -> str:
    """Share of a peak rate, over the time in steps, so that an idle worker does not look slow."""
    in_steps = f"{rate_of_workers(counter, 'replica')} / ({_MEASURED} > 0)"
    return f"{in_steps} / {largest(of_workers(peak), 'replica')}"


STEPS = Dashboard(
    "xyserve-steps",
    "XY-Serve: steps",
    "What workers do: what is in a step, how long steps take, and how well they are predicted.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Busy",
                    "Mean share of their time that the workers spend in steps. Near 100 % they "
                    "are saturated, which is good as long as the targets are met.",
                    Unit.SHARE,
                    (Query(f"avg({_MEASURED})", "busy"),),
                    Kind.STAT,
                ),
                Panel(
                    "Step time, p95",
                    "95 % of the steps took no longer than this. Without drafts, a request gets "
                    "at most one token per step.",
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
                    "Predicted over measured time of all steps. 90 % to 110 % is good: below, "
                    "steps take longer than planned and targets are missed; above, steps are "
                    "emptier than they could be.",
                    Unit.SHARE,
                    (Query(f"sum({_PREDICTED}) / (sum({_MEASURED}) > 0)", "predicted"),),
                    Kind.STAT,
                ),
                Panel(
                    "Running",
                    "Requests in the workers' steps: at most `max_num_seqs` on each worker.",
                    Unit.COUNT,
                    (Query(total(of_workers(metrics.VLLM_NUM_REQUESTS_RUNNING)), "running"),),
                    Kind.STAT,
                ),
                Panel(
                    "Waiting",
                    "Requests that are waiting on a worker. Near zero is good; if it stays high, "
                    "add workers.",
                    Unit.COUNT,
                    (Query(total(of_workers(metrics.VLLM_NUM_REQUESTS_WAITING)), "waiting"),),
                    Kind.STAT,
                    Thresholds(8, 32),
                ),
                Panel(
                    "KV cache, fullest",
                    "Share of the KV cache in use, on the worker where it is highest. Above 95 %,"
                    " requests wait for room or are preempted.",
                    Unit.SHARE,
                    (Query(largest(of_workers(metrics.VLLM_KV_CACHE_USAGE)), "in use"),),
                    Kind.STAT,
                    Thresholds(0.85, 0.95),
                ),
            ),
        ),
        Row(
            "Contents of a step",
            (
                Panel(
                    "Tokens per step",
                    "Mean number of tokens in a step, by stage. A decode has one token per "
                    "request, a verify also its drafts; prefill fills the time that the targets "
                    "leave. Steps with decodes only leave most of the device idle.",
                    Unit.COUNT,
                    (Query(_in_a_step(metrics.STEP_TOKENS, "stage"), "{{stage}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Tokens computed",
                    "Tokens computed in steps per second, by stage. Verified drafts that are not "
                    "accepted count here but not in the output.",
                    Unit.TOKENS_PER_S,
                    (Query(rate_of_workers(metrics.STEP_TOKENS, "stage"), "{{stage}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Deferred requests",
                    "Mean number of requests deferred in a step, by reason: "
                    f"{in_words(Reason)}. Some are normal under load. For kv, enlarge the cache; "
                    "for seats and tokens, raise the limits; for the others, add workers.",
                    Unit.COUNT,
                    (Query(_in_a_step(metrics.DEFERRALS, "reason"), "{{reason}}"),),
                    may_be_empty="no request was deferred",
                ),
            ),
        ),
        Row(
            "Time",
            (
                Panel(
                    "Step time",
                    "Duration of steps. p99 follows long prompts; if p50 grows under the same "
                    "load, another process uses the device.",
                    Unit.SECONDS,
                    quantiles(metrics.STEP_SECONDS, of_worker=True),
                ),
                Panel(
                    "Busy, by worker",
                    "Share of its time that each worker spends in steps. They should be similar: "
                    "a worker that stands out has long requests or is slower. A worker at zero "
                    "with running requests hangs: restart it.",
                    Unit.SHARE,
                    (Query(_MEASURED, "{{replica}}"),),
                ),
                Panel(
                    "Use of the time allowed",
                    "Predicted time of a step over the time that the targets of its requests "
                    "allow. Near 100 % the step is as full as it may be. Above that, the targets "
                    "cannot be met: reduce the load, widen the targets or add workers.",
                    Unit.SHARE,
                    quantiles(metrics.STEP_BUDGET_USE, of_worker=True),
                    thresholds=Thresholds(1.0, 1.25),
                ),
            ),
        ),
        Row(
            "Prediction",
            (
                Panel(
                    "Predicted and measured time",
                    "Seconds spent in steps per second, as predicted and as measured, over all "
                    "workers. The two lines should coincide.",
                    Unit.SECONDS,
                    (
                        Query(f"sum({_PREDICTED})", "predicted"),
                        Query(f"sum({_MEASURED})", "measured"),
                    ),
                ),
                Panel(
                    "Prediction error",
                    "Difference between predicted and measured time of a step, relative to the "
                    "measured time. A p50 below 10 % is good. If it stays high, run `xyserve "
                    "calibrate`; if it is high on one worker, another process uses its cores.",
                    Unit.SHARE,
                    quantiles(metrics.STEP_PREDICTION_ERROR, of_worker=True),
                    thresholds=Thresholds(0.2, 0.5),
                ),
                Panel(
                    "Planning time",
                    "How long planning a step took, which is part of the step. Below 1 ms or 1 % "
                    "of the step is good; it grows with the number of requests on a worker.",
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
                    "Model FLOPs utilisation",
                    "MFU: floating point operations that the model needs, per"
                    " second in steps, over the peak FLOP/s measured on the device. Prefill "
                    "raises it. It is low while mostly decoding, which is bound by memory "
                    "bandwidth.",
                    Unit.SHARE,
                    (Query(_peak_share(metrics.STEP_FLOPS, metrics.PEAK_FLOPS), "{{replica}}"),),
                ),
                Panel(
                    "Model bandwidth utilisation",
                    "MBU: bytes that the model's steps read and write, "
                    "per second in steps, over the peak bandwidth measured on the device. Decodes"
                    " raise it. If this and the MFU are both low, time is lost between the two: "
                    "see the planning time.",
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
                    "Requests in the workers' steps, and requests waiting. If requests wait while"
                    " the KV cache is not full, they wait for time in a step.",
                    Unit.COUNT,
                    (
                        Query(total(of_workers(metrics.VLLM_NUM_REQUESTS_RUNNING)), "running"),
                        Query(total(of_workers(metrics.VLLM_NUM_REQUESTS_WAITING)), "waiting"),
                    ),
                ),
                Panel(
                    "KV cache in use",
                    "Share of each worker's KV cache that requests hold. Above 95 %, new requests"
                    " wait for room: raise `worker.engine.kv_cache_gib` or add workers.",
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
                    "Requests preempted in the last 5 minutes: their KV blocks were freed and "
                    "must be computed again. Zero is good; each costs its prompt a second time.",
                    Unit.COUNT,
                    (Query(total(grown(shown(metrics.VLLM_NUM_PREEMPTIONS), "5m")), "preempted"),),
                    Kind.BARS,
                    may_be_empty="no request was preempted",
                ),
            ),
        ),
    ),
)
