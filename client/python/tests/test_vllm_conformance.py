"""The connector against vLLM's interface: every recorded version, and the one that is installed.

Recordings are made by `record_vllm_interface.py`; without vLLM the connector's source is read
instead of imported, so that this runs everywhere. With vLLM the classes are looked at for real.

Writes the table of versions in docs/engines/vllm.md: KVTIER_TEST_REGENERATE=1 does it, without
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
from record_vllm_interface import CLASSES, FUNCTIONS, record

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "python" / "kvtier" / "vllm"
PAGE = HERE.parents[2] / "docs" / "engines" / "vllm.md"
RECORDINGS = sorted((HERE / "vllm_interfaces").glob("*.json"))
HAS_VLLM = importlib.util.find_spec("vllm") is not None

BASES = {
    "KvtierConnector": ["KVConnectorBase_V1", "SupportsHMA"],
    "KvtierWorkerMetadata": ["KVConnectorWorkerMetadata"],
    "KvtierStats": ["KVConnectorStats"],
    "KvtierPromMetrics": ["KVConnectorPromMetrics"],
}
"""Classes of ours and what of vLLM's they derive from."""

READ = {
    "SchedulerOutput": [
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
        "preempted_req_ids",
    ],
    "NewRequestData": ["req_id", "block_ids", "num_computed_tokens"],
    "CachedRequestData": ["req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens"],
    "KVConnectorOutput": [
        "finished_sending",
        "finished_recving",
        "invalid_block_ids",
        "kv_connector_worker_meta",
    ],
    "Request": [
        "request_id",
        "all_token_ids",
        "num_tokens",
        "num_prompt_tokens",
        "lora_request",
        "cache_salt",
        "mm_features",
    ],
    "KVCacheConfig": ["num_blocks", "kv_cache_groups", "kv_cache_layout"],
    "KVCacheGroupSpec": ["layer_names", "kv_cache_spec"],
    "KVTransferConfig": [
        "kv_load_failure_policy",
        "kv_connector_extra_config",
        "is_kv_producer",
        "is_kv_consumer",
    ],
    "LoRARequest": ["lora_name", "lora_path"],
    "MultiModalFeatureSpec": ["identifier", "mm_position"],
    "PlaceholderRange": ["offset", "length"],
    "KVCacheSpecKind": ["FULL_ATTENTION", "MLA_ATTENTION"],
}
"""Fields of vLLM's objects that the connector cannot do without."""

READ_BY_HOOK = {"get_external_cache_hit_sources": ("CacheHitSource", ["HOST", "DISK"])}
"""What only one method needs, which vLLM calls where it has it."""

HOOKS = {
    "on_new_request": "lookups begin when a request arrives",
    "build_connector_worker_meta": "pages are given back as soon as they are copied",
    "handle_preemptions": "preemption is safe",
    "has_pending_block_frees": "vLLM waits for copies before it preempts",
    "get_external_cache_hit_sources": "hits are told by tier",
    "reset_cache": "`reset_prefix_cache(reset_connector=True)`",
    "get_block_ids_with_load_errors": "what does not load is computed",
    "build_prom_metrics": "metrics in Prometheus",
}
"""Methods that some versions do not call, and what is lacking there."""


def ours() -> dict[str, dict[str, list[str]]]:
    """Methods of our classes and their parameters, from the sources."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in ("connector.py", "metrics.py"):
        for node in ast.parse((SOURCES / name).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in BASES:
                found[node.name] = {
                    item.name: [arg.arg for arg in item.args.args]
                    for item in node.body
                    if isinstance(item, ast.FunctionDef)
                }
    return found


def problems(interface: dict) -> list[str]:
    """What of this version the connector does not meet."""
    found = []
    for name, methods in ours().items():
        known = {}
        for base in BASES[name]:
            if base not in interface["classes"]:
                found.append(f"no class {base}")
                continue
            known |= interface["classes"][base]["methods"]
        for method, recorded in known.items():
            if recorded.get("abstractmethod") and method not in methods:
                found.append(f"{name} lacks {method}")
            if method in methods and method != "__init__":
                given, wanted = methods[method], recorded["parameters"]
                if given[: len(wanted)] != wanted:
                    found.append(f"{name}.{method}{given}, called with {wanted}")
    methods = interface["classes"].get("KVConnectorBase_V1", {"methods": {}})["methods"]
    hooks = dict(wanted for hook, wanted in READ_BY_HOOK.items() if hook in methods)
    for name, fields in (READ | hooks).items():
        recorded = interface["classes"].get(name)
        has = set(recorded["fields"]) if recorded else set()
        found += [f"no {name}.{field}" for field in fields if field not in has]
    wanted = {function for names in FUNCTIONS.values() for function in names}
    found += [f"no {function}()" for function in sorted(wanted - set(interface["functions"]))]
    return found


def test_there_are_recordings_and_they_have_what_is_read() -> None:
    assert RECORDINGS
    classes = {name for names in CLASSES.values() for name in names}
    assert set(READ) <= classes
    assert {base for bases in BASES.values() for base in bases} <= classes


def test_our_classes_are_found_and_a_difference_is_noticed() -> None:
    assert set(ours()) == set(BASES)
    interface = json.loads(RECORDINGS[-1].read_text())
    methods = interface["classes"]["KVConnectorBase_V1"]["methods"]
    methods["get_finished"]["parameters"].append("more")
    methods["brand_new"] = {"parameters": ["self"], "required": 1, "abstractmethod": True}
    interface["classes"]["Request"]["fields"].remove("cache_salt")
    found = "; ".join(problems(interface))
    for part in ("get_finished", "lacks brand_new", "no Request.cache_salt"):
        assert part in found


def test_the_newest_recorded_interface_is_met_in_full() -> None:
    newest = max((json.loads(p.read_text()) for p in RECORDINGS), key=number)
    assert problems(newest) == []
    methods = newest["classes"]["KVConnectorBase_V1"]["methods"]
    assert [hook for hook in HOOKS if hook not in methods] == []


def number(interface: dict) -> list[int]:
    """Version of a recording, to order by."""
    return [int(part) for part in interface["vllm"].split(".")[:3]]


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_the_installed_vllm_is_met_and_is_what_was_recorded() -> None:
    import vllm

    installed = record(Path(vllm.__file__).parent)
    assert problems(installed) == []
    same = [p for p in RECORDINGS if p.stem == installed["vllm"]]
    for recording in same:
        assert json.loads(recording.read_text()) == installed, "record it again"

    from kvtier.vllm import KvtierConnector, connector, metrics

    for name, bases in BASES.items():
        ours_live = getattr(connector, name, None) or getattr(metrics, name)
        assert not inspect.isabstract(ours_live), name
        assert {base.__name__ for base in ours_live.__mro__} >= set(bases)
        for method, function in vars(ours_live).items():
            base = next((b for b in ours_live.__mro__[1:] if method in vars(b)), None)
            if method.startswith("_") or not inspect.isfunction(function) or base is object:
                continue
            if base is not None:
                wanted = inspect.signature(getattr(base, method)).parameters
                given = inspect.signature(function).parameters
                assert list(given)[: len(wanted)] == list(wanted), method

    from vllm.distributed.kv_transfer.kv_connector.v1 import supports_hma

    assert supports_hma(KvtierConnector)


def table() -> str:
    """The table of versions for the page."""
    lines = ["| vLLM | interface | lacking there |", "|---|---|---|"]
    for interface in sorted((json.loads(p.read_text()) for p in RECORDINGS), key=number)[::-1]:
        found = problems(interface)
        base = interface["classes"].get("KVConnectorBase_V1", {"methods": {}})
        lacking = [text for hook, text in HOOKS.items() if hook not in base["methods"]]
        verdict = "met" if not found else "not met: " + "; ".join(found[:3])
        if len(found) > 3:
            verdict += f"; {len(found) - 3} more"
        lines.append(f"| {interface['vllm']} | {verdict} | {'; '.join(lacking) or 'nothing'} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_current_table_of_versions() -> None:
    wanted = with_table(PAGE, table())
    assert PAGE.read_text() == wanted, "KVTIER_TEST_REGENERATE=1 writes the table"
