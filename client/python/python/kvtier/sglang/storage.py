"""`KvtierStorage`: what SGLang calls, in the process of each rank.

Upstairs:   SGLang (`HiCacheStorage`), from its scheduler, prefetch and backup threads.
Downstairs: `mover` does the work; here are the interface's shapes only.

What is set up wrongly is refused when SGLang starts, by a ValueError that says what is accepted.
After that nothing here may raise: what cannot be served is a miss.

Not here on purpose
  Other pools than that of the KV pages (indexer, Mamba, sliding windows): their pages are misses,
  so a model that needs them computes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult

from ..vllm.identity import describe
from .identity import chains_adapters, descriptor, facts_of, model_of, server_args
from .link import Link
from .mover import Mover
from .options import Options
from .pool import HostPages
from .pool import describe as describe_pool
from .stats import Stats

if TYPE_CHECKING:
    import torch
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
        PoolTransfer,
    )
    from sglang.srt.mem_cache.pool_host import HostKVCache

STAGING_MIN = 64 << 20
STAGING_PAGES = 8
PAGE = 4096

logger = logging.getLogger("sglang.kvtier")


class KvtierStorage(HiCacheStorage):
    """Keeps the pages of SGLang's host pool in the kvtier daemon of this host."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        self._config = storage_config
        self._options = Options.parse(storage_config.extra_config)
        self._server = server_args()
        if int(getattr(storage_config, "dcp_size", 1) or 1) != 1:
            raise ValueError("decode context parallelism is on; accepted: --dcp-size 1")
        if getattr(self._server, "enable_lora", False) and not chains_adapters():
            raise ValueError(
                "this SGLang's page hashes do not name the adapter; accepted: no --enable-lora, "
                "or SGLang 0.5.20 or later"
            )
        self._model = model_of(storage_config.model_name, self._options, self._server)
        self._stats = Stats(bool(storage_config.enable_storage_metrics))
        self._pages: HostPages | None = None
        self._mover: Mover | None = None

    # Pools.

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        """The pool is there: begins to connect. ValueError when its pages cannot be kept."""
        self.mem_pool_host = mem_pool_host
        pages = describe_pool(mem_pool_host)
        if pages == self._pages:
            return
        if self._mover is not None:
            self._mover.close()
        self._pages, self._mover = pages, self._connect(pages)

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: Any) -> None:
        """One of several pools: that of the KV pages is kept."""
        if not hasattr(self, "registered_pools"):
            self.registered_pools: dict[Any, Any] = {}
        self.registered_pools[host_pool_name] = host_pool
        if host_pool_name == PoolName.KV:
            self.register_mem_pool_host(host_pool)
        else:
            logger.warning(
                "kvtier: pages of the pool %s are not kept; a model that needs them computes",
                host_pool_name,
            )

    def _connect(self, pages: HostPages) -> Mover:
        import kvtier

        config, options, pool = self._config, self._options, pages.owner
        facts = facts_of(config, pages, pool, self._server, options.share_dp)
        model = descriptor(kvtier, self._model, pages, facts, config)
        staging = options.staging_mib << 20 or max(STAGING_MIN, STAGING_PAGES * pages.page_bytes)
        rank = f"tp {config.tp_rank} pp {config.pp_rank} dp {getattr(config, 'dp_rank', 0)}"

        def open_session() -> Any:
            client = kvtier.connect(
                options.socket,
                connect_timeout=options.lookup_timeout_s,
                control_timeout=options.load_timeout_s,
                commit_timeout=options.save_timeout_s,
                restore_idle_timeout=options.load_timeout_s,
                descriptor_socket=options.descriptor_socket or None,
            )
            return client.open_session(
                model,
                client_name=f"sglang {facts['sglang']} {rank} pid {os.getpid()}",
                staging_bytes=-(-staging // PAGE) * PAGE,
            )

        link = Link(open_session, rank)
        mover = Mover(kvtier, options, pages, pages.cache(kvtier, model), link, self._stats)
        link.start(options.connect_wait_s)
        logger.info(
            "kvtier (%s): pages of %d tokens, %d bytes, %d pieces of %s; %s",
            rank,
            pages.page_tokens,
            pages.page_bytes,
            len(pages.pieces),
            pages.element,
            describe(facts),
        )
        return mover

    # Pages of the pool.

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """Leading pages that are stored."""
        return 0 if self._mover is None else self._mover.exists(keys, extra_info)

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Loads pages into the pool; False for each that did not come wholly."""
        if self._mover is None:
            return [False] * len(keys)
        return self._mover.load(keys, host_indices, extra_info)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Saves pages of the pool, which may be given away when this returns."""
        if self._mover is None:
            return [False] * len(keys)
        return self._mover.save(keys, host_indices, extra_info)

    # Pages of several pools.

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Leading pages that are stored, and with them what the other pools need: nothing is."""
        there = self.batch_exists(keys, extra_info)
        hits: dict[Any, int] = {PoolName.KV: there} if there else {}
        usable = there
        for transfer in pool_transfers or ():
            # Groups of blocks are another form of pages that are there; they are not needed.
            if transfer.name != PoolName.KV and transfer.hit_policy != "block_groups":
                usable = 0
        result = PoolTransferResult(usable, hits)
        if hasattr(result, "restorable_prefix_pages"):
            result.restorable_prefix_pages = list(range(1, usable + 1))
        return result

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Loads pages of each pool; those of other pools are misses."""
        return _each(transfers, self.batch_get_v1, extra_info)

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Saves pages of each pool; those of other pools are not stored."""
        return _each(transfers, self.batch_set_v1, extra_info)

    # Pages as flat tensors: without `"interface_v1": 1`.

    def get(
        self, key: str, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> torch.Tensor | None:
        """A page as a flat tensor, in `target_location` where there is one."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> list[torch.Tensor | None]:
        """Pages as flat tensors; None for each that is not there."""
        if self._mover is None or self._pages is None or not self._pages.flat:
            return [None] * len(keys)
        targets = list(target_locations or [None] * len(keys))
        pool = self._pages.owner
        targets = [pool.get_dummy_flat_data_page() if t is None else t for t in targets]
        loaded = self._mover.load_flat(keys, targets)
        return [target if ok else None for target, ok in zip(targets, loaded, strict=False)]

    def set(
        self,
        key: str,
        value: Any | None = None,
        target_location: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Saves a page given as a flat tensor."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Saves pages given as flat tensors. True when all are stored."""
        if self._mover is None:
            return False
        return all(self._mover.save_flat(keys, _list(values)))

    def exists(self, key: str) -> bool:
        """True when the page is stored."""
        return self.batch_exists([key]) == 1

    # All of it.

    def clear(self) -> bool:
        """Forgets every block of the daemon's namespace, of other engines in it too."""
        return self._mover is None or self._mover.clear()

    def get_stats(self) -> Any:
        """What was moved since the last call, for SGLang's metrics."""
        if not self._config.enable_storage_metrics:
            return None
        metrics = _metrics_class()
        if metrics is None:
            return None
        found = metrics()
        for name, values in self._stats.take().items():
            getattr(found, name).extend(values)
        return found

    def close(self) -> None:
        """SGLang lets go of the storage."""
        if self._mover is not None:
            self._mover.close()


def _each(
    transfers: Sequence[PoolTransfer],
    move: Callable[[list[str], Any, Any], list[bool]],
    extra_info: HiCacheStorageExtraInfo | None,
) -> dict[str, list[bool]]:
    """Moves the KV pages of several pools; nothing is done for other pages."""
    moved = {}
    for transfer in transfers:
        keys = transfer.keys or []
        is_kept = transfer.name == PoolName.KV
        moved[transfer.name] = (
            move(keys, transfer.host_indices, extra_info) if is_kept else [False] * len(keys)
        )
    return moved


def _list(values: Sequence[Any] | None) -> list[Any]:
    return [] if values is None else list(values)


def _metrics_class() -> Any:
    try:
        from sglang.srt.observability.metrics_collector import StorageMetrics
    except ImportError:  # another version
        return None
    return StorageMetrics
