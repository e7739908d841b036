"""What the scheduler's side tells the workers in a step. Plain data, since it is pickled.

Upstairs:   `scheduler` writes it, `worker` reads it.
Downstairs: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoadOrder:
    """Blocks to load for a request. `keys` has one list for each tensor-parallel rank."""

    req_id: str
    keys: list[list[bytes]]
    pages: list[int]


@dataclass
class SaveOrder:
    """Full blocks of a request to save, in order, from block `first` of its prefix on."""

    number: int
    """Orders are numbered over the life of the engine; a worker says how far it has come."""
    req_id: str
    first: int
    keys: list[list[bytes]]
    parents: list[bytes]
    """Key of the block before, for each rank."""
    pages: list[int]


@dataclass
class StepOrders:
    """Everything for one step."""

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    settle: set[str] = field(default_factory=set)
    """Requests whose pages are given to others in this step: nothing may read them any more."""
    report: set[str] = field(default_factory=set)
    """Requests that have ended; the engine keeps their pages until their saves are copied."""
    idle: bool = False
    """No token is computed in this step: a worker may wait a moment for a load."""

    def is_empty(self) -> bool:
        """True when there is nothing to do and nothing to wait for."""
        return not (self.loads or self.saves or self.settle or self.report)
