"""Settings of a connector, read from what an engine's user wrote, with all problems at once.

Upstairs:   `vllm.options` and `sglang.options`, whose classes say what there is.
Downstairs: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

DEFAULT_SOCKET = "/run/kvtier/kvtierd.sock"


def read(
    cls: Any, given: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Values by the names of a dataclass's fields, each of its default's type; names that are no
    fields; what is wrong with the others. The variable KVTIER_SOCKET is the default of `socket`."""
    values: dict[str, Any] = {}
    unknown, problems = [], []
    if environ.get("KVTIER_SOCKET"):
        values["socket"] = environ["KVTIER_SOCKET"]
    known = {field.name: field for field in fields(cls)}
    for name, value in given.items():
        field = known.get(name)
        if field is None:
            unknown.append(name)
            continue
        wanted = type(field.default)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            problems.append(f"{name} is {value!r}; accepted: a {wanted.__name__}")
            continue
        values[name] = value
    return values, unknown, problems


def out_of_range(options: Any, least: Iterable[tuple[str, float]]) -> list[str]:
    """What is below its least value, or names no daemon."""
    problems = []
    for name, bound in least:
        value = getattr(options, name)
        # Written so that NaN is a problem too.
        if not value >= bound:
            problems.append(f"{name} is {value}; accepted: at least {bound}")
    if not options.socket:
        problems.append("socket is empty; accepted: a path, or tcp://HOST:PORT")
    return problems
