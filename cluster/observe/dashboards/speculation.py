"""Whether drafts pay."""

from cluster.observe import metrics
from cluster.observe.dashboards.panels import Dashboard, Kind, Panel, Query, Row, Thresholds, Unit
from cluster.observe.dashboards.promql import largest, of_workers, rate, ratio, shown, total
from cluster.observe.dashboards.queries import events, rate_of_workers


def _draft_rate(outcome: str, *by: str) -> str:
    return total(rate(of_workers(metrics.DRAFT_TOKENS, f'outcome=~"{outcome}"')), *by)


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
                            rate_of_workers(metrics.DRAFT_TOKENS, "drafter", "outcome"),
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
                    events(metrics.DRAFT_COLLAPSES, "reason"),
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
