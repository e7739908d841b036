"""The storage backend of SGLang over a real daemon, with host pools that are numpy arrays."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from conftest import Daemon
from sglang_fakes import (
    KvtierStorage,
    Pool,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    Tensor,
    config,
    hashes,
    info,
)

LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
SOON_S = 4.0
"""More than any call may take while the daemon is away, on a loaded machine."""


@pytest.fixture
def attach(daemon: Daemon):
    """Attaches a storage to a pool as SGLang does."""
    made = []

    def make(pool: Pool, **changes) -> KvtierStorage:
        extra = {"socket": str(daemon.socket), "connect_wait_s": 20.0, **changes.pop("extra", {})}
        storage = KvtierStorage(config(extra=extra, **changes), {})
        storage.register_mem_pool_host(pool)
        made.append(storage)
        return storage

    yield make
    for storage in made:
        storage.close()


def wait_for(condition) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mla", [False, True])
def test_pages_come_back_into_other_places_of_another_process_pool(attach, layout, mla) -> None:
    ours, places, others = Pool(layout, mla=mla, seed=1), [6, 1, 4], [0, 7, 2]
    storage = attach(ours, is_mla_model=mla)
    keys = hashes(3)
    assert storage.batch_exists(keys) == 0
    assert storage.batch_set_v1(keys, ours.indices(places), info()) == [True] * 3
    ours.array[:] = 7  # SGLang gave the pages away
    saved = Pool(layout, mla=mla, seed=1)

    theirs = Pool(layout, mla=mla)
    again = attach(theirs, is_mla_model=mla)
    assert again.batch_exists([*keys, *hashes(1, first=99)], info()) == 3
    assert again.batch_get_v1(keys, theirs.indices(others), info()) == [True] * 3
    for place, other in zip(places, others, strict=True):
        assert theirs.page(other) == saved.page(place)
    untouched = set(range(8)) - set(others)
    assert all(not any(theirs.page(number)) for number in untouched)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8"])
def test_pages_of_every_type_come_back(attach, dtype) -> None:
    pool = Pool(dtype=dtype, seed=2)
    storage = attach(pool)
    saved = pool.page(3)
    assert storage.batch_set_v1(hashes(1), pool.indices([3])) == [True]
    pool.wipe()
    assert storage.batch_get_v1(hashes(1), pool.indices([5])) == [True]
    assert pool.page(5) == saved


def test_pages_survive_a_restart_of_the_daemon_and_a_kill(attach, daemon) -> None:
    pool = Pool(seed=3)
    storage = attach(pool)
    keys, saved = hashes(4), [Pool(seed=3).page(number) for number in range(4)]
    assert all(storage.batch_set_v1(keys, pool.indices([0, 1, 2, 3])))
    for how in (signal.SIGTERM, signal.SIGKILL):
        daemon.stop(how)
        daemon.start()
        pool.wipe()
        assert wait_for(lambda: storage.batch_exists(keys) == 4)
        assert storage.batch_get_v1(keys, pool.indices([4, 5, 6, 7])) == [True] * 4
        assert [pool.page(number) for number in (4, 5, 6, 7)] == saved


def test_more_pages_than_there_is_memory_to_save_through_are_saved(attach) -> None:
    # Three pages fit into the staging memory at a time, and the batch is larger than SGLang's.
    pool = Pool(pages=150, layers=4, heads=8, dim=80, seed=4)
    storage = attach(pool, extra={"staging_mib": 1})
    keys, every = hashes(150), list(range(150))
    before = pool.array.copy()
    assert all(storage.batch_set_v1(keys, pool.indices(every)))
    pool.wipe()
    assert storage.batch_exists(keys) == 150
    assert all(storage.batch_get_v1(keys, pool.indices(every)))
    assert np.array_equal(pool.array, before)


def test_a_partial_hit_is_told_page_by_page(attach) -> None:
    pool = Pool(seed=5)
    storage = attach(pool)
    keys, saved = hashes(5), [pool.page(number) for number in range(5)]
    stored = [0, 1, 3]
    names = [keys[number] for number in stored]
    assert all(storage.batch_set_v1(names, pool.indices(stored)))
    pool.wipe()
    assert storage.batch_exists(keys) == 2
    assert storage.exists(keys[3])
    assert not storage.exists(keys[4])
    loaded = storage.batch_get_v1(keys, pool.indices([0, 1, 2, 3, 4]))
    assert loaded == [True, True, False, True, False]
    assert all(pool.page(number) == saved[number] for number in stored)


OTHER = {
    "dtype": ({"dtype": "float16"}, {}),
    "layout": ({"layout": "page_first_direct"}, {}),
    "page size": ({"page_size": 32}, {}),
    "layers": ({"layers": 4}, {}),
    "heads at equal bytes": ({"heads": 4, "dim": 4}, {}),
    "tp rank": ({}, {"tp_rank": 1}),
    "tp size": ({}, {"tp_size": 2}),
    "pp rank": ({}, {"pp_rank": 1, "pp_size": 2}),
    "cp rank": ({}, {"attn_cp_rank": 1}),
    "cp size": ({}, {"attn_cp_size": 2}),
    "dp rank": ({}, {"dp_rank": 1}),
    "model": ({}, {"model_name": "tests/other"}),
    "weights": ({}, {"extra": {"weights_fingerprint": "two"}}),
    "split of heads": ({}, {"tp_lcm_size": 4, "should_split_heads": True}),
}


@pytest.mark.parametrize("what", OTHER)
def test_an_engine_that_differs_in_anything_finds_nothing(attach, what) -> None:
    shape, settings = OTHER[what]
    base = {"tp_size": 2} if what == "tp rank" else {"pp_size": 2} if what == "pp rank" else {}
    ours = Pool(seed=6)
    keys = hashes(2)
    assert all(attach(ours, **base).batch_set_v1(keys, ours.indices([0, 1])))
    theirs = Pool(**shape)
    other = attach(theirs, **base, **settings) if base.keys().isdisjoint(settings) else None
    other = other or attach(theirs, **{**base, **settings})
    assert other.batch_exists(keys) == 0
    assert other.batch_get_v1(keys, theirs.indices([0, 1])) == [False, False]
    assert not theirs.array.any()
    same = Pool()
    assert attach(same, **base).batch_exists(keys) == 2


def test_mla_ranks_share_one_shard_and_others_do_not(attach) -> None:
    pool = Pool(mla=True, seed=7)
    first = attach(pool, is_mla_model=True, tp_rank=0, tp_size=8)
    assert first.batch_set_v1(hashes(1), pool.indices([2])) == [True]
    for rank, size in ((5, 8), (1, 2)):
        other = Pool(mla=True)
        storage = attach(other, is_mla_model=True, tp_rank=rank, tp_size=size)
        assert storage.batch_get_v1(hashes(1), other.indices([0])) == [True]
        assert other.page(0) == pool.page(2)


def test_ranks_of_attention_data_parallelism_share_when_told_to(attach) -> None:
    pool = Pool(seed=8)
    shared = {"extra": {"share_dp": True}}
    assert attach(pool, dp_rank=0, **shared).batch_set_v1(hashes(1), pool.indices([2])) == [True]
    assert attach(Pool(), dp_rank=1, **shared).batch_exists(hashes(1)) == 1
    assert attach(Pool(), dp_rank=1).batch_exists(hashes(1)) == 0


def test_what_sglang_says_of_a_request_is_in_the_name_and_hints_are_not(attach) -> None:
    pool = Pool(seed=9)
    storage = attach(pool)
    tenant = info(extra={"tenant": "a"})
    assert storage.batch_set_v1(hashes(1), pool.indices([0]), tenant) == [True]
    assert storage.batch_exists(hashes(1), tenant) == 1
    assert storage.batch_exists(hashes(1), info(extra={"tenant": "b"})) == 0
    assert storage.batch_exists(hashes(1), info()) == 0
    hint = info(prefix=hashes(3, first=50), extra={"tenant": "a", "kvcc_router_hint": {"at": 1}})
    assert storage.batch_exists(hashes(1), hint) == 1


def test_a_long_prefix_is_saved_and_asked_for_in_portions(attach) -> None:
    pool = Pool(seed=10)
    storage = attach(pool)
    front, back = hashes(3), hashes(3, first=3)
    assert all(storage.batch_set_v1(front, pool.indices([0, 1, 2]), info(prefix=[])))
    assert all(storage.batch_set_v1(back, pool.indices([3, 4, 5]), info(prefix=front)))
    # SGLang passes what is before a page with some calls only: it is the same page.
    assert storage.batch_exists(front + back, info()) == 6
    assert storage.batch_exists(back, info(prefix=front)) == 3
    saved = pool.page(4)
    pool.wipe()
    assert storage.batch_get_v1(back, pool.indices([0, 1, 2])) == [True] * 3
    assert pool.page(1) == saved


def test_indices_that_are_no_whole_pages_are_misses(attach) -> None:
    pool = Pool(seed=11)
    storage = attach(pool)
    shifted = Tensor(np.arange(8, 24))
    outside = Tensor(np.arange(8 * 16, 9 * 16))
    torn = Tensor(np.concatenate([np.arange(8), np.arange(16, 24)]))
    short = Tensor(np.arange(15))
    for indices in (shifted, outside, torn, short, None):
        assert storage.batch_set_v1(hashes(1), indices) == [False]
        assert storage.batch_get_v1(hashes(1), indices) == [False]
    assert storage.batch_exists(hashes(1)) == 0


def test_flat_pages_and_pages_of_the_pool_are_the_same_blocks(attach) -> None:
    for number, layout in enumerate(LAYOUTS):
        pool = Pool(layout, seed=12)
        storage = attach(pool)
        first, second = hashes(2, first=10 * number)
        assert storage.batch_set([first], [pool.get_data_page(0)])
        assert storage.batch_set_v1([second], pool.indices([1])) == [True]
        flat = pool.get_dummy_flat_data_page()
        assert storage.batch_get([second, "none", first], [flat, *_flat(pool, 2)])[1] is None
        assert flat.array.tobytes() == pool.page(1)
        found = storage.get(first)
        assert found.array.tobytes() == pool.page(0)
        saved = pool.page(0)
        pool.wipe()
        assert storage.batch_get_v1([first], pool.indices([6])) == [True]
        assert pool.page(6) == saved


def _flat(pool: Pool, count: int) -> list[Tensor]:
    return [pool.get_dummy_flat_data_page() for _ in range(count)]


def test_flat_tensors_of_another_size_are_misses(attach) -> None:
    pool = Pool(seed=13)
    storage = attach(pool)
    wrong = Tensor(np.zeros(7, np.uint8))
    assert not storage.set(hashes(1)[0], wrong)
    assert not storage.set(hashes(1)[0], None)
    assert storage.set(hashes(1)[0], pool.get_data_page(0))
    assert storage.get(hashes(1)[0], wrong) is None


def test_many_flat_pages_are_saved_through_little_memory(attach) -> None:
    pool = Pool(pages=70, layers=4, heads=8, dim=80, seed=14)
    storage = attach(pool, extra={"staging_mib": 1})
    values = [pool.get_data_page(number * 16) for number in range(70)]
    assert storage.batch_set(hashes(70), values)
    found = storage.batch_get(hashes(70), _flat(pool, 70))
    assert [one.array.tobytes() for one in found] == [one.array.tobytes() for one in values]


def test_calls_of_the_second_interface_keep_the_kv_pool_and_miss_others(attach) -> None:
    pool = Pool(seed=15)
    storage = attach(pool)
    storage.register_mem_host_pool_v2(pool, PoolName.KV)
    storage.register_mem_host_pool_v2(Pool(), PoolName.MAMBA)
    keys = hashes(3)
    both = [
        PoolTransfer(PoolName.KV, pool.indices([0, 1, 2]), keys),
        PoolTransfer(PoolName.MAMBA, pool.indices([0]), keys[:1]),
    ]
    saved = storage.batch_set_v2(both)
    assert saved == {PoolName.KV: [True] * 3, PoolName.MAMBA: [False]}
    found = storage.batch_exists_v2([*keys, "none"])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (3, [1, 2, 3])
    assert found.extra_pool_hit_pages == {PoolName.KV: 3}
    for policy, usable in (
        (PoolHitPolicy.ALL_PAGES, 0),
        (PoolHitPolicy.TRAILING_PAGES, 0),
        (PoolHitPolicy.BLOCK_GROUPS, 3),
    ):
        needs = [PoolTransfer(PoolName.MAMBA, None, keys[:1], policy)]
        found = storage.batch_exists_v2(keys, needs)
        assert found.kv_hit_pages == usable
        assert found.extra_pool_hit_pages == {PoolName.KV: 3}
    bytes_before = pool.page(1)
    pool.wipe()
    loaded = storage.batch_get_v2(both)
    assert loaded == {PoolName.KV: [True] * 3, PoolName.MAMBA: [False]}
    assert pool.page(1) == bytes_before


def test_a_daemon_that_dies_costs_little_and_is_used_again_when_it_is_back(attach, daemon) -> None:
    pool = Pool(seed=16)
    storage = attach(pool)
    keys = hashes(4)
    assert all(storage.batch_set_v1(keys, pool.indices([0, 1, 2, 3])))
    daemon.kill()
    began = time.monotonic()
    for _ in range(20):
        assert storage.batch_exists(keys) == 0
        assert storage.batch_get_v1(keys, pool.indices([0, 1, 2, 3])) == [False] * 4
        assert storage.batch_set_v1(keys, pool.indices([0, 1, 2, 3])) == [False] * 4
        assert storage.get(keys[0]) is None
    assert time.monotonic() - began < SOON_S
    daemon.start()
    assert wait_for(lambda: storage.batch_exists(keys) == 4)
    assert all(storage.batch_get_v1(keys, pool.indices([4, 5, 6, 7])))


def test_a_daemon_that_hangs_costs_a_bounded_time(attach, daemon) -> None:
    pool = Pool(seed=17)
    short = {"lookup_timeout_s": 0.3, "load_timeout_s": 0.3, "save_timeout_s": 0.3}
    storage = attach(pool, extra=short)
    assert all(storage.batch_set_v1(hashes(1), pool.indices([0])))
    daemon.process.send_signal(signal.SIGSTOP)
    os.waitpid(daemon.process.pid, os.WUNTRACED)  # it has stopped, all of it
    try:
        for call in (
            lambda: storage.batch_exists(hashes(1)),
            lambda: any(storage.batch_get_v1(hashes(1), pool.indices([1]))),
            lambda: any(storage.batch_set_v1(hashes(1, first=5), pool.indices([2]))),
            lambda: storage.get(hashes(1)[0]) is not None,
            lambda: storage.set(hashes(1, first=6)[0], pool.get_data_page(0)),
        ):
            storage._mover._link.worked()  # no pause: every call tries
            began = time.monotonic()
            assert not call()
            assert time.monotonic() - began < SOON_S
        began = time.monotonic()
        assert storage.batch_exists(hashes(1)) == 0
        assert time.monotonic() - began < 0.1  # in the pause nothing is asked
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert wait_for(lambda: storage.batch_exists(hashes(1)) == 1)


def test_a_daemon_killed_during_loads_and_saves_never_gives_wrong_pages(attach, daemon) -> None:
    pool = Pool(pages=64, layers=8, heads=8, dim=64, seed=18)
    storage = attach(pool)
    keys, half = hashes(32), list(range(32))
    saved = [pool.page(number) for number in half]
    assert all(storage.batch_set_v1(keys, pool.indices(half)))
    for turn, pause in enumerate((0.005, 0.03, 0.06), 1):
        theirs = hashes(32, first=100 * turn)
        killer = threading.Timer(pause, daemon.kill)
        killer.start()
        while killer.is_alive():
            loaded = storage.batch_get_v1(keys, pool.indices([32 + n for n in half]))
            for number in half:
                if loaded[number]:
                    assert pool.page(32 + number) == saved[number]
            for number in half:
                storage.batch_set_v1(theirs[number : number + 1], pool.indices([number]))
        daemon.start()
        assert wait_for(lambda: storage.batch_exists(keys) == 32)
        pool.array[:, 32 * 16 :] = 0
        loaded = storage.batch_get_v1(theirs, pool.indices([32 + n for n in half]))
        for number in half:
            if loaded[number]:
                assert pool.page(32 + number) == saved[number]


def test_clear_forgets_everything_and_waits_for_a_daemon_that_is_away(attach, daemon) -> None:
    pool = Pool(seed=19)
    storage = attach(pool)
    keys = hashes(2)
    assert all(storage.batch_set_v1(keys, pool.indices([0, 1])))
    assert storage.clear() is True
    assert storage.batch_exists(keys) == 0
    assert all(storage.batch_set_v1(keys, pool.indices([0, 1])))
    daemon.kill()
    assert storage.clear() is False
    daemon.start()
    # What was stored before the clear is never served after it.
    end = time.monotonic() + 5
    while time.monotonic() < end:
        assert storage.batch_exists(keys) == 0
        time.sleep(0.05)
    assert wait_for(lambda: all(storage.batch_set_v1(keys, pool.indices([0, 1]))))
    assert storage.batch_exists(keys) == 2


def test_a_daemon_that_comes_after_the_start_is_used(daemon) -> None:
    daemon.kill()
    pool = Pool(seed=20)
    began = time.monotonic()
    extra = {"socket": str(daemon.socket), "connect_wait_s": 0.2}
    storage = KvtierStorage(config(extra=extra), {})
    storage.register_mem_pool_host(pool)
    assert time.monotonic() - began < SOON_S
    assert storage.batch_exists(hashes(1)) == 0
    daemon.start()
    assert wait_for(lambda: storage.batch_set_v1(hashes(1), pool.indices([0])) == [True])
    storage.close()
    assert storage.batch_exists(hashes(1)) == 0


def test_metrics_are_given_when_they_are_on_and_once(attach) -> None:
    pool = Pool(seed=21)
    assert attach(pool).get_stats() is None
    storage = attach(pool, enable_storage_metrics=True)
    storage.batch_set_v1(hashes(3), pool.indices([0, 1, 2]))
    storage.batch_get_v1(hashes(2), pool.indices([3, 4]))
    found = storage.get_stats()
    assert (found.backup_pgs, found.prefetch_pgs) == ([3], [2])
    assert len(found.backup_bandwidth) == len(found.prefetch_bandwidth) == 1
    assert min(found.backup_bandwidth + found.prefetch_bandwidth) > 0
    assert storage.get_stats().prefetch_pgs == []
