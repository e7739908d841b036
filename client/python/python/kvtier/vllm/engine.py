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
from .identity import commit_of, describe, digest
from .options import Options
from .weights import config_of, placeless, weights_of

OLDEST = (0, 29)
"""Oldest vLLM whose interface the connector meets. One that is older may give pages away without
a word while they are read."""
STAGING_MIN = 64 << 20
PAGE = 4096
READ_FORMATS = (
    "auto",
    "hf",
    "safetensors",
    "pt",
    "npcache",
    "mistral",
    "gguf",
    "bitsandbytes",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
    "runai_streamer_sharded",
    "sharded_state",
)
"""Values of `load_format` that read the files beside the model's configuration. Others take
weights from elsewhere, or make them up."""


@dataclass
class Engine:
    """All that both sides need to know to open sessions for the same blocks."""

    kvtier: Any
    options: Options
    geometry: Geometry
    model: Mapping[str, Any]
    facts: Mapping[str, Any]
    tp_size: int

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
    place = _place(vllm_config.model_config, vllm_config.load_config)
    model = _model(vllm_config, place, options)
    if isinstance(model, str):
        return model
    return Engine(
        kvtier=kvtier,
        options=options,
        geometry=geometry,
        model=model,
        facts=_facts(vllm_config, kv_cache_config, geometry, place),
        tp_size=int(parallel.tensor_parallel_size),
    )


def _version(text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


@dataclass
class Place:
    """Where the model lies: a directory or a file; empty where it is not known."""

    path: str
    commit: str


def _place(config: Any, load: Any) -> Place:
    path = str(config.model)
    if not os.path.exists(path):
        cached = _cached_file(path, str(config.revision or ""), getattr(load, "download_dir", None))
        path = os.path.dirname(cached)
    return Place(path, commit_of(os.path.abspath(path)) if path else "")


def _cached_file(repository: str, revision: str, cache_dir: str | None) -> str:
    """Path of the model's configuration in the cache of the Hugging Face hub, or empty."""
    try:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(
            repository, "config.json", cache_dir=cache_dir, revision=revision or None
        )
    except Exception:  # a name that the hub does not know, or no such package
        return ""
    return path if isinstance(path, str) else ""


def _model(vllm_config: Any, place: Place, options: Options) -> dict[str, Any] | str:
    """Name, revision and weights, or why nobody can tell which weights these are. A directory is
    named by what is in it, so that it may move."""
    config, load_format = vllm_config.model_config, str(vllm_config.load_config.load_format)
    name, weights = str(config.model), options.weights_fingerprint.encode()[:256]
    if os.path.exists(name):
        name = os.path.basename(os.path.normpath(name))
    if not weights:
        if load_format not in READ_FORMATS:
            return f"weights of load_format {load_format} cannot be told: set weights_fingerprint"
        weights = weights_of(place.path)
        if not weights and not place.commit:
            return f"found no files of the weights of {config.model}: set weights_fingerprint"
    return {
        "name": name,
        "revision": place.commit or str(config.revision or ""),
        "weights": weights,
        "d_model": config.get_hidden_size(),
    }


def _facts(
    vllm_config: Any, kv_cache_config: Any, geometry: Geometry, place: Place
) -> dict[str, Any]:
    """Everything that decides what the bytes of a block mean. A fact too many costs a cache that
    begins empty after a change; one too few would give wrong bytes."""
    import vllm
    from vllm.platforms import current_platform

    model, cache = vllm_config.model_config, vllm_config.cache_config
    load = vllm_config.load_config
    facts = {
        "vllm": ".".join(map(str, _version(vllm.__version__))),
        "device": current_platform.device_type,
        "layout": kv_cache_config.kv_cache_layout,
        "block": geometry.block_tokens,
        "dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "backend": _backend(vllm_config),
        # RoPE of some models takes its factors by it.
        "max_len": model.max_model_len,
        "load": load.load_format,
        "loader": _short(load.model_loader_extra_config),
        "config": digest(_config(model, place), 8).hex(),
        "draft": _draft(vllm_config),
    }
    if current_platform.device_type == "cpu":
        facts["isa"] = _cpu_isa(vllm_config, kv_cache_config)
    return facts


def _short(value: Any) -> str:
    """Short name of a setting that may be long; a dash where it is empty."""
    if not value:
        return "-"
    return digest([("value", json.dumps(value, sort_keys=True, default=str).encode())], 8).hex()


def _backend(vllm_config: Any) -> str:
    attention = getattr(vllm_config, "attention_config", None)
    return str(getattr(attention, "backend", None))


def _config(model: Any, place: Place) -> list[tuple[str, bytes]]:
    """The model's configuration and what a user overrides. From the files, where they say it
    all: vLLM's object may be changed by a model that is loaded, in one process and not in
    another."""
    overrides = model.hf_overrides
    fields = config_of(place.path) if os.path.isdir(place.path) else []
    elsewhere = getattr(model, "hf_config_path", None) or callable(overrides)
    if elsewhere or ("name", b"config.json") not in fields:
        fields.append(("live", placeless(model.hf_config.to_dict()).encode()))
    if not callable(overrides):
        fields.append(("overrides", _short(overrides).encode()))
    multimodal = getattr(model, "multimodal_config", None)
    inputs = _short(getattr(multimodal, "mm_processor_kwargs", None))
    kind = str(getattr(model, "model_impl", "auto"))
    return [*fields, ("inputs", inputs.encode()), ("implementation", kind.encode())]


def _draft(vllm_config: Any) -> str:
    """The model that drafts: its layers may have a share of each block."""
    given = getattr(vllm_config, "speculative_config", None)
    if given is None:
        return "-"
    model = str(getattr(given, "model", None))
    fields = [("weights", weights_of(model))]
    if not os.path.exists(model):
        fields.append(("model", f"{model} {getattr(given, 'revision', None)}".encode()))
    fields.append(("method", str(getattr(given, "method", None)).encode()))
    return digest(fields, 8).hex()


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
