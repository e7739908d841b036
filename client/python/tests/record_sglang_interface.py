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
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from record_vllm_interface import _class

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


class Sources:
    """Files of a package folder or a wheel."""

    def __init__(self, source: Path):
        self._zip = zipfile.ZipFile(source) if source.suffix == ".whl" else None
        self._folder = source
        self._names = set(self._zip.namelist()) if self._zip else set()

    def read(self, name: str) -> str | None:
        """Text of a file of the package; None where it has none such."""
        if self._zip is not None:
            path = f"sglang/{name}"
            return self._zip.read(path).decode() if path in self._names else None
        file = self._folder / name
        return file.read_text() if file.is_file() else None

    def version(self) -> str:
        """Version, as the name of the metadata says it."""
        names = self._names or {f"{path.name}/" for path in self._folder.parent.iterdir()}
        for name in names:
            folder = name.split("/")[0]
            if folder.startswith("sglang-") and folder.endswith(".dist-info"):
                return folder.removeprefix("sglang-").removesuffix(".dist-info")
        raise SystemExit("no metadata beside the package")


def record(source: Path) -> dict[str, Any]:
    """The interface of the SGLang at `source`."""
    sources = Sources(source)
    classes: dict[str, Any] = {}
    for name, files in CLASSES.items():
        for file in files:
            text = sources.read(file)
            for node in ast.parse(text).body if text else ():
                if isinstance(node, ast.ClassDef) and node.name == name and name not in classes:
                    classes[name] = _class(node)
    functions = []
    for name, file in FUNCTIONS.items():
        text = sources.read(file)
        found = ast.parse(text).body if text else []
        if any(isinstance(node, ast.FunctionDef) and node.name == name for node in found):
            functions.append(name)
    return {"sglang": sources.version(), "classes": classes, "functions": functions}


def main() -> None:
    """Records one version."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    recorded = record(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
