"""Names of a request's blocks, and how far a prefix is stored.

Upstairs:   `tracker` keeps one chain a request.
Downstairs: a function that names blocks from their parent (the SDK's key derivation).

Invariants kept here
  C1  A block is named only when all of its tokens are known, and by all of them: chunked
      prefill, decoding and preemption extend a chain, nothing takes back a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

ROOT = bytes(32)
"""Parent of the first block."""

NameBlocks = Callable[[bytes, Sequence[int], int, bytes], list[bytes]]
"""(parent, tokens, block_tokens, extra) -> keys of the full blocks of `tokens`."""

ExtraOf = Callable[[int], bytes]
"""What goes into the key of block i beside its tokens."""


class Chain:
    """Keys of the full blocks of one request, for one shard of the model."""

    def __init__(
        self, name: NameBlocks, block_tokens: int, extra_of: ExtraOf, uniform: bool
    ) -> None:
        self._name = name
        self._block_tokens = block_tokens
        self._extra_of = extra_of
        # Where all blocks share one extra they are named in one call.
        self._uniform = uniform
        self.keys: list[bytes] = []

    def extend(self, tokens: Sequence[int], blocks: int) -> list[bytes]:
        """Keys of the first `blocks` blocks of `tokens`, which may have grown (C1)."""
        blocks = min(blocks, len(tokens) // self._block_tokens)
        while len(self.keys) < blocks:
            first = len(self.keys)
            last = blocks if self._uniform else first + 1
            parent = self.keys[-1] if self.keys else ROOT
            span = tokens[first * self._block_tokens : last * self._block_tokens]
            named = self._name(parent, span, self._block_tokens, self._extra_of(first))
            if len(named) != last - first:
                raise RuntimeError(f"{len(named)} keys for {last - first} blocks")
            self.keys += named
        return self.keys[:blocks]

    def parent(self, block: int) -> bytes:
        """Key of the block before."""
        return self.keys[block - 1] if block else ROOT


def full_blocks(tokens: int, block_tokens: int) -> int:
    """Blocks that `tokens` tokens fill; the tail that fills none is always computed."""
    return tokens // block_tokens


def stored_run(present: Sequence[bool], first: int, last: int) -> int:
    """Blocks from `first` on that are present without a gap, up to `last`."""
    end = first
    while end < min(last, len(present)) and present[end]:
        end += 1
    return end - first
