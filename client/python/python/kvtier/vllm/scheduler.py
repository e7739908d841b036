"""The scheduler's side: what to load, what to save, when pages may be given away.

Upstairs:   `connector`, whose methods of the same names vLLM calls.
Downstairs: `tracker` for each request; a `Directory` that names blocks and looks them up.

vLLM's objects are used by their attributes only, so that tests bring their own.

Invariants kept here
  S1  Nothing waits: a lookup that has not answered is asked again in a later step, and given up
      after `lookup_timeout_s`.
  S2  Pages that a worker may still read or write are not given away: vLLM keeps those of an
      ended request until its saves are copied, and those of a preempted one are settled first.
  S3  A request is reported as sent only if vLLM was told to wait for it, and not while it loads.
  S4  Nothing is computed over pages whose load may still fail, so nothing of it is saved: loads
      are between steps, when their request is not scheduled and its pages are nobody else's.
  S5  Nothing escapes: a request that cannot be named or saved, whatever the reason, is left to
      the engine, and the log says once why. An exception would end the engine.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .chain import Chain, full_blocks, stored_run
from .identity import block_extra, is_cacheable, prefix_extra
from .options import Options
from .orders import StepOrders
from .stats import Stats
from .tracker import Lookup, Question, Tracked
from .weights import Adapters

LOOKUP_KEYS_MAX = 4096
"""Blocks of one question; a longer prefix is asked for as far as that."""
FRESH_S = 2.0
"""An answer that is older than this is asked for again, while its request waits."""
PROBE_S = 5.0
"""Where nothing has been looked up for so long, the sessions are probed: an engine that only saves
would name blocks with the secret of a namespace that is gone."""
REASONS_MAX = 64
"""Most reasons to leave a request that the log names."""

logger = logging.getLogger("vllm.kvtier")


class Names(Protocol):
    """Names blocks of one shard."""

    def name(self, parent: bytes, tokens: Sequence[int], size: int, extra: bytes) -> list[bytes]:
        """Keys of the full blocks of `tokens`, of `size` tokens each."""


class Directory(Protocol):
    """The daemon, as the scheduler needs it."""

    def names(self) -> tuple[int, Sequence[Names]] | None:
        """Generation and one for each rank; None while the daemon is not known. Never waits."""

    def lookup(self, keys: list[list[bytes]], first: int) -> Lookup | None:
        """Starts a lookup of the same blocks for each rank; None while the daemon is away."""

    def probe(self) -> None:
        """Notices sessions that no longer serve. Never waits."""


class SchedulerSide:
    """Everything that is decided in the scheduler's process."""

    def __init__(
        self,
        options: Options,
        block_tokens: int,
        directory: Directory,
        clock: Callable[[], float],
        shards: Mapping[int, bytes] | None = None,
    ) -> None:
        """`shards`: fingerprint of each rank's descriptor, to compare with what workers say."""
        self._options = options
        self._block_tokens = block_tokens
        self._directory = directory
        self._clock = clock
        self._requests: dict[str, Tracked] = {}
        self._orders = StepOrders()
        self._numbered = 0
        self._copied = 0
        self._delayed: set[str] = set()
        # Blocks of each order that no worker has said is copied.
        self._backlog: dict[int, int] = {}
        self._epoch = b""
        self._adapters = Adapters()
        # Requests that are left to the engine without having been named.
        self._left: set[str] = set()
        self._shards = shards or {}
        self._stopped = False
        self._asked_at = clock()
        self._reasons: set[str] = set()
        self.stats = Stats()

    # Requests.

    def on_new_request(self, request: Any) -> None:
        """Asks early: the answer is often here when the request is first looked at."""
        try:
            tracked = self._track(request)
            if tracked is not None and self._options.load and tracked.question is None:
                self._ask(tracked, 0)
        except Exception as error:
            self._leave(request.request_id, error)

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond `computed` that can be loaded, and that it is between steps. None: ask
        again (S1). After a load to the end of the prompt vLLM steps back by a token itself."""
        try:
            return self._matched(request, computed)
        except Exception as error:
            self._leave(request.request_id, error)
            return (0, False)

    def _matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        nothing = (0, False)
        tracked = self._track(request)
        if tracked is None or tracked.gave_up or not self._options.load:
            return nothing
        tracked.matched = (0, 0)
        first = computed // self._block_tokens
        last = full_blocks(request.num_tokens, self._block_tokens)
        last = min(last, first + LOOKUP_KEYS_MAX)
        if last - first < self._options.min_load_blocks:
            return nothing
        question = self._question(tracked, first)
        if question is None:
            return nothing
        if question.tiers is None:
            return (None, False)
        present = [block >= question.first for block in range(question.end)]
        run = stored_run(present, first, last)
        if run < self._options.min_load_blocks:
            return nothing
        tracked.matched = (first, run)
        return (run * self._block_tokens, True)

    def allocated(self, request: Any, pages: Sequence[int], external: int) -> None:
        """vLLM has pages for the request; `external` of its tokens are to be loaded."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or external <= 0:
            return
        tracked.pages = list(pages)
        try:
            order = tracked.order_load(external)
        except Exception as error:
            self._leave(tracked.req_id, error)
            order = tracked.fail_load(external)
        tracked.loading = True
        self._orders.loads.append(order)
        self.stats.count("hit_blocks", len(order.pages))

    def sources(self, request: Any, external: int) -> dict[str, int]:
        """Tokens to load by the tier that has them."""
        tracked = self._requests.get(request.request_id)
        question = tracked.question if tracked else None
        if tracked is None or question is None or question.tiers is None:
            return {}
        first = tracked.matched[0] - question.first
        tokens: dict[str, int] = {}
        for tier in question.tiers[first : first + external // self._block_tokens]:
            tokens[tier] = tokens.get(tier, 0) + self._block_tokens
        return tokens

    def finished(self, request: Any) -> bool:
        """The request has ended. True: vLLM keeps its pages until a worker reports it (S2)."""
        self._left.discard(request.request_id)
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return False
        if tracked.question is not None:
            tracked.question.lookup.cancel()
        # What loads is reported by its load; its saves were settled when it was preempted (S3).
        if tracked.loading or tracked.last_order <= self._copied:
            return False
        self._delayed.add(tracked.req_id)
        self._orders.report.add(tracked.req_id)
        return True

    def forget_cache(self) -> None:
        """vLLM's weights may have changed: nothing from before is loaded any more."""
        self._epoch = secrets.token_bytes(16)
        for tracked in self._requests.values():
            # What is half computed with the old weights is neither saved nor loaded.
            tracked.leave()

    def has_delayed(self) -> bool:
        """True while vLLM keeps pages of ended requests for us."""
        return bool(self._delayed)

    # Steps.

    def build(self, output: Any) -> StepOrders:
        """Orders of the step that vLLM has scheduled."""
        self._probe()
        orders, self._orders = self._orders, StepOrders()
        for req_id in output.preempted_req_ids or ():
            orders.settle.add(req_id)
            if req_id in self._requests:
                self._requests[req_id].lost_pages()
        for new in output.scheduled_new_reqs:
            tracked = self._requests.get(new.req_id)
            if tracked is not None:
                tracked.pages = list(new.block_ids[0])
                self._save(tracked, new.num_computed_tokens, output, orders)
        cached = output.scheduled_cached_reqs
        for index, req_id in enumerate(cached.req_ids):
            tracked = self._requests.get(req_id)
            if tracked is None:
                continue
            added = cached.new_block_ids[index]
            if req_id in cached.resumed_req_ids:
                # Preempted before: all pages are new. Settled here too, for a vLLM that does
                # not name preempted requests.
                orders.settle.add(req_id)
                tracked.lost_pages()
            tracked.pages += added[0] if added else []
            self._save(tracked, cached.num_computed_tokens[index], output, orders)
        orders.idle = output.total_num_scheduled_tokens == 0
        return orders

    def _save(self, tracked: Tracked, computed: int, output: Any, orders: StepOrders) -> None:
        if not self._options.save or not self._is_current(tracked):
            return
        computed += output.num_scheduled_tokens.get(tracked.req_id, 0)
        try:
            made = tracked.order_saves(computed, self._options.save_output)
        except Exception as error:
            self._leave(tracked.req_id, error)
            return
        for order in made:
            waiting = sum(self._backlog.values())
            if waiting + len(order.pages) > self._options.save_backlog_blocks:
                self.stats.count("save_dropped_blocks", len(order.pages))
                continue
            self._numbered += 1
            order.number = self._numbered
            self._backlog[order.number] = len(order.pages)
            tracked.last_order = order.number
            orders.saves.append(order)

    def learned(
        self,
        loaded: set[str],
        reported: set[str],
        bad_pages: set[int],
        copied: int | None,
        shards: Mapping[int, bytes] | None = None,
    ) -> None:
        """What the workers said after a step."""
        self._compare(shards or {})
        for req_id in loaded:
            if req_id in self._requests:
                self._requests[req_id].loading = False
        if bad_pages:
            for tracked in self._requests.values():
                tracked.failed_pages(bad_pages)
        self._delayed -= reported
        if copied is not None and copied > self._copied:
            self._copied = copied
            self._backlog = {n: b for n, b in self._backlog.items() if n > copied}

    def _compare(self, shards: Mapping[int, bytes]) -> None:
        """Keeps nothing more where a worker has other blocks than are named here."""
        other = [
            rank
            for rank, found in shards.items()
            if not found or self._shards.get(rank, found) != found
        ]
        if not other or self._stopped:
            return
        self._stopped = True
        for tracked in self._requests.values():
            tracked.leave()
        logger.warning(
            "kvtier: nothing more is saved or loaded: the worker of rank %s has other blocks than "
            "the scheduler, or none; its log may say why",
            ", ".join(map(str, sorted(other))),
        )

    def _probe(self) -> None:
        now = self._clock()
        if now - self._asked_at > PROBE_S:
            self._asked_at = now
            self._directory.probe()

    # Names and lookups.

    def _track(self, request: Any) -> Tracked | None:
        tracked = self._requests.get(request.request_id)
        if tracked is not None:
            return tracked if self._is_current(tracked) else None
        names = self._directory.names()
        if names is None or not is_cacheable(request):
            return None
        if self._stopped or request.request_id in self._left:
            return None
        generation, shards = names
        adapter = self._adapters.fields(request.lora_request)
        prefix = prefix_extra(adapter, request.cache_salt, self._epoch)
        features, size = list(request.mm_features or ()), self._block_tokens

        def extra_of(block: int) -> bytes:
            return block_extra(prefix, features, block * size, (block + 1) * size)

        chains = [Chain(shard.name, size, extra_of, not features) for shard in shards]
        tracked = Tracked(request.request_id, request, size, chains, generation)
        self._requests[request.request_id] = tracked
        return tracked

    def _leave(self, req_id: str, error: Exception) -> None:
        """The request is computed, and nothing more of it is saved (S5)."""
        tracked = self._requests.get(req_id)
        if tracked is not None:
            tracked.leave()
        else:
            self._left.add(req_id)
        self.stats.count("left_requests")
        reason = f"{type(error).__name__}: {error}"
        if reason not in self._reasons and len(self._reasons) < REASONS_MAX:
            self._reasons.add(reason)
            logger.warning("kvtier: requests are computed and not kept: %s", reason)

    def _is_current(self, tracked: Tracked) -> bool:
        names = self._directory.names()
        return names is not None and names[0] == tracked.generation

    def _ask(self, tracked: Tracked, first: int) -> Question | None:
        size, tokens = self._block_tokens, tracked.request.num_tokens
        last = min(full_blocks(tokens, size), first + LOOKUP_KEYS_MAX)
        tracked.question = None
        if last > first:
            keys = [keys[first:] for keys in tracked.keys(last)]
            lookup = self._directory.lookup(keys, first)
            if lookup is not None:
                self._asked_at = self._clock()
                self.stats.count("lookups")
                tracked.question = Question(lookup, last, self._clock())
        return tracked.question

    def _question(self, tracked: Tracked, first: int) -> Question | None:
        """The question that covers block `first`, with or without its answer; None when there
        is none to be had."""
        question = tracked.question or self._ask(tracked, first)
        if question is None or not self._poll(tracked, question):
            return None
        if question.tiers is None:
            return question
        old = self._clock() - question.answered_at > FRESH_S
        # The daemon lacks a block that the engine has, or was not asked for those that follow:
        # they may be there.
        if old or question.first > first or question.end < first or question.last <= first:
            asked = self._ask(tracked, first)
            return asked if asked is not None and self._poll(tracked, asked) else None
        return question

    def _poll(self, tracked: Tracked, question: Question) -> bool:
        """Takes the answer if there is one. False: there will be none."""
        if question.tiers is not None:
            return True
        now = self._clock()
        try:
            question.tiers = question.lookup.poll()
        except Exception:  # whatever it is, the request is computed; the link says why
            self.stats.count("lookup_failures")
            tracked.question, tracked.gave_up = None, True
            return False
        if question.tiers is None:
            if now - question.asked_at <= self._options.lookup_timeout_s:
                return True
            question.lookup.cancel()
            self.stats.count("lookup_timeouts")
            tracked.question, tracked.gave_up = None, True
            return False
        question.answered_at = now
        tracked.stored.update(range(question.first, question.end))
        return True
