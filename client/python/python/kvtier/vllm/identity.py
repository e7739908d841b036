"""What tells blocks apart beside their tokens: the engine's layout, adapters, salts.

Upstairs:   `connector` makes the model descriptor, `tracker` the keys of a request.
Downstairs: nothing; what weights are comes from `weights`.

Invariants kept here
  I1  Two engines that lay out a block differently, or hold other weights, never share a key.
  I2  Two requests whose KV differs for equal tokens (adapter, salt, image) never share a key.

Every list of fields is hashed with tags and lengths, so that no two lists feed a hash the same
bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def digest(fields: Iterable[tuple[str, bytes]], size: int = 32) -> bytes:
    """Hash of tagged fields."""
    hasher = hashlib.blake2b(digest_size=size, person=b"kvtier.vllm.1")
    for tag, value in fields:
        name = tag.encode()
        for part in (name, value):
            hasher.update(len(part).to_bytes(8, "little"))
            hasher.update(part)
    return hasher.digest()


def describe(facts: Mapping[str, Any]) -> str:
    """Facts in one order, as text that a log shows and a hash takes."""
    return " ".join(f"{name}={facts[name]}" for name in sorted(facts))


def layout_tag(facts: Mapping[str, Any]) -> str:
    """Short name of everything that decides what the bytes of a block mean (I1). Part of the
    model descriptor, so part of its fingerprint."""
    return "vllm-" + digest([("layout", describe(facts).encode())], 12).hex()


def commit_of(path: str) -> str:
    """Commit of a model in the cache of the Hugging Face hub, from the path of its files."""
    parts = os.path.normpath(path).split(os.sep)
    for place, folder in enumerate(parts[1:-1], 1):
        if folder == "snapshots" and parts[place - 1].startswith("models--"):
            return parts[place + 1]
    return ""


def prefix_extra(adapter: Sequence[tuple[str, bytes]], salt: str | None, epoch: bytes) -> bytes:
    """Extra of every block of a request (I2); empty for an ordinary one."""
    fields = list(adapter)
    if salt:
        fields.append(("salt", salt.encode()))
    if epoch:
        fields.append(("epoch", epoch))
    return digest(fields) if fields else b""


def block_extra(prefix: bytes, features: Sequence[Any], first: int, end: int) -> bytes:
    """Extra of the block of tokens `first .. end`: that of its prefix and every image, clip or
    sound that reaches into it, with its place. Later blocks are told apart by their parent."""
    fields = []
    for feature in features:
        place = feature.mm_position
        if place.offset < end and place.offset + place.length > first:
            name = feature.identifier or feature.mm_hash
            if not name:
                raise ValueError("a multimodal input without a hash")
            relative = place.offset - first
            fields.append(("mm", str(name).encode()))
            fields.append(("mm at", relative.to_bytes(8, "little", signed=True)))
    if not fields:
        return prefix
    return digest([("prefix", prefix), *fields])


def is_cacheable(request: Any) -> bool:
    """False for requests whose KV does not follow from tokens and what is hashed here:
    embeddings given by the caller, and sessions that change their prompt as they go."""
    if getattr(request, "prompt_embeds", None) is not None:
        return False
    if getattr(request, "resumable", False):
        return False
    features = getattr(request, "mm_features", None) or ()
    return all(getattr(f, "identifier", None) or getattr(f, "mm_hash", None) for f in features)
