"""How the engine's cache is cut into blocks and layers, and whether that can be kept.

Upstairs:   `connector`, in both processes: they must come to the same descriptor by themselves.
Downstairs: `identity` for the tag of the layout; the `kvtier` package for the descriptor.

A layer's share of a block is stored as the bytes that it is: engines pack K and V for their
processor (the CPU backend keeps K transposed beside V, or in tiles for AMX). Where they are
values of one type they are declared as rows of such values, one a token, so that the daemon's
lossless codec finds exponents. No lossy level applies: it would have to know K from V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .identity import layout_tag

BLOCK_TOKENS_MIN = 16
BLOCK_TOKENS_MAX = 2048
WIDTH_MAX = 65536

ELEMENTS = {
    "bfloat16": ("bf16", 2),
    "float16": ("f16", 2),
    "float32": ("f32", 4),
    "float8_e4m3fn": ("f8_e4m3", 1),
    "float8_e5m2": ("f8_e5m2", 1),
    "uint8": ("u8", 1),
    "int8": ("u8", 1),
}
"""Element types by torch's names: the daemon's name and the size."""

COMPACT_LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")
"""Layouts of vLLM in which a layer's share of a block is one run of bytes."""

KINDS = ("full_attention", "mla_attention")
"""Kinds of layers whose blocks hold all of a prefix."""


@dataclass(frozen=True)
class LayerPage:
    """A layer's share of one block."""

    name: str
    nbytes: int
    dtype: str


@dataclass(frozen=True)
class Geometry:
    """What a block of this engine is."""

    block_tokens: int
    layers: tuple[LayerPage, ...]
    compact: bool

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def element(self) -> str:
        """Type of all that is stored; bytes where layers differ, or lie in pieces."""
        dtypes = {layer.dtype for layer in self.layers}
        name, size = ELEMENTS.get(next(iter(dtypes)), ("u8", 1)) if len(dtypes) == 1 else ("u8", 1)
        whole = all(
            layer.nbytes % (size * self.block_tokens) == 0
            and layer.nbytes // (size * self.block_tokens) <= WIDTH_MAX
            for layer in self.layers
        )
        return name if whole and self.compact else "u8"

    def width(self, layer: LayerPage) -> int | None:
        """Values a token of this layer takes; None where it is stored as bytes."""
        if self.element == "u8":
            return None
        size = next(size for name, size in ELEMENTS.values() if name == self.element)
        return layer.nbytes // (size * self.block_tokens)


def unsupported(kv_cache_config: Any, parallel: Any, kind_of: Any) -> str | None:
    """Why blocks of this engine cannot be kept; None when they can. `kind_of` names the kind of
    a layer's cache."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return (
            f"the model has {len(groups)} KV cache groups; one is kept "
            "(--disable-hybrid-kv-cache-manager makes one of them, where vLLM can)"
        )
    group = groups[0]
    if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
        return "the KV cache is not on the device alone"
    for name, spec in layer_specs(group):
        kind = kind_of(spec)
        if kind not in KINDS:
            return f"layer {name} is of kind {kind}; kept are {', '.join(KINDS)}"
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) != 1:
            return f"{name} is {getattr(parallel, name)}; accepted: 1"
    tokens = group.kv_cache_spec.block_size
    if not BLOCK_TOKENS_MIN <= tokens <= BLOCK_TOKENS_MAX:
        return f"block_size is {tokens}; accepted: {BLOCK_TOKENS_MIN} to {BLOCK_TOKENS_MAX}"
    return None


def layer_specs(group: Any) -> list[tuple[str, Any]]:
    """Layers of a group, each with its own spec, in the group's order."""
    own = getattr(group.kv_cache_spec, "kv_cache_specs", None) or {}
    return [(name, own.get(name, group.kv_cache_spec)) for name in group.layer_names]


def geometry_of(kv_cache_config: Any) -> Geometry:
    """Geometry of a supported engine."""
    group = kv_cache_config.kv_cache_groups[0]
    layers = []
    for name, spec in layer_specs(group):
        dtype = str(getattr(spec, "dtype", "uint8")).removeprefix("torch.")
        layers.append(LayerPage(name, int(spec.page_size_bytes), dtype))
    layout = getattr(kv_cache_config, "kv_cache_layout", None)
    compact = str(layout).upper() in COMPACT_LAYOUTS
    return Geometry(int(group.kv_cache_spec.block_size), tuple(layers), compact)


def descriptor(
    kvtier: Any,
    geometry: Geometry,
    model: Mapping[str, Any],
    facts: Mapping[str, Any],
    shard: Sequence[int],
) -> Any:
    """Model descriptor of one shard. `model` has name, revision, weights and d_model; `facts`
    all that decides what the bytes mean; `shard` rank and size."""
    layers = []
    for layer in geometry.layers:
        width = geometry.width(layer)
        if width is None:
            layers.append(kvtier.LayerSpec.opaque(bytes_per_block=layer.nbytes))
        else:
            layers.append(kvtier.LayerSpec.latent(width, 0))
    pages = ",".join(f"{layer.name}:{layer.nbytes}:{layer.dtype}" for layer in geometry.layers)
    tag = layout_tag({**facts, "pages": pages, "compact": geometry.compact})
    return kvtier.ModelDescriptor(
        str(model["name"])[-200:],
        layers,
        d_model=int(model["d_model"]),
        block_tokens=geometry.block_tokens,
        element=geometry.element,
        revision=f"{str(model['revision'])[:100]}+{tag}",
        weights_fingerprint=model["weights"],
        shard=kvtier.Shard(tp_rank=shard[0], tp_size=shard[1]),
    )
