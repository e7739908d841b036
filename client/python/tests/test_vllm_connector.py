"""What vLLM calls of the connector, with modules of vLLM that are fakes."""

from types import SimpleNamespace

import pytest

import vllm_modules
from kvtier.vllm.orders import LoadOrder
from vllm_fakes import Request, step


@pytest.fixture(name="made")
def connector_maker(tmp_path, monkeypatch):
    """Makes connectors of a model that lies in a directory; no daemon is there."""
    vllm_modules.install(monkeypatch)
    module = vllm_modules.connector()
    monkeypatch.setattr(module, "CONNECT_WAIT_S", 0.01)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(9))
    connectors = []

    def make(role, **changes):
        config = vllm_modules.vllm_config(str(tmp_path), **changes)
        role = vllm_modules.Role[role]
        found = module.KvtierConnector(config, role, vllm_modules.kv_cache_config())
        connectors.append(found)
        return found

    make.module = module
    yield make
    for found in connectors:
        found.shutdown()


def orders(made, **content):
    return made.module.KvtierMetadata(made.module.StepOrders(**content))


def output(meta=None, **content):
    fields = dict.fromkeys(("finished_recving", "finished_sending", "invalid_block_ids"))
    return SimpleNamespace(kv_connector_worker_meta=meta, **(fields | content))


def test_both_sides_describe_the_same_blocks_and_the_worker_says_which(made) -> None:
    worker, scheduler = made("WORKER"), made("SCHEDULER")
    meta = worker.build_connector_worker_meta()
    assert meta.shards == scheduler._scheduler._shards
    both = meta.aggregate(made.module.KvtierWorkerMetadata(7, {1: b"x"}))
    assert both.shards == {**meta.shards, 1: b"x"}
    assert both.copied == 0
    scheduler.update_connector_output(output(meta))
    assert not scheduler._scheduler._stopped
    scheduler.update_connector_output(output(made.module.KvtierWorkerMetadata(0, {0: b""})))
    assert scheduler._scheduler._stopped


def test_files_that_cannot_be_read_switch_a_connector_off_and_end_no_engine(
    made, monkeypatch, caplog
) -> None:
    def refuse(*_):
        raise PermissionError("model.safetensors")

    monkeypatch.setattr(made.module, "describe_engine", refuse)
    scheduler = made("SCHEDULER")
    request = Request("a", list(range(40)))
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert scheduler.build_connector_meta(step()).orders.is_empty()
    assert "PermissionError: model.safetensors" in caplog.text


def test_a_worker_that_is_off_fails_what_is_ordered_and_tells_the_scheduler(
    made, monkeypatch
) -> None:
    monkeypatch.setattr(made.module, "describe_engine", lambda *_: "no")
    worker = made("WORKER")
    loads = [LoadOrder("a", [[bytes(32)]], [5])]
    worker._connector_metadata = orders(made, loads=loads, report={"b"})
    worker.start_load_kv(None)
    worker.wait_for_save()
    assert worker.get_finished(set()) == ({"b"}, {"a"})
    assert worker.get_block_ids_with_load_errors() == {5}
    assert worker.build_connector_worker_meta().shards == {0: b""}


def test_a_cache_that_cannot_be_registered_is_told_to_the_scheduler(made, caplog) -> None:
    worker = made("WORKER")
    broken = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    worker.register_kv_caches({"layer0": broken})
    assert "AttributeError" in caplog.text or "has no attribute" in caplog.text
    assert worker.build_connector_worker_meta().shards == {0: b""}


def test_a_policy_that_fails_requests_switches_loading_off(made, caplog) -> None:
    scheduler = made("SCHEDULER", transfer_kv_load_failure_policy="fail")
    assert not scheduler._scheduler._options.load
    assert scheduler._scheduler._options.save
    assert "Nothing is loaded" in caplog.text


def test_settings_that_are_wrong_are_refused_at_the_start(made) -> None:
    wrong = {"async_load": False, "socket": "/nowhere"}
    with pytest.raises(ValueError, match="async_load is False"):
        made("SCHEDULER", transfer_kv_connector_extra_config=wrong)
