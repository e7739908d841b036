"""Comparing runs and writing them down.

Upstairs:   `vllm_e2e.py`.
Downstairs: `/proc`, for what machine it was.

A result file is the one of all benchmarks here: {"suite", "machine", "rows"}.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

Run = list[dict[str, Any]]


def identical(left: Run, right: Run) -> int:
    """Prompts whose tokens and log-probabilities (the five best of each place) are the same
    bits."""
    same = 0
    for a, b in zip(left, right, strict=True):
        same += a["tokens"] == b["tokens"] and a["logprobs"] == b["logprobs"]
    return same


def distance(left: Run, right: Run) -> float:
    """Largest difference of a log-probability, as far as tokens agree."""
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        for place, token in enumerate(a["tokens"]):
            for name, value in a["logprobs"][place].items():
                other = b["logprobs"][place].get(name)
                if other is not None:
                    worst = max(worst, abs(other - value))
            if token != b["tokens"][place]:
                break
    return worst


def of_length(run: Run, length: int) -> Run:
    """Results of prompts of one length."""
    return [result for result in run if result["length"] == length]


def machine(folder: Path) -> dict[str, Any]:
    """Where a result comes from. No host name: result files are published."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(": ", 1)[1]
            break
    device, longest = "unknown", -1
    for line in Path("/proc/mounts").read_text().splitlines():
        source, mount, kind = line.split()[:3]
        inside = folder.resolve().is_relative_to(mount)
        if inside and len(mount) > longest:
            device, longest = f"{kind} on {os.path.basename(source)}", len(mount)
    return {"cores": os.cpu_count(), "cpu": cpu, "kernel": platform.release(), "device": device}


class Rows:
    """Rows of a result file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        unit: str,
        values: list[float],
        limit: tuple[str, list[float]] | None = None,
    ) -> None:
        """A row; `limit` is the side-by-side reference, and `ratio` the median of the ratios to
        it, pair by pair."""
        ratio = None
        if limit is not None:
            ratio = statistics.median(
                value / other for value, other in zip(values, limit[1], strict=True)
            )
        self.rows.append(
            {
                "name": name,
                "unit": unit,
                "n": len(values),
                "min": round(min(values), 3),
                "median": round(statistics.median(values), 3),
                "max": round(max(values), 3),
                "limit": limit[0] if limit else None,
                "ratio": round(ratio, 4) if ratio is not None else None,
            }
        )

    def value(self, name: str) -> float:
        """Median of a row."""
        return next(row["median"] for row in self.rows if row["name"] == name)

    def write(self, path: Path, suite: str, folder: Path) -> None:
        """Writes the file."""
        whole = {"suite": suite, "machine": machine(folder), "rows": self.rows}
        path.write_text(json.dumps(whole, indent=2) + "\n")
