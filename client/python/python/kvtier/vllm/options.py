"""What a user sets in `kv_connector_extra_config`, checked once.

Upstairs:   both sides of the connector.
Downstairs: nothing.

Every problem is named at once, with what would be accepted: a misspelt key that is ignored
looks like a cache that never hits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .._settings import DEFAULT_SOCKET, out_of_range, read

LEAST = (
    ("min_load_blocks", 1),
    ("save_backlog_blocks", 1),
    ("staging_mib", 0),
    ("lookup_timeout_s", 0.001),
    ("load_timeout_s", 0.001),
    ("shutdown_timeout_s", 0.0),
)

SYNC_LOAD = (
    "async_load is {value!r}; accepted: true. That a load before the step has failed is known only "
    "after it: vLLM has computed over its pages by then, also in requests that share them"
)
"""Why there is no load before the step: what such a step computes may be wrong, and saved."""


@dataclass(frozen=True)
class Options:
    """Settings of the connector. Times are in seconds."""

    socket: str = DEFAULT_SOCKET
    """Where the daemon listens. Default: the variable KVTIER_SOCKET, else the packaged path."""

    descriptor_socket: str = ""
    """Where it hands out memory, when a container mounts it elsewhere."""

    save: bool = True
    """Save blocks. A `kv_role` of kv_consumer switches it off as well."""

    load: bool = True
    """Load blocks. A `kv_role` of kv_producer switches it off as well."""

    load_may_fail_requests: bool = False
    """Load also where `kv_load_failure_policy` is not recompute: a request of which a block was
    found and does not load ends with an error then."""

    save_output: bool = True
    """Save blocks of generated tokens too: the next turn of a conversation begins with them."""

    min_load_blocks: int = 1
    """A shorter run of stored blocks is computed."""

    lookup_timeout_s: float = 0.25
    """A request whose lookup takes longer is computed."""

    load_timeout_s: float = 20.0
    """Blocks that have not come by then are computed."""

    save_backlog_blocks: int = 4096
    """Most blocks that wait to be saved. More are not saved: they hold memory of the engine."""

    shutdown_timeout_s: float = 10.0
    """Longest wait for saves that are under way when the engine stops."""

    staging_mib: int = 0
    """Memory that this process shares with the daemon to save through. Default: 64 MiB, or four
    blocks where that is more."""

    weights_fingerprint: str = ""
    """Identity of the weights. Default: taken from samples of the model's files."""

    @classmethod
    def parse(cls, given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Options:
        """Reads `kv_connector_extra_config`; ValueError names all that is wrong with it."""
        values, unknown, problems = read(cls, given, environ)
        known = ", ".join(field.name for field in fields(cls))
        for name in unknown:
            if name != "async_load":
                problems.append(f"{name} is no setting; accepted: {known}")
            elif given[name] is not True:
                problems.append(SYNC_LOAD.format(value=given[name]))
        options = cls(**values)
        problems += out_of_range(options, LEAST)
        if problems:
            raise ValueError("kv_connector_extra_config: " + "; ".join(problems))
        return options

    def of_role(self, producer: bool, consumer: bool) -> Options:
        """The same for a `kv_role`: who produces saves, who consumes loads."""
        return replace(self, save=self.save and producer, load=self.load and consumer)

    def of_policy(self, policy: str) -> tuple[Options, str]:
        """The same for a `kv_load_failure_policy`, and what is to be said about it."""
        if policy == "recompute" or not self.load:
            return self, ""
        fails = f"kv_load_failure_policy is {policy!r}: a request fails when a block does not load"
        if self.load_may_fail_requests:
            return self, fails
        return replace(self, load=False), (
            f'{fails}. Nothing is loaded; accepted: "recompute", or load_may_fail_requests'
        )
