"""What is known of one request: its blocks' names, where they lie, what is stored of them.

Upstairs:   `scheduler` asks and tells.
Downstairs: `chain` names blocks. No clock, no I/O: time and answers come from the caller.

Invariants kept here
  T1  A block is ordered to be saved once, and only when all its tokens are known and computed
      at the end of the step.
  T2  A load never reaches beyond what a lookup found, nor into blocks that the engine has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .chain import Chain, full_blocks
from .orders import LoadOrder, SaveOrder

ORDER_BLOCKS_MAX = 1024
"""Most blocks of an order to save. A long prefix takes several, so that pages of the first are
free before the last is copied."""


class Lookup(Protocol):
    """A lookup on its way, of the blocks from `first` on."""

    first: int

    def poll(self) -> list[str] | None:
        """Tiers of the leading blocks that are there; None while it is not known. Raises what
        the lookup raises."""

    def cancel(self) -> None:
        """Nobody waits for it any more."""


@dataclass
class Question:
    """A lookup and what it said."""

    lookup: Lookup
    last: int
    """End of what was asked for; a long prefix is asked for in pieces."""
    asked_at: float
    tiers: list[str] | None = None
    answered_at: float = 0.0

    @property
    def first(self) -> int:
        """First block that was asked for."""
        return self.lookup.first

    @property
    def end(self) -> int:
        """First block that is not there."""
        return self.first + len(self.tiers or ())


@dataclass
class Tracked:
    """One request, from its arrival to its end."""

    req_id: str
    request: Any
    block_tokens: int
    chains: list[Chain]
    """One for each tensor-parallel rank."""
    generation: int
    """Of the sessions that the names come from."""
    question: Question | None = None
    matched: tuple[int, int] = (0, 0)
    """First block and number of blocks that vLLM was last told of."""
    pages: list[int] = field(default_factory=list)
    stored: set[int] = field(default_factory=set)
    """Blocks that are stored, or ordered to be: they are not saved again."""
    scanned: int = 0
    """Blocks before this one have been looked at for saving."""
    last_order: int = 0
    loading: bool = False
    gave_up: bool = False
    """A load has failed: the rest is computed. vLLM asks again for a request of which nothing
    came, and would be told the same forever."""

    def tokens(self) -> Sequence[int]:
        """Tokens that are known by now."""
        tokens: Sequence[int] = self.request.all_token_ids
        return tokens

    def keys(self, blocks: int) -> list[list[bytes]]:
        """Names of the first `blocks` blocks, for each rank."""
        tokens = self.tokens()
        return [chain.extend(tokens, blocks) for chain in self.chains]

    def order_load(self, external: int) -> LoadOrder:
        """An order to load `external` tokens into the pages (T2). Were they others than what was
        matched, the order has no names: the worker fails it, and they are computed."""
        first, found = self.matched
        blocks = -(-external // self.block_tokens)
        end = first + blocks
        pages = self.pages[first:end]
        if blocks * self.block_tokens != external or blocks > found or len(pages) < blocks:
            return self.fail_load(external)
        self.stored.update(range(first, end))
        keys = [keys[first:end] for keys in self.keys(end)]
        return LoadOrder(self.req_id, keys, pages)

    def fail_load(self, external: int) -> LoadOrder:
        """An order that a worker fails, for the pages that were to be loaded into."""
        first, blocks = self.matched[0], -(-external // self.block_tokens)
        return LoadOrder(self.req_id, [[] for _ in self.chains], self.pages[first : first + blocks])

    def leave(self) -> None:
        """Nothing more of it is loaded or saved."""
        self.gave_up, self.generation = True, -1

    def order_saves(self, computed: int, output: bool) -> list[SaveOrder]:
        """Orders for blocks that are full once `computed` tokens are (T1). Numbers are given by
        the caller."""
        known = len(self.tokens())
        if not output:
            known = min(known, self.request.num_prompt_tokens)
        full = min(full_blocks(min(computed, known), self.block_tokens), len(self.pages))
        orders: list[SaveOrder] = []
        if full <= self.scanned:
            return orders
        keys = self.keys(full)
        run: list[int] = []
        for block in range(self.scanned, full + 1):
            wanted = block < full and block not in self.stored
            if run and (not wanted or len(run) == ORDER_BLOCKS_MAX):
                orders.append(self._order(run, keys))
                run = []
            if wanted:
                run.append(block)
        self.stored.update(range(self.scanned, full))
        self.scanned = full
        return orders

    def _order(self, run: list[int], keys: list[list[bytes]]) -> SaveOrder:
        first, end = run[0], run[-1] + 1
        return SaveOrder(
            number=0,
            req_id=self.req_id,
            first=first,
            keys=[keys[first:end] for keys in keys],
            parents=[chain.parent(first) for chain in self.chains],
            pages=self.pages[first:end],
        )

    def lost_pages(self) -> None:
        """vLLM took the pages away. Names stay, and what is stored."""
        self.pages = []
        self.scanned = 0
        self.matched = (0, 0)

    def failed_pages(self, bad: set[int]) -> None:
        """These pages did not load: what they were to hold is computed, and then saved."""
        for block, page in enumerate(self.pages):
            if page in bad:
                self.stored.discard(block)
                self.scanned = min(self.scanned, block)
                self.gave_up = True
