"""Records the interface of one vLLM that the connector meets, as JSON.

    record_vllm_interface.py SOURCE OUT

SOURCE is the package folder of an installed vLLM, or a wheel of it. Sources are read, not
imported, so that versions can be recorded that are not installed, without torch.

What is recorded: the methods of the classes that the connector derives from, with their
parameters, and the fields of vLLM's objects that it reads. `test_vllm_conformance.py` holds
the connector to every recording in `vllm_interfaces/`.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

CLASSES = {
    "distributed/kv_transfer/kv_connector/v1/base.py": [
        "KVConnectorBase_V1",
        "SupportsHMA",
        "KVConnectorMetadata",
        "KVConnectorWorkerMetadata",
    ],
    "distributed/kv_transfer/kv_connector/v1/metrics.py": [
        "KVConnectorStats",
        "KVConnectorPromMetrics",
    ],
    "v1/core/sched/output.py": ["SchedulerOutput", "NewRequestData", "CachedRequestData"],
    "v1/outputs.py": ["KVConnectorOutput"],
    "v1/request.py": ["Request"],
    "v1/kv_cache_interface.py": ["KVCacheConfig", "KVCacheGroupSpec", "KVCacheSpecKind"],
    "v1/metrics/cache_hit_source.py": ["CacheHitSource"],
    "config/kv_transfer.py": ["KVTransferConfig"],
    "lora/request.py": ["LoRARequest"],
    "multimodal/inputs.py": ["MultiModalFeatureSpec", "PlaceholderRange"],
}
FUNCTIONS = {"v1/kv_cache_interface.py": ["get_kv_cache_spec_kind"]}


class Sources:
    """Files of a package folder or a wheel."""

    def __init__(self, source: Path):
        self._zip = zipfile.ZipFile(source) if source.suffix == ".whl" else None
        self._folder = source

    def read(self, name: str) -> str | None:
        """Text of a file of the package; None where it has none such."""
        if self._zip is not None:
            names = set(self._zip.namelist())
            return self._zip.read(f"vllm/{name}").decode() if f"vllm/{name}" in names else None
        path = self._folder / name
        return path.read_text() if path.is_file() else None

    def version(self) -> str:
        """Version, as the package says it."""
        text = self.read("_version.py") or ""
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id in ("version", "__version__"):
                        return str(node.value.value).split("+")[0]
        raise SystemExit("no version in _version.py")


def _method(node: ast.FunctionDef) -> dict[str, Any]:
    marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
    own = node.args
    names = [arg.arg for arg in own.posonlyargs + own.args]
    required = len(names) - len(own.defaults)
    method: dict[str, Any] = {"parameters": names, "required": required}
    if own.kwarg is not None:
        method["any_keywords"] = True
    for mark in ("abstractmethod", "classmethod", "property", "cached_property"):
        if mark in marks:
            method[mark] = True
    return method


def _class(node: ast.ClassDef) -> dict[str, Any]:
    methods = {n.name: _method(n) for n in node.body if isinstance(n, ast.FunctionDef)}
    fields = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            fields.append(item.target.id)
        elif isinstance(item, ast.Assign):
            fields += [t.id for t in item.targets if isinstance(t, ast.Name)]
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            for part in ast.walk(function):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    fields.append(part.attr)
    fields += [name for name, m in methods.items() if "property" in m or "cached_property" in m]
    public = {name: m for name, m in methods.items() if not name.startswith("_")}
    public |= {name: m for name, m in methods.items() if name == "__init__"}
    return {"methods": public, "fields": sorted({f for f in fields if not f.startswith("_")})}


def record(source: Path) -> dict[str, Any]:
    """The interface of the vLLM at `source`."""
    sources = Sources(source)
    classes: dict[str, Any] = {}
    functions: dict[str, Any] = {}
    for name, wanted in CLASSES.items():
        text = sources.read(name)
        for node in ast.parse(text).body if text else ():
            if isinstance(node, ast.ClassDef) and node.name in wanted:
                classes[node.name] = _class(node)
            if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS.get(name, ()):
                functions[node.name] = _method(node)
    return {"vllm": sources.version(), "classes": classes, "functions": functions}


def main() -> None:
    """Records one version."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    recorded = record(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
