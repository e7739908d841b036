"""`KvtierConnector`: what vLLM calls, in the scheduler's process and in each worker's.

Upstairs:   vLLM (`KVConnectorBase_V1`, with `SupportsHMA`).
Downstairs: `scheduler` and `worker` do the work; here are the interface's shapes only.

Nothing here may end the engine: an engine that cannot be served is told so once in the log and
runs as if there were no connector.
"""

from __future__ import annotations

import atexit
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from .engine import Engine, describe_engine
from .link import DaemonDirectory, Link
from .memory import register
from .metrics import KvtierPromMetrics, KvtierStats
from .options import Options
from .orders import StepOrders
from .scheduler import SchedulerSide
from .worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

CONNECT_WAIT_S = 3.0
"""How long the start of the engine waits for the daemon. It goes on without it after that."""

logger = logging.getLogger("vllm.kvtier")


def _rank() -> int:
    """Tensor-parallel rank of this process."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


@dataclass
class KvtierMetadata(KVConnectorMetadata):
    """From the scheduler to the workers, in each step."""

    orders: StepOrders = field(default_factory=StepOrders)


@dataclass
class KvtierWorkerMetadata(KVConnectorWorkerMetadata):
    """From the workers to the scheduler."""

    copied: int = 0
    """Orders up to this number are copied out of the pages."""
    shards: dict[int, bytes] = field(default_factory=dict)
    """Fingerprint of each rank's descriptor; empty where a rank keeps nothing."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """What holds for both: the slower worker counts."""
        shards = {**self.shards, **other.shards}
        return KvtierWorkerMetadata(min(self.copied, other.copied), shards)


class KvtierConnector(KVConnectorBase_V1, SupportsHMA):
    """Saves full blocks to the kvtier daemon of this host and loads them from it."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        options = Options.parse(transfer.kv_connector_extra_config)
        options = options.of_role(transfer.is_kv_producer, transfer.is_kv_consumer)
        self._options, self._notice = options.of_policy(transfer.kv_load_failure_policy)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._link: Link | None = None
        self._engine: Engine | None = None
        self._shards: dict[int, bytes] = {}
        try:
            engine = describe_engine(vllm_config, kv_cache_config, self._options)
            if isinstance(engine, Engine):
                if role == KVConnectorRole.SCHEDULER:
                    self._start_scheduler(engine)
                else:
                    self._start_worker(engine)
                self._engine = engine
                return
        except Exception as error:  # files of the model, most often
            engine = f"{type(error).__name__}: {error}"
        logger.warning("kvtier: nothing is saved or loaded: %s", engine)
        if self._link is not None:
            self._link.close()
        if role == KVConnectorRole.WORKER:
            # The scheduler may see no reason: it is told, and what it orders till then fails.
            self._shards = {_rank(): b""}
            self._worker = WorkerSide(self._options, 0, 0, Link(list, "off"), dict)

    def _start_scheduler(self, engine: Engine) -> None:
        if self._notice:
            logger.warning("kvtier: %s", self._notice)
        logger.info("kvtier: %s", engine.summary())
        ranks = range(engine.tp_size)
        self._link = Link(lambda: [engine.open(rank, staging=False) for rank in ranks], "scheduler")
        self._link.start(CONNECT_WAIT_S)
        directory = DaemonDirectory(self._link)
        tokens = engine.geometry.block_tokens
        expected = {rank: engine.descriptor(rank).fingerprint for rank in ranks}
        self._scheduler = SchedulerSide(self._options, tokens, directory, time.monotonic, expected)

    def _start_worker(self, engine: Engine) -> None:
        rank = _rank()
        self._shards = {rank: engine.descriptor(rank).fingerprint}
        self._link = Link(lambda: [engine.open(rank, staging=True)], f"worker {rank}")
        self._link.start(CONNECT_WAIT_S)
        tokens = engine.geometry.block_tokens
        self._worker = WorkerSide(self._options, tokens, rank, self._link, engine.kvtier.SaveBlock)
        # An engine that is dropped without a word still gets its last saves out.
        atexit.register(self.shutdown)

    def shutdown(self) -> None:
        """Ends what is under way. May be called more than once."""
        atexit.unregister(self.shutdown)
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
        elif self._link is not None:
            self._link.close()

    # Both sides.

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not saved is computed again."""
        return False

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What was counted on this side since the last call."""
        side = self._scheduler or self._worker
        data = side.stats.take() if side is not None else {}
        return KvtierStats(data=data) if data else None

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """The statistics that `data` are of."""
        return KvtierStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """The counters in Prometheus."""
        return KvtierPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Scheduler.

    def on_new_request(self, request: Request) -> None:
        """Starts to ask what is stored of the request."""
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded. Never waits."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The request has pages to load into."""
        if self._scheduler is not None and num_external_tokens > 0:
            pages = blocks.get_block_ids()[0]
            self._scheduler.allocated(request, pages, num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[Any, int]:
        """Tokens to load by the tier that has them."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        if self._scheduler is None or num_external_tokens == 0:
            return {}
        sources = self._scheduler.sources(request, num_external_tokens)
        return {CacheHitSource(tier): tokens for tier, tokens in sources.items()}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers do in this step."""
        if self._scheduler is None:
            return KvtierMetadata()
        return KvtierMetadata(self._scheduler.build(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers have done."""
        if self._scheduler is None:
            return
        meta = connector_output.kv_connector_worker_meta
        self._scheduler.learned(
            set(connector_output.finished_recving or ()),
            set(connector_output.finished_sending or ()),
            set(connector_output.invalid_block_ids or ()),
            meta.copied if isinstance(meta, KvtierWorkerMetadata) else None,
            meta.shards if isinstance(meta, KvtierWorkerMetadata) else {},
        )

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether the pages must stay until saves are copied."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether the pages must stay until saves are copied."""
        if self._scheduler is None:
            return False, None
        return self._scheduler.finished(request), None

    def has_pending_block_frees(self) -> bool:
        """True while pages of ended requests stay for us."""
        return self._scheduler is not None and self._scheduler.has_delayed()

    def reset_cache(self) -> bool | None:
        """The weights may have changed: what was stored is no longer loaded by this engine."""
        if self._scheduler is not None:
            self._scheduler.forget_cache()
        return True

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The engine's pages are there."""
        if self._worker is None or self._engine is None:
            return
        engine = self._engine
        blocks = self._kv_cache_config.num_blocks
        try:
            model = engine.descriptor(_rank())
            self._worker.register(
                register(engine.kvtier, model, engine.geometry, blocks, kv_caches)
            )
        except Exception as error:
            logger.warning("kvtier: nothing is saved or loaded: %s", error)
            self._shards = {_rank(): b""}

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Pages are about to be given to others."""
        if self._worker is not None and isinstance(kv_connector_metadata, KvtierMetadata):
            self._worker.settle(kv_connector_metadata.orders)

    def _orders(self) -> StepOrders:
        meta = self._connector_metadata
        return meta.orders if isinstance(meta, KvtierMetadata) else StepOrders()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Starts this step's loads."""
        if self._worker is not None:
            self._worker.start_loads(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads that a step needs are there before it begins."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing: a block is saved whole, after the step that fills it."""

    def wait_for_save(self) -> None:
        """Starts the saves of what this step has filled."""
        if self._worker is not None:
            self._worker.start_saves(self._orders())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose pages are no longer needed, and those that have loaded."""
        if self._worker is None:
            return None, None
        report = self._worker.finish(self._orders())
        return report.sent or None, report.loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that did not load."""
        return self._worker.take_bad_pages() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """How far copying has come, and what this rank keeps."""
        if self._worker is None:
            return None
        return KvtierWorkerMetadata(self._worker.copied(), self._shards)
