"""Stand-ins for SGLang's modules, tensors and host pools, for tests without SGLang and torch.

A pool is one numpy array and says of itself what SGLang's pools say. Importing this puts the
modules that the backend imports in their places, unless SGLang is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

__all__ = [
    "HAS_SGLANG",
    "SERVER",
    "KvtierStorage",
    "Pool",
    "PoolHitPolicy",
    "PoolName",
    "PoolTransfer",
    "Tensor",
    "config",
    "hashes",
    "info",
]

HAS_SGLANG = importlib.util.find_spec("sglang") is not None

SERVER: list[Any] = [None]
"""What SGLang was started with, as the fake says it."""


class HiCacheStorage:
    """Base of backends."""


class PoolName(str, Enum):  # noqa: UP042, as SGLang writes it
    """Names of pools."""

    KV = "kv"
    MAMBA = "mamba"
    INDEXER = "indexer"


class PoolHitPolicy(str, Enum):  # noqa: UP042
    """What a pool needs of a prefix."""

    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    """Pages of one pool."""

    name: PoolName
    host_indices: Any = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    """What is there."""

    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


@dataclass
class StorageMetrics:
    """What SGLang shows of a storage."""

    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


def _install() -> None:
    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.version": {"__version__": "0.5.23"},
        "sglang.srt": {},
        "sglang.srt.mem_cache": {},
        "sglang.srt.mem_cache.hicache_storage": {
            "HiCacheStorage": HiCacheStorage,
            "PoolName": PoolName,
            "PoolTransferResult": PoolTransferResult,
        },
        "sglang.srt.mem_cache.utils": {"storage_namespace_seed": lambda *_: None},
        "sglang.srt.observability": {},
        "sglang.srt.observability.metrics_collector": {"StorageMetrics": StorageMetrics},
        "sglang.srt.runtime_context": {"get_server_args": lambda: SERVER[0]},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module


if not HAS_SGLANG:
    _install()

from kvtier.sglang import KvtierStorage  # noqa: E402, after the modules that it imports


class Tensor:
    """A view of a numpy array with torch's words."""

    def __init__(self, array: np.ndarray, device: str = "cpu") -> None:
        self.array = array
        self.device = SimpleNamespace(type=device)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize

    def numel(self) -> int:
        return self.array.size

    def data_ptr(self) -> int:
        return self.array.__array_interface__["data"][0]

    def is_contiguous(self) -> bool:
        return self.array.flags.c_contiguous

    def tolist(self) -> list[Any]:
        return self.array.tolist()


class Pool:
    """A host pool of one array. Bytes of `dtype` are held as unsigned integers of its size."""

    def __init__(
        self,
        layout: str = "page_first",
        *,
        mla: bool = False,
        pages: int = 8,
        page_size: int = 16,
        layers: int = 3,
        heads: int = 2,
        dim: int = 8,
        dtype: str = "bfloat16",
        seed: int | None = None,
    ) -> None:
        self.layout, self.page_size, self.page_num = layout, page_size, pages
        self.size = pages * page_size
        self.dtype = f"torch.{dtype}"
        self.layer_num, self.head_num, self.head_dim = layers, 1 if mla else heads, dim
        held = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
        unit = held.get(dtype, np.uint8)
        parts = 1 if mla else 2
        width = self.head_num * dim
        self.size_per_token = parts * layers * width * np.dtype(unit).itemsize
        shape = {
            "layer_first": (parts, layers, self.size, width),
            "page_first": (parts, self.size, layers, width),
            "page_first_direct": (parts, pages, layers, page_size, width),
            "page_head": (parts, pages, self.head_num, page_size, layers, dim),
        }.get(layout, (parts, self.size, layers, width))
        self.array = np.zeros(shape, unit)
        if seed is not None:
            top = np.iinfo(unit).max
            self.array[:] = np.random.default_rng(seed).integers(0, top, shape, unit)

    @property
    def kv_buffer(self) -> Tensor:
        return Tensor(self.array)

    def _view(self, page: int) -> np.ndarray:
        """Bytes of a page, in the order of a flat page."""
        first = page * self.page_size
        if self.layout == "layer_first":
            return self.array[:, :, first : first + self.page_size]
        if self.layout == "page_first":
            return self.array[:, first : first + self.page_size]
        return self.array[:, page : page + 1]

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        """Runs of each page: K and V in turn, layer by layer where layers are apart."""
        tokens = indices.tolist()
        pointers, sizes = [], []
        for at in range(0, len(tokens), self.page_size):
            view = self._view(tokens[at] // self.page_size)
            if self.layout == "layer_first":
                runs = [part[layer] for layer in range(self.layer_num) for part in view]
            else:
                runs = list(view)
            pointers += [Tensor(run).data_ptr() for run in runs]
            sizes += [run.size * run.itemsize for run in runs]
        return pointers, sizes

    def get_data_page(self, index: int, flat: bool = True) -> Tensor:
        view = self._view(index // self.page_size)
        return Tensor(view.flatten() if flat else view)

    def get_dummy_flat_data_page(self) -> Tensor:
        return Tensor(np.zeros(self._view(0).size, self.array.dtype))

    # What tests do.

    def page(self, number: int) -> bytes:
        return self._view(number).tobytes()

    def wipe(self) -> None:
        self.array[:] = 0

    def indices(self, numbers: list[int]) -> Tensor:
        size = self.page_size
        return Tensor(np.concatenate([np.arange(n * size, (n + 1) * size) for n in numbers]))


def config(**changes: Any) -> SimpleNamespace:
    """A HiCacheStorageConfig. `extra` is the extra configuration."""
    values: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": True,
        "model_name": "tests/small",
        "tp_lcm_size": None,
        "should_split_heads": False,
        "dp_rank": 0,
        "extra_config": {},
        "dcp_size": 1,
        "dcp_rank": 0,
    }
    extra = changes.pop("extra", {})
    values |= changes
    values["extra_config"] = {
        "backend_name": "kvtier",
        "module_path": "kvtier.sglang",
        "class_name": "KvtierStorage",
        "interface_v1": 1,
        "weights_fingerprint": "one",
        **extra,
    }
    return SimpleNamespace(**values)


def info(prefix: list[str] | None = None, extra: dict[str, Any] | None = None) -> SimpleNamespace:
    """A HiCacheStorageExtraInfo."""
    return SimpleNamespace(prefix_keys=prefix, extra_info=extra)


def hashes(count: int, first: int = 0) -> list[str]:
    """Page hashes as SGLang makes them: 64 hexadecimal digits."""
    return [f"{first + number:064x}" for number in range(count)]
