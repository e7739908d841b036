"""Counters of one side of the connector, as plain data that vLLM carries between processes.

Upstairs:   `metrics` shows them as vLLM's own statistics and in Prometheus.
Downstairs: nothing.
"""

from __future__ import annotations

from typing import Any

COUNTERS = {
    "lookups": "Lookups of prefixes that were started.",
    "lookup_failures": "Lookups that failed; their requests were computed.",
    "lookup_timeouts": "Lookups that took too long; their requests were computed.",
    "left_requests": "Requests that were not kept since they could not be named.",
    "hit_blocks": "Blocks that were found stored, and ordered to be loaded.",
    "loaded_blocks": "Blocks that were loaded.",
    "loaded_bytes": "Bytes of those blocks.",
    "load_failed_blocks": "Blocks that did not load; they were computed.",
    "saved_blocks": "Blocks that the daemon took.",
    "saved_bytes": "Bytes of those blocks.",
    "save_known_blocks": "Blocks that the daemon had already.",
    "save_failed_blocks": "Blocks that the daemon did not take.",
    "save_dropped_blocks": "Blocks that were not saved since too many were waiting.",
}
"""Every counter and what it counts. Names in Prometheus are made of them."""

SERIES = {
    "load_seconds": "Time from the order to load a request's blocks until they were there.",
    "save_seconds": "Time from the order to save blocks until the daemon had them.",
}
"""Every series of observations."""


class Stats:
    """What was counted since the last `take`."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._series: dict[str, list[float]] = {}

    def count(self, name: str, by: int = 1) -> None:
        """Adds to a counter of COUNTERS."""
        if by and name in COUNTERS:
            self._counts[name] = self._counts.get(name, 0) + by

    def observe(self, name: str, value: float) -> None:
        """Adds an observation to a series of SERIES."""
        if name in SERIES:
            self._series.setdefault(name, []).append(value)

    def take(self) -> dict[str, Any]:
        """All of it, and begins anew. Empty when nothing happened."""
        taken: dict[str, Any] = {**self._counts, **self._series}
        self._counts, self._series = {}, {}
        return taken


def merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Sum of two portions."""
    merged = dict(left)
    for name, value in right.items():
        merged[name] = merged[name] + value if name in merged else value
    return merged


def reduce(data: dict[str, Any]) -> dict[str, int | float]:
    """One line for vLLM's log."""
    line: dict[str, int | float] = {}
    for name, value in data.items():
        if isinstance(value, list):
            if value:
                line[f"{name}_mean"] = round(sum(value) / len(value), 4)
                line[f"{name}_max"] = round(max(value), 4)
        elif name.endswith("_bytes"):
            line[name.replace("_bytes", "_mib")] = round(value / 2**20, 1)
        else:
            line[name] = value
    return line
