"""The dashboard of speculation."""

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
from cluster.observe.dashboards.promql import largest, of_workers, rate, ratio, shown, total
from cluster.observe.dashboards.queries import events, rate_of_workers
from scheduler.drafting import CollapseReason


def _draft_rate(outcome: str, *by: str) -> str:
    return total(rate(of_workers(metrics.DRAFT_TOKENS, f'outcome=~"{outcome}"')), *by)


SPECULATION = Dashboard(
    "xyserve-speculation",
    "XY-Serve: speculation",
    "Whether drafts pay off: how many arrive in time, how many are accepted, what they gain.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Accepted",
                    "Share of the verified draft tokens that were accepted. What is good depends "
                    "on the text: half or more for code and quotations, a fifth for free "
                    "conversation. Where it is low, the workers verify fewer drafts.",
                    Unit.SHARE,
                    (Query(ratio(_draft_rate("accepted"), _draft_rate("verified")), "accepted"),),
                    Kind.STAT,
                ),
                Panel(
                    "Tokens per decode",
                    "Recent output tokens per decode, mean over the workers. Without drafts it is"
                    " 1; what is above 1 is the gain.",
                    Unit.COUNT,
                    (Query(f"avg({of_workers(metrics.TOKENS_PER_DECODE)})", "tokens"),),
                    Kind.STAT,
                ),
                Panel(
                    "In time",
                    "Share of the proposed draft tokens that were neither late nor stale. Below "
                    "80 % the draft workers are too slow: give them more cores, or fewer workers "
                    "to draft for.",
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
                    "Share of its time that the busiest draft worker spends drafting. Above 90 % "
                    "drafts arrive late: add a draft worker.",
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
                    "Draft tokens per second, by drafter and outcome. Proposed drafts that are "
                    "not verified were late (their position was already computed), stale (the "
                    "text took another course), or had no room in a step.",
                    Unit.TOKENS_PER_S,
                    (
                        Query(
                            rate_of_workers(metrics.DRAFT_TOKENS, "drafter", "outcome"),
                            "{{drafter}} {{outcome}}",
                        ),
                    ),
                ),
                Panel(
                    "Accepted, by drafter",
                    "Share of each drafter's verified draft tokens that were accepted. A drafter "
                    "that stays far below the others can be removed from `draft.drafters`.",
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
                    "Share of the verified draft tokens that were accepted, by their position "
                    "after the newest token. It falls with the position, because one wrong token "
                    "invalidates all after it; where it is near zero, longer drafts gain nothing.",
                    Unit.SHARE,
                    (
                        Query(
                            ratio(
                                rate_of_workers(metrics.DRAFT_ACCEPTED_AT, "position"),
                                rate_of_workers(metrics.DRAFT_VERIFIED_AT, "position"),
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
                    "Recent output tokens per decode on each worker. Without drafts it is 1.",
                    Unit.COUNT,
                    (
                        Query(
                            largest(of_workers(metrics.TOKENS_PER_DECODE), "replica"), "{{replica}}"
                        ),
                    ),
                ),
                Panel(
                    "Recently accepted",
                    "Share of the recently verified drafts that were accepted, on each worker. If"
                    " one worker alone falls, its draft worker is the reason; if all fall, the "
                    "text is.",
                    Unit.SHARE,
                    (
                        Query(
                            largest(of_workers(metrics.DRAFT_ACCEPTANCE), "replica"), "{{replica}}"
                        ),
                    ),
                ),
                Panel(
                    "Draft worker's silence",
                    "Time that the draft worker has owed each worker an answer. Above 30 s it is "
                    "stopped or overloaded.",
                    Unit.SECONDS,
                    (Query(largest(of_workers(metrics.DRAFT_SILENCE), "replica"), "{{replica}}"),),
                    thresholds=Thresholds(3, 30),
                ),
                Panel(
                    "Collapses",
                    "Times in the last 5 minutes that the drafts for a worker were no longer "
                    f"accepted as they used to be, by reason: {in_words(CollapseReason)}. "
                    "Requests continue without drafts.",
                    Unit.COUNT,
                    events(metrics.DRAFT_COLLAPSES, "reason"),
                    Kind.BARS,
                    may_be_empty="drafts have not collapsed",
                ),
            ),
        ),
        Row(
            "Draft workers",
            (
                Panel(
                    "Busy",
                    "Share of its time that each draft worker spends drafting. Near 100 % its "
                    "drafts arrive late; near 0 it could draft for more workers.",
                    Unit.SHARE,
                    (Query(largest(shown(metrics.DRAFT_WORKER_BUSY), "replica"), "{{replica}}"),),
                    thresholds=Thresholds(0.8, 0.9),
                ),
                Panel(
                    "Requests followed",
                    "Requests whose tokens each draft worker follows. The sum should equal the "
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
    when_empty="no draft worker, or no drafts in this period",
)
