"""vLLM's own metrics, exported as ours are: through Ray's metrics endpoint of each node."""

import dataclasses
import itertools
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

GAUGES = (
    "num_running_reqs",
    "num_waiting_reqs",
    "num_skipped_waiting_reqs",
    "num_kv_fetch_reqs_by_stage",
    "kv_cache_usage",
    "waiting_lora_adapters",
    "running_lora_adapters",
)
"""Fields of vLLM's statistics of a step that describe its moment."""
SUMS = ("prefix_cache_stats", "connector_prefix_cache_stats", "spec_decoding_stats")
"""Fields that add up over steps."""


class RequestStatLogger(RayPrometheusStatLogger):
    """Metrics of the requests of one ingress, with the counter of a rare event at zero."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM's `inc` and Ray's let no zero through; see `Exporter.begin`.
        preemptions: Any = self.counter_num_preempted_reqs[0]
        preemptions.metric._record(0, preemptions._tags)


class SchedulerMetrics:
    """Metrics of one worker's vLLM scheduler: queues, KV cache, prefix hits, drafts."""

    def __init__(self, vllm_config: VllmConfig, model_name: str) -> None:
        vllm_config.model_config.served_model_name = model_name
        self._logger = RayPrometheusStatLogger(vllm_config)
        self._stats = SchedulerStats()

    def add(self, stats: SchedulerStats) -> None:
        """Add the statistics of one step; cheap, unlike exporting them."""
        for name in SUMS:
            setattr(stats, name, _sum(getattr(self._stats, name), getattr(stats, name)))
        stats.kv_cache_eviction_events[:0] = self._stats.kv_cache_eviction_events
        self._stats = stats

    def export(self) -> None:
        """Send what was added since the last export; and the gauges, which Ray forgets in 20 s."""
        stats = self._stats
        self._stats = SchedulerStats(**{name: getattr(stats, name) for name in GAUGES})
        self._logger.record(stats, None)


def _sum(old: Any, new: Any) -> Any:
    """The sum of two of vLLM's statistics, field by field; either may be None.

    Lists add up by position. Written for any of vLLM's dataclasses of counts, so that a field
    that vLLM adds is not forgotten.
    """
    if old is None or new is None:
        return new if old is None else old
    for field in dataclasses.fields(new):
        before, after = getattr(old, field.name), getattr(new, field.name)
        total: Any
        if field.name == "num_spec_tokens":  # a setting
            total = max(before, after)
        elif isinstance(after, list):
            total = [a + b for a, b in itertools.zip_longest(before, after, fillvalue=0)]
        elif isinstance(after, dict):
            total = {key: before.get(key, 0) + after.get(key, 0) for key in before | after}
        else:
            total = before + after
        setattr(new, field.name, total)
    return new
