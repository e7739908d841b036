"""What was moved since SGLang last asked, in the shape of its storage metrics.

Upstairs:   `storage.get_stats`; `mover` adds to it.
Downstairs: nothing.
"""

from __future__ import annotations

import threading

KEPT_MAX = 4096
"""Batches that are remembered while nobody asks."""


class Stats:
    """Pages and speed of each batch that was loaded or saved."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._lock = threading.Lock()
        self._loads: list[tuple[int, float]] = []
        self._saves: list[tuple[int, float]] = []

    def loaded(self, pages: int, nbytes: int, seconds: float) -> None:
        """A batch was loaded."""
        self._add(self._loads, pages, nbytes, seconds)

    def saved(self, pages: int, nbytes: int, seconds: float) -> None:
        """A batch was saved."""
        self._add(self._saves, pages, nbytes, seconds)

    def take(self) -> dict[str, list[int] | list[float]]:
        """All of it by the names of SGLang's fields, and begins anew. Speed is in GiB/s."""
        with self._lock:
            loads, saves = list(self._loads), list(self._saves)
            self._loads.clear()
            self._saves.clear()
        return {
            "prefetch_pgs": [pages for pages, _ in loads],
            "prefetch_bandwidth": [speed for _, speed in loads],
            "backup_pgs": [pages for pages, _ in saves],
            "backup_bandwidth": [speed for _, speed in saves],
        }

    def _add(self, to: list[tuple[int, float]], pages: int, nbytes: int, seconds: float) -> None:
        if self._enabled and pages:
            with self._lock:
                if len(to) < KEPT_MAX:
                    to.append((pages, nbytes / (1 << 30) / max(seconds, 1e-9)))
