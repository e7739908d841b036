"""Stand-ins for vLLM's objects and for the daemon, for tests of the connector without either.

The daemon is a dictionary; what is "on its way" ends when a test says so.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

BLOCK = 4


@dataclass
class Request:
    """A request as vLLM's scheduler knows it."""

    request_id: str
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    resumable: bool = False

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt + self.output

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)


def step(
    new: list[tuple[str, int, list[int]]] = (),
    cached: list[tuple[str, int, list[int]]] = (),
    scheduled: dict[str, int] | None = None,
    resumed: set[str] = frozenset(),
    preempted: set[str] = frozenset(),
) -> SimpleNamespace:
    """A scheduler's output: (request, computed tokens, pages) for new and running requests."""
    scheduled = scheduled or {}
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=r, num_computed_tokens=c, block_ids=(list(p),))
            for r, c, p in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[r for r, _, _ in cached],
            num_computed_tokens=[c for _, c, _ in cached],
            new_block_ids=[(list(p),) if p else None for _, _, p in cached],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        preempted_req_ids=set(preempted),
        finished_req_ids=set(),
    )


class Names:
    """Names blocks of one rank."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.calls = 0

    def name(self, parent, tokens, size, extra):
        self.calls += 1
        keys = []
        for at in range(0, len(tokens) - size + 1, size):
            text = repr((self.rank, parent, list(tokens[at : at + size]), extra))
            parent = hashlib.blake2b(text.encode(), digest_size=32).digest()
            keys.append(parent)
        return keys


class FakeLookup:
    """Answers when the test lets it."""

    def __init__(self, directory, keys, first) -> None:
        self.directory, self.keys, self.first = directory, keys, first
        self.cancelled = False

    def poll(self):
        if self.directory.error is not None:
            raise self.directory.error
        if self.directory.held:
            return None
        tiers = []
        for of_block in zip(*self.keys, strict=False):
            if not all(key in self.directory.stored for key in of_block):
                break
            tiers.append(min(self.directory.stored[key] for key in of_block))
        return tiers

    def cancel(self) -> None:
        self.cancelled = True


class FakeDirectory:
    """A daemon that holds keys; see `scheduler.Directory`."""

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = [Names(rank) for rank in range(ranks)]
        self.stored: dict[bytes, str] = {}
        self.generation = 1
        self.away = self.held = False
        self.error: Exception | None = None
        self.lookups: list[FakeLookup] = []
        self.probes = 0

    def probe(self) -> None:
        self.probes += 1

    def names(self):
        return None if self.away else (self.generation, self.ranks)

    def lookup(self, keys, first):
        if self.away:
            return None
        self.lookups.append(FakeLookup(self, keys, first))
        return self.lookups[-1]

    def store(self, request: Request, blocks: int, tier: str = "disk", extra: bytes = b"") -> None:
        """Stores the first blocks of a request, for every rank."""
        for names in self.ranks:
            tokens = request.all_token_ids[: blocks * BLOCK]
            for key in names.name(bytes(32), tokens, BLOCK, extra):
                self.stored[key] = tier


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeRestoring:
    """A restore under way."""

    keys: list[bytes]
    pages: list[int]
    usable: int
    missed: list[tuple[int, str]]
    ended: bool = True
    error: Exception | None = None
    cancelled: bool = False

    def done(self):
        return self.ended

    def result(self, timeout=None):
        if not self.ended:
            if timeout is None:
                self.ended = True
            else:
                raise TimeoutError
        if self.error is not None:
            raise self.error
        return SimpleNamespace(usable_blocks=self.usable, missed=self.missed)

    def cancel(self) -> None:
        self.cancelled = self.ended = True


class Cancelled(Exception):
    """Of the SDK, by its name."""


@dataclass
class FakeSaving:
    """A save under way."""

    blocks: list[Any]
    pages: list[int]
    is_copied: bool = True
    ended: bool = True
    error: Exception | None = None
    waited: int = 0
    stuck: bool = False
    """It is copied only when it is cancelled."""
    limits: list[float] = field(default_factory=list)
    cancelled: bool = False

    def copied(self):
        return self.is_copied

    def wait_copied(self, timeout=None) -> bool:
        self.waited += 1
        self.limits.append(timeout)
        if self.stuck and not self.is_copied and timeout:
            time.sleep(timeout)
        self.is_copied = self.is_copied or not self.stuck
        return self.is_copied

    def done(self):
        return self.ended

    def result(self, timeout=None):
        if self.cancelled:
            raise Cancelled
        if self.error is not None:
            raise self.error
        return [SimpleNamespace(status="stored") for _ in self.blocks]

    def cancel(self) -> None:
        self.ended = self.is_copied = self.cancelled = True


class FakeSession:
    """A session with the daemon."""

    def __init__(self) -> None:
        self.stored: set[bytes] = set()
        self.restores: list[FakeRestoring] = []
        self.saves: list[FakeSaving] = []
        self.slow = False
        self.error: Exception | None = None
        self.closed = False
        self.is_durable = True
        self.waits: list[str] = []

    def restore_pages(self, cache, keys, pages, *, deadline=None):
        if self.error is not None:
            raise self.error
        usable = 0
        while usable < len(keys) and keys[usable] in self.stored:
            usable += 1
        missed = [(index, "absent") for index in range(usable, len(keys))]
        self.restores.append(FakeRestoring(keys, pages, usable, missed, not self.slow))
        return self.restores[-1]

    def save_pages(self, cache, blocks, pages, *, wait):
        if self.error is not None:
            raise self.error
        self.waits.append(wait)
        self.saves.append(FakeSaving(blocks, pages, not self.slow, not self.slow))
        self.stored.update(block.key for block in blocks)
        return self.saves[-1]

    def close(self) -> None:
        self.closed = True


def save_block(key, *, parent, position, tokens):
    """`kvtier.SaveBlock`."""
    return SimpleNamespace(key=key, parent=parent, position=position, tokens=tokens)
