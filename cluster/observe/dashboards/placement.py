"""Which worker gets what."""

from cluster.observe import metrics
from cluster.observe.dashboards.panels import Dashboard, Kind, Panel, Query, Row, Thresholds, Unit
from cluster.observe.dashboards.promql import largest, number, rate, ratio, share, shown, total
from cluster.observe.dashboards.queries import rate_of_workers

_REPORT_AGE = shown(metrics.WORKER_REPORT_AGE)


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
                                rate_of_workers(metrics.VLLM_PREFIX_CACHE_HITS),
                                rate_of_workers(metrics.VLLM_PREFIX_CACHE_QUERIES),
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
                                rate_of_workers(metrics.VLLM_PREFIX_CACHE_HITS, "replica"),
                                rate_of_workers(metrics.VLLM_PREFIX_CACHE_QUERIES, "replica"),
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
