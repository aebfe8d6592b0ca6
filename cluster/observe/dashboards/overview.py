"""What clients see."""

from cluster.observe import metrics
from cluster.observe.dashboards.panels import Dashboard, Kind, Panel, Query, Row, Thresholds, Unit
from cluster.observe.dashboards.promql import quantile, rate, ratio, share, shown, total
from cluster.observe.dashboards.queries import events, quantiles


def _attainment(*by: str, target: str) -> str:
    of = f'target="{target}"'
    met = total(rate(shown(metrics.SLO_REQUESTS, of, 'met="true"')), *by)
    return ratio(met, total(rate(shown(metrics.SLO_REQUESTS, of)), *by))


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
                    "why requests are deferred.",
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
                    quantiles(metrics.TIME_TO_FIRST_TOKEN),
                ),
                Panel(
                    "Time per output token",
                    "Mean time of a request's tokens after the first. It follows how long steps "
                    "take, less what drafts gain. People read about 5 to 10 tokens in a second: "
                    "100 to 200 ms are enough for them.",
                    Unit.SECONDS,
                    quantiles(metrics.TIME_PER_OUTPUT_TOKEN),
                ),
                Panel(
                    "Whole request",
                    "From arrival to the last token. It depends on how much is asked for, so "
                    "judge it only against itself.",
                    Unit.SECONDS,
                    quantiles(metrics.REQUEST_LATENCY),
                ),
                Panel(
                    "Queue",
                    "From arrival to the first step that computes some of the request. Good is "
                    "far below the time to first token; if most of that is spent here, add "
                    "workers.",
                    Unit.SECONDS,
                    quantiles(metrics.QUEUE_TIME),
                ),
                Panel(
                    "Gap between tokens",
                    "Time between two outputs of a request, as vLLM counts it. p99 far above p50 "
                    "is a stutter that clients see: a long prompt in between, or a preemption.",
                    Unit.SECONDS,
                    quantiles(metrics.VLLM_INTER_TOKEN_LATENCY),
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
                    events(metrics.ADMISSIONS, "outcome", 'outcome!="admitted"'),
                    Kind.BARS,
                    may_be_empty="no call was refused",
                ),
                Panel(
                    "Failed requests",
                    "Requests in the last 5 minutes that ended with an error after they had been "
                    "admitted, by class. Good is none. The logs of ingress and worker name each.",
                    Unit.COUNT,
                    events(metrics.REQUESTS, "slo_class", 'outcome="error"'),
                    Kind.BARS,
                    may_be_empty=NOTHING_FAILED,
                ),
                Panel(
                    "Retried requests",
                    "Requests in the last 5 minutes that lost their worker and went on with "
                    "another, by what happened to the first. Clients notice a pause and no more; "
                    "but find out why the worker went.",
                    Unit.COUNT,
                    events(metrics.RETRIES, "reason"),
                    Kind.BARS,
                    may_be_empty="no request has lost its worker",
                ),
            ),
        ),
    ),
)
