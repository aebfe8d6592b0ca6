"""The dashboard of how requests are placed on workers."""

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
from cluster.observe.dashboards.promql import (
    grown,
    largest,
    number,
    rate,
    ratio,
    share,
    shown,
    total,
)
from cluster.observe.dashboards.queries import quantiles, rate_of_workers
from scheduler.pace import SLOW, USUAL
from scheduler.placement import PlacementReason, RefusalReason
from scheduler.scaling import ScalingReason
from scheduler.stage_policy import PolicyReason

_REPORT_AGE = shown(metrics.WORKER_REPORT_AGE)
_UPTIME = f"time() - {shown(metrics.START_TIME)}"

_NOT_SCALED = "`autoscaling` is not configured, or Serve's own policy decides"

PLACEMENT = Dashboard(
    "xyserve-placement",
    "XY-Serve: placement",
    "Where requests are placed: the load of the workers, the reasons, the prefix cache, restarts.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Workers",
                    "Workers that the GlobalScheduler sees. Fewer than the config asks for means "
                    "that some have not started or have died: see `serve status`.",
                    Unit.COUNT,
                    (Query(number(_REPORT_AGE), "workers"),),
                    Kind.STAT,
                ),
                Panel(
                    "Oldest report",
                    "Time since the last report of the worker that has been silent longest. "
                    "Workers report every 2 s; after 30 s of silence a worker gets requests only "
                    "if all others are silent too.",
                    Unit.SECONDS,
                    (Query(largest(_REPORT_AGE), "age"),),
                    Kind.STAT,
                    Thresholds(10, 30),
                ),
                Panel(
                    "Outstanding tokens",
                    "Tokens that all requests on the workers may still need. Divided by the "
                    "tokens computed per second, it is an upper bound on the time until all are "
                    "done.",
                    Unit.COUNT,
                    (Query(total(shown(metrics.WORKER_OUTSTANDING_TOKENS)), "tokens"),),
                    Kind.STAT,
                ),
                Panel(
                    "Prefix cache hits",
                    "Share of the prompt tokens that were already in the KV cache. What is good "
                    "depends on the prompts: the more of them share a prefix, the higher it "
                    "should be.",
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
                    "Newest replica",
                    "Time since a replica of the app last started. A short time without a "
                    "deployment is a crash: see the restarts below.",
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
                    "it. They may differ: each request goes to the worker where it is predicted "
                    "to get its first token soonest, which depends on what is cached there.",
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
                    "Requests on each worker, as placement sees it. They may differ while the "
                    "tokens do not: one long request weighs as much as many short ones.",
                    Unit.COUNT,
                    (Query(largest(shown(metrics.WORKER_REQUESTS), "worker"), "{{worker}}"),),
                ),
                Panel(
                    "Slowness",
                    "Recent step times of each worker relative to its profile. About 1 is good, 2 "
                    "is common where others use the machine. A worker above 3 while another is "
                    "not is slow: it gets requests only if no other takes them, and is replaced "
                    "after `worker.slow_timeout_s`.",
                    Unit.COUNT,
                    (Query(largest(shown(metrics.WORKER_SLOWNESS), "worker"), "{{worker}}"),),
                    thresholds=Thresholds(USUAL, SLOW),
                ),
                Panel(
                    "Share of the load",
                    "Each worker's share of all outstanding tokens. Equal shares are good; a "
                    "worker with hardly any is draining, new or silent.",
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
            "Decisions",
            (
                Panel(
                    "Placements by worker",
                    "Requests placed per second, by worker. They may differ: prompts go where they "
                    "are cached, and a long one takes as long as many short ones.",
                    Unit.REQUESTS_PER_S,
                    (Query(total(rate(shown(metrics.PLACEMENTS)), "worker"), "{{worker}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Placements by reason",
                    "Requests placed per second, by the reason for the choice: "
                    f"{in_words(PlacementReason)}. Silent workers should be rare: see the age of "
                    "their reports.",
                    Unit.REQUESTS_PER_S,
                    (Query(total(rate(shown(metrics.PLACEMENTS)), "reason"), "{{reason}}"),),
                    Kind.STACKED,
                ),
                Panel(
                    "Refused at once",
                    "Requests per second that were refused because they would have been late: "
                    f"{RefusalReason.OVERLOAD.text}, or {RefusalReason.TOO_LONG.text}. If the "
                    "first lasts, add workers; if the second does, give the class a longer time.",
                    Unit.REQUESTS_PER_S,
                    (
                        Query(
                            total(rate(shown(metrics.PLACEMENT_REFUSALS)), "reason"), "{{reason}}"
                        ),
                    ),
                    Kind.STACKED,
                ),
                Panel(
                    "Age of reports",
                    "Time since each worker's last load report. Below 3 s is good. If one line "
                    "rises, that worker hangs: restart it. If all rise, the GlobalScheduler "
                    "cannot be reached.",
                    Unit.SECONDS,
                    (Query(largest(_REPORT_AGE, "worker"), "{{worker}}"),),
                    thresholds=Thresholds(10, 30),
                ),
            ),
        ),
        Row(
            "Predictions",
            (
                Panel(
                    "TTFT against prediction",
                    "Time to first token over what was predicted when the request was placed. "
                    "About 1 is good. Above 2 requests wait longer than placement believes: other "
                    "processes use the machine, or `xyserve calibrate` is due; reports that are "
                    "old show in their age.",
                    Unit.COUNT,
                    quantiles(metrics.TTFT_TO_PREDICTED),
                    thresholds=Thresholds(2, 4),
                    may_be_empty="nothing is predicted: placement.policy is least_tokens",
                ),
                Panel(
                    "Cached tokens",
                    "Prompt tokens per second: all that were placed, those that were predicted to "
                    "be cached where they went, and those that were found. Found far below "
                    "predicted means that blocks are evicted before they are used (more "
                    "`worker.engine.kv_cache_gib`), or that the workers' events are wrong. "
                    "Nothing predicted means that prompts share nothing, or that no events come.",
                    Unit.TOKENS_PER_S,
                    (Query(total(rate(shown(metrics.PREFIX_TOKENS)), "kind"), "{{kind}}"),),
                    may_be_empty="nothing is predicted: placement.policy is least_tokens",
                ),
                Panel(
                    "Who tells of its cache",
                    "Workers that tell what their prefix caches have, and serving ones that do "
                    "not although the config says so: those get requests as if nothing were "
                    "cached there. Their log says why, as `no_prefix_index` of `engine ready`.",
                    Unit.COUNT,
                    (
                        Query(largest(shown(metrics.PREFIX_INDEX_WORKERS)), "tell"),
                        Query(largest(shown(metrics.PREFIX_UNTOLD_WORKERS)), "do not"),
                    ),
                ),
                Panel(
                    "Index of prefix caches",
                    "Different blocks that all workers have, and bytes that the index of them "
                    "takes at most. From 768 MiB on it leaves blocks out.",
                    Unit.COUNT,
                    (
                        Query(largest(shown(metrics.PREFIX_INDEX_BLOCKS)), "blocks"),
                        Query(largest(shown(metrics.PREFIX_INDEX_BYTES)), "bytes"),
                    ),
                ),
                Panel(
                    "Resyncs and mismatches",
                    "In five minutes: how often a worker was asked for all that its cache has, "
                    "which is usual after a restart only, and how often a worker's blocks could "
                    "not be compared with a request's. The latter is usual for the first requests "
                    "of an ingress only; else the log of the GlobalScheduler has both formats and "
                    "the remedy.",
                    Unit.COUNT,
                    (
                        Query(total(grown(shown(metrics.PREFIX_RESYNCS), "5m")), "resyncs"),
                        Query(
                            total(grown(shown(metrics.PREFIX_FORMAT_MISMATCH), "5m")),
                            "mismatches",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Scaling",
            (
                Panel(
                    "Workers wanted",
                    "How many workers should run, and how many take requests. Between them are "
                    "those that start; if they stay apart, Ray has no room for more: see "
                    "`serve status`.",
                    Unit.COUNT,
                    (
                        Query(largest(shown(metrics.WORKERS_WANTED)), "wanted"),
                        Query(largest(shown(metrics.WORKERS_READY)), "ready"),
                    ),
                    may_be_empty=_NOT_SCALED,
                ),
                Panel(
                    "Work",
                    "Work that is offered, in workers that compute full steps all the time, and "
                    "what the workers that are ready are thought to take while targets are met. "
                    "The second line should stay above the first; it is learned from misses.",
                    Unit.COUNT,
                    (
                        Query(largest(shown(metrics.OFFERED_WORK)), "offered"),
                        Query(
                            f"{largest(shown(metrics.WORKER_CAPACITY))}"
                            f" * {largest(shown(metrics.WORKERS_READY))}",
                            "capacity",
                        ),
                    ),
                    may_be_empty=_NOT_SCALED,
                ),
                Panel(
                    "Changes",
                    "Times per minute that another number of workers was wanted, by the reason: "
                    f"{in_words(ScalingReason)}. The log of the GlobalScheduler has the numbers "
                    "of each.",
                    Unit.COUNT,
                    (
                        Query(
                            f"60 * {total(rate(shown(metrics.SCALING_CHANGES)), 'reason')}",
                            "{{reason}}",
                        ),
                    ),
                    Kind.BARS,
                ),
            ),
        ),
        Row(
            "Stage policy",
            (
                Panel(
                    "Share of prefills",
                    "Longest time for prefills in each worker's steps with decodes, as a share of "
                    "what their targets allow: 100 % bounds nothing. It falls by a tenth at a time "
                    "where decodes are late, and rises again.",
                    Unit.SHARE,
                    (Query(largest(shown(metrics.PREFILL_SHARE), "worker"), "{{worker}}"),),
                    may_be_empty="placement.stage_policy is off",
                ),
                Panel(
                    "Drafts at most",
                    "Drafts of one request that each worker verifies at most, where the stage "
                    "policy limits them because a draft worker is saturated: add draft workers.",
                    Unit.COUNT,
                    (Query(largest(shown(metrics.MAX_DRAFTS), "worker"), "{{worker}}"),),
                    may_be_empty="no worker's drafts are limited",
                ),
                Panel(
                    "Changes by reason",
                    "Changes of the workers' bounds in five minutes, by reason: "
                    f"{in_words(PolicyReason)}. Shares that go up and down all the time mean that "
                    "prefills and decodes are late in turns: add workers.",
                    Unit.COUNT,
                    (
                        Query(
                            total(grown(shown(metrics.STAGE_POLICY_CHANGES), "5m"), "reason"),
                            "{{reason}}",
                        ),
                    ),
                    Kind.BARS,
                ),
            ),
        ),
        Row(
            "Output lengths",
            (
                Panel(
                    "Error of predicted output lengths",
                    "Mean of |ln(predicted / real)| over each tenant's latest 300 requests: 0.69 "
                    "is a factor of two, which is common for chats; answers of one kind come "
                    "below 0.4. It rises when a tenant's requests change, and falls again as they "
                    "are learned.",
                    Unit.COUNT,
                    (Query(largest(shown(metrics.OUTPUT_LENGTH_ERROR), "tenant"), "{{tenant}}"),),
                    may_be_empty="no request has ended yet, or placement.learn_output_lengths is "
                    "false",
                ),
                Panel(
                    "Bias of predicted output lengths",
                    "Predicted tokens of all of a tenant's latest requests relative to the real "
                    "ones, minus 1: above zero the workers were thought to be busier than they "
                    "were. About zero is good.",
                    Unit.SHARE,
                    (Query(largest(shown(metrics.OUTPUT_LENGTH_BIAS), "tenant"), "{{tenant}}"),),
                    may_be_empty="no request has ended yet, or placement.learn_output_lengths is "
                    "false",
                ),
                Panel(
                    "Within the predicted limit",
                    "Share of each tenant's latest requests that gave no more tokens than 95% of "
                    "such requests were predicted to. It should be about 95%.",
                    Unit.SHARE,
                    (
                        Query(
                            largest(shown(metrics.OUTPUT_LENGTH_COVERAGE), "tenant"), "{{tenant}}"
                        ),
                    ),
                    may_be_empty="no request has ended yet, or placement.learn_output_lengths is "
                    "false",
                ),
            ),
        ),
        Row(
            "Prefix cache and replicas",
            (
                Panel(
                    "Prefix cache hits",
                    "Share of each worker's prompt tokens that were already in its KV cache. It "
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
                    "Time since the newest replica of each deployment started. It falls to zero "
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
                    "Started replicas",
                    "Replicas that started in the last 15 minutes: all of them after a "
                    "deployment, otherwise those that were added or have died before. Ray's log "
                    "of a replica that died has the reason; `dmesg` lists processes that the "
                    "kernel killed for lack of memory.",
                    Unit.COUNT,
                    (
                        Query(
                            f"{number(f'{_UPTIME} < 900', 'deployment')}"
                            f" or 0 * {number(_UPTIME, 'deployment')}",
                            "{{deployment}}",
                        ),
                    ),
                    Kind.BARS,
                ),
            ),
        ),
    ),
)
