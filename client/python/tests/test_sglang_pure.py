"""Settings, geometry, identity and the link of SGLang's storage backend, without a daemon."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import kvtier
from kvtier.sglang import identity
from kvtier.sglang.link import Link
from kvtier.sglang.options import Options
from kvtier.sglang.pool import describe
from kvtier.sglang.stats import Stats
from sglang_fakes import HAS_SGLANG, SERVER, KvtierStorage, Pool, Tensor, config, info

LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]


@pytest.fixture
def server():
    """Sets what SGLang was started with."""
    if HAS_SGLANG:
        pytest.skip("the installed SGLang says what it was started with")

    def start(**values) -> SimpleNamespace:
        SERVER[0] = SimpleNamespace(**values)
        return SERVER[0]

    yield start
    SERVER[0] = None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mla", [False, True])
def test_pieces_are_all_bytes_of_a_page_in_the_order_of_a_flat_page(layout, mla) -> None:
    pool = Pool(layout, mla=mla, seed=1)
    pages = describe(pool)
    start, whole = pool.kv_buffer.data_ptr(), pool.array.tobytes()
    for number in range(pool.page_num):
        found = b""
        for piece in pages.pieces:
            at = piece.base - start + number * piece.stride
            found += whole[at : at + piece.nbytes]
        assert found == pool.page(number)
    assert pages.flat
    assert pages.page_bytes * pool.page_num == pool.array.nbytes


def test_a_pool_without_flat_pages_is_described_without_them() -> None:
    pool = Pool()
    pool.get_data_page = None
    assert not describe(pool).flat
    pool = Pool()
    pool.get_data_page = lambda index, flat: Tensor(pool.array[:, :8])
    assert not describe(pool).flat


def test_a_group_of_pools_is_described_by_its_anchor() -> None:
    pool = Pool()
    group = SimpleNamespace(anchor_entry=SimpleNamespace(host_pool=pool))
    assert describe(group) == describe(pool)


def test_values_are_rows_of_a_token_and_all_else_is_bytes() -> None:
    pages = describe(Pool("page_first"))
    assert (pages.element, pages.width(pages.pieces[0])) == ("bf16", 3 * 2 * 8)
    assert describe(Pool(dtype="uint8")).element == "u8"
    assert describe(Pool(dim=65536, pages=2)).element == "u8"


def test_a_pool_that_does_not_fit_is_refused_by_name() -> None:
    for changes, said in (
        ({"layout": "page_unified"}, "layout is page_unified; accepted: layer_first, page_first"),
        ({"page_size": 1}, "--page-size is 1; accepted: 16 to 2048"),
        ({"layers": 600, "layout": "layer_first"}, "1200 pieces; accepted: at most 1024"),
    ):
        with pytest.raises(ValueError, match=said):
            describe(Pool(**changes))
    pool = Pool()
    pool.dcp_size = 2
    with pytest.raises(ValueError, match="context parallelism is 2; accepted: 1"):
        describe(pool)
    pool = Pool()
    pool.size_per_token += 2
    with pytest.raises(ValueError, match="bytes a page, of"):
        describe(pool)


def test_pieces_that_are_not_linear_or_not_inside_are_refused() -> None:
    pool = Pool()
    honest = pool.get_page_buffer_meta

    def shuffled(indices):
        pointers, sizes = honest(indices)
        return [p + 64 * (indices.tolist()[0] == 7 * 16) for p in pointers], sizes

    pool.get_page_buffer_meta = shuffled
    with pytest.raises(ValueError, match="equal steps"):
        describe(pool)
    pool.get_page_buffer_meta = lambda indices: (
        [p + 64 for p in honest(indices)[0]],
        honest(indices)[1],
    )
    with pytest.raises(ValueError, match="outside of its buffers"):
        describe(pool)
    pool.get_page_buffer_meta = lambda indices: None
    with pytest.raises(ValueError, match="does not say where pages lie"):
        describe(pool)
    pool = Pool()
    pool.get_hybrid_pool_buffer = lambda: [Tensor(pool.array, "cuda")]
    with pytest.raises(ValueError, match="memory of cuda; accepted: cpu"):
        describe(pool)


def test_only_whole_pages_have_numbers() -> None:
    pages = describe(Pool())
    assert pages.numbers(Pool().indices([7, 0, 3]), 3) == [7, 0, 3]
    assert pages.numbers(Pool().indices([7]), 2) is None
    assert pages.numbers(Tensor(np.arange(16, 0, -1)), 1) is None
    assert pages.numbers(Tensor(np.arange(-16, 0)), 1) is None


def test_settings_are_read_and_what_is_wrong_is_named(caplog) -> None:
    given = config(extra={"load_timeout_s": 3, "socket": "/s"}).extra_config
    options = Options.parse(given, {"KVTIER_SOCKET": "/other"})
    assert (options.load_timeout_s, options.socket) == (3.0, "/s")
    assert Options.parse(None, {"KVTIER_SOCKET": "/other"}).socket == "/other"
    assert not caplog.records
    wrong = {"durable": "yes", "save_timeout_s": float("nan"), "staging_mib": -1}
    with pytest.raises(ValueError, match=r"durable is 'yes'"):
        Options.parse(wrong)
    del wrong["durable"]
    with pytest.raises(ValueError, match=r"save_timeout_s is nan.*staging_mib is -1"):
        Options.parse(wrong)
    with caplog.at_level(logging.WARNING):
        assert Options.parse({"sokcet": "/s"}, {}) == Options()
    assert "sokcet is no setting" in caplog.text


def test_a_server_whose_weights_cannot_be_told_is_refused(server, tmp_path) -> None:
    server(model_path="no/such-model", revision=None)
    with pytest.raises(ValueError, match="cannot be told; accepted in"):
        KvtierStorage(config(extra={"weights_fingerprint": ""}))
    KvtierStorage(config())
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    server(model_path=str(tmp_path), revision=None)
    first = identity.model_of("served", Options(), identity.server_args())
    assert first.weights
    (tmp_path / "model.safetensors").write_bytes(b"others!")
    second = identity.model_of("served", Options(), identity.server_args())
    assert first.name == second.name == tmp_path.name
    assert first.weights != second.weights


def test_without_a_server_pages_are_those_of_the_process() -> None:
    first = identity.model_of("a", Options(), None)
    assert first == identity.model_of("a", Options(), None)
    assert first.weights == identity._OF_THIS_PROCESS


def test_adapters_are_refused_where_hashes_do_not_name_them(server, monkeypatch) -> None:
    server(enable_lora=True, model_path="m")
    KvtierStorage(config())
    utils = sys.modules["sglang.srt.mem_cache.utils"]
    monkeypatch.delattr(utils, "storage_namespace_seed")
    with pytest.raises(ValueError, match="do not name the adapter"):
        KvtierStorage(config())


def test_decode_context_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match="decode context parallelism is on"):
        KvtierStorage(config(dcp_size=2))


def fingerprint(pool: Pool, server=None, **changes) -> bytes:
    pages, settings = describe(pool), config(**changes)
    facts = identity.facts_of(settings, pages, pool, server, False)
    model = identity.Model("m", "r", b"w")
    return identity.descriptor(kvtier, model, pages, facts, settings).fingerprint


def test_what_changes_the_meaning_of_bytes_changes_the_fingerprint(tmp_path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter.safetensors").write_bytes(b"one")
    lora = {"lora_paths": [f"name={adapter}"]}
    servers = [
        None,
        SimpleNamespace(kv_cache_dtype="fp8_e4m3"),
        SimpleNamespace(kv_cache_dtype="fp8_e5m2"),
        SimpleNamespace(quantization="awq"),
        SimpleNamespace(json_model_override_args='{"rope_theta": 1}'),
        SimpleNamespace(speculative_draft_model_path="draft"),
        SimpleNamespace(**lora),
    ]
    found = [fingerprint(Pool(), server) for server in servers]
    (adapter / "adapter.safetensors").write_bytes(b"two")
    found.append(fingerprint(Pool(), SimpleNamespace(**lora)))
    assert len(set(found)) == len(found)
    assert fingerprint(Pool(seed=1)) == fingerprint(Pool(seed=2, pages=3))


def test_hints_are_no_part_of_a_name_and_all_else_is() -> None:
    assert identity.extra_of(None) == identity.extra_of(info(prefix=["a"])) == b""
    assert identity.extra_of(info(extra={"session_id": 1})) == b""
    tenants = [identity.extra_of(info(extra={"tenant": who})) for who in ("a", "b")]
    assert len({b"", *tenants}) == 3


def test_a_link_pauses_longer_after_each_failure_and_not_after_a_success() -> None:
    link = Link(lambda: "session", "test")
    link.start(5.0)
    assert link.session() == "session"
    link.failed(RuntimeError("no"))
    assert link.session() is None
    first = link._quiet_until - time.monotonic()
    link.failed(RuntimeError("no"))
    second = link._quiet_until - time.monotonic()
    assert 0 < first < second
    for _ in range(20):
        link.failed(RuntimeError("no"))
    assert link._quiet_until - time.monotonic() <= 15.0
    link.worked()
    assert link.session() == "session"


def test_a_link_opens_a_new_session_where_the_old_one_cannot_serve() -> None:
    opened = iter(["first", "second"])
    link = Link(lambda: next(opened), "test")
    link.start(5.0)
    link.failed(type("NamespaceChanged", (Exception,), {})())
    end = time.monotonic() + 5
    while link._session is None and time.monotonic() < end:
        time.sleep(0.01)
    assert link._session == "second"


def test_a_session_that_opens_after_the_close_is_given_back() -> None:
    gate, closed = threading.Event(), threading.Event()

    def slow() -> SimpleNamespace:
        gate.wait(5)
        return SimpleNamespace(close=closed.set)

    link = Link(slow, "test")
    link.start()
    link.close()
    gate.set()
    assert closed.wait(5)
    assert link.session() is None


def test_stats_are_taken_once_and_only_when_they_are_on() -> None:
    stats = Stats(True)
    stats.loaded(2, 1 << 30, 0.5)
    stats.saved(0, 0, 0.1)
    taken = stats.take()
    assert taken["prefetch_pgs"] == [2]
    assert taken["prefetch_bandwidth"] == [2.0]
    assert taken["backup_pgs"] == []
    assert stats.take()["prefetch_pgs"] == []
    off = Stats(False)
    off.loaded(2, 1, 1.0)
    assert off.take()["prefetch_pgs"] == []
