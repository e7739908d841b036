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
from pathlib import Path
from typing import Any

from interfaces import Sources, class_of, method_of, write

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


def version(sources: Sources) -> str:
    """Version, as the package says it."""
    text = sources.read("_version.py") or ""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id in ("version", "__version__"):
                    return str(node.value.value).split("+")[0]
    raise SystemExit("no version in _version.py")


def record(source: Path) -> dict[str, Any]:
    """The interface of the vLLM at `source`."""
    sources = Sources(source, "vllm")
    classes: dict[str, Any] = {}
    functions: dict[str, Any] = {}
    for name, wanted in CLASSES.items():
        text = sources.read(name)
        for node in ast.parse(text).body if text else ():
            if isinstance(node, ast.ClassDef) and node.name in wanted:
                classes[node.name] = class_of(node)
            if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS.get(name, ()):
                functions[node.name] = method_of(node)
    return {"vllm": version(sources), "classes": classes, "functions": functions}


if __name__ == "__main__":
    write(record, __doc__)
