"""Where the engine's pages lie, told to the SDK once.

Upstairs:   `connector` registers vLLM's tensors here; `worker` hands the cache to each transfer.
Downstairs: `kvtier.PagedCache`, which keeps the tensors alive and copies from and to them.

Invariants kept here
  M1  What is registered has the geometry that the descriptor says: another number of bytes a
      block, or memory that the processor cannot reach, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .geometry import Geometry

BLOCKS_MIN = 3
"""Of one or two blocks nobody can tell whether the first dimension counts them, or K and V."""


class Pages:
    """The engine's KV cache, one page a block."""

    def __init__(self, cache: Any, block_bytes: int) -> None:
        self.cache = cache
        self.block_bytes = block_bytes


def register(
    kvtier: Any, model: Any, geometry: Geometry, blocks: int, tensors: Mapping[str, Any]
) -> Pages:
    """Names every layer's tensor to the SDK. ValueError says what does not fit (M1)."""
    cache = kvtier.PagedCache(model, geometry.block_tokens)
    for index, layer in enumerate(geometry.layers):
        tensor = tensors.get(layer.name)
        if tensor is None:
            raise ValueError(f"vLLM registered no cache for layer {layer.name}")
        if tensor.device.type != "cpu":
            raise ValueError(
                f"layer {layer.name} is in memory of {tensor.device.type}; accepted: cpu"
            )
        if blocks < BLOCKS_MIN:
            raise ValueError(f"a cache of {blocks} blocks; accepted: {BLOCKS_MIN} or more")
        rows = tensor.shape[0]
        if rows == 0 or rows % blocks:
            raise ValueError(f"layer {layer.name} has {rows} rows for {blocks} blocks")
        # The kernel's blocks may be smaller than those of the scheduler.
        view = tensor.unflatten(0, (blocks, rows // blocks))
        nbytes = view[0].numel() * view.element_size()
        if nbytes != layer.nbytes:
            raise ValueError(
                f"layer {layer.name} has {nbytes} bytes a block; its spec says {layer.nbytes}"
            )
        width = geometry.width(layer)
        if width is None:
            cache.add(index, "opaque", view)
        else:
            cache.add(index, "latent", view.view(blocks, geometry.block_tokens, width))
    return Pages(cache, geometry.block_bytes)
