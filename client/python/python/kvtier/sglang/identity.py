"""Whose pages they are: the model, its weights, and all that decides what the bytes mean.

Upstairs:   `storage` makes the descriptor of the session and the extra of every name.
Downstairs: SGLang's configuration; samples of the model's files, as the vLLM connector takes them.

Invariants kept here
  I1  Two engines that lay out a page differently, or hold other weights, never share a name. A
      server whose weights cannot be told is refused; without a server pages stay in the process.
  I2  Two requests whose KV differs for equal tokens never share a name. SGLang chains its hashes
      from the adapter and the salt; a version that does not is refused where it serves adapters.
  I3  A rank never loads what another rank has of a page, unless all hold the same (MLA).

SGLang's hash of a page names the page and all before it, so `prefix_keys` add nothing to a name:
they come with some calls and not with others, for the same pages.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..vllm.identity import commit_of, describe, digest
from ..vllm.weights import config_of, weights_of
from .options import Options
from .pool import HostPages

HINTS = frozenset({"kvcc_router_hint", "kvcr_router_hint", "session_id"})
"""What SGLang passes along with a call that says where a page may be, not what is in it."""

OF_SERVER = (
    "dtype",
    "enable_lora",
    "json_model_override_args",
    "kv_cache_dtype",
    "quantization",
    "quantization_param_path",
    "revision",
)
"""Arguments of the server that change what is in a page."""

OF_POOL = (
    "end_layer",
    "head_dim",
    "head_num",
    "kv_cache_dim",
    "kv_lora_rank",
    "layer_num",
    "qk_rope_head_dim",
    "start_layer",
    "storage_format_tag",
    "v_head_dim",
)
"""What a host pool says of its geometry, where it has it."""


_OF_THIS_PROCESS = os.urandom(32)

logger = logging.getLogger("sglang.kvtier")


@dataclass(frozen=True)
class Model:
    """A model, by its name and what is in its files."""

    name: str
    revision: str
    weights: bytes


def server_args() -> Any:
    """What this SGLang was started with; None outside of a server."""
    for module, function in (
        ("sglang.srt.runtime_context", "get_server_args"),
        ("sglang.srt.server_args", "get_global_server_args"),
    ):
        try:
            found = getattr(importlib.import_module(module), function)()
        except Exception:  # another version, or no server
            continue
        if found is not None:
            return found
    return None


def sglang_version() -> str:
    """Major and minor number and patch of the installed SGLang; its layouts may change with it."""
    try:
        text = str(importlib.import_module("sglang.version").__version__)
    except Exception:  # not installed as a package
        return "unknown"
    return ".".join(re.findall(r"\d+", text)[:3])


def chains_adapters() -> bool:
    """True when this SGLang's page hashes begin with the adapter and the salt (I2)."""
    try:
        utils = importlib.import_module("sglang.srt.mem_cache.utils")
    except Exception:  # another version
        return False
    return hasattr(utils, "storage_namespace_seed")


def model_of(name: str | None, options: Options, server: Any) -> Model:
    """The model; ValueError when its weights cannot be told (I1)."""
    path = options.model_path or str(getattr(server, "model_path", "") or "") or str(name or "")
    revision = str(getattr(server, "revision", "") or "")
    if os.path.isdir(path):
        weights = _files_of(path)
        revision = revision or commit_of(path)
        called = os.path.basename(os.path.normpath(path))
    else:
        cached = _cached_file(path, revision)
        weights = _files_of(os.path.dirname(cached)) if cached else b""
        revision = commit_of(cached) or revision
        called = path
    if options.weights_fingerprint:
        weights = options.weights_fingerprint.encode()[:256]
    if not weights and server is None:
        # No server, so no weights either: a harness around a pool. Its pages are its own.
        weights = _OF_THIS_PROCESS
        logger.warning(
            "kvtier: there is no SGLang server whose weights could be told; pages are kept for "
            "this process alone, unless weights_fingerprint or model_path is set"
        )
    if not weights:
        raise ValueError(
            f"the weights of {path or 'the model'} cannot be told; accepted in "
            "hicache-storage-backend-extra-config: model_path with the folder of the model's "
            "files, or weights_fingerprint with a text that changes whenever the weights do"
        )
    return Model(called or "model", revision, weights)


def _files_of(directory: str) -> bytes:
    """Identity of a model's files: weights, and what configures them. Empty where there are no
    weights, or they cannot be read."""
    try:
        weights = weights_of(directory)
        return digest([("weights", weights), *config_of(directory)]) if weights else b""
    except (OSError, ValueError) as error:
        logger.warning("kvtier: files of the model in %s cannot be read: %s", directory, error)
        return b""


def _cached_file(repository: str, revision: str) -> str:
    """Path of the model's configuration in the cache of the Hugging Face hub, or empty."""
    try:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except Exception:  # a name that the hub does not know, or no such package
        return ""
    return path if isinstance(path, str) else ""


def facts_of(
    config: Any, pages: HostPages, pool: Any, server: Any, share_dp: bool
) -> dict[str, str]:
    """Everything that decides what the bytes of a page mean. A fact too many costs a cache that
    begins empty after a change; one too few would give wrong bytes."""
    facts: dict[str, Any] = {
        "sglang": sglang_version(),
        "name": config.model_name,
        "layout": pages.layout,
        "page": pages.page_tokens,
        "dtype": pages.dtype,
        "flat": pages.flat,
        "pieces": ",".join(str(piece.nbytes) for piece in pages.pieces),
        "mla": bool(config.is_mla_model),
        "split": f"{config.tp_lcm_size}/{config.should_split_heads}",
        "cp": f"{getattr(config, 'attn_cp_rank', 0)}/{getattr(config, 'attn_cp_size', 1)}",
        "dp": 0 if share_dp or config.is_mla_model else getattr(config, "dp_rank", 0),
    }
    for name in OF_SERVER:
        facts[f"server {name}"] = getattr(server, name, None)
    for name in OF_POOL:
        facts[f"pool {name}"] = getattr(pool, name, None)
    # Pages may hold layers of a draft model, and adapters keep their names when their files change.
    for name, path in _other_weights(server).items():
        facts[f"weights {name}"] = weights_of(path).hex() or path
    return {name: str(value) for name, value in facts.items()}


def _other_weights(server: Any) -> dict[str, str]:
    """Folders of weights beside the model's own, by what they are."""
    found = {}
    draft = getattr(server, "speculative_draft_model_path", None)
    if draft:
        found["draft"] = str(draft)
    adapters = getattr(server, "lora_paths", None) or []
    for adapter in adapters.values() if isinstance(adapters, dict) else adapters:
        if isinstance(adapter, Mapping):
            path = str(adapter.get("lora_path", ""))
        else:
            path = str(getattr(adapter, "lora_path", adapter)).split("=", 1)[-1]
        found[f"adapter {path}"] = path
    return found


def shard_of(config: Any) -> dict[str, int]:
    """Place of this rank (I3). With MLA all tensor-parallel ranks hold the same."""
    alone = bool(config.is_mla_model)
    return {
        "tp_rank": 0 if alone else int(config.tp_rank),
        "tp_size": 1 if alone else int(config.tp_size),
        "pp_rank": int(config.pp_rank),
        "pp_size": int(config.pp_size),
    }


def descriptor(
    kvtier: Any, model: Model, pages: HostPages, facts: dict[str, str], config: Any
) -> Any:
    """Model descriptor of this rank's pages."""
    tag = digest([("layout", describe(facts).encode())], 12).hex()
    return kvtier.ModelDescriptor(
        model.name[-200:],
        pages.layers(kvtier),
        d_model=1,
        block_tokens=pages.page_tokens,
        element=pages.element,
        revision=f"{model.revision[:100]}+sglang-{tag}",
        weights_fingerprint=model.weights,
        shard=kvtier.Shard(**shard_of(config)),
    )


def extra_of(info: Any) -> bytes:
    """Extra of every name of a call: what SGLang says of the request beside its hashes (I2)."""
    given = getattr(info, "extra_info", None) or {}
    kept = {str(name): value for name, value in given.items() if name not in HINTS}
    if not kept:
        return b""
    text = json.dumps(kept, sort_keys=True, default=str)
    return digest([("sglang extra", text.encode())])


def page_hash(key: str) -> bytes:
    """A page's key of any length, as the hash that its name is derived from."""
    return digest([("sglang page", key.encode())])
