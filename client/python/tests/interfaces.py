"""What both recorders of interfaces and both tests against them do alike.

Upstairs:   `record_vllm_interface.py`, `record_sglang_interface.py` and the conformance tests.
Downstairs: sources, which are read and not imported.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- versions: begin -->\n", "<!-- versions: end -->\n"


class Sources:
    """Files of a package's folder, or of a wheel of it."""

    def __init__(self, source: Path, package: str) -> None:
        self._zip = zipfile.ZipFile(source) if source.suffix == ".whl" else None
        self._folder = source
        self._package = package
        self.names = set(self._zip.namelist()) if self._zip else set()

    def read(self, name: str) -> str | None:
        """Text of a file of the package; None where it has none such."""
        if self._zip is not None:
            path = f"{self._package}/{name}"
            return self._zip.read(path).decode() if path in self.names else None
        file = self._folder / name
        return file.read_text() if file.is_file() else None


def method_of(node: ast.FunctionDef) -> dict[str, Any]:
    """Parameters of a method, and what its decorators make of it."""
    marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
    own = node.args
    names = [arg.arg for arg in own.posonlyargs + own.args]
    required = len(names) - len(own.defaults)
    method: dict[str, Any] = {"parameters": names, "required": required}
    if own.kwarg is not None:
        method["any_keywords"] = True
    for mark in ("abstractmethod", "classmethod", "property", "cached_property"):
        if mark in marks:
            method[mark] = True
    return method


def class_of(node: ast.ClassDef) -> dict[str, Any]:
    """Public methods of a class, and its fields."""
    methods = {n.name: method_of(n) for n in node.body if isinstance(n, ast.FunctionDef)}
    fields = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            fields.append(item.target.id)
        elif isinstance(item, ast.Assign):
            fields += [t.id for t in item.targets if isinstance(t, ast.Name)]
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            for part in ast.walk(function):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    fields.append(part.attr)
    fields += [name for name, m in methods.items() if "property" in m or "cached_property" in m]
    public = {name: m for name, m in methods.items() if not name.startswith("_")}
    public |= {name: m for name, m in methods.items() if name == "__init__"}
    return {"methods": public, "fields": sorted({f for f in fields if not f.startswith("_")})}


def write(record: Callable[[Path], dict[str, Any]], usage: str | None) -> None:
    """Records one version, as the command line says."""
    if len(sys.argv) != 3:
        raise SystemExit(usage)
    recorded = record(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


def with_table(page: Path, table: str) -> str:
    """The page with this table of versions; with KVTIER_TEST_REGENERATE it is written."""
    head, rest = page.read_text().split(BEGIN)
    _, tail = rest.split(END)
    wanted = head + BEGIN + table + END + tail
    if os.environ.get("KVTIER_TEST_REGENERATE"):
        page.write_text(wanted)
    return wanted
