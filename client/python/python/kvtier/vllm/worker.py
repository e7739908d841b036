"""The worker's side: moves blocks between the engine's pages and the daemon.

Upstairs:   `connector`, whose methods of the same names vLLM calls in each step.
Downstairs: `link` for the session; its `restore_pages` and `save_pages` copy in the background.

Invariants kept here
  W1  Nothing escapes: whatever fails, its pages are reported and its request is computed.
      An exception in `start_loads` would end the engine, one in a load would leave its request
      waiting for ever.
  W2  A load is reported once, when nothing writes its pages any more.
  W3  A page that did not load, or whose load was not confirmed, is reported with it.
  W4  Nothing reads pages of a request after `settle`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .link import Link
from .memory import Pages
from .options import Options
from .orders import LoadOrder, SaveOrder, StepOrders
from .stats import Stats

IDLE_WAIT_S = 0.002
"""How long an empty step waits for a load: without it the scheduler would spin, and take the
processor from those who copy."""
SETTLE_S = 0.2
"""How long a step waits for all copies out of pages that others get. Then they are cancelled."""
CANCEL_S = 5.0
"""Longest wait for a cancelled copy, which ends with the parts that are copied at that moment."""

logger = logging.getLogger("vllm.kvtier")


@dataclass
class Load:
    """A load under way, or one that could not be started."""

    order: LoadOrder
    restoring: Any
    started: float


@dataclass
class Save:
    """A save under way."""

    order: SaveOrder
    saving: Any
    started: float
    copied: bool = False


@dataclass
class Report:
    """What vLLM is told after a step."""

    loaded: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)


class WorkerSide:
    """Everything that is done in a worker's process."""

    def __init__(
        self,
        options: Options,
        block_tokens: int,
        rank: int,
        link: Link,
        save_block: Callable[..., Any],
    ) -> None:
        self._options = options
        self._block_tokens = block_tokens
        self._rank = rank
        self._link = link
        self._save_block = save_block
        self._pages: Pages | None = None
        self._loads: list[Load] = []
        self._saves: list[Save] = []
        self._done: set[str] = set()
        self._bad_pages: set[int] = set()
        self._to_report: set[str] = set()
        self._last_order = 0
        self.stats = Stats()

    def register(self, pages: Pages) -> None:
        """The engine's pages are there."""
        self._pages = pages

    # One step, in the order in which vLLM calls.

    def settle(self, orders: StepOrders) -> None:
        """Waits until nothing reads the pages of these requests (W4)."""
        saves = [save for save in self._saves if save.order.req_id in orders.settle]
        reading = self._finish_copies(saves, SETTLE_S)
        if reading:
            # Their pages would be overwritten while they are read: what is stored would be wrong.
            names = ", ".join(sorted({save.order.req_id for save in reading}))
            raise RuntimeError(f"pages of requests that have no claim to them are read: {names}")

    def start_loads(self, orders: StepOrders) -> None:
        """Starts every load (W1)."""
        for order in orders.loads:
            load = Load(order, None, time.monotonic())
            try:
                load.restoring = self._restore(order)
            except Exception as error:
                self._trouble("a load could not be started", error)
            self._loads.append(load)

    def start_saves(self, orders: StepOrders) -> None:
        """Starts every save of blocks that this step has filled."""
        for order in orders.saves:
            self._last_order = max(self._last_order, order.number)
            try:
                saving = self._save(order)
            except Exception as error:
                self._trouble("a save could not be started", error)
                saving = None
            if saving is None:
                self.stats.count("save_failed_blocks", len(order.pages))
                continue
            self._saves.append(Save(order, saving, time.monotonic()))

    def finish(self, orders: StepOrders) -> Report:
        """What has ended since the last step."""
        self._to_report |= orders.report
        self._poll_loads()
        if orders.idle and self._loads and not self._done:
            self._wait(self._loads[0], IDLE_WAIT_S)
            self._poll_loads()
        self._poll_saves()
        copying = {save.order.req_id for save in self._saves if not save.copied}
        sent = self._to_report - copying
        self._to_report -= sent
        loaded, self._done = self._done, set()
        return Report(loaded, sent)

    def take_bad_pages(self) -> set[int]:
        """Pages that did not load, reported in or before the step of their request (W3)."""
        bad, self._bad_pages = self._bad_pages, set()
        return bad

    def copied(self) -> int:
        """Number of the last order up to which all are copied out of the pages."""
        waiting = [save.order.number for save in self._saves if not save.copied]
        return min(waiting) - 1 if waiting else self._last_order

    def close(self) -> None:
        """The engine stops: saves under way get some time, loads get none. Never raises."""
        for load in self._loads:
            try:
                if load.restoring is not None:
                    load.restoring.cancel()
            except Exception as error:
                self._trouble("a load could not be cancelled", error)
        until = time.monotonic() + CANCEL_S
        for load in self._loads:
            self._wait(load, max(until - time.monotonic(), 0.0))
        until = time.monotonic() + self._options.shutdown_timeout_s
        for save in self._saves:
            try:
                save.saving.result(max(until - time.monotonic(), 0.0))
            except Exception as error:
                self._trouble("a save did not end in time", error)
        if self._finish_copies(self._saves, 0.0):
            logger.warning("kvtier: pages are still being read while the engine stops")
        self._loads, self._saves = [], []
        try:
            self._link.close()
        except Exception as error:
            self._trouble("a session did not close", error)

    # Loads.

    def _session(self) -> Any:
        sessions = self._link.usable()
        return sessions[0] if sessions else None

    def _restore(self, order: LoadOrder) -> Any:
        session, keys = self._session(), order.keys[self._rank]
        if session is None or self._pages is None or len(keys) != len(order.pages):
            return None
        deadline = self._options.load_timeout_s
        return session.restore_pages(self._pages.cache, keys, order.pages, deadline=deadline)

    def _wait(self, load: Load, limit_s: float | None = None) -> None:
        if load.restoring is None:
            return
        try:
            load.restoring.result(limit_s)
        except Exception:  # what it raises is looked at when it has ended
            return

    def _poll_loads(self) -> None:
        still = []
        for load in self._loads:
            if load.restoring is not None and not load.restoring.done():
                still.append(load)
            else:
                self._end_load(load)
        self._loads = still

    def _end_load(self, load: Load) -> None:
        """Takes the end of a load, which is certain to have ended (W2, W3)."""
        order, missed = load.order, set(range(len(load.order.pages)))
        if load.restoring is not None:
            try:
                summary = load.restoring.result(0.0)
                missed = {index for index, _ in summary.missed}
                missed.update(range(summary.usable_blocks, len(order.pages)))
                self._link.back()
            except Exception as error:
                self._trouble("a load failed", error)
                self._link.failed(error)
        loaded = len(order.pages) - len(missed)
        self.stats.count("loaded_blocks", loaded)
        self.stats.count("loaded_bytes", loaded * (self._pages.block_bytes if self._pages else 0))
        self.stats.count("load_failed_blocks", len(missed))
        self.stats.observe("load_seconds", time.monotonic() - load.started)
        if missed:
            self._bad_pages.update(order.pages[index] for index in missed)
        self._done.add(order.req_id)

    # Saves.

    def _save(self, order: SaveOrder) -> Any:
        session = self._session()
        if session is None or self._pages is None:
            return None
        size, parent = self._block_tokens, order.parents[self._rank]
        blocks = []
        for index, key in enumerate(order.keys[self._rank], order.first):
            position = index * size
            blocks.append(self._save_block(key, parent=parent, position=position, tokens=size))
            parent = key
        # Without a device the daemon's memory is as far as a block gets.
        wait = "durable" if session.is_durable else "accepted"
        return session.save_pages(self._pages.cache, blocks, order.pages, wait=wait)

    def _poll_saves(self) -> None:
        still = []
        for save in self._saves:
            save.copied = save.copied or save.saving.copied()
            if save.saving.done() and save.copied:
                self._end_save(save)
            else:
                still.append(save)
        self._saves = still

    def _end_save(self, save: Save) -> None:
        try:
            outcomes = save.saving.result(0.0)
        except Exception as error:
            # One that was settled in time is nobody's fault.
            if type(error).__name__ != "Cancelled":
                self._trouble("a save failed", error)
                self._link.failed(error)
            self.stats.count("save_failed_blocks", len(save.order.pages))
            return
        self._link.back()
        new = sum(outcome.status == "stored" for outcome in outcomes)
        known = sum(outcome.status == "already" for outcome in outcomes)
        self.stats.count("saved_blocks", new)
        self.stats.count("saved_bytes", new * (self._pages.block_bytes if self._pages else 0))
        self.stats.count("save_known_blocks", known)
        self.stats.count("save_failed_blocks", len(outcomes) - new - known)
        self.stats.observe("save_seconds", time.monotonic() - save.started)

    def _finish_copies(self, saves: list[Save], limit_s: float) -> list[Save]:
        """Waits at most `limit_s` for all of these to be copied, then cancels the rest and waits
        for what is being copied at this moment. Returns those that read pages even so."""
        self._wait_copied(saves, limit_s)
        reading = [save for save in saves if not save.copied]
        for save in reading:
            try:
                save.saving.cancel()
            except Exception as error:
                self._trouble("a save could not be cancelled", error)
        self._wait_copied(reading, CANCEL_S)
        return [save for save in reading if not save.copied]

    def _wait_copied(self, saves: list[Save], limit_s: float) -> None:
        until = time.monotonic() + limit_s
        for save in saves:
            try:
                if not save.copied:
                    left = max(until - time.monotonic(), 0.0)
                    save.copied = bool(save.saving.wait_copied(left))
            except Exception as error:
                self._trouble("a save failed", error)

    def _trouble(self, what: str, error: BaseException) -> None:
        self._link.away(error)
        logger.debug("kvtier: %s: %s: %s", what, type(error).__name__, error)
