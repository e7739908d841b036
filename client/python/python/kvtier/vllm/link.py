"""The way to the daemon: sessions that a thread opens, and calls on them that never wait.

Upstairs:   `scheduler` through `DaemonDirectory`, `worker` through `Link`.
Downstairs: the `kvtier` package, imported when a link is opened.

A daemon that is away is no error of the engine: calls answer that there is nothing, a thread
keeps trying, and the log says once why it went away and once that it is back.

Not here on purpose
  No retry of a lost session by hand: the SDK opens it again with the next call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .chain import ROOT

PAUSE_MIN_S = 0.1
PAUSE_MAX_S = 5.0
NOBODYS = b"\xff" * 32
"""A key that no block has: keys are hashes."""

logger = logging.getLogger("vllm.kvtier")


class Link:
    """Sessions of one side, one for each shard that it works with."""

    def __init__(self, open_sessions: Callable[[], list[Any]], what: str) -> None:
        self._open = open_sessions
        self._what = what
        self._lock = threading.Lock()
        self._sessions: list[Any] | None = None
        self._generation = 0
        self._away: str | None = None
        self._quiet_until = 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, wait_s: float = 0.0) -> None:
        """Begins to connect; waits at most `wait_s` for it."""
        with self._lock:
            if self._thread is not None or self._sessions is not None or self._closed.is_set():
                return
            self._thread = threading.Thread(target=self._connect, name="kvtier", daemon=True)
            self._thread.start()
            thread = self._thread
        thread.join(wait_s)

    def _connect(self) -> None:
        pause = PAUSE_MIN_S
        while not self._closed.is_set():
            try:
                sessions = self._open()
            except Exception as error:  # the engine goes on without a cache, whatever it is
                self.away(error)
                self._closed.wait(pause)
                pause = min(pause * 2, PAUSE_MAX_S)
                continue
            with self._lock:
                self._sessions, self._thread = sessions, None
                self._generation += 1
            self.back()
            return

    def sessions(self) -> tuple[int, list[Any]] | None:
        """Generation and sessions. None while there are none. Never waits."""
        with self._lock:
            return None if self._sessions is None else (self._generation, self._sessions)

    def usable(self) -> list[Any] | None:
        """Sessions to call now. None while the daemon is away, also for a moment after a call
        failed: an engine must not be slowed by asking in vain."""
        found = self.sessions()
        if found is None or time.monotonic() < self._quiet_until:
            return None
        return found[1]

    def failed(self, error: BaseException) -> None:
        """A call failed. Sessions that can no longer serve are opened anew."""
        pause = max(float(getattr(error, "retry_after", 0.0) or 0.0), PAUSE_MIN_S)
        self._quiet_until = time.monotonic() + pause
        self.away(error)
        if type(error).__name__ in ("NamespaceChanged", "LayoutMismatch", "Refused", "Forked"):
            with self._lock:
                self._sessions = None
            self.start()

    def away(self, error: BaseException) -> None:
        """Says once that the daemon is away, and why."""
        if self._away is None and not self._closed.is_set():
            self._away = f"{type(error).__name__}: {error}"
            logger.warning(
                "kvtier (%s): the daemon cannot be used, requests are computed: %s",
                self._what,
                self._away,
            )

    def back(self) -> None:
        """A call worked."""
        if self._away is not None:
            self._away = None
            logger.info("kvtier (%s): the daemon can be used again", self._what)

    def close(self) -> None:
        """Gives the sessions back."""
        self._closed.set()
        with self._lock:
            sessions, self._sessions = self._sessions or [], None
        for session in sessions:
            session.close()


class PendingLookup:
    """The same blocks asked of every shard: as many are there as the worst one has."""

    def __init__(self, link: Link, pending: Sequence[Any], first: int) -> None:
        self.first = first
        self._link = link
        self._pending = pending

    def poll(self) -> list[str] | None:
        """See `tracker.Lookup`."""
        if not all(pending.done() for pending in self._pending):
            return None
        try:
            found = [pending.result(0.0) for pending in self._pending]
        except Exception as error:
            self._link.failed(error)
            raise
        self._link.back()
        blocks = min(lookup.prefix_blocks for lookup in found)
        tiers = [[status.tier for status in lookup.blocks[:blocks]] for lookup in found]
        # Slowest tier of the shards: "disk" before "host".
        return [min(of_block) for of_block in zip(*tiers, strict=False)]

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for pending in self._pending:
            pending.cancel()


class ShardNames:
    """Names blocks with the secret of a session."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def name(self, parent: bytes, tokens: Sequence[int], size: int, extra: bytes) -> list[bytes]:
        """See `scheduler.Names`."""
        if parent == ROOT:
            # A prompt from its start takes one call; `size` is the descriptor's.
            whole = list(tokens[: len(tokens) // size * size])
            return list(self._session.prefix_keys(whole, extra=extra))
        keys = []
        for at in range(0, len(tokens) - size + 1, size):
            block = list(tokens[at : at + size])
            parent = self._session.derive_key(parent, block, extra=extra)
            keys.append(parent)
        return keys


class DaemonDirectory:
    """The daemon, as the scheduler needs it: see `scheduler.Directory`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._names: tuple[int, list[ShardNames]] | None = None
        self._probe: PendingLookup | None = None

    def names(self) -> tuple[int, list[ShardNames]] | None:
        """Names stay good while the daemon is away: the secret is the namespace's."""
        found = self._link.sessions()
        if found is None:
            return None
        if self._names is None or self._names[0] != found[0]:
            self._names = (found[0], [ShardNames(session) for session in found[1]])
        return self._names

    def probe(self) -> None:
        """Asks after a block that nobody has, so that sessions which no longer serve are noticed
        where nothing else is asked. Never waits."""
        if self._probe is not None:
            try:
                if self._probe.poll() is None:
                    return
            except Exception:  # the link has been told
                logger.debug("kvtier: a probe failed", exc_info=True)
        sessions = self._link.usable()
        self._probe = self.lookup([[NOBODYS] for _ in sessions], 0) if sessions else None

    def lookup(self, keys: list[list[bytes]], first: int) -> PendingLookup | None:
        """Starts a lookup of the same blocks for each rank; None while the daemon is away."""
        sessions = self._link.usable()
        if sessions is None or len(sessions) != len(keys):
            return None
        try:
            pending = [session.start_lookup(k) for session, k in zip(sessions, keys, strict=False)]
        except Exception as error:
            self._link.failed(error)
            return None
        return PendingLookup(self._link, pending, first)
