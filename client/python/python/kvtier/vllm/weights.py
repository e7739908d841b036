"""Identity of weights and of what configures them, by the files that they are loaded from.

Upstairs:   `engine` for the model, `scheduler` for the adapters of requests.
Downstairs: `identity` for hashes; files.

Invariants kept here
  F1  No file is read whole: its size, its header, a sample of each tensor. A file whose tensors
      are not found is sampled at places that are close to each other.
  F2  Nothing that could not be read has an identity: an error, or no bytes.
  F3  An adapter is what it was when it was first seen. Are its files others by now, nobody knows
      which of them the engine has, unless the request makes it load them again.

Not here on purpose
  No times of files in an identity: the same weights elsewhere are the same weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from .identity import digest

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
CONFIG_SUFFIXES = ("config.json", "params.json", ".py")
"""What says how weights are used: quantisation, images, code that comes with the model."""
NO_CONFIG = ("generation_config.json", "tokenizer_config.json")
"""Decide which tokens there are, not what KV they have."""

HEADER_MAX = 100_000_000
"""Longest header of a safetensors file, as in its library. With a longer one it is another file."""
TENSOR_BYTES = 256
PLACES, PLACE_BYTES = 1024, 4096
END_BYTES = 1 << 20
"""Both ends of a file whose tensors are not found: there are its lists of tensors and checksums."""
CONFIG_MAX = 16 << 20
FILES_MAX = 4096
ADAPTERS_MAX = 16384
"""Most adapters that are known at a time; requests of further ones are computed."""


def _tensors(file: BinaryIO, size: int) -> tuple[bytes, list[tuple[int, int]]] | None:
    """Header of a safetensors file, place and size of each tensor; None for another file."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(HEADER_MAX, size - 8):
        return None
    header, start = file.read(length), 8 + length
    places = []
    try:
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                begin, end = map(int, entry["data_offsets"])
                if not 0 <= begin <= end <= size - start:
                    return None
                places.append((start + begin, end - begin))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return header, sorted(places)


def _spread(size: int) -> list[tuple[int, int]]:
    """Places of a file of which nothing else is known (F1)."""
    last = max(size - PLACE_BYTES, 0)
    places = {(last * i // (PLACES - 1), PLACE_BYTES) for i in range(PLACES)}
    return sorted(places | {(0, END_BYTES), (max(size - END_BYTES, 0), END_BYTES)})


def sample(path: str) -> bytes:
    """Identity of one file of weights."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        fields = [("size", size.to_bytes(8, "little"))]
        found = _tensors(file, size) if path.endswith(".safetensors") else None
        if found is not None:
            header, tensors = found
            fields.append(("header", header))
            places = [
                (begin + max(length - TENSOR_BYTES, 0) // 2, min(length, TENSOR_BYTES))
                for begin, length in tensors
            ]
        else:
            places = _spread(size)
        # Samples lie far apart: what a kernel would read ahead is not wanted.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for at, length in places:
            fields.append(("at", at.to_bytes(8, "little")))
            fields.append(("bytes", os.pread(file.fileno(), length, at)))
    return digest(fields)


def _named(directory: str, suffixes: tuple[str, ...]) -> list[str]:
    """Names of files in a directory, in order."""
    names = [name for name in sorted(os.listdir(directory)) if name.endswith(suffixes)]
    return [name for name in names if os.path.isfile(os.path.join(directory, name))][:FILES_MAX]


def weights_of(path: str) -> bytes:
    """Identity of the weights in a directory, or in a file; empty where there are none (F2)."""
    if os.path.isfile(path):
        return digest([("file", sample(path))])
    if not os.path.isdir(path):
        return b""
    fields = []
    for name in _named(path, WEIGHT_SUFFIXES):
        fields += [("name", name.encode()), ("file", sample(os.path.join(path, name)))]
    return digest(fields) if fields else b""


def config_of(directory: str) -> list[tuple[str, bytes]]:
    """What configures a model, without what names a place: a directory may move."""
    fields = []
    for name in _named(directory, CONFIG_SUFFIXES):
        if name in NO_CONFIG:
            continue
        with open(os.path.join(directory, name), "rb") as file:
            content = file.read(CONFIG_MAX)
        if name == "config.json":
            content = placeless(json.loads(content)).encode()
        fields += [("name", name.encode()), ("content", content)]
    return fields


def placeless(config: dict[str, Any]) -> str:
    """A configuration as text, in one order, without where it came from."""
    names = ("_name_or_path", "name_or_path", "transformers_version")
    kept = {name: value for name, value in config.items() if name not in names}
    return json.dumps(kept, sort_keys=True, default=str)


@dataclass
class _Seen:
    stamp: tuple[Any, ...]
    weights: bytes
    reason: str = ""
    """Why there are none."""


class Adapters:
    """LoRA adapters as the engine has loaded them (F3)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str, str], _Seen] = {}

    def fields(self, lora: Any) -> list[tuple[str, bytes]]:
        """What names the adapter of a request: its name, where it lies, and what lay there when
        it was first seen. ValueError and OSError say why it cannot be told (F2)."""
        if lora is None:
            return []
        name, path = str(lora.lora_name), str(getattr(lora, "lora_path", "") or "")
        key = (int(lora.lora_int_id), name, path)
        stamp, seen = self._stamp(path), self._seen.get(key)
        if seen is None or (seen.stamp != stamp and getattr(lora, "load_inplace", False)):
            if seen is None and len(self._seen) >= ADAPTERS_MAX:
                raise ValueError(f"more than {ADAPTERS_MAX} LoRA adapters")
            seen = self._look(stamp, path)
            self._seen[key] = seen
        if not seen.weights:
            raise ValueError(f"the LoRA adapter {name} cannot be told apart: {seen.reason}")
        if seen.stamp != stamp or self._stamp(path) != stamp:
            raise ValueError(f"files of the LoRA adapter {name} have changed since it was loaded")
        return [
            ("lora", name.encode()),
            ("lora path", path.encode()),
            ("lora files", seen.weights),
        ]

    def _look(self, stamp: tuple[Any, ...], path: str) -> _Seen:
        """Looks at the files, once: whatever comes of it is kept."""
        try:
            weights = weights_of(path) if os.path.isdir(path) else b""
            config = os.path.join(path, "adapter_config.json")
            scale = sample(config) if os.path.isfile(config) else b""
        except OSError as error:
            return _Seen(stamp, b"", str(error))
        if not weights:
            return _Seen(stamp, b"", f"no files of weights at {path!r}")
        return _Seen(stamp, digest([("weights", weights), ("config", scale)]))

    def _stamp(self, path: str) -> tuple[Any, ...]:
        """Cheap facts of the files that change when these do. Never part of a key."""
        if not os.path.isdir(path):
            return ()
        facts: list[Any] = []
        for name in _named(path, (*WEIGHT_SUFFIXES, "adapter_config.json")):
            stat = os.stat(os.path.join(path, name))
            facts.append((name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        return tuple(facts)
