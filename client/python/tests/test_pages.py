"""Saving out of an engine's pages and restoring into them."""

import time
from collections.abc import Callable

import numpy as np
import pytest

import kvtier
from conftest import (
    BLOCK,
    DIM,
    HEADS,
    LAYERS,
    PAGE,
    Daemon,
    Engine,
    model_of,
    open_session,
    save_all,
)

TOKENS = list(range(1000, 1000 + 3 * BLOCK + 5))
"""Three full blocks of two pages, and a short one of one page."""

PAGES = [9, 2, 7, 0, 4, 11, 5]


def test_pages_restored_after_a_restart_are_those_that_were_saved(
    daemon: Daemon, session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine = Engine(model, 12, seed=1)
    keys = save_all(session, engine, TOKENS, PAGES)
    daemon.kill()
    daemon.start()

    fresh = Engine(model, 8)
    again = open_session(daemon, model)
    assert again.lookup(keys, tokens=len(TOKENS)).prefix_tokens == len(TOKENS)
    order = [0, 1, 2, 3, 4, 5, 6]
    restoring = again.restore_pages(fresh.cache, keys, order)
    summary = restoring.result(60)

    assert summary.usable_blocks == 4
    assert summary.missed == []
    assert sorted(restoring.poll()) == [0, 1, 2, 3]
    assert restoring.poll() == []
    assert engine.same(fresh, PAGES, order, len(TOKENS))
    rest = fresh.arrays[0][6][:, 5:]
    assert not rest.any(), "tokens behind a short block were written"


def test_a_lost_session_opens_again_with_the_same_keys(
    daemon: Daemon, session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine = Engine(model, 12, seed=2)
    keys = save_all(session, engine, TOKENS, PAGES)
    daemon.kill()
    assert session.wait_not_open(30)
    assert session.state == "lost"
    assert session.state_reason
    daemon.start()
    session.reopen()
    assert session.state == "open"
    assert session.prefix_keys(TOKENS) == keys
    fresh = Engine(model, 12)
    assert session.restore_pages(fresh.cache, keys, PAGES).result(60).usable_blocks == 4
    assert engine.same(fresh, PAGES, PAGES, len(TOKENS))


def test_what_is_stored_already_is_not_read_again(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine = Engine(model, 12, seed=3)
    keys = save_all(session, engine, TOKENS, PAGES)
    blocks = session.chain(keys, len(TOKENS))
    other = Engine(model, 12, seed=4)
    outcomes = session.save_pages(other.cache, blocks, PAGES).result(60)
    assert {outcome.status for outcome in outcomes} == {"already"}
    fresh = Engine(model, 12)
    session.restore_pages(fresh.cache, keys, PAGES).result(60)
    assert engine.same(fresh, PAGES, PAGES, len(TOKENS))


def test_head_major_pages_with_strides_come_back_in_other_strides(daemon: Daemon) -> None:
    model = model_of(order="head_major", element="f16")
    session = open_session(daemon, model)
    random = np.random.default_rng(5)
    # Heads outermost, then pages; and pages with tokens outermost.
    by_head = [random.random((2, HEADS, 6, PAGE, DIM)).astype(np.float16) for _ in range(LAYERS)]
    by_token = [np.zeros((6, PAGE, HEADS, 2, DIM), np.float16) for _ in range(LAYERS)]
    source, target = kvtier.PagedCache(model, PAGE), kvtier.PagedCache(model, PAGE)
    for layer in range(LAYERS):
        for part, code in enumerate(("k", "v")):
            source.add(layer, code, by_head[layer][part].swapaxes(0, 1))
            target.add(layer, code, by_token[layer][:, :, :, part].swapaxes(1, 2))
    assert source.missing() == []
    tokens = TOKENS[: 2 * BLOCK + 20]
    keys = session.prefix_keys(tokens)
    blocks = session.chain(keys, len(tokens))
    pages = [5, 4, 3, 2, 1, 0]
    session.save_pages(source, blocks, pages).result(60)
    assert session.restore_pages(target, keys, pages).result(60).usable_blocks == 3
    for layer in range(LAYERS):
        for part in (0, 1):
            want = by_head[layer][part].swapaxes(0, 1)
            got = by_token[layer][:, :, :, part].swapaxes(1, 2)
            for page in (5, 4, 3, 2, 1):
                assert np.array_equal(want[page], got[page])
            assert np.array_equal(want[0][:, :4], got[0][:, :4])
            assert not got[0][:, 4:].any()


def test_opaque_pages_travel_whole(daemon: Daemon) -> None:
    nbytes = 3000
    model = model_of(layers=[kvtier.LayerSpec.opaque(bytes_per_block=nbytes)] * 2)
    session = open_session(daemon, model)
    packed = np.random.default_rng(6).integers(0, 256, (2, 5, nbytes), np.uint8)
    fresh = np.zeros_like(packed)
    source, target = kvtier.PagedCache(model, BLOCK), kvtier.PagedCache(model, BLOCK)
    for layer in range(2):
        source.add(layer, "opaque", packed[layer])
        target.add(layer, "opaque", fresh[layer].reshape(5, 30, 100))
    keys = session.prefix_keys(TOKENS[: 2 * BLOCK], extra=b"vec/f32/32")
    session.save_pages(source, session.chain(keys, 2 * BLOCK), [3, 1]).result(60)
    assert session.lookup(session.prefix_keys(TOKENS[: 2 * BLOCK])).prefix_blocks == 0
    assert session.restore_pages(target, keys, [0, 4]).result(60).usable_blocks == 2
    assert np.array_equal(packed[:, [3, 1]], fresh[:, [0, 4]])


def test_memory_at_an_address_is_an_array_like_any(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine = Engine(model, 12, seed=7)
    cache = kvtier.PagedCache(model, PAGE)
    for layer, array in enumerate(engine.arrays):
        page = array[0, 0].nbytes
        for part, code in enumerate(("k", "v")):
            memory = kvtier.Memory(
                array.ctypes.data + part * page,
                (12, PAGE, HEADS * DIM * 4),
                strides=(2 * page, HEADS * DIM * 4, 1),
                owner=array,
            )
            assert memory.nbytes == 12 * page
            cache.add(layer, code, memory)
    keys = session.prefix_keys(TOKENS)
    session.save_pages(cache, session.chain(keys, len(TOKENS)), PAGES).result(60)
    fresh = Engine(model, 12)
    session.restore_pages(fresh.cache, keys, PAGES).result(60)
    assert engine.same(fresh, PAGES, PAGES, len(TOKENS))


def test_pages_that_are_not_named_right_are_refused_by_name(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine = Engine(model, 12, seed=8)
    keys = session.prefix_keys(TOKENS)
    blocks = session.chain(keys, len(TOKENS))
    for pages, part in (
        (PAGES[:6], "6 pages for 4 blocks"),
        ([*PAGES, 1, 2], "9 pages for 4 blocks"),
        ([*PAGES[:6], 12], "page 12; accepted: below 12"),
    ):
        with pytest.raises(kvtier.Invalid, match=part):
            session.save_pages(engine.cache, blocks, pages)
        with pytest.raises(kvtier.Invalid, match=part):
            session.restore_pages(engine.cache, keys, pages)
    partly = kvtier.PagedCache(model, PAGE)
    with pytest.raises(kvtier.Invalid, match="no array holds k of layer 0"):
        session.save_pages(partly, blocks, PAGES)
    with pytest.raises(kvtier.Invalid, match="accepted: pages, then"):
        partly.add(0, "k", engine.arrays[0][:, 0, :8])
    with pytest.raises(kvtier.Invalid, match="has no part"):
        partly.add(0, "latent", engine.arrays[0])
    with pytest.raises(kvtier.Invalid, match="accepted: a divisor"):
        kvtier.PagedCache(model, 24)


def test_read_only_pages_are_saved_and_never_restored_into(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine = Engine(model, 12, seed=9)
    for array in engine.arrays:
        array.flags.writeable = False
    cache = kvtier.PagedCache(model, PAGE)
    for layer, array in enumerate(engine.arrays):
        cache.add(layer, "k", array[:, 0])
        cache.add(layer, "v", array[:, 1])
    keys = session.prefix_keys(TOKENS)
    session.save_pages(cache, session.chain(keys, len(TOKENS)), PAGES).result(60)
    with pytest.raises(kvtier.Invalid, match="read-only"):
        session.restore_pages(cache, keys, PAGES)


def test_a_save_says_when_pages_may_change_and_when_blocks_are_there(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine = Engine(model, 12, seed=10)
    keys = session.prefix_keys(TOKENS)
    saving = session.save_pages(engine.cache, session.chain(keys, len(TOKENS)), PAGES)
    assert saving.wait_copied(60)
    assert saving.copied()
    for array in engine.arrays:
        array[:] = 0
    assert saving.wait_accepted(60)
    assert session.lookup(keys).prefix_blocks == 4
    assert all(outcome.is_stored("durable") for outcome in saving.result(60))
    assert saving.done()
    fresh = Engine(model, 12)
    session.restore_pages(fresh.cache, keys, PAGES).result(60)
    assert Engine(model, 12, seed=10).same(fresh, PAGES, PAGES, len(TOKENS))


def test_layers_become_ready_and_stay_so(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine = Engine(model, 12, seed=11)
    keys = save_all(session, engine, TOKENS, PAGES)
    fresh = Engine(model, 12)
    restoring = session.restore_pages(fresh.cache, keys, PAGES)
    for layer in range(LAYERS):
        assert restoring.wait_layer(layer, 60)
        assert restoring.layer_ready(layer)
        want, got = (one.tokens(PAGES, len(TOKENS))[layer] for one in (engine, fresh))
        assert np.array_equal(want, got)
    assert restoring.wait_block(3, 60)
    assert restoring.ready() == [0, 1, 2, 3]
    assert restoring.result(60).usable_blocks == 4


def test_missing_blocks_are_named_and_their_pages_left_alone(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine = Engine(model, 12, seed=12)
    keys = save_all(session, engine, TOKENS, PAGES)
    keys[1] = bytes(32)
    for scattered, blocks in ((False, [0]), (True, [0, 2, 3])):
        fresh = Engine(model, 12)
        restoring = session.restore_pages(fresh.cache, keys, PAGES, scattered=scattered)
        summary = restoring.result(60)
        assert summary.usable_blocks == 1
        assert (1, "absent") in summary.missed
        assert restoring.ready() == blocks
        assert not restoring.wait_block(1, 0)
        assert not fresh.arrays[0][PAGES[2:4]].any()


def test_an_engine_that_computes_from_the_front_ends_with_every_block(
    make_daemon: Callable[..., Daemon], model: kvtier.ModelDescriptor
) -> None:
    # A device of 1 MiB a second: 96 blocks of 12 KiB take a second, and an engine is let in.
    daemon = make_daemon(disk='read_limit = "1 MiB"')
    reader = kvtier.ReaderSpec(two_ended=True, layers=[(1 << 20, 1, 0)] * LAYERS)
    session = open_session(daemon, model, reader=reader)
    blocks = 96
    tokens = list(range(blocks * BLOCK))
    pages = list(range(2 * blocks))
    engine = Engine(model, 2 * blocks, seed=13)
    keys = save_all(session, engine, tokens, pages)
    daemon.kill()
    daemon.start()
    session.reopen()
    for _ in range(8):
        session.report_prefill(0, BLOCK, 0.002)

    fresh = Engine(model, 2 * blocks)
    restoring = session.restore_pages(fresh.cache, keys, pages, two_ended=(0, 16))
    computed = []
    end = time.monotonic() + 60
    while (step := restoring.next_compute()) != "finished":
        assert time.monotonic() < end
        if step == "wait":
            restoring.wait_event(0.05)
            continue
        for mine, theirs in zip(fresh.arrays, engine.arrays, strict=True):
            mine[2 * step : 2 * step + 2] = theirs[2 * step : 2 * step + 2]
        time.sleep(0.002)
        restoring.computed(step, before=step * BLOCK, tokens=BLOCK, seconds=0.002)
        computed.append(step)
    summary = restoring.result(60)
    assert computed == sorted(computed)
    assert summary.usable_blocks == blocks
    assert set(computed) | set(restoring.ready()) == set(range(blocks))
    assert engine.same(fresh, pages, pages, len(tokens))


def test_a_cancelled_restore_ends_and_writes_no_more(
    make_daemon: Callable[..., Daemon], model: kvtier.ModelDescriptor
) -> None:
    daemon = make_daemon(disk='read_limit = "1 MiB"')
    session = open_session(daemon, model)
    blocks = 256
    pages = list(range(2 * blocks))
    engine = Engine(model, 2 * blocks, seed=14)
    keys = save_all(session, engine, list(range(blocks * BLOCK)), pages)
    daemon.kill()
    daemon.start()
    session.reopen()
    fresh = Engine(model, 2 * blocks)
    restoring = session.restore_pages(fresh.cache, keys, pages)
    assert not restoring.done()
    with pytest.raises(kvtier.Timeout):
        restoring.result(0)
    restoring.cancel()
    summary = restoring.result(60)
    assert summary.cancelled
    came = restoring.ready()
    assert len(came) < blocks
    for array in fresh.arrays:
        for block in set(range(blocks)) - set(came):
            assert not array[2 * block].any()


def test_pages_travel_over_tcp_too(
    make_daemon: Callable[..., Daemon], model: kvtier.ModelDescriptor, free_port: int
) -> None:
    server = f'tcp = "127.0.0.1:{free_port}"\ntcp_namespace = "default"'
    make_daemon(server=server)
    session = kvtier.connect(f"tcp://127.0.0.1:{free_port}").open_session(model)
    assert not session.is_shared
    engine = Engine(model, 12, seed=15)
    keys = save_all(session, engine, TOKENS, PAGES)
    fresh = Engine(model, 12)
    assert session.restore_pages(fresh.cache, keys, PAGES).result(60).usable_blocks == 4
    assert engine.same(fresh, PAGES, PAGES, len(TOKENS))


def test_pages_are_free_once_they_are_read_and_not_only_once_they_are_committed(
    daemon: Daemon,
) -> None:
    # One part of 1 MiB: long to check and to commit, beside what waking up takes.
    width, tries = 8192, 24
    model = model_of(layers=[kvtier.LayerSpec.latent(width, 0)])
    session, seen = open_session(daemon, model), 0
    pages = np.zeros((2, BLOCK, width), np.float32)
    cache = kvtier.PagedCache(model, BLOCK)
    cache.add(0, "latent", pages)
    for number in range(tries):
        keys = session.prefix_keys([number * 100 + token for token in range(BLOCK)])
        pages[0] = number + 1
        saving = session.save_pages(cache, session.chain(keys, BLOCK), [0])
        assert saving.wait_copied(60)
        seen += not saving.accepted()
        # What has been read is what is stored, whatever becomes of the page.
        pages[0] = -1
        assert {outcome.status for outcome in saving.result(60)} == {"stored"}
        assert session.restore_pages(cache, keys, [1]).result(60).usable_blocks == 1
        assert (pages[1] == number + 1).all()
    assert seen > tries // 3, f"only {seen} of {tries} were free before they were committed"


def test_saves_that_are_started_together_are_all_stored_however_little_staging_there_is(
    daemon: Daemon, model: kvtier.ModelDescriptor
) -> None:
    session = open_session(daemon, model, staging_bytes=64 << 10)
    engine, started = Engine(model, 12, seed=7), []
    for number in range(12):
        tokens = [number * 10_000 + token for token in range(len(TOKENS))]
        blocks = session.chain(session.prefix_keys(tokens), len(tokens))
        started.append(session.save_pages(engine.cache, blocks, PAGES))
    outcomes = [outcome for saving in started for outcome in saving.result(60)]
    assert {outcome.status for outcome in outcomes} == {"stored"}
    # One that is cancelled, waiting or not, keeps nobody from their turn.
    session.save_pages(engine.cache, blocks, PAGES).cancel()
    blocks = session.chain(session.prefix_keys(TOKENS), len(TOKENS))
    outcomes = session.save_pages(engine.cache, blocks, PAGES).result(60)
    assert {outcome.status for outcome in outcomes} == {"stored"}
