import copy
from typing import Any

from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from cluster.observe.vllm_metrics import SchedulerMetrics


class Recorded:
    """Replaces vLLM's logger, which needs a replica around it."""

    def __init__(self) -> None:
        self.stats: list[SchedulerStats] = []

    def record(self, stats: SchedulerStats, iteration_stats: None) -> None:
        self.stats.append(copy.deepcopy(stats))


def scheduler_metrics() -> tuple[SchedulerMetrics, list[SchedulerStats]]:
    mine: Any = SchedulerMetrics.__new__(SchedulerMetrics)
    mine._logger, mine._stats = Recorded(), SchedulerStats()
    return mine, mine._logger.stats


def stats(num_running: int, queries: int, hits: int, *accepted: int) -> SchedulerStats:
    drafts = SpecDecodingStats.new(3) if accepted else None
    for num_accepted in accepted:
        assert drafts
        drafts.observe_draft(3, num_accepted)
    return SchedulerStats(
        num_running_reqs=num_running,
        kv_cache_usage=num_running / 10,
        prefix_cache_stats=PrefixCacheStats(requests=1, queries=queries, hits=hits),
        spec_decoding_stats=drafts,
    )


def test_what_adds_up_is_added_up_between_two_exports_and_counted_once() -> None:
    mine, exported = scheduler_metrics()

    mine.add(stats(1, 100, 60, 2, 3))
    mine.add(stats(2, 50, 0))
    mine.add(stats(3, 10, 10, 1))
    mine.export()
    mine.export()

    first, second = exported
    assert (first.prefix_cache_stats.queries, first.prefix_cache_stats.hits) == (160, 70)
    drafts = first.spec_decoding_stats
    assert drafts is not None
    assert (drafts.num_drafts, drafts.num_draft_tokens, drafts.num_accepted_tokens) == (3, 9, 6)
    assert drafts.num_accepted_tokens_per_pos == [3, 2, 1]
    assert drafts.num_spec_tokens == 3
    assert second.prefix_cache_stats.queries == 0
    assert second.spec_decoding_stats is None


def test_gauges_are_those_of_the_last_step_and_are_exported_each_time() -> None:
    mine, exported = scheduler_metrics()

    mine.export()
    mine.add(stats(1, 0, 0))
    mine.add(stats(4, 0, 0))
    mine.export()
    mine.export()

    assert [(s.num_running_reqs, s.kv_cache_usage) for s in exported] == [
        (0, 0.0), (4, 0.4), (4, 0.4),
    ]  # fmt: skip
