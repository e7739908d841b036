"""What a user sets in `--hicache-storage-backend-extra-config`, checked once.

Upstairs:   `storage`.
Downstairs: nothing.

SGLang reads settings of its own from the same object, and each version knows others, so a name
that is not ours is no error; it is named in the log, where one that was misspelt can be seen.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .._settings import DEFAULT_SOCKET, out_of_range, read

OF_SGLANG = frozenset(
    {
        "allocator",
        "backend_name",
        "class_name",
        "hicache_storage_pass_prefix_keys",
        "interface_v1",
        "module_path",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_max",
        "prefetch_timeout_per_ki_token",
        "tp_lcm_size",
    }
)
"""Settings that SGLang itself reads."""

LEAST = (
    ("lookup_timeout_s", 0.001),
    ("load_timeout_s", 0.001),
    ("save_timeout_s", 0.001),
    ("connect_wait_s", 0.0),
    ("staging_mib", 0),
)

logger = logging.getLogger("sglang.kvtier")


@dataclass(frozen=True)
class Options:
    """Settings of the backend. Times are in seconds."""

    socket: str = DEFAULT_SOCKET
    """Where the daemon listens. Default: the variable KVTIER_SOCKET, else the packaged path."""

    descriptor_socket: str = ""
    """Where it hands out memory, when a container mounts it elsewhere."""

    lookup_timeout_s: float = 1.0
    """A lookup that takes longer is a miss."""

    load_timeout_s: float = 5.0
    """Pages of a batch that have not come by then are misses."""

    save_timeout_s: float = 10.0
    """A batch that is not stored by then counts as not stored."""

    connect_wait_s: float = 3.0
    """How long the start waits for the daemon. It goes on without it after that."""

    durable: bool = True
    """Count a page as stored when it survives kill -9 and power loss. False: when the daemon
    has it in memory."""

    staging_mib: int = 0
    """Memory that this process shares with the daemon to save through. Default: 64 MiB, or eight
    pages where that is more."""

    model_path: str = ""
    """Folder of the model's files. Default: what SGLang was started with."""

    weights_fingerprint: str = ""
    """Identity of the weights. Default: taken from samples of the model's files."""

    share_dp: bool = False
    """Let the ranks of attention data parallelism load each other's pages."""

    @classmethod
    def parse(
        cls, given: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ
    ) -> Options:
        """Reads the extra configuration; ValueError names all that is wrong with our part."""
        values, unknown, problems = read(cls, given or {}, environ)
        for name in unknown:
            if name not in OF_SGLANG:
                logger.warning(
                    "kvtier: %s is no setting of this backend; they are: %s",
                    name,
                    ", ".join(field.name for field in fields(cls)),
                )
        options = cls(**values)
        problems += out_of_range(options, LEAST)
        if problems:
            raise ValueError("hicache-storage-backend-extra-config: " + "; ".join(problems))
        return options
