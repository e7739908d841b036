"""The package as it is installed: stubs, words, the README."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import kvtier
import kvtier.types
from conftest import Daemon, model_of, open_session
from kvtier import _kvtier

PACKAGE = Path(kvtier.__file__).parent
STUB = ast.parse((PACKAGE / "_kvtier.pyi").read_text())


def names_of(call: ast.FunctionDef) -> list[str]:
    arguments = call.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    names = [argument.arg for argument in every]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_every_name_of_the_stubs_is_there_and_none_is_missing() -> None:
    classes = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
    functions = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
    public = {name for name in vars(_kvtier) if not name.startswith("_")}
    assert public == set(classes) | set(functions) | {"ROOT"}
    assert set(kvtier.__all__) == public | {"__version__"}
    checked = 0
    for name, node in classes.items():
        real = getattr(_kvtier, name)
        assert (PACKAGE / "py.typed").is_file()
        members = [one for one in node.body if isinstance(one, ast.FunctionDef)]
        assert real.__doc__, f"{name} says nothing of itself"
        for member in members:
            # Buffers have no name in Python before 3.12.
            if member.name in ("__buffer__", "__new__"):
                continue
            assert hasattr(real, member.name), f"{name}.{member.name}"
            found = getattr(real, member.name)
            if callable(found) and not member.name.startswith("__"):
                given = [one for one in inspect.signature(found).parameters if one != "self"]
                assert given == names_of(member), f"{name}.{member.name}"
                checked += 1
        known = {member.name for member in members}
        if not issubclass(real, BaseException):
            there = {one for one in vars(real) if not one.startswith("_")}
            assert there == {one for one in known if not one.startswith("_")}, name
    assert checked > 80


def test_words_of_the_types_are_those_that_are_accepted(daemon: Daemon) -> None:
    types = kvtier.types
    for element in get_args(types.Element):
        assert model_of(element=element).element == element
    for order in get_args(types.PartOrder):
        assert model_of(order=order).order == order
    model = model_of(layers=[kvtier.LayerSpec.opaque(bytes_per_token=2)])
    for kind in get_args(types.PayloadKind):
        kvtier.SaveBlock(bytes(32), tokens=1, kind=kind)
    for code in get_args(types.PartCode):
        assert (model.layout().part(0, code) is None) == (code != "opaque")
    session = open_session(daemon, model)
    for quality in get_args(types.Quality):
        session.lookup([bytes(32)], accept=quality)
    for wait in get_args(types.Acknowledge):
        assert session.commit([], wait) == []


def test_the_readme_does_what_it_says(daemon: Daemon) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert examples
    names: dict[str, object] = {}
    for example in examples:
        text = example.replace("/run/kvtier/kvtierd.sock", str(daemon.socket))
        exec(compile(text, "README.md", "exec"), names)


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_the_stubs_pass_the_type_checker_and_match_the_module(tmp_path: Path) -> None:
    # What an interpreter before 3.12 does not show of an extension's class, and what only it has.
    names = r"(\w+\.__(buffer|release_buffer|class_getitem)__|__all__)"
    allowed = tmp_path / "allowed"
    allowed.write_text(rf"kvtier\._kvtier\.{names}" + "\n")
    rules = str(Path(__file__).parents[1] / "pyproject.toml")
    stubtest = ["mypy.stubtest", "kvtier._kvtier", "--mypy-config-file", rules]
    for command in (
        ["mypy", "--config-file", rules, "-p", "kvtier"],
        [*stubtest, "--allowlist", str(allowed), "--ignore-unused-allowlist"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_torch_tensors_share_memory_both_ways(daemon: Daemon) -> None:
    torch = pytest.importorskip("torch")
    model = model_of(element="bf16")
    session = open_session(daemon, model)
    saved = torch.randn(3, 2, 6, 16, 2, 8).to(torch.bfloat16)
    fresh = torch.zeros_like(saved)
    caches = []
    for tensor in (saved, fresh):
        cache = kvtier.PagedCache(model, 16)
        for layer in range(3):
            cache.add(layer, "k", tensor[layer, 0])
            cache.add(layer, "v", tensor[layer, 1])
        caches.append(cache)
    keys = session.prefix_keys(torch.arange(64))
    session.save_pages(caches[0], session.chain(keys, 64), [3, 1, 0, 5]).result(60)
    session.restore_pages(caches[1], keys, torch.tensor([0, 1, 2, 3])).result(60)
    assert torch.equal(saved[:, :, [3, 1, 0, 5]], fresh[:, :, :4])
    key = session.derive_key(kvtier.ROOT, [1])
    (slot,) = session.reserve([kvtier.SaveBlock(key, tokens=16)])
    assert isinstance(slot, kvtier.Slot)
    with slot.fill_part(0, "k") as view:
        tensor = torch.from_dlpack(view)
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, (16, 2, 8))
        tensor.fill_(2.0)
        del tensor
    slot.release()
