"""Which engines share blocks: weights, configuration and settings in the identity of a model."""

import json
from types import SimpleNamespace

import pytest

import vllm_modules
from kvtier.vllm import weights
from kvtier.vllm.engine import Engine, describe_engine
from kvtier.vllm.options import Options


def tensors(path, *values, note=""):
    """A safetensors file of one-dimensional tensors of bytes."""
    header, end = {"__metadata__": {"note": note}}, 0
    for index, value in enumerate(values):
        header[f"t{index}"] = {"dtype": "U8", "data_offsets": [end, end + len(value)]}
        end += len(value)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values))


@pytest.fixture(name="model")
def model_folder(tmp_path, monkeypatch):
    """A model's directory, in an engine that has vLLM's modules."""
    vllm_modules.install(monkeypatch)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"layers": 1, "_name_or_path": "a"}))
    tensors(folder / "model.safetensors", bytes(1000), bytes(3))
    return folder


def engine(model, options=None, **changes):
    given = vllm_modules.vllm_config(str(model), **changes)
    return describe_engine(given, vllm_modules.kv_cache_config(), options or Options())


def fingerprint(model, options=None, **changes):
    found = engine(model, options, **changes)
    assert isinstance(found, Engine), found
    return found.descriptor(0).fingerprint


def test_every_tensor_is_sampled_however_small_its_share_of_the_file(tmp_path) -> None:
    file = tmp_path / "model.safetensors"
    big = bytes(8_000_000)
    tensors(file, big, bytes(64), big)
    first = weights.weights_of(str(tmp_path))
    tensors(file, big, bytes(63) + b"\1", big)
    assert weights.weights_of(str(tmp_path)) != first
    tensors(file, big, bytes(64), big, note="another header")
    assert weights.weights_of(str(tmp_path)) != first
    tensors(file, big, bytes(64), big)
    assert weights.weights_of(str(tmp_path)) == first


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (40).to_bytes(8, "little") + b'{"a": {"data_offsets": [0, 99999999999]}}',
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_a_file_that_is_no_safetensors_is_sampled_as_bytes(tmp_path, content) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    first = weights.weights_of(str(tmp_path))
    assert first
    file.write_bytes(content + b"\1")
    assert weights.weights_of(str(tmp_path)) != first


def test_a_model_that_is_one_file_is_sampled_and_differs_from_others(tmp_path) -> None:
    (tmp_path / "a.gguf").write_bytes(bytes(100_000))
    (tmp_path / "b.gguf").write_bytes(bytes(99_999) + b"\1")
    both = [weights.weights_of(str(tmp_path / name)) for name in ("a.gguf", "b.gguf")]
    assert all(both)
    assert len(set(both)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"model_max_model_len": 8192},
        {"model_hf_overrides": {"rope_scaling": {"factor": 2}}},
        {"model_model_impl": "transformers"},
        {"model_multimodal_config": SimpleNamespace(mm_processor_kwargs={"crops": 4})},
        {"load_load_format": "pt"},
        {"load_model_loader_extra_config": {"shards": 2}},
    ],
)
def test_engines_that_load_or_lay_out_a_model_otherwise_share_no_key(model, change) -> None:
    assert fingerprint(model) != fingerprint(model, **change)
    assert fingerprint(model, **change) == fingerprint(model, **change)


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", "modeling_mine.py"])
def test_what_configures_a_model_is_in_its_identity(model, name) -> None:
    first = fingerprint(model)
    (model / name).write_text(json.dumps({"layers": 2}))
    assert fingerprint(model) != first


def test_a_model_that_changes_its_configuration_while_it_loads_stays_the_same(model) -> None:
    changed = SimpleNamespace(to_dict=lambda: {"live": 2})
    assert fingerprint(model) == fingerprint(model, model_hf_config=changed)
    changes = {"model_hf_overrides": lambda config: config}
    first = fingerprint(model, **changes)
    assert first != fingerprint(model, model_hf_config=changed, **changes)


def test_a_directory_may_move_and_nothing_of_its_place_is_kept(model, tmp_path) -> None:
    first = fingerprint(model)
    (model / "config.json").write_text(json.dumps({"_name_or_path": "b", "layers": 1}))
    (tmp_path / "elsewhere").mkdir()
    assert fingerprint(model.rename(tmp_path / "elsewhere" / "mine")) == first


@pytest.mark.parametrize("load_format", ["dummy", "tensorizer", "somebody's"])
def test_weights_that_are_in_no_file_are_refused_unless_they_are_named(model, load_format) -> None:
    refused = engine(model, load_load_format=load_format)
    assert isinstance(refused, str)
    assert "set weights_fingerprint" in refused
    named = Options(weights_fingerprint="run 7")
    assert fingerprint(model, named, load_load_format=load_format)


def test_a_model_without_files_of_weights_or_a_commit_is_refused(model) -> None:
    (model / "model.safetensors").unlink()
    refused = engine(model)
    assert isinstance(refused, str)
    assert "set weights_fingerprint" in refused
    assert "set weights_fingerprint" in engine("nobody/knows-it")
    assert fingerprint("nobody/knows-it", Options(weights_fingerprint="1"))


def test_a_commit_of_the_hub_names_weights_without_their_files(model, tmp_path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert fingerprint(snapshot)
    folder = tmp_path / "snapshots" / "latest"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert isinstance(engine(folder), str)


def test_a_draft_model_is_in_the_identity(model, tmp_path) -> None:
    plain = fingerprint(model)
    draft = tmp_path / "draft"
    draft.mkdir()
    found = {plain}
    given = vllm_modules.vllm_config(str(model))
    given.speculative_config = SimpleNamespace(model=str(draft), method="eagle", revision=None)
    for value in (b"\0", b"\1"):
        tensors(draft / "model.safetensors", value * 9)
        made = describe_engine(given, vllm_modules.kv_cache_config(), Options())
        found.add(made.descriptor(0).fingerprint)
    assert len(found) == 3


def test_without_recompute_nothing_is_loaded_unless_it_is_asked_for() -> None:
    options, notice = Options().of_policy("fail")
    assert not options.load
    assert options.save
    assert "recompute" in notice
    options, notice = Options(load_may_fail_requests=True).of_policy("fail")
    assert options.load
    assert "fails" in notice
    assert Options().of_policy("recompute") == (Options(), "")
