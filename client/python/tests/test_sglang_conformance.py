"""The storage backend against SGLang's interface: every recorded version, and the installed one.

Recordings are made by `record_sglang_interface.py`; without SGLang the backend's source is read
instead of imported, so that this runs everywhere. With SGLang the backend is loaded by SGLang's
own factory, over a daemon, with a real host pool.

Writes the table of versions in docs/engines/sglang.md: KVTIER_TEST_REGENERATE=1 does it, without
it the table must be current.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
from pathlib import Path

import pytest

from interfaces import with_table
from record_sglang_interface import CLASSES, record
from sglang_fakes import HAS_SGLANG, KvtierStorage, config, hashes

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "python" / "kvtier" / "sglang" / "storage.py"
PAGE = HERE.parents[2] / "docs" / "engines" / "sglang.md"
RECORDINGS = sorted((HERE / "sglang_interfaces").glob("*.json"))

READ = {
    "HiCacheStorageConfig": [
        "enable_storage_metrics",
        "extra_config",
        "is_mla_model",
        "model_name",
        "pp_rank",
        "pp_size",
        "should_split_heads",
        "tp_lcm_size",
        "tp_rank",
        "tp_size",
    ],
    "HiCacheStorageExtraInfo": ["prefix_keys", "extra_info"],
    "PoolName": ["KV"],
    "PoolTransfer": ["name", "host_indices", "keys", "hit_policy"],
    "PoolTransferResult": ["kv_hit_pages", "extra_pool_hit_pages"],
    "HostKVCache": ["dtype", "layout", "page_size", "size", "size_per_token"],
    "StorageMetrics": ["prefetch_pgs", "backup_pgs", "prefetch_bandwidth", "backup_bandwidth"],
}
"""Fields of SGLang's objects that the backend cannot do without."""

CALLED = {
    "MHATokenToKVPoolHost": ["get_page_buffer_meta", "get_data_page", "get_dummy_flat_data_page"],
    "MLATokenToKVPoolHost": ["get_page_buffer_meta", "get_data_page", "get_dummy_flat_data_page"],
}
"""Methods of host pools that the backend calls."""

BETTER = {
    "storage_namespace_seed": "adapters (`--enable-lora` is refused), salts in names",
}
"""Functions that some versions lack, and what is lacking there."""


def ours() -> dict[str, list[str]]:
    """Methods of our class and their parameters, from the source."""
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "KvtierStorage":
            return {
                item.name: [arg.arg for arg in item.args.args]
                for item in node.body
                if isinstance(item, ast.FunctionDef)
            }
    raise AssertionError("no KvtierStorage")


def problems(interface: dict) -> list[str]:
    """What of this version the backend does not meet."""
    found, given = [], ours()
    base = interface["classes"].get("HiCacheStorage", {"methods": {}})["methods"]
    if not base:
        found.append("no class HiCacheStorage")
    for method, recorded in base.items():
        if recorded.get("abstractmethod") and method not in given:
            found.append(f"KvtierStorage lacks {method}")
        wanted = recorded["parameters"]
        if method in given and method != "__init__" and given[method][: len(wanted)] != wanted:
            found.append(f"{method}{given[method]}, called with {wanted}")
    for name, fields in READ.items():
        has = set(interface["classes"].get(name, {"fields": []})["fields"])
        found += [f"no {name}.{field}" for field in fields if field not in has]
    for name, methods in CALLED.items():
        has = set(interface["classes"].get(name, {"methods": {}})["methods"])
        found += [f"no {name}.{method}()" for method in methods if method not in has]
    return found


def test_there_are_recordings_and_they_have_what_is_read() -> None:
    assert RECORDINGS
    assert set(READ) | set(CALLED) <= set(CLASSES)
    assert json.loads(RECORDINGS[-1].read_text())["sglang"] == "0.5.23"


def test_a_difference_is_noticed() -> None:
    interface = json.loads(RECORDINGS[-1].read_text())
    methods = interface["classes"]["HiCacheStorage"]["methods"]
    methods["batch_get_v1"]["parameters"].append("more")
    methods["brand_new"] = {"parameters": ["self"], "required": 1, "abstractmethod": True}
    interface["classes"]["HostKVCache"]["fields"].remove("size_per_token")
    del interface["classes"]["MLATokenToKVPoolHost"]["methods"]["get_page_buffer_meta"]
    found = "; ".join(problems(interface))
    for said in (
        "batch_get_v1[",
        "lacks brand_new",
        "no HostKVCache.size_per_token",
        "buffer_meta",
    ):
        assert said in found


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_backend_meets_the_recorded_interface(path: Path) -> None:
    interface = json.loads(path.read_text())
    assert interface["sglang"] == path.stem
    assert problems(interface) == []


def test_every_method_of_the_newest_interface_is_ours_or_may_be_left_to_the_base() -> None:
    interface = json.loads(RECORDINGS[-1].read_text())
    left = set(interface["classes"]["HiCacheStorage"]["methods"]) - set(ours())
    assert left == {"on_host_pools_registered"}


def table() -> str:
    """The table of versions for the page."""
    lines = ["| SGLang | interface | lacking there |", "|---|---|---|"]
    for interface in sorted((json.loads(p.read_text()) for p in RECORDINGS), key=number)[::-1]:
        found = problems(interface)
        lacking = [text for name, text in BETTER.items() if name not in interface["functions"]]
        verdict = "met" if not found else "not met: " + "; ".join(found[:3])
        lines.append(f"| {interface['sglang']} | {verdict} | {'; '.join(lacking) or 'nothing'} |")
    return "\n".join(lines) + "\n"


def number(interface: dict) -> list[int]:
    """Order of versions."""
    return [int(part) for part in interface["sglang"].split(".")[:3]]


def test_the_page_has_the_current_table_of_versions() -> None:
    wanted = with_table(PAGE, table())
    assert PAGE.read_text() == wanted, "KVTIER_TEST_REGENERATE=1 writes the table"


@pytest.mark.skipif(not HAS_SGLANG, reason="needs an installed SGLang")
def test_the_backend_meets_the_installed_sglang() -> None:
    package = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    assert problems(record(package)) == []
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    assert issubclass(KvtierStorage, HiCacheStorage)
    assert not inspect.isabstract(KvtierStorage)
    for method, function in vars(HiCacheStorage).items():
        if inspect.isfunction(function) and method in vars(KvtierStorage):
            wanted = list(inspect.signature(function).parameters)
            given = list(inspect.signature(getattr(KvtierStorage, method)).parameters)
            assert given[: len(wanted)] == wanted or method == "__init__", method


LAYOUTS = [
    *(
        ("mha", layout)
        for layout in ("layer_first", "page_first", "page_first_direct", "page_head")
    ),
    *(("mla", layout) for layout in ("layer_first", "page_first", "page_first_direct")),
]


@pytest.mark.skipif(not HAS_SGLANG, reason="needs an installed SGLang")
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_a_real_host_pool_of_the_installed_sglang_comes_back(daemon, kind, layout) -> None:
    import torch
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
        PoolName,
        PoolTransfer,
    )
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    pool = mha_pool(torch, layout) if kind == "mha" else mla_pool(torch, layout)
    extra = {"socket": str(daemon.socket), "connect_wait_s": 20.0}
    values = vars(config(is_mla_model=kind == "mla", extra=extra))
    storage = StorageBackendFactory.create_backend("dynamic", HiCacheStorageConfig(**values), pool)
    storage.register_mem_pool_host(pool)
    storage.register_mem_host_pool_v2(pool, PoolName.KV)
    storage.on_host_pools_registered()
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape).bfloat16())
    before, keys = pool.kv_buffer.clone(), hashes(8)
    places = torch.arange(8 * 64)
    info = HiCacheStorageExtraInfo(prefix_keys=[])
    assert storage.batch_set_v1(keys[:4], places[: 4 * 64], info) == [True] * 4
    saved = storage.batch_set_v2([PoolTransfer(PoolName.KV, places[4 * 64 :], keys=keys[4:])])
    assert saved == {PoolName.KV: [True] * 4}
    assert storage.batch_exists([*keys, "f" * 64], info) == 8
    pool.kv_buffer.zero_()
    assert storage.batch_get_v1(keys, places, info) == [True] * 8
    assert torch.equal(pool.kv_buffer, before)
    # The way without "interface_v1": pages as flat tensors.
    pool.kv_buffer.zero_()
    found = storage.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
    for page, value in enumerate(found):
        pool.set_from_flat_data_page(page * 64, value)
    assert torch.equal(pool.kv_buffer, before)
    flat = [pool.get_data_page(page * 64) for page in range(8)]
    assert storage.batch_set(hashes(8, first=50), flat)
    pool.kv_buffer.zero_()
    assert storage.batch_get_v1(hashes(8, first=50), places, info) == [True] * 8
    assert torch.equal(pool.kv_buffer, before)
    storage.close()


def mha_pool(torch, layout: str):
    """A host pool of SGLang 0.5.23 for a small model on the CPU."""
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    layers, heads, dim, page, pages = 3, 2, 32, 64, 8
    device = [torch.zeros(pages * page, heads, dim).bfloat16() for _ in range(2 * layers)]
    k, v = tuple(device[:layers]), tuple(device[layers:])
    addresses = [torch.tensor([t.data_ptr() for t in part], dtype=torch.uint64) for part in (k, v)]
    buffers = KVBuffers(
        k=k, v=v, k_data_ptrs=addresses[0], v_data_ptrs=addresses[1], layout=KVBufferLayout.NHD
    )
    info = MHABufferInfo(
        buffers=buffers,
        page_size=page,
        head_num=heads,
        head_dim=dim,
        v_head_dim=dim,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return MHATokenToKVPoolHost(
        info,
        host_to_device_ratio=1.0,
        host_size=0,
        page_size=page,
        layout=layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=pages * page,
        start_layer=0,
        end_layer=layers - 1,
        host_token_capacity=pages * page,
    )


def mla_pool(torch, layout: str):
    """The same for a small model with latent attention."""
    from sglang.srt.mem_cache.device_pool_info import MLABufferInfo
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    layers, latent, rope, page, pages = 3, 32, 16, 64, 8
    device = tuple(torch.zeros(pages * page, 1, latent + rope).bfloat16() for _ in range(layers))
    info = MLABufferInfo(
        buffers=device,
        data_ptrs=torch.tensor([t.data_ptr() for t in device], dtype=torch.uint64),
        layer_indices=tuple(range(layers)),
        device_layer_num=layers,
        page_size=page,
        kv_lora_rank=latent,
        qk_rope_head_dim=rope,
        kv_cache_dim=latent + rope,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return MLATokenToKVPoolHost(
        info,
        host_to_device_ratio=1.0,
        host_size=0,
        page_size=page,
        layout=layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=pages * page,
        start_layer=0,
        end_layer=layers - 1,
        target_layer_num=layers,
        host_token_capacity=pages * page,
    )
