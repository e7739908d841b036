"""Storage backend of SGLang's HiCache: keeps pages of its host KV pool in the kvtier daemon.

Upstairs:   SGLang, by `--hicache-storage-backend dynamic` with `module_path` "kvtier.sglang".
Downstairs: `storage`, which is imported when the class is asked for.

    storage.KvtierStorage      what SGLang calls, from several threads
      mover                    names pages; looks up, loads and saves them
        pool                   where the pieces of each page lie
        identity               whose pages they are
        link                   the session, and the pause after a failure

Nothing here imports SGLang or torch before `KvtierStorage` is named, so the logic is tested
without either.

A page of SGLang is a block of kvtier, and each run of bytes that it has in the host pool is a
part of that block, declared as rows of values (or opaque bytes), never as K or V: the layouts
order layers, heads and tokens in different ways, some pools hold layers of a draft model or packed
scales, and SGLang says of all of them alike where the runs lie. So every layout takes the same
way, and no lossy level applies.
"""

from typing import Any

__all__ = ["KvtierStorage"]


def __getattr__(name: str) -> Any:
    if name == "KvtierStorage":
        from .storage import KvtierStorage

        return KvtierStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
