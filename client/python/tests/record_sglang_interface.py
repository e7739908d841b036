"""Records the interface of one SGLang that the storage backend meets, as JSON.

    record_sglang_interface.py SOURCE OUT

SOURCE is the package folder of an installed SGLang, or a wheel of it. Sources are read, not
imported, so that versions can be recorded that are not installed, without torch.

What is recorded: the methods of the class that the backend derives from and of the host pools
that it reads, with their parameters, and the fields of SGLang's objects that it looks at.
`test_sglang_conformance.py` holds the backend to every recording in `sglang_interfaces/`.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from interfaces import Sources, class_of, write

CLASSES = {
    "HiCacheStorage": ["srt/mem_cache/hicache_storage.py"],
    "HiCacheStorageConfig": ["srt/mem_cache/hicache_storage.py"],
    "HiCacheStorageExtraInfo": ["srt/mem_cache/hicache_storage.py"],
    "PoolName": ["srt/mem_cache/hicache_storage.py"],
    "PoolHitPolicy": ["srt/mem_cache/hicache_storage.py"],
    "PoolTransfer": ["srt/mem_cache/hicache_storage.py"],
    "PoolTransferResult": ["srt/mem_cache/hicache_storage.py"],
    "HostKVCache": ["srt/mem_cache/pool_host/base.py", "srt/mem_cache/memory_pool_host.py"],
    "MHATokenToKVPoolHost": ["srt/mem_cache/pool_host/mha.py", "srt/mem_cache/memory_pool_host.py"],
    "MLATokenToKVPoolHost": ["srt/mem_cache/pool_host/mla.py", "srt/mem_cache/memory_pool_host.py"],
    "StorageMetrics": [
        "srt/observability/metrics_collector.py",
        "srt/metrics/collector.py",
    ],
}
"""Classes and the files in which one version or another has them."""

FUNCTIONS = {
    "get_server_args": "srt/runtime_context.py",
    "get_global_server_args": "srt/server_args.py",
    "storage_namespace_seed": "srt/mem_cache/utils.py",
}
"""Functions that some versions have."""


def version(sources: Sources, source: Path) -> str:
    """Version, as the name of the metadata says it."""
    names = sources.names or {f"{path.name}/" for path in source.parent.iterdir()}
    for name in names:
        folder = name.split("/")[0]
        if folder.startswith("sglang-") and folder.endswith(".dist-info"):
            return folder.removeprefix("sglang-").removesuffix(".dist-info")
    raise SystemExit("no metadata beside the package")


def record(source: Path) -> dict[str, Any]:
    """The interface of the SGLang at `source`."""
    sources = Sources(source, "sglang")
    classes: dict[str, Any] = {}
    for name, files in CLASSES.items():
        for file in files:
            text = sources.read(file)
            for node in ast.parse(text).body if text else ():
                if isinstance(node, ast.ClassDef) and node.name == name and name not in classes:
                    classes[name] = class_of(node)
    functions = []
    for name, file in FUNCTIONS.items():
        text = sources.read(file)
        found = ast.parse(text).body if text else []
        if any(isinstance(node, ast.FunctionDef) and node.name == name for node in found):
            functions.append(name)
    return {"sglang": version(sources, source), "classes": classes, "functions": functions}


if __name__ == "__main__":
    write(record, __doc__)
