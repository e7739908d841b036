"""Slots filled by hand, blocks read in place, and who may use their bytes when."""

import gc
from collections.abc import Callable

import numpy as np
import pytest

import kvtier
from conftest import BLOCK, DIM, HEADS, LAYERS, Daemon, Engine, model_of, open_session, save_all

TOKENS = list(range(2 * BLOCK))


def slots_of(session: kvtier.Session, tokens: list[int]) -> list[kvtier.Slot]:
    keys = session.prefix_keys(tokens)
    reserved = session.reserve(session.chain(keys, len(tokens)))
    slots = [slot for slot in reserved if isinstance(slot, kvtier.Slot)]
    assert len(slots) == len(keys)
    return slots


def restored(session: kvtier.Session, tokens: list[int]) -> list[kvtier.LeasedBlock]:
    blocks, summary = session.restore(session.prefix_keys(tokens)).collect()
    assert summary.usable_blocks == len(blocks)
    return blocks


def test_parts_written_from_arrays_of_any_strides_are_read_in_place(
    session: kvtier.Session,
) -> None:
    random = np.random.default_rng(1)
    wide = random.standard_normal((LAYERS, 2, BLOCK, HEADS, 2 * DIM)).astype(np.float32)
    (slot,) = slots_of(session, TOKENS[:BLOCK])
    assert len(slot.missing()) == 2 * LAYERS
    for layer in range(LAYERS):
        slot.write_part(layer, "k", wide[layer, 0, :, :, ::2])
        slot.write_part(layer, "v", wide[layer, 1, :, :, :DIM])
    assert slot.missing() == []
    (outcome,) = session.commit([slot])
    assert (outcome.status, outcome.acknowledged, outcome.reason) == ("stored", "durable", None)

    (block,) = restored(session, TOKENS[:BLOCK])
    assert block.key == session.prefix_keys(TOKENS[:BLOCK])[0]
    assert (block.index, block.tokens, block.tier) == (0, BLOCK, "host")
    for layer in range(LAYERS):
        k = np.frombuffer(block.part(layer, "k"), np.float32).reshape(BLOCK, HEADS, DIM)
        v = np.from_dlpack(block.part(layer, "v"))
        assert np.array_equal(k, wide[layer, 0, :, :, ::2])
        assert np.array_equal(v, wide[layer, 1, :, :, :DIM])
        assert not k.flags.writeable
        assert not v.flags.writeable
        page = np.frombuffer(block.page(layer), np.float32)
        assert np.array_equal(page, np.concatenate([k.ravel(), v.ravel()]))
    whole = np.zeros(block.nbytes, np.uint8)
    block.copy(whole)
    assert bytes(block) == whole.tobytes()
    part = np.zeros((BLOCK, HEADS, 3 * DIM), np.float32)
    block.copy_part(1, "v", part[:, :, DIM : 2 * DIM])
    assert np.array_equal(part[:, :, DIM : 2 * DIM], wide[1, 1, :, :, :DIM])
    assert not part[:, :, :DIM].any()
    assert not part[:, :, 2 * DIM :].any()


def test_a_slot_filled_in_place_counts_as_filled_when_the_body_ends_well(
    session: kvtier.Session,
) -> None:
    first, second = slots_of(session, TOKENS)
    with pytest.raises(ZeroDivisionError), first.fill():
        _ = 1 // 0
    assert len(first.missing()) == 2 * LAYERS
    with first.fill_part(0, "k") as view:
        assert view.shape == (BLOCK, HEADS, DIM)
        assert view.element == "f32"
        np.from_dlpack(view)[:] = 7
    assert (0, "k") not in first.missing()
    with first.fill() as view:
        memoryview(view)[:] = bytes(range(256)) * (len(view) // 256)
    with second.fill() as view:
        np.frombuffer(view, np.uint8)[:] = 9
    outcomes = session.commit([first, second], "accepted")
    assert [outcome.acknowledged for outcome in outcomes] == ["accepted"] * 2
    outcomes = session.wait_durable(session.prefix_keys(TOKENS))
    assert [outcome.acknowledged for outcome in outcomes] == ["durable"] * 2
    one, two = restored(session, TOKENS)
    assert bytes(one) == bytes(range(256)) * (one.nbytes // 256)
    assert bytes(two) == bytes([9]) * two.nbytes


def test_a_slot_is_not_taken_while_it_is_shown_or_unfilled(session: kvtier.Session) -> None:
    first, second = slots_of(session, TOKENS)
    with first.fill() as view:
        shown = np.frombuffer(view, np.uint8)
        shown[:] = 1
    with pytest.raises(kvtier.Invalid, match=r"of slots\[1\] is not written"):
        session.commit([first, second])
    second.write(np.full(len(view), 2, np.uint8))
    with pytest.raises(BufferError, match="1 views"):
        session.commit([second, first])
    with pytest.raises(BufferError, match="1 views"):
        first.release()
    del shown
    assert [outcome.status for outcome in session.commit([second, first])] == ["stored"] * 2
    with pytest.raises(BufferError, match="committed or released"):
        memoryview(view)
    with pytest.raises(BufferError, match="committed or released"):
        session.commit([first])


def test_a_block_is_not_released_while_it_is_shown(session: kvtier.Session) -> None:
    for slot in (slots := slots_of(session, TOKENS)):
        slot.write(np.full(slot.layout.nbytes, 3, np.uint8))
    session.commit(slots)
    one, two = restored(session, TOKENS)
    shown = np.from_dlpack(two.part(0, "k"))
    with pytest.raises(BufferError, match="1 views"):
        session.release([one, two])
    with pytest.raises(TypeError, match="read-only"):
        memoryview(two)[0] = 1
    assert bytes(one), "the one that could have been released is still there"
    # The tensor holds the bytes; the block's own object may go first.
    view = two.part(0, "v")
    del two
    gc.collect()
    assert (shown.view(np.uint8) == 3).all()
    del shown
    session.release([one])
    with pytest.raises(BufferError, match="committed or released"):
        bytes(one)
    assert bytes(view) == bytes([3]) * view.nbytes


def test_dropping_gives_everything_back(session: kvtier.Session) -> None:
    keys = session.prefix_keys(TOKENS)
    for slot in (slots := slots_of(session, TOKENS)):
        slot.write(np.zeros(slot.layout.nbytes, np.uint8))
    session.commit(slots)
    del slots, slot
    blocks = restored(session, TOKENS)

    def leases() -> list[int]:
        explained = [session.explain(key) for key in keys]
        return [max(variant.leases for variant in one.variants) for one in explained]

    assert leases() == [1, 1]
    del blocks
    session.flush()
    assert leases() == [0, 0]


def test_slots_gather_from_pages_layer_by_layer_and_blocks_scatter(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    engine, fresh = Engine(model, 8, seed=3), Engine(model, 8)
    slots = slots_of(session, TOKENS)
    for index, slot in enumerate(slots):
        pages = [2 * index + 1, 2 * index]
        slot.gather(engine.cache, pages, [0])
        assert {layer for layer, _ in slot.missing()} == {1, 2}
        slot.gather(engine.cache, np.array(pages), [1, 2])
    session.commit(slots, "accepted")
    blocks = restored(session, TOKENS)
    for block in blocks:
        block.scatter(fresh.cache, [2 * block.index + 1, 2 * block.index], [2])
    assert not fresh.arrays[0].any()
    assert fresh.arrays[2].any()
    for block in blocks:
        pages = [2 * block.index + 1, 2 * block.index]
        block.scatter(fresh.cache, pages)
        with pytest.raises(kvtier.Invalid, match="stores nothing"):
            block.scatter(fresh.cache, pages, [3])
    assert engine.same(fresh, [0, 1, 2, 3], [0, 1, 2, 3], len(TOKENS))


def test_what_is_saved_behind_a_lossy_block_is_no_better(session: kvtier.Session) -> None:
    keys = session.prefix_keys(TOKENS)
    session.set_quality(keys[:1], "balanced")
    for slot in (slots := slots_of(session, TOKENS)):
        slot.write(np.full(slot.layout.nbytes, 5, np.uint8))
    session.commit(slots)
    assert session.quality_of(keys[0]) == "balanced"
    assert session.lookup(keys).prefix_blocks == 0
    assert session.lookup(keys, accept="balanced").prefix_blocks == 2
    (block,), _ = session.restore(keys[1:], accept="balanced", after=keys[0]).collect()
    assert block.quality == "balanced"
    session.release([block])
    with pytest.raises(kvtier.Invalid, match="a key of 3 bytes"):
        session.restore(keys[1:], after=b"abc")
    with pytest.raises(kvtier.Invalid, match='quality is "best"'):
        session.set_quality(keys, "best")  # type: ignore[arg-type]


def test_a_commit_in_the_background_says_how_far_it_is(session: kvtier.Session) -> None:
    for slot in (slots := slots_of(session, TOKENS)):
        slot.write(np.zeros(slot.layout.nbytes, np.uint8))
    saving = session.start_commit(slots)
    assert saving.copied()
    assert saving.wait_accepted(30)
    assert [outcome.acknowledged for outcome in saving.result(30)] == ["durable"] * 2
    assert saving.result() == saving.result()


def test_reserve_says_what_is_stored_and_what_finds_no_room(
    daemon: Daemon, model: kvtier.ModelDescriptor
) -> None:
    session = open_session(daemon, model, staging_bytes=64 << 10)
    tokens = list(range(16 * BLOCK))
    (slot,) = slots_of(session, tokens[:BLOCK])
    slot.write(np.zeros(slot.layout.nbytes, np.uint8))
    session.commit([slot])
    blocks = session.chain(session.prefix_keys(tokens), len(tokens))
    first, *rest = session.start_reserve(blocks).result(30)
    assert isinstance(first, kvtier.SaveOutcome)
    assert (first.status, first.acknowledged) == ("already", "durable")
    refused = [one for one in rest if isinstance(one, kvtier.SaveOutcome)]
    assert refused, "64 KiB hold five blocks"
    assert {(one.status, one.reason) for one in refused} == {("refused", "region_full")}
    assert not refused[0].is_stored()


def test_restores_hand_out_events_in_their_order(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    save_all(session, Engine(model, 4, seed=4), TOKENS, [0, 1, 2, 3])
    keys = [*session.prefix_keys(TOKENS), bytes(32)]
    restore = session.restore(keys, deadline=30)
    plan, *blocks, summary = restore
    assert isinstance(plan, kvtier.RestorePlan)
    assert [status.is_present for status in plan.blocks] == [True, True, False]
    assert plan.blocks[2].miss == "absent"
    assert plan.blocks[0].tier == "host"
    assert sorted(block.index for block in blocks) == [0, 1]
    assert isinstance(summary, kvtier.RestoreSummary)
    assert (summary.usable_blocks, summary.missed) == (2, [(2, "absent")])
    assert restore.ended()
    assert restore.next() is None
    assert restore.try_next() is None
    with pytest.raises(StopIteration):
        next(restore)


def test_a_restore_can_be_polled_and_cancelled(
    make_daemon: Callable[..., Daemon], model: kvtier.ModelDescriptor
) -> None:
    daemon = make_daemon(disk='read_limit = "1 MiB"')
    session = open_session(daemon, model)
    tokens = list(range(256 * BLOCK))
    keys = save_all(session, Engine(model, 512, seed=5), tokens, list(range(512)))
    daemon.kill()
    daemon.start()
    session.reopen()
    restore = session.restore(keys)
    restore.wait(30)
    came = []
    while (event := restore.try_next()) is not None:
        came.append(event)
    assert len(came) < 256
    restore.progress(1)
    restore.cancel()
    *_, summary = restore
    assert isinstance(summary, kvtier.RestoreSummary)
    assert summary.cancelled


def test_kinds_and_words_are_those_of_the_sdk(daemon: Daemon) -> None:
    layers = [kvtier.LayerSpec.latent(16, 4), kvtier.LayerSpec.state(40)]
    model = model_of(layers=layers, element="bf16")
    layout = model.layout()
    assert [(part.layer, part.code, part.shape) for part in layout.parts] == [
        (0, "latent", (BLOCK, 16)),
        (0, "rope", (BLOCK, 4)),
        (1, "state", (40,)),
    ]
    assert layout.nbytes == BLOCK * 20 * 2 + 40
    assert model.layout("hidden", tokens=3).parts[1].shape == (3, HEADS * DIM)
    session = open_session(daemon, model)
    key = session.derive_key(kvtier.ROOT, TOKENS[:4])
    block = kvtier.SaveBlock(key, tokens=4, kind="hidden")
    (slot,) = session.reserve([block])
    assert isinstance(slot, kvtier.Slot)
    with slot.fill() as view:
        np.frombuffer(view, np.uint16)[:] = 0x3F80
    session.commit([slot], "accepted")
    assert session.lookup([key], "hidden").prefix_blocks == 1
    assert session.lookup([key]).prefix_blocks == 0
