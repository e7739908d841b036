"""The connector's counters in vLLM's own statistics, its log and Prometheus.

Upstairs:   vLLM asks `connector` for these classes.
Downstairs: `stats`.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from .stats import COUNTERS, SERIES, merge, reduce

BUCKETS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]


class KvtierStats(KVConnectorStats):
    """Counters of one or several processes."""

    def reset(self) -> None:
        """Forgets all."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Sum of both."""
        return KvtierStats(data=merge(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """One line for vLLM's log."""
        return reduce(self.data)

    def is_empty(self) -> bool:
        """True when nothing was counted."""
        return not self.data


class KvtierPromMetrics(KVConnectorPromMetrics):
    """The same as `vllm:kvtier_*`, by engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, Any] = {}
        for name, help_text in COUNTERS.items():
            self._metrics[name] = self._counter_cls(
                name=f"vllm:kvtier_{name}", documentation=help_text, labelnames=labelnames
            )
        for name, help_text in SERIES.items():
            self._metrics[name] = self._histogram_cls(
                name=f"vllm:kvtier_{name}",
                documentation=help_text,
                labelnames=labelnames,
                buckets=BUCKETS,
            )
        # Every series exists from the first scrape on.
        for metric in self._metrics.values():
            for labels in per_engine_labelvalues.values():
                metric.labels(*labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds what was counted to the series of an engine."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            metric = self._metrics.get(name)
            if metric is None:
                continue
            of_engine = metric.labels(*labels)
            if isinstance(value, list):
                for observation in value:
                    of_engine.observe(observation)
            else:
                of_engine.inc(value)
