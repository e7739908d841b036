"""Moves pages between SGLang's host pool and the daemon.

Upstairs:   `storage`, whose methods SGLang calls from its prefetch, backup and scheduler threads.
Downstairs: `link` for the session; its `lookup`, `restore_pages` and `save_pages`.

Invariants kept here
  M1  Nothing escapes: whatever fails, its pages are misses. An exception would end SGLang's thread,
      and its storage with it.
  M2  A page counts as loaded when all of it is in place and the daemon has confirmed it.
  M3  No page is read or written after a call returns: SGLang gives its pages away then. Where that
      cannot be had, the call does not return a result (it raises, the one exception to M1).
  M4  After a `clear` that did not reach the daemon nothing is served until one has.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from .identity import extra_of, page_hash
from .link import Link
from .options import Options
from .pool import HostPages
from .stats import Stats

KEYS_PER_CALL = 1024
FLAT_SLOTS = 32
SETTLE_S = 60.0
"""Longest wait until nothing touches pages any more. The SDK's own limits end it sooner."""
GRACE_S = 1.0
"""The daemon ends a load at its deadline; this much later it is ended here."""

logger = logging.getLogger("sglang.kvtier")


class Mover:
    """Everything that is done with the pages of one pool."""

    def __init__(
        self, kvtier: Any, options: Options, pages: HostPages, cache: Any, link: Link, stats: Stats
    ) -> None:
        self._kvtier = kvtier
        self._options = options
        self._pages = pages
        self._cache = cache
        self._link = link
        self._stats = stats
        self._clearing = threading.Lock()
        self._must_clear = False

    # Names and sessions.

    def _session(self) -> Any:
        """The session to call now, or None."""
        session = self._link.session()
        if session is not None and self._must_clear and not self._wipe(session):
            return None
        return session

    def _names(self, session: Any, keys: Sequence[str], info: Any) -> list[bytes]:
        names: list[bytes] = session.hash_keys(
            [page_hash(key) for key in keys], extra=extra_of(info)
        )
        return names

    def _failed(self, what: str, error: BaseException) -> None:
        self._link.failed(error)
        logger.debug("kvtier: %s: %s: %s", what, type(error).__name__, error)

    def close(self) -> None:
        """SGLang lets go of the storage."""
        self._link.close()

    # Questions.

    def exists(self, keys: Sequence[str], info: Any = None) -> int:
        """Leading pages that can be loaded now."""
        found = 0
        session = self._session()
        if session is None:
            return 0
        try:
            for at in range(0, len(keys), KEYS_PER_CALL):
                portion = keys[at : at + KEYS_PER_CALL]
                asked = session.start_lookup(self._names(session, portion, info))
                there = asked.result(self._options.lookup_timeout_s).prefix_blocks
                found += there
                if there < len(portion):
                    break
        except Exception as error:
            self._failed("a lookup failed", error)
            return 0
        self._link.worked()
        return found

    def clear(self) -> bool:
        """Forgets every block of the namespace, now or before anything else is served (M4)."""
        self._must_clear = True
        session = self._link.session()
        return session is not None and self._wipe(session)

    def _wipe(self, session: Any) -> bool:
        with self._clearing:
            if not self._must_clear:
                return True
            try:
                session.wipe()
            except Exception as error:
                self._failed("the namespace could not be cleared", error)
                return False
            self._must_clear = False
        self._link.worked()
        return True

    # Pages of the pool.

    def load(self, keys: Sequence[str], indices: Any, info: Any = None) -> list[bool]:
        """Loads pages to these places. What is False may have been written to in part (M2)."""
        numbers = self._pages.numbers(indices, len(keys))
        if numbers is None:
            return self._no_pages(keys)
        loaded: list[bool] = []
        for at in range(0, len(keys), KEYS_PER_CALL):
            end = at + KEYS_PER_CALL
            loaded += self._load(keys[at:end], numbers[at:end], info)
        return loaded

    def _load(self, keys: Sequence[str], numbers: list[int], info: Any) -> list[bool]:
        none, began = [False] * len(keys), time.monotonic()
        session = self._session()
        if session is None or not keys:
            return none
        limit = self._options.load_timeout_s
        restoring = None
        try:
            names = self._names(session, keys, info)
            restoring = session.restore_pages(
                self._cache, names, numbers, deadline=limit, scattered=True
            )
            summary = restoring.result(limit + GRACE_S)
            missed = {index for index, _ in summary.missed}
            ready = set(restoring.ready()) - missed
        except Exception as error:
            self._failed("a load failed", error)
            if restoring is not None:
                self._settle_load(restoring)
            return none
        self._link.worked()
        self._stats.loaded(
            len(ready), len(ready) * self._pages.page_bytes, time.monotonic() - began
        )
        return [index in ready for index in range(len(keys))]

    def _settle_load(self, restoring: Any) -> None:
        """Makes certain that nothing writes to the pages of a load (M3)."""
        until = time.monotonic() + SETTLE_S
        while not restoring.done():
            restoring.cancel()
            try:
                restoring.result(GRACE_S)
            except Exception as error:  # what matters is `done`
                logger.debug("kvtier: a load ends: %s", error)
            if time.monotonic() > until:
                raise RuntimeError("pages of a load are still being written to")

    def save(self, keys: Sequence[str], indices: Any, info: Any = None) -> list[bool]:
        """Saves pages from these places."""
        numbers = self._pages.numbers(indices, len(keys))
        if numbers is None:
            return self._no_pages(keys)
        saved: list[bool] = []
        before = list(getattr(info, "prefix_keys", None) or [])
        for at in range(0, len(keys), KEYS_PER_CALL):
            end = at + KEYS_PER_CALL
            saved += self._save(keys[at:end], numbers[at:end], before, info)
            before += keys[at:end]
        return saved

    def _save(
        self, keys: Sequence[str], numbers: list[int], before: Sequence[str], info: Any
    ) -> list[bool]:
        none, began = [False] * len(keys), time.monotonic()
        session = self._session()
        if session is None or not keys:
            return none
        saving = None
        try:
            blocks = self._blocks(session, keys, before, info)
            saving = session.save_pages(self._cache, blocks, numbers, wait=self._wait(session))
            outcomes = saving.result(self._options.save_timeout_s)
        except Exception as error:
            self._failed("a save failed", error)
            if saving is not None:
                self._settle_save(saving)
            return none
        self._link.worked()
        new = sum(outcome.status == "stored" for outcome in outcomes)
        self._stats.saved(new, new * self._pages.page_bytes, time.monotonic() - began)
        return [bool(outcome.is_stored()) for outcome in outcomes]

    def _settle_save(self, saving: Any) -> None:
        """Makes certain that nothing reads the pages of a save (M3)."""
        until = time.monotonic() + SETTLE_S
        while not saving.copied():
            saving.cancel()
            try:
                saving.wait_copied(GRACE_S)
            except Exception as error:  # what matters is `copied`
                logger.debug("kvtier: a save ends: %s", error)
            if time.monotonic() > until:
                raise RuntimeError("pages of a save are still being read")

    def _wait(self, session: Any) -> str:
        """How far a page must have come. Without a device memory is as far as it gets."""
        return "durable" if self._options.durable and session.is_durable else "accepted"

    def _blocks(
        self, session: Any, keys: Sequence[str], before: Sequence[str], info: Any
    ) -> list[Any]:
        """Blocks to save. Each is behind the one before it, as far as SGLang says which that is:
        the daemon keeps the front of a prefix longer than its end."""
        size = self._pages.page_tokens
        parent = self._names(session, before[-1:], info)[0] if before else self._kvtier.ROOT
        blocks = []
        for index, name in enumerate(self._names(session, keys, info), len(before)):
            blocks.append(
                self._kvtier.SaveBlock(name, parent=parent, position=index * size, tokens=size)
            )
            parent = name
        return blocks

    def _no_pages(self, keys: Sequence[str]) -> list[bool]:
        logger.error("kvtier: SGLang named %d pages by indices that are no whole pages", len(keys))
        return [False] * len(keys)

    # Pages as flat tensors.

    def load_flat(self, keys: Sequence[str], targets: Sequence[Any]) -> list[bool]:
        """Copies pages into tensors of a page's bytes."""
        none, began = [False] * len(keys), time.monotonic()
        memories = [self._memory(target) for target in targets]
        session = self._session()
        if session is None or not keys or len(memories) != len(keys) or None in memories:
            return none
        limit = self._options.load_timeout_s
        loaded = list(none)
        try:
            names = self._names(session, keys, None)
            restore = session.restore(names, deadline=limit, scattered=True)
            blocks = []
            while (event := restore.next(limit + GRACE_S)) is not None:
                if isinstance(event, self._kvtier.LeasedBlock):
                    event.copy(memories[event.index])
                    blocks.append(event)
                    loaded[event.index] = True
            session.release(blocks)
        except Exception as error:
            self._failed("a load failed", error)
            return none
        self._link.worked()
        count = sum(loaded)
        self._stats.loaded(count, count * self._pages.page_bytes, time.monotonic() - began)
        return loaded

    def save_flat(self, keys: Sequence[str], values: Sequence[Any]) -> list[bool]:
        """Saves tensors that hold a page each."""
        none, began = [False] * len(keys), time.monotonic()
        memories = [self._memory(value) for value in values]
        session = self._session()
        if session is None or not keys or len(memories) != len(keys) or None in memories:
            return none
        saved: list[bool] = []
        try:
            blocks = self._blocks(session, keys, (), None)
            for at in range(0, len(blocks), FLAT_SLOTS):
                end = at + FLAT_SLOTS
                saved += self._save_portion(session, blocks[at:end], memories[at:end])
        except Exception as error:
            self._failed("a save failed", error)
            return saved + none[len(saved) :]
        self._link.worked()
        count = sum(saved)
        self._stats.saved(count, count * self._pages.page_bytes, time.monotonic() - began)
        return saved

    def _save_portion(self, session: Any, blocks: list[Any], memories: list[Any]) -> list[bool]:
        """Saves a few pages; those for which there is no room now wait for the others."""
        saved = [False] * len(blocks)
        waiting = list(range(len(blocks)))
        while waiting:
            again, slots, filled = [], [], []
            found = session.reserve([blocks[index] for index in waiting])
            for index, slot in zip(waiting, found, strict=True):
                if isinstance(slot, self._kvtier.Slot):
                    slot.write(memories[index])
                    slots.append(slot)
                    filled.append(index)
                elif slot.reason == "region_full":
                    again.append(index)
                else:
                    saved[index] = bool(slot.is_stored())
            if not slots:
                break
            outcomes = session.commit(slots, self._wait(session))
            for index, outcome in zip(filled, outcomes, strict=True):
                saved[index] = bool(outcome.is_stored())
            waiting = again
        return saved

    def _memory(self, tensor: Any) -> Any:
        """A flat page as memory; None when it is not one."""
        if tensor is None or not self._pages.flat or tensor.device.type != "cpu":
            return None
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes != self._pages.page_bytes or not tensor.is_contiguous():
            return None
        return self._kvtier.Memory(int(tensor.data_ptr()), (nbytes,), owner=tensor)
