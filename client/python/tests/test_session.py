"""Names, questions, hints and events; waits, threads and forks."""

import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import kvtier
from conftest import BLOCK, DIM, HEADS, LAYERS, Daemon, Engine, model_of, open_session, save_all

TOKENS = list(range(4 * BLOCK))


def test_keys_depend_on_everything_that_tells_blocks_apart(session: kvtier.Session) -> None:
    plain = session.prefix_keys(TOKENS)
    assert len(plain) == 4
    assert {len(key) for key in plain} == {32}
    for integers in (np.uint32, np.int32, np.int64):
        assert session.prefix_keys(np.array(TOKENS, integers)) == plain
    assert session.prefix_keys(range(4 * BLOCK)) == plain
    assert session.prefix_keys(np.array([TOKENS, TOKENS]).T[:, 0]) == plain
    for extra in (b"", b"vec"):
        again = kvtier.ROOT
        for index, key in enumerate(session.prefix_keys(TOKENS, extra=extra)):
            block = TOKENS[index * BLOCK : (index + 1) * BLOCK]
            again = session.derive_key(again, block, extra=extra)
            assert again == key
    others = [
        session.prefix_keys(TOKENS, extra=b"vec"),
        session.prefix_keys(TOKENS, salt="tenant"),
        session.prefix_keys(TOKENS, salt="tenant", extra=b"vec"),
        session.prefix_keys(TOKENS, adapter="lora-7"),
        session.hash_keys([bytes([n]) * 32 for n in range(4)]),
        session.hash_keys([bytes([n]) * 32 for n in range(4)], salt="tenant"),
    ]
    every = [key for keys in [plain, *others] for key in keys]
    assert len(set(every)) == len(every)
    assert session.hash_keys([bytes([2]) * 32]) == [others[4][2]], "each stands for itself"


def test_an_adapter_named_by_a_call_is_the_models_own(
    daemon: Daemon, session: kvtier.Session
) -> None:
    other = open_session(daemon, model_of(adapter="lora-7"))
    assert other.prefix_keys(TOKENS) == session.prefix_keys(TOKENS, adapter="lora-7")


def test_tokens_that_are_none_are_refused(session: kvtier.Session) -> None:
    for tokens, error in (
        (np.array([-1]), kvtier.Invalid),
        (np.array([1 << 32]), kvtier.Invalid),
        (np.zeros((2, 2), np.int32), kvtier.Invalid),
        (b"bytes", kvtier.Invalid),
        ([-1], kvtier.Invalid),
        (["a"], TypeError),
        (7, TypeError),
    ):
        with pytest.raises(error):
            session.prefix_keys(tokens)  # type: ignore[arg-type]


def test_questions_and_hints_answer_in_blocks_and_tokens(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    tokens = TOKENS[: 3 * BLOCK + 3]
    keys = save_all(session, Engine(model, 8, seed=1), tokens, list(range(7)))
    found = session.lookup(keys, tokens=len(tokens))
    assert (found.prefix_blocks, found.prefix_tokens) == (4, len(tokens))
    other = [keys[0], bytes(32), keys[2]]
    assert session.lookup(other).prefix_tokens == BLOCK
    assert [status.miss for status in session.lookup(other).blocks] == [None, "absent"]
    each = session.lookup_each(other).blocks
    assert [status.tier for status in each] == ["host", None, "host"]
    pending = session.start_lookup(keys, tokens=len(tokens))
    assert pending.result(30).prefix_tokens == len(tokens)
    assert pending.done()
    assert pending.result().prefix_blocks == 4
    assert session.prefetch(keys).resident == 4
    assert session.start_prefetch(keys).result(30).started == 0
    assert session.pin(keys, 60.0) == 4
    explained = session.explain(keys[0])
    assert explained.miss is None
    assert all(variant.pinned for variant in explained.variants)
    assert {variant.tier for variant in explained.variants} == {"host", "disk"}
    assert session.unpin(keys) == 4
    assert session.explain(bytes(32)).miss == "absent"
    assert session.wipe() == 4
    assert session.lookup(keys).prefix_blocks == 0


def test_events_tell_of_what_is_stored(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    events = session.watch_events()
    assert events.try_next() is None
    with pytest.raises(kvtier.Timeout):
        events.next(0.01)
    keys = save_all(session, Engine(model, 8, seed=2), TOKENS[:BLOCK], [0, 1])
    tiers = set()
    while tiers != {"host", "disk"}:
        event = events.next(30)
        assert event is not None
        assert (event.key, event.change, event.dropped) == (keys[0], "stored", 0)
        tiers.add(event.tier)


def test_what_the_daemon_says_of_itself(session: kvtier.Session) -> None:
    assert session.is_shared
    assert session.is_durable
    assert (session.namespace, session.state, session.state_reason) == ("default", "open", "")
    assert session.daemon_version
    assert session.namespace_id >= 0
    assert session.model.block_tokens == BLOCK
    assert not session.wait_not_open(0.01)


def test_a_closed_session_says_so(session: kvtier.Session) -> None:
    with session as same:
        assert same is session
    with pytest.raises(kvtier.Invalid, match="closed"):
        session.lookup([bytes(32)])
    session.close()


def count_while(call: Callable[[], object]) -> int:
    """How often another thread of Python's runs while `call` does."""
    count, running = 0, True

    def run() -> None:
        nonlocal count
        while running:
            count += 1
            time.sleep(0.0001)

    thread = threading.Thread(target=run)
    thread.start()
    before = count
    call()
    after = count
    running = False
    thread.join()
    return after - before


def test_waits_leave_the_interpreter_free(session: kvtier.Session) -> None:
    events = session.watch_events()

    def wait() -> None:
        with pytest.raises(kvtier.Timeout):
            events.next(0.5)

    # Held for the whole of the call, it would let the other thread in once at most.
    assert count_while(wait) > 3
    assert count_while(lambda: session.wait_not_open(0.5)) > 3


def test_copies_leave_the_interpreter_free(daemon: Daemon) -> None:
    # Runs of one byte: the slowest copy there is, so that it can be seen.
    layers = [kvtier.LayerSpec.attention(16, 512)]
    model = model_of(layers=layers, element="u8", block_tokens=1024)
    session = open_session(daemon, model)
    (slot,) = session.reserve(session.chain(session.prefix_keys(range(1024)), 1024))
    assert isinstance(slot, kvtier.Slot)
    apart = np.ones((1024, 16, 512, 2), np.uint8)[..., 0]
    slot.write_part(0, "v", apart)
    assert count_while(lambda: slot.write_part(0, "k", apart)) > 3


def test_a_wait_ends_with_ctrl_c(session: kvtier.Session) -> None:
    # A shell that runs this in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    events = session.watch_events()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        events.next(30)
    timer.join()
    signal.signal(signal.SIGINT, before)
    assert session.lookup([bytes(32)]).prefix_blocks == 0, "the session goes on"


def test_threads_share_a_session(session: kvtier.Session, model: kvtier.ModelDescriptor) -> None:
    prompts = [list(range(n * 1000, n * 1000 + 2 * BLOCK)) for n in range(8)]
    engines = [Engine(model, 4, seed=n) for n in range(8)]
    wrong: list[int] = []

    def work(n: int) -> None:
        keys = save_all(session, engines[n], prompts[n], [0, 1, 2, 3])
        fresh = Engine(model, 4)
        usable = session.restore_pages(fresh.cache, keys, [0, 1, 2, 3]).result(60).usable_blocks
        if usable != 2 or not engines[n].same(fresh, [0, 1, 2, 3], [0, 1, 2, 3], 2 * BLOCK):
            wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []


def in_child(check: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_told_and_may_connect_anew(
    daemon: Daemon, session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    keys = save_all(session, Engine(model, 4, seed=3), TOKENS[:BLOCK], [0, 1])
    (slot,) = session.reserve(session.chain(session.prefix_keys(TOKENS[:40]), 40, first=1))
    blocks, _ = session.restore(keys).collect()

    def check() -> None:
        for call in (
            lambda: session.lookup(keys),
            lambda: memoryview(blocks[0]),
            lambda: slot.release(),
            lambda: session.state,
        ):
            with pytest.raises(kvtier.Forked):
                call()
        blocks.clear()
        own = open_session(daemon, model)
        assert own.lookup(keys).prefix_blocks == 1

    in_child(check)
    assert session.lookup(keys).prefix_blocks == 1
    assert bytes(blocks[0])


def test_a_large_model_needs_no_large_answer(daemon: Daemon) -> None:
    model = model_of(layers=[kvtier.LayerSpec.attention(HEADS, DIM)] * 200)
    assert model.layers == 200
    assert len(model.layout().parts) == 400
    assert open_session(daemon, model, staging_bytes=4 << 20).model.layers == 200
    assert LAYERS == 3
