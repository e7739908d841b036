"""Words and shapes of the interface, for type checkers.

Upstairs:   engines annotate with these; the stubs of ``_kvtier`` use them.
Downstairs: nothing.

The words are plain strings. A word that is not listed is refused by ``kvtier.Invalid``, which
names those that are.
"""

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "Acknowledge",
    "Array",
    "BlockKey",
    "CommitFailure",
    "Element",
    "Happened",
    "Miss",
    "PartCode",
    "PartOrder",
    "PayloadKind",
    "Quality",
    "SaveRefusal",
    "SupportsDLPack",
    "Tier",
]

BlockKey: TypeAlias = bytes
"""Name of one block: 32 bytes. Hash it, compare it, send it to another process."""

PayloadKind: TypeAlias = Literal["kv", "latent", "hidden", "state", "opaque"]
"""What the bytes of a block are."""

PartCode: TypeAlias = Literal["k", "v", "latent", "rope", "state", "hidden", "opaque"]
"""What one part of a layer is."""

PartOrder: TypeAlias = Literal["token_major", "head_major"]
"""Order inside K and V: ``[tokens, heads, dim]`` or ``[heads, tokens, dim]``."""

Element: TypeAlias = Literal["bf16", "f16", "f32", "f8_e4m3", "f8_e5m2", "u8"]
"""Element type of everything stored."""

Quality: TypeAlias = Literal["exact", "transparent", "balanced", "small", "any"]
"""Worst quality that a request takes."""

Tier: TypeAlias = Literal["host", "disk"]
"""Where a block is."""

Acknowledge: TypeAlias = Literal["accepted", "durable"]
"""``accepted``: in the daemon's memory. ``durable``: survives kill -9 and power loss."""

Miss: TypeAlias = Literal[
    "absent",
    "evicted",
    "stale_epoch",
    "misdirected",
    "header_crc",
    "payload_crc",
    "wrong_key",
    "wrong_layout",
    "undecodable",
    "unsupported",
    "quality",
    "device",
    "no_space",
    "deadline",
    "no_tables",
]
"""Why a block is not there. A miss is a value, never an exception."""

SaveRefusal: TypeAlias = Literal["region_full", "over_quota", "draining", "no_space"]
"""Why a block cannot be saved now."""

CommitFailure: TypeAlias = Literal["stale_slot", "checksum", "no_space", "not_durable"]
"""Why a filled block was not stored as asked."""

Happened: TypeAlias = Literal["no", "unknown"]
"""Whether a call that failed may have had an effect."""


@runtime_checkable
class SupportsDLPack(Protocol):
    """A tensor that lends its memory by DLPack: of PyTorch, NumPy, JAX and others."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


Array: TypeAlias = "Buffer | SupportsDLPack"
"""Memory of the caller in the CPU's reach: a buffer, a tensor, or ``kvtier.Memory``."""
