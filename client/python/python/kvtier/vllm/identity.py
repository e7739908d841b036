"""What tells blocks apart beside their tokens: the engine's layout, weights, adapters, salts.

Upstairs:   `connector` makes the model descriptor, `tracker` the keys of a request.
Downstairs: files of weights, which are sampled.

Invariants kept here
  I1  Two engines that lay out a block differently, or hold other weights, never share a key.
  I2  Two requests whose KV differs for equal tokens (adapter, salt, image) never share a key.

Every list of fields is hashed with tags and lengths, so that no two lists feed a hash the same
bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES = 32
"""Places of a file that are read. A fine-tune changes all of a tensor, not one byte of it."""
SAMPLE_BYTES = 4096
FILES_MAX = 4096


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


def _sample(path: str) -> bytes:
    """Size and samples of one file: its beginning, its end and places between."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        fields = [("size", size.to_bytes(8, "little"))]
        last = max(size - SAMPLE_BYTES, 0)
        for place in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
            file.seek(place)
            fields.append(("at", place.to_bytes(8, "little")))
            fields.append(("bytes", file.read(SAMPLE_BYTES)))
    return digest(fields)


def weights_of(directory: str) -> bytes:
    """Identity of the weights in a directory; empty where there are none to look at."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return b""
    fields = []
    for name in names[:FILES_MAX]:
        path = os.path.join(directory, name)
        wanted = name == "config.json" or name.endswith(WEIGHT_SUFFIXES)
        if wanted and os.path.isfile(path):
            fields += [("name", name.encode()), ("file", _sample(path))]
    return digest(fields) if fields else b""


def commit_of(path: str) -> str:
    """Commit of a model in the cache of the Hugging Face hub, from the path of its files."""
    parts = os.path.normpath(path).split(os.sep)
    for before, after in itertools.pairwise(parts):
        if before == "snapshots":
            return after
    return ""


def adapter_fields(lora: Any) -> list[tuple[str, bytes]]:
    """What names a LoRA adapter: its name, where it lies, and what lies there. An adapter that
    is replaced in place is another one."""
    if lora is None:
        return []
    path = str(getattr(lora, "lora_path", "") or "")
    return [
        ("lora", str(lora.lora_name).encode()),
        ("lora path", path.encode()),
        ("lora files", weights_of(path) if os.path.isdir(path) else b""),
    ]


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
