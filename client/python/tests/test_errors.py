"""Errors are exceptions of the SDK's names, and what Python calls such things."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvtier
from conftest import BLOCK, Daemon, Engine, model_of, open_session, save_all


def test_errors_have_bases_that_python_programs_catch() -> None:
    bases = {
        "Connect": ConnectionError,
        "Unavailable": ConnectionError,
        "Invalid": ValueError,
        "Refused": PermissionError,
        "Unimplemented": NotImplementedError,
        "Timeout": TimeoutError,
        "SessionLost": ConnectionError,
    }
    for name, base in bases.items():
        kind = getattr(kvtier, name)
        assert issubclass(kind, base)
        assert issubclass(kind, kvtier.Error)
    error = kvtier.Busy("full")
    assert (error.happened, error.is_transient, error.retry_after) == ("no", False, 0.0)


def test_nobody_at_the_socket_is_a_connect_error(tmp_path: Path) -> None:
    with pytest.raises(kvtier.Connect, match="is the daemon running") as caught:
        kvtier.connect(tmp_path / "nobody.sock", connect_timeout=0.5)
    assert caught.value.is_transient
    assert caught.value.happened == "no"


def test_wrong_arguments_are_named_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(kvtier.Invalid, match="not loopback"):
        kvtier.connect("tcp://192.0.2.1:9470")
    with pytest.raises(kvtier.Invalid, match="an IP address and port"):
        kvtier.connect("tcp://localhost")
    with pytest.raises(kvtier.Invalid, match="connect_timeout is -1"):
        kvtier.connect(tmp_path, connect_timeout=-1)
    with pytest.raises(kvtier.Invalid, match=r"d_model.*; model\.block_tokens|block_tokens.*;"):
        model_of(d_model=0, block_tokens=1)
    with pytest.raises(kvtier.Invalid, match="accepted: bf16, f16"):
        model_of(element="float99")
    with pytest.raises(kvtier.Invalid, match="accepted: kv, latent"):
        model_of().layout("keys")  # type: ignore[arg-type]
    with pytest.raises(kvtier.Invalid, match="32 bytes"):
        kvtier.SaveBlock(b"short", tokens=1)


def test_arguments_of_calls_are_checked_too(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    with pytest.raises(kvtier.Invalid, match="1 to 4096"):
        session.lookup([])
    with pytest.raises(kvtier.Invalid, match="ttl"):
        session.pin([bytes(32)], 0)
    with pytest.raises(kvtier.Invalid, match="timeout is"):
        session.wait_not_open(float("nan"))
    with pytest.raises(TypeError):
        session.lookup(["text"])  # type: ignore[list-item]
    cache = kvtier.PagedCache(model, BLOCK)
    with pytest.raises(TypeError, match="lends no memory"):
        cache.add(0, "k", object())  # type: ignore[arg-type]
    (slot,) = session.reserve(session.chain(session.prefix_keys([1, 2]), 2))
    assert isinstance(slot, kvtier.Slot)
    with pytest.raises(kvtier.Invalid, match="5 bytes; accepted: exactly"):
        slot.write_part(0, "k", np.zeros(5, np.uint8))
    with pytest.raises(kvtier.Invalid, match="no part"):
        slot.write_part(9, "k", np.zeros(5, np.uint8))
    with pytest.raises(kvtier.Invalid, match="a stride of -"):
        slot.write_part(0, "k", np.zeros((2, 2, 8), np.float32)[::-1, :, ::-1])


def test_memory_of_a_device_is_refused_by_name(model: kvtier.ModelDescriptor) -> None:
    class Device:
        def __dlpack__(self, **_: object) -> object:
            raise AssertionError("nobody asks for it")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 1)

    with pytest.raises(kvtier.Invalid, match="memory of device 1"):
        kvtier.PagedCache(model, BLOCK).add(0, "k", Device())


def test_a_consumer_that_cannot_be_told_gets_no_read_only_tensor(
    session: kvtier.Session, model: kvtier.ModelDescriptor
) -> None:
    keys = save_all(session, Engine(model, 2, seed=1), list(range(BLOCK)), [0, 1])
    (block,), _ = session.restore(keys).collect()
    part = block.part(0, "k")
    with pytest.raises(BufferError, match=r"DLPack 1\.0"):
        part.__dlpack__()
    with pytest.raises(BufferError):
        part.__dlpack__(max_version=(1, 0), copy=True)
    with pytest.raises(BufferError):
        part.__dlpack__(max_version=(1, 0), dl_device=(2, 0))
    unclaimed = part.__dlpack__(max_version=(1, 0))
    with pytest.raises(BufferError, match="1 views"):
        block.release()
    del unclaimed
    block.release()


def test_a_daemon_that_goes_is_session_lost_and_then_unavailable(
    make_daemon: Callable[..., Daemon], model: kvtier.ModelDescriptor
) -> None:
    daemon = make_daemon(disk='read_limit = "1 MiB"')
    session = open_session(daemon, model)
    tokens = list(range(256 * BLOCK))
    engine = Engine(model, 512, seed=2)
    keys = save_all(session, engine, tokens, list(range(512)))
    daemon.kill()
    daemon.start()
    session.reopen()
    restoring = session.restore_pages(engine.cache, keys, list(range(512)))
    (block,), _ = session.restore(keys[:1]).collect()
    daemon.kill()
    with pytest.raises(kvtier.SessionLost) as lost:
        restoring.result(60)
    assert lost.value.is_transient
    with pytest.raises(kvtier.SessionLost):
        restoring.wait_layer(2, 60)
    assert session.wait_not_open(30)
    with pytest.raises(kvtier.SessionLost):
        memoryview(block)
    with pytest.raises((kvtier.Connect, kvtier.Unavailable)):
        session.lookup(keys)
    with pytest.raises(kvtier.Unavailable) as away:
        session.start_lookup(keys).result(30)
    assert away.value.retry_after > 0


def test_a_cancelled_call_says_so(session: kvtier.Session, model: kvtier.ModelDescriptor) -> None:
    pending = session.start_lookup([bytes(32)])
    assert pending.result(30).prefix_blocks == 0
    pending.cancel()
    assert pending.result(30).prefix_blocks == 0, "an answer that is there stays"
    engine = Engine(model, 64, seed=3)
    keys = session.prefix_keys(list(range(32 * BLOCK)))
    saving = session.save_pages(engine.cache, session.chain(keys, 32 * BLOCK), list(range(64)))
    saving.cancel()
    assert saving.wait_copied(30)
    try:
        outcomes = saving.result(30)
    except kvtier.Cancelled as error:
        assert error.happened == "unknown"
    else:
        assert len(outcomes) == 32, "it was faster than the cancel"
