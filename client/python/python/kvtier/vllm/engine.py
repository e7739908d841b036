"""What vLLM says of itself, read once: the model, its cache, the rank of this process.

Upstairs:   `connector`.
Downstairs: vLLM's configuration objects, `geometry`, `identity`, the `kvtier` package.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .geometry import Geometry, descriptor, geometry_of, unsupported
from .identity import commit_of, describe, digest, weights_of
from .options import Options

OLDEST = (0, 29)
"""Oldest vLLM whose interface the connector meets. One that is older may give pages away without
a word while they are read."""
STAGING_MIN = 64 << 20
PAGE = 4096


@dataclass
class Engine:
    """All that both sides need to know to open sessions for the same blocks."""

    kvtier: Any
    options: Options
    geometry: Geometry
    model: Mapping[str, Any]
    facts: Mapping[str, Any]
    tp_size: int

    def own_rank(self) -> int:
        """Tensor-parallel rank of this process."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        return int(get_tensor_model_parallel_rank())

    def descriptor(self, rank: int) -> Any:
        """Model descriptor of one rank."""
        shard = (rank, self.tp_size)
        return descriptor(self.kvtier, self.geometry, self.model, self.facts, shard)

    def open(self, rank: int, staging: bool) -> Any:
        """A session for the blocks of one rank. Waits for the daemon."""
        options = self.options
        client = self.kvtier.connect(
            options.socket,
            restore_idle_timeout=options.load_timeout_s,
            descriptor_socket=options.descriptor_socket or None,
        )
        role = f"worker {rank}" if staging else "scheduler"
        return client.open_session(
            self.descriptor(rank),
            client_name=f"vllm {self.facts['vllm']} {role} pid {os.getpid()}",
            staging_bytes=self.staging_bytes() if staging and options.save else 0,
        )

    def staging_bytes(self) -> int:
        """Memory to save through: room for four blocks at least."""
        wanted = self.options.staging_mib << 20 or max(STAGING_MIN, 4 * self.geometry.block_bytes)
        return -(-wanted // PAGE) * PAGE

    def summary(self) -> str:
        """One line for the log."""
        geometry = self.geometry
        return (
            f"blocks of {geometry.block_tokens} tokens, {geometry.block_bytes} bytes, "
            f"{len(geometry.layers)} layers of {geometry.element}; {describe(self.facts)}"
        )


def describe_engine(vllm_config: Any, kv_cache_config: Any, options: Options) -> Engine | str:
    """The engine, or why its blocks cannot be kept."""
    import vllm
    from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind

    import kvtier

    if _version(vllm.__version__) < OLDEST:
        return f"vLLM is {vllm.__version__}; accepted: {'.'.join(map(str, OLDEST))} or later"
    parallel = vllm_config.parallel_config
    reason = unsupported(kv_cache_config, parallel, lambda spec: get_kv_cache_spec_kind(spec).value)
    if reason is not None:
        return reason
    geometry = geometry_of(kv_cache_config)
    model_config = vllm_config.model_config
    return Engine(
        kvtier=kvtier,
        options=options,
        geometry=geometry,
        model=_model(model_config, options),
        facts=_facts(vllm_config, kv_cache_config, geometry),
        tp_size=int(parallel.tensor_parallel_size),
    )


def _version(text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _model(config: Any, options: Options) -> dict[str, Any]:
    """Name, revision and weights. A directory is named by what is in it, so that it may move."""
    name, revision = str(config.model), str(config.revision or "")
    if os.path.isdir(name):
        weights = weights_of(name)
        revision = revision or commit_of(name)
        name = os.path.basename(os.path.normpath(name))
    else:
        cached = _cached_file(name, revision)
        weights = weights_of(os.path.dirname(cached)) if cached else b""
        revision = commit_of(cached) or revision
    if options.weights_fingerprint:
        weights = options.weights_fingerprint.encode()[:256]
    return {
        "name": name,
        "revision": revision,
        "weights": weights,
        "d_model": config.get_hidden_size(),
    }


def _cached_file(repository: str, revision: str) -> str:
    """Path of the model's configuration in the cache of the Hugging Face hub, or empty."""
    try:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except Exception:  # a name that the hub does not know, or no such package
        return ""
    return path if isinstance(path, str) else ""


def _facts(vllm_config: Any, kv_cache_config: Any, geometry: Geometry) -> dict[str, Any]:
    """Everything that decides what the bytes of a block mean. A fact too many costs a cache that
    begins empty after a change; one too few would give wrong bytes."""
    import vllm
    from vllm.platforms import current_platform

    model, cache = vllm_config.model_config, vllm_config.cache_config
    facts = {
        "vllm": ".".join(map(str, _version(vllm.__version__))),
        "device": current_platform.device_type,
        "layout": kv_cache_config.kv_cache_layout,
        "block": geometry.block_tokens,
        "dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "backend": _backend(vllm_config),
        "config": digest([("config", _config_text(model).encode())], 8).hex(),
    }
    if current_platform.device_type == "cpu":
        facts["isa"] = _cpu_isa(vllm_config, kv_cache_config)
    return facts


def _backend(vllm_config: Any) -> str:
    attention = getattr(vllm_config, "attention_config", None)
    return str(getattr(attention, "backend", None))


def _config_text(model: Any) -> str:
    """The model's configuration with what a user overrides, without what names a place."""
    config = model.hf_config.to_dict()
    for name in ("_name_or_path", "name_or_path", "transformers_version"):
        config.pop(name, None)
    return json.dumps(config, sort_keys=True, default=str)


def _cpu_isa(vllm_config: Any, kv_cache_config: Any) -> str:
    """How the CPU backend packs a block. Where vLLM does not say, what the processor is must
    do."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        packing = _get_attn_isa(
            vllm_config.model_config.dtype,
            spec.block_size,
            getattr(spec, "head_size", None),
            vllm_config.cache_config.cache_dtype,
        )
    except Exception:  # a private function: another vLLM may have none such
        packing = "unknown"
    return f"{packing}/{capability}"
