"""The four dashboards: what they show, and why.

`cluster/grafana.py` turns them into Grafana's JSON, `cluster/dashboard_plots.py` into pictures.
"""

from cluster import metrics
from cluster.metrics import Metric, VllmMetric
from cluster.panels import Dashboard, Kind, Panel, Query, Row, Thresholds, Unit
from cluster.promql import (
    QUANTILES,
    grown,
    largest,
    number,
    of_workers,
    quantile,
    rate,
    ratio,
    share,
    shown,
    total,
)


def _quantiles(histogram: Metric | VllmMetric, *, of_worker: bool = False) -> tuple[Query, ...]:
    buckets = (of_workers if of_worker else shown)(histogram, part="_bucket")
    return tuple(Query(quantile(q, buckets), f"p{100 * q:g}") for q in QUANTILES)


def _attainment(*by: str, target: str) -> str:
    of = f'target="{target}"'
    met = total(rate(shown(metrics.SLO_REQUESTS, of, 'met="true"')), *by)
    return ratio(met, total(rate(shown(metrics.SLO_REQUESTS, of)), *by))


def _rate_of_workers(metric: Metric | VllmMetric, *by: str, part: str = "") -> str:
    return total(rate(of_workers(metric, part=part)), *by)


def _events(counter: Metric, label: str, *matchers: str) -> tuple[Query, ...]:
    """How many there were in five minutes; for counters that seldom grow."""
    return (Query(total(grown(shown(counter, *matchers), "5m"), label), f"{{{{{label}}}}}"),)


_MEASURED = _rate_of_workers(metrics.STEP_MEASURED_SECONDS, "replica")
_REPORT_AGE = shown(metrics.WORKER_REPORT_AGE)
_PREDICTED = _rate_of_workers(metrics.STEP_PREDICTED_SECONDS, "replica")


def _in_a_step(counter: Metric, label: str) -> str:
    num_steps = _rate_of_workers(metrics.STEP_SECONDS, part="_count")
    return f"{_rate_of_workers(counter, label)} / on () group_left () ({num_steps} > 0)"


def _peak_share(counter: Metric, peak: Metric) -> str:
    """Of the time in steps, so that a worker without work is not held to be slow."""
    in_steps = f"{_rate_of_workers(counter, 'replica')} / ({_MEASURED} > 0)"
    return f"{in_steps} / {largest(of_workers(peak), 'replica')}"


def _draft_rate(outcome: str, *by: str) -> str:
    return total(rate(of_workers(metrics.DRAFT_TOKENS, f'outcome=~"{outcome}"')), *by)


NOTHING_FAILED = "nothing has failed"

OVERVIEW = Dashboard(
    "xyserve-overview",
    "XY-Serve: overview",
    "What the clients see: how much they ask, how long they wait, and whether targets are met.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Requests",
                    "Requests that end each second. Zero while clients say that they send some "
                    "means that nothing comes through: look at the refusals below.",
                    Unit.REQUESTS_PER_S,
                    (Query(total(rate(shown(metrics.REQUESTS))), "requests"),),
                    Kind.STAT,
                ),
                Panel(
                    "Targets met",
                    "Share of the requests that met every target they had, over all classes. Good "
                    "is 95 % and more; below 90 % add workers or put less urgent work into a "
                    "class with wider targets.",
                    Unit.SHARE,
                    (Query(_attainment(target="all"), "met"),),
                    Kind.STAT,
                    Thresholds(0.95, 0.9),
                ),
                Panel(
                    "First token, p95",
                    "19 of 20 requests had their first token within this time. It grows with long "
                    "prompts and when requests queue; compare it with the queue time below.",
                    Unit.SECONDS,
                    (
                        Query(
                            quantile(0.95, shown(metrics.TIME_TO_FIRST_TOKEN, part="_bucket")),
                            "p95",
                        ),
                    ),
                    Kind.STAT,
                    Thresholds(1, 10),
                ),
                Panel(
                    "Output tokens",
                    "Tokens that the workers give each second: what the cluster is for. If it no "
                    "longer grows with the number of live requests, the workers are full.",
                    Unit.TOKENS_PER_S,
                    (Query(total(rate(shown(metrics.VLLM_GENERATION_TOKENS))), "output"),),
                    Kind.STAT,
                ),
                Panel(
                    "Live requests",
                    "Requests that were admitted and have not ended. A number that only grows "
                    "means that more comes in than the workers can do.",
                    Unit.COUNT,
                    (Query(total(shown(metrics.LIVE_REQUESTS)), "live"),),
                    Kind.STAT,
                ),
                Panel(
                    "Errors",
                    "Share of the requests that ended with an error of ours. Good is zero; when "
                    "it is not, the logs of the ingress name the request and the cause.",
                    Unit.SHARE,
                    (
                        Query(
                            ratio(
                                total(rate(shown(metrics.REQUESTS, 'outcome="error"'))),
                                total(rate(shown(metrics.REQUESTS))),
                            ),
                            "errors",
                        ),
                    ),
                    Kind.STAT,
                    Thresholds(0.001, 0.01),
                ),
            ),
        ),
        Row(
            "Requests",
            (
                Panel(
                    "Requests by class",
                    "Requests that end each second, by service class: who asks. A class that is "
                    "missing has sent none; a sudden step is a new client.",
                    Unit.REQUESTS_PER_S,
                    (Query(total(rate(shown(metrics.REQUESTS)), "slo_class"), "{{slo_class}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Requests by outcome",
                    "How requests end: stop (the model was done), length (max_tokens was "
                    "reached), abort (the client left) or error. Many aborts mean clients that "
                    "time out: compare with the latencies. Errors are ours.",
                    Unit.REQUESTS_PER_S,
                    (Query(total(rate(shown(metrics.REQUESTS)), "outcome"), "{{outcome}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Live requests",
                    "Requests that were admitted and go on, over all ingresses. A sawtooth is "
                    "normal; a slope that does not end is overload.",
                    Unit.COUNT,
                    (Query(total(shown(metrics.LIVE_REQUESTS)), "live"),),
                ),
            ),
        ),
        Row(
            "Targets",
            (
                Panel(
                    "Targets met, by class",
                    "Share of the requests of each class that met all their targets. Good is 95 % "
                    "and more. When one class falls alone, its targets are tighter than its "
                    "prompts allow; when all fall, workers are missing.",
                    Unit.SHARE,
                    (Query(_attainment("slo_class", target="all"), "{{slo_class}}"),),
                    Kind.LINES,
                    Thresholds(0.95, 0.9),
                ),
                Panel(
                    "First token in time",
                    "Share of the requests of each class whose first token came in time. When it "
                    "is low, prompts wait: see the queue time, and on the dashboard of the steps "
                    "why requests are put off.",
                    Unit.SHARE,
                    (Query(_attainment("slo_class", target="ttft"), "{{slo_class}}"),),
                    Kind.LINES,
                    Thresholds(0.95, 0.9),
                ),
                Panel(
                    "Tokens in time",
                    "Share of the requests of each class whose time per output token was met. "
                    "When it is low, steps last too long: see on the dashboard of the steps "
                    "whether they take what was predicted.",
                    Unit.SHARE,
                    (Query(_attainment("slo_class", target="tpot"), "{{slo_class}}"),),
                    Kind.LINES,
                    Thresholds(0.95, 0.9),
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Panel(
                    "Time to first token",
                    "From arrival at the ingress to the first token, for the classes chosen "
                    "above. p99 far above p50 comes from long prompts or from waiting; choose one "
                    "class to tell which.",
                    Unit.SECONDS,
                    _quantiles(metrics.TIME_TO_FIRST_TOKEN),
                ),
                Panel(
                    "Time per output token",
                    "Mean time of a request's tokens after the first. It follows how long steps "
                    "take, less what drafts gain. People read about 5 to 10 tokens in a second: "
                    "100 to 200 ms are enough for them.",
                    Unit.SECONDS,
                    _quantiles(metrics.TIME_PER_OUTPUT_TOKEN),
                ),
                Panel(
                    "Whole request",
                    "From arrival to the last token. It depends on how much is asked for, so "
                    "judge it only against itself.",
                    Unit.SECONDS,
                    _quantiles(metrics.REQUEST_LATENCY),
                ),
                Panel(
                    "Queue",
                    "From arrival to the first step that computes some of the request. Good is "
                    "far below the time to first token; if most of that is spent here, add "
                    "workers.",
                    Unit.SECONDS,
                    _quantiles(metrics.QUEUE_TIME),
                ),
                Panel(
                    "Gap between tokens",
                    "Time between two outputs of a request, as vLLM counts it. p99 far above p50 "
                    "is a stutter that clients see: a long prompt in between, or a preemption.",
                    Unit.SECONDS,
                    _quantiles(metrics.VLLM_INTER_TOKEN_LATENCY),
                ),
            ),
        ),
        Row(
            "Tokens",
            (
                Panel(
                    "Tokens",
                    "Prompt tokens taken in and output tokens given each second. Prompts with "
                    "much the same beginning cost less than they count here: see the prefix cache.",
                    Unit.TOKENS_PER_S,
                    (
                        Query(total(rate(shown(metrics.VLLM_PROMPT_TOKENS))), "prompt"),
                        Query(total(rate(shown(metrics.VLLM_GENERATION_TOKENS))), "output"),
                    ),
                ),
                Panel(
                    "Tokens by class",
                    "Prompt and output tokens of requests that ended, by class. It jumps when a "
                    "large request ends, since it counts then.",
                    Unit.TOKENS_PER_S,
                    (
                        Query(
                            total(rate(shown(metrics.REQUEST_TOKENS)), "slo_class", "kind"),
                            "{{slo_class}} {{kind}}",
                        ),
                    ),
                    Kind.STACKED,
                ),
                Panel(
                    "Share of each class",
                    "How the tokens are divided between the classes: who uses the cluster, and "
                    "who should pay for it.",
                    Unit.SHARE,
                    (
                        Query(
                            share(rate(shown(metrics.REQUEST_TOKENS)), "slo_class"), "{{slo_class}}"
                        ),
                    ),
                    Kind.STACKED,
                ),
            ),
        ),
        Row(
            "What went wrong",
            (
                Panel(
                    "Refused calls",
                    "Calls in the last 5 minutes that were not admitted. Invalid is the client's "
                    "error: its answer says what to change. Unavailable means that no worker "
                    "could take it: look whether workers run, and whether they drain.",
                    Unit.COUNT,
                    _events(metrics.ADMISSIONS, "outcome", 'outcome!="admitted"'),
                    Kind.BARS,
                    may_be_empty="no call was refused",
                ),
                Panel(
                    "Failed requests",
                    "Requests in the last 5 minutes that ended with an error after they had been "
                    "admitted, by class. Good is none. The logs of ingress and worker name each.",
                    Unit.COUNT,
                    _events(metrics.REQUESTS, "slo_class", 'outcome="error"'),
                    Kind.BARS,
                    may_be_empty=NOTHING_FAILED,
                ),
                Panel(
                    "Resumed requests",
                    "Requests in the last 5 minutes that lost their worker and went on with "
                    "another, by what happened to the first. Clients notice a pause and no more; "
                    "but find out why the worker went.",
                    Unit.COUNT,
                    _events(metrics.RESUMES, "cause"),
                    Kind.BARS,
                    may_be_empty="no request has lost its worker",
                ),
            ),
        ),
    ),
)

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
                    (Query(_rate_of_workers(metrics.STEP_TOKENS, "stage"), "{{stage}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Requests put off",
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
                    _quantiles(metrics.STEP_SECONDS, of_worker=True),
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
                    _quantiles(metrics.STEP_BUDGET_USE, of_worker=True),
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
                    _quantiles(metrics.STEP_PREDICTION_ERROR, of_worker=True),
                    thresholds=Thresholds(0.2, 0.5),
                ),
                Panel(
                    "Time to decide",
                    "How long planning a step took, which is part of the step. Good is below 1 "
                    "ms, or 1 % of the step; it grows with the number of requests on a worker.",
                    Unit.SECONDS,
                    _quantiles(metrics.STEP_DECISION_SECONDS, of_worker=True),
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

PLACEMENT = Dashboard(
    "xyserve-placement",
    "XY-Serve: placement",
    "Which worker gets what: load, the reasons for placing, the prefix cache, and restarts.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Workers",
                    "Workers that the GlobalScheduler sees. Fewer than the config asks for means "
                    "that some have not started, or died: `serve status` tells which.",
                    Unit.COUNT,
                    (Query(number(_REPORT_AGE), "workers"),),
                    Kind.STAT,
                ),
                Panel(
                    "Oldest report",
                    "Time since the worker that has been silent longest told its load. They do "
                    "every 2 s; after 30 s a worker gets requests only if all others are silent.",
                    Unit.SECONDS,
                    (Query(largest(_REPORT_AGE), "age"),),
                    Kind.STAT,
                    Thresholds(10, 30),
                ),
                Panel(
                    "Outstanding tokens",
                    "Tokens that all requests on the workers may still need. Over the tokens "
                    "computed each second it is the time until all are done, at most.",
                    Unit.COUNT,
                    (Query(total(shown(metrics.WORKER_OUTSTANDING_TOKENS)), "tokens"),),
                    Kind.STAT,
                ),
                Panel(
                    "Prefix cache hits",
                    "Share of the prompt tokens that the KV cache had already. Good depends on "
                    "the prompts: many with the same beginning should bring it far up.",
                    Unit.SHARE,
                    (
                        Query(
                            ratio(
                                _rate_of_workers(metrics.VLLM_PREFIX_CACHE_HITS),
                                _rate_of_workers(metrics.VLLM_PREFIX_CACHE_QUERIES),
                            ),
                            "hits",
                        ),
                    ),
                    Kind.STAT,
                ),
                Panel(
                    "Youngest replica",
                    "Time since a replica of the app last started. A short time that nobody "
                    "ordered is a crash: see the restarts below.",
                    Unit.SECONDS,
                    (Query(f"time() - {largest(shown(metrics.START_TIME))}", "uptime"),),
                    Kind.STAT,
                ),
            ),
        ),
        Row(
            "Load",
            (
                Panel(
                    "Outstanding tokens",
                    "Tokens that the requests of each worker may still need, as placement sees "
                    "it. The lines should stay together: each request goes where they are fewest.",
                    Unit.COUNT,
                    (
                        Query(
                            largest(shown(metrics.WORKER_OUTSTANDING_TOKENS), "worker"),
                            "{{worker}}",
                        ),
                    ),
                ),
                Panel(
                    "Requests",
                    "Requests on each worker, as placement sees it. They may differ where tokens "
                    "do not: one long request weighs as much as many short ones.",
                    Unit.COUNT,
                    (Query(largest(shown(metrics.WORKER_REQUESTS), "worker"), "{{worker}}"),),
                ),
                Panel(
                    "Share of the load",
                    "Each worker's share of all outstanding tokens. Equal shares are good; a "
                    "worker with hardly any drains, is new, or is silent.",
                    Unit.SHARE,
                    (
                        Query(
                            share(shown(metrics.WORKER_OUTSTANDING_TOKENS), "worker"), "{{worker}}"
                        ),
                    ),
                    Kind.STACKED,
                    may_be_empty="no request is on any worker",
                ),
            ),
        ),
        Row(
            "Choices",
            (
                Panel(
                    "Placements by worker",
                    "Requests placed on each worker, each second.",
                    Unit.REQUESTS_PER_S,
                    (Query(total(rate(shown(metrics.PLACEMENTS)), "worker"), "{{worker}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Placements by reason",
                    "Why it was that worker: least_tokens and fewest_requests are the rule, tie "
                    "is an idle cluster, only is a single worker. others_silent and all_silent "
                    "mean that workers do not report: see the age of their reports.",
                    Unit.REQUESTS_PER_S,
                    (Query(total(rate(shown(metrics.PLACEMENTS)), "reason"), "{{reason}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Age of reports",
                    "Time since each worker told its load. Good is below 3 s. One line that rises "
                    "is a worker that hangs: restart it. All lines: the GlobalScheduler cannot be "
                    "reached.",
                    Unit.SECONDS,
                    (Query(largest(_REPORT_AGE, "worker"), "{{worker}}"),),
                    thresholds=Thresholds(10, 30),
                ),
            ),
        ),
        Row(
            "Prefix cache and replicas",
            (
                Panel(
                    "Prefix cache hits",
                    "Share of the prompt tokens of each worker that its KV cache had already. It "
                    "falls when prompts are new or when the cache is too small to keep them.",
                    Unit.SHARE,
                    (
                        Query(
                            ratio(
                                _rate_of_workers(metrics.VLLM_PREFIX_CACHE_HITS, "replica"),
                                _rate_of_workers(metrics.VLLM_PREFIX_CACHE_QUERIES, "replica"),
                            ),
                            "{{replica}}",
                        ),
                    ),
                ),
                Panel(
                    "Uptime",
                    "Time since the youngest replica of each deployment started. It falls to zero "
                    "with each restart, and with each replica that is added.",
                    Unit.SECONDS,
                    (
                        Query(
                            f"time() - {largest(shown(metrics.START_TIME), 'deployment')}",
                            "{{deployment}}",
                        ),
                    ),
                ),
                Panel(
                    "Restarts",
                    "How often in 15 minutes the start of the youngest replica changed. Good is "
                    "zero. Ray's log of the replica that died has the reason; `dmesg` tells of "
                    "the ones that the kernel killed for their memory.",
                    Unit.COUNT,
                    (
                        Query(
                            f"changes({largest(shown(metrics.START_TIME), 'deployment')}[15m:15s])",
                            "{{deployment}}",
                        ),
                    ),
                    Kind.BARS,
                    Thresholds(1, 3),
                ),
            ),
        ),
    ),
)

SPECULATION = Dashboard(
    "xyserve-speculation",
    "XY-Serve: speculation",
    "Whether drafts pay: how many come in time, how many are right, and what they gain.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Accepted",
                    "Share of the verified draft tokens that were right. What is good depends on "
                    "the text: half or more for code and quotations, a fifth for free talk. The "
                    "workers draft less where it is low.",
                    Unit.SHARE,
                    (Query(ratio(_draft_rate("accepted"), _draft_rate("verified")), "accepted"),),
                    Kind.STAT,
                ),
                Panel(
                    "Tokens per decode",
                    "Output tokens that a decode gave lately, in the mean of the workers. Without "
                    "drafts it is 1; what is above is the gain.",
                    Unit.COUNT,
                    (Query(f"avg({of_workers(metrics.TOKENS_PER_DECODE)})", "tokens"),),
                    Kind.STAT,
                ),
                Panel(
                    "In time",
                    "Share of the proposed draft tokens that were neither late nor stale. Below "
                    "80 % the draft workers are too slow: give them more cores or fewer workers.",
                    Unit.SHARE,
                    (
                        Query(
                            f"1 - ({ratio(_draft_rate('late|stale'), _draft_rate('proposed'))})",
                            "in time",
                        ),
                    ),
                    Kind.STAT,
                    Thresholds(0.8, 0.5),
                ),
                Panel(
                    "Draft worker, busiest",
                    "Share of its time that the busiest draft worker drafts. Above 90 % drafts "
                    "come late: add a draft worker.",
                    Unit.SHARE,
                    (Query(largest(shown(metrics.DRAFT_WORKER_BUSY)), "busy"),),
                    Kind.STAT,
                    Thresholds(0.8, 0.9),
                ),
            ),
        ),
        Row(
            "Drafts",
            (
                Panel(
                    "Draft tokens",
                    "Draft tokens each second by drafter and by what became of them. Between "
                    "proposed and verified lie the late ones (their place was taken by then), the "
                    "stale ones (the text went elsewhere) and those that no step had room for.",
                    Unit.TOKENS_PER_S,
                    (
                        Query(
                            _rate_of_workers(metrics.DRAFT_TOKENS, "drafter", "outcome"),
                            "{{drafter}} {{outcome}}",
                        ),
                    ),
                ),
                Panel(
                    "Accepted, by drafter",
                    "Share of the verified draft tokens of each drafter that were right. A "
                    "drafter that stays far below the others can be taken out of `draft.drafters`.",
                    Unit.SHARE,
                    (
                        Query(
                            ratio(
                                _draft_rate("accepted", "drafter"),
                                _draft_rate("verified", "drafter"),
                            ),
                            "{{drafter}}",
                        ),
                    ),
                ),
                Panel(
                    "Accepted, by position",
                    "Share of the verified draft tokens that were right, by their position behind "
                    "the newest token. It falls with the position, for one wrong token spoils all "
                    "behind it; where it is near zero longer drafts gain nothing.",
                    Unit.SHARE,
                    (
                        Query(
                            ratio(
                                _rate_of_workers(metrics.DRAFT_ACCEPTED_AT, "position"),
                                _rate_of_workers(metrics.DRAFT_VERIFIED_AT, "position"),
                            ),
                            "{{position}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Gain, by worker",
            (
                Panel(
                    "Tokens per decode",
                    "Output tokens that a decode gave lately on each worker. 1 is what there is "
                    "without drafts.",
                    Unit.COUNT,
                    (
                        Query(
                            largest(of_workers(metrics.TOKENS_PER_DECODE), "replica"), "{{replica}}"
                        ),
                    ),
                ),
                Panel(
                    "Accepted lately",
                    "Share of the drafts verified lately on each worker that were right. When one "
                    "worker falls below the others, its draft worker is at fault, not the text.",
                    Unit.SHARE,
                    (
                        Query(
                            largest(of_workers(metrics.DRAFT_ACCEPTANCE), "replica"), "{{replica}}"
                        ),
                    ),
                ),
                Panel(
                    "Collapses",
                    "Times in the last 5 minutes that the drafts for a worker were no longer "
                    "accepted as they had been: silent (the draft worker does not answer), "
                    "restarted, late, or content (other text, nothing to mend). Requests go on "
                    "without drafts.",
                    Unit.COUNT,
                    _events(metrics.DRAFT_COLLAPSES, "cause"),
                    Kind.BARS,
                    may_be_empty="drafting has not collapsed",
                ),
            ),
        ),
        Row(
            "Draft workers",
            (
                Panel(
                    "Busy",
                    "Share of its time that each draft worker drafts. Near 100 % its drafts come "
                    "late; near 0 it could draft for more workers.",
                    Unit.SHARE,
                    (Query(largest(shown(metrics.DRAFT_WORKER_BUSY), "replica"), "{{replica}}"),),
                    thresholds=Thresholds(0.8, 0.9),
                ),
                Panel(
                    "Requests followed",
                    "Requests whose tokens each draft worker follows. The sum should be the "
                    "number of running requests; a sudden fall to zero is a restart.",
                    Unit.COUNT,
                    (
                        Query(
                            largest(shown(metrics.DRAFT_WORKER_CONTEXTS), "replica"), "{{replica}}"
                        ),
                    ),
                ),
            ),
        ),
    ),
    when_empty="no draft worker, or no drafts in this time",
)

DASHBOARDS = (OVERVIEW, STEPS, PLACEMENT, SPECULATION)
"""All of them."""
