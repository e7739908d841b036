"""vLLM's modules as far as the connector imports them, for tests where vLLM is not installed."""

from __future__ import annotations

import enum
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
OURS = ("kvtier.vllm.connector", "kvtier.vllm.metrics")


class Base:
    """vLLM's `KVConnectorBase_V1`."""

    def __init__(self, vllm_config, role, kv_cache_config) -> None:
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._kv_cache_config = kv_cache_config
        self._connector_metadata: Any = None


class Role(enum.Enum):
    """vLLM's `KVConnectorRole`."""

    SCHEDULER = 0
    WORKER = 1


def install(monkeypatch, rank=0) -> None:
    """Puts the modules where an import finds them, until the test ends."""

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    plain = lambda: type("Plain", (), {})  # noqa: E731
    for name in ("distributed", "distributed.kv_transfer", "distributed.kv_transfer.kv_connector"):
        module(f"vllm.{name}")
    module("vllm", __version__="0.32.0")
    module(V1)
    module("vllm.v1")
    module(
        f"{V1}.base",
        KVConnectorBase_V1=Base,
        KVConnectorMetadata=plain(),
        KVConnectorRole=Role,
        KVConnectorWorkerMetadata=plain(),
        SupportsHMA=plain(),
    )
    module(f"{V1}.metrics", KVConnectorPromMetrics=plain(), KVConnectorStats=plain())
    module(
        "vllm.v1.kv_cache_interface",
        get_kv_cache_spec_kind=lambda spec: SimpleNamespace(value="full_attention"),
    )
    module("vllm.platforms", current_platform=SimpleNamespace(device_type="test"))
    module("vllm.distributed.parallel_state", get_tensor_model_parallel_rank=lambda: rank)
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)


def connector() -> ModuleType:
    """The connector's module, made over the modules that are installed."""
    for name in OURS:
        sys.modules.pop(name, None)
    made = importlib.import_module(OURS[0])
    for name in OURS:
        sys.modules.pop(name, None)
    return made


def vllm_config(model: str, **changes: Any) -> SimpleNamespace:
    """An engine's configuration. `changes` are `model_x=..`, `load_x=..`, `transfer_x=..`."""

    def part(prefix: str, **content: Any) -> SimpleNamespace:
        given = {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}
        return SimpleNamespace(**(content | given))

    live = SimpleNamespace(to_dict=lambda: {"live": 1})
    return SimpleNamespace(
        model_config=part(
            "model_",
            model=model,
            revision=None,
            dtype="torch.bfloat16",
            quantization=None,
            max_model_len=4096,
            hf_overrides={},
            hf_config=live,
            get_hidden_size=lambda: 8,
        ),
        load_config=part(
            "load_", load_format="auto", model_loader_extra_config={}, download_dir=None
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        kv_transfer_config=part(
            "transfer_",
            kv_connector_extra_config={"socket": "/nowhere/kvtierd.sock"},
            kv_load_failure_policy="recompute",
            is_kv_producer=True,
            is_kv_consumer=True,
        ),
    )


def kv_cache_config(blocks: int = 8, nbytes: int = 4096) -> SimpleNamespace:
    """One group of one layer."""
    spec = SimpleNamespace(dtype="torch.bfloat16", page_size_bytes=nbytes, block_size=16)
    group = SimpleNamespace(layer_names=["layer0"], kv_cache_spec=spec)
    return SimpleNamespace(num_blocks=blocks, kv_cache_groups=[group], kv_cache_layout="LBHNC")
