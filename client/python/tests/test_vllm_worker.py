"""The worker's side of the vLLM connector, with a session that is a fake."""

import time
from types import SimpleNamespace
from typing import Never

import pytest

from kvtier.vllm import worker
from kvtier.vllm.link import Link
from kvtier.vllm.options import Options
from kvtier.vllm.orders import LoadOrder, SaveOrder, StepOrders
from kvtier.vllm.worker import WorkerSide
from vllm_fakes import BLOCK, FakeSession, save_block

KEYS = [bytes([number]) * 32 for number in range(1, 9)]


class Bench:
    """A worker's side with a session."""

    def __init__(self, session=None, **options) -> None:
        self.session = session or FakeSession()
        self.link = Link(lambda: [self.session], "test")
        self.link.start(5.0)
        self.side = WorkerSide(Options(**options), BLOCK, 0, self.link, save_block)
        self.side.register(SimpleNamespace(cache="pages", block_bytes=100))

    def step(self, **orders):
        orders = StepOrders(**orders)
        self.side.settle(orders)
        self.side.start_loads(orders)
        self.side.start_saves(orders)
        report = self.side.finish(orders)
        return report, self.side.take_bad_pages()


def load(name="a", blocks=3):
    return LoadOrder(name, [KEYS[:blocks]], list(range(10, 10 + blocks)))


def save(number, name="a", first=0, blocks=2):
    keys = KEYS[first : first + blocks]
    parent = KEYS[first - 1] if first else bytes(32)
    return SaveOrder(number, name, first, [keys], [parent], list(range(20, 20 + blocks)))


def test_a_load_is_reported_once_when_it_has_ended() -> None:
    bench = Bench()
    bench.session.stored.update(KEYS)
    bench.session.slow = True
    report, bad = bench.step(loads=[load()], idle=True)
    assert (report.loaded, bad) == (set(), set())
    bench.session.restores[0].ended = True
    assert bench.step() == (type(report)({"a"}, set()), set())
    assert bench.step()[0].loaded == set()
    assert bench.side.stats.take()["loaded_blocks"] == 3


def test_a_block_that_is_missing_and_all_after_it_are_reported_with_the_load() -> None:
    bench = Bench()
    bench.session.stored.add(KEYS[0])
    report, bad = bench.step(loads=[load()])
    assert report.loaded == {"a"}
    assert bad == {11, 12}
    assert bench.side.take_bad_pages() == set()


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_session_that_is_lost_makes_every_page_of_the_load_bad(when) -> None:
    bench = Bench()
    bench.session.stored.update(KEYS)
    if when == "before":
        bench.session.error = ConnectionError("no daemon")
        report, bad = bench.step(loads=[load()])
    else:
        bench.session.slow = True
        bench.step(loads=[load()])
        bench.session.restores[0].error = ConnectionError("killed")
        bench.session.restores[0].ended = True
        report, bad = bench.step()
    assert report.loaded == {"a"}
    assert bad == {10, 11, 12}
    assert bench.side.stats.take()["load_failed_blocks"] == 3


def test_an_order_without_names_fails_as_a_whole() -> None:
    bench = Bench()
    report, bad = bench.step(loads=[LoadOrder("a", [[]], [10, 11])])
    assert report.loaded == {"a"}
    assert bad == {10, 11}
    assert not bench.session.restores


def test_saves_name_parent_place_and_size_of_each_block() -> None:
    bench = Bench()
    bench.step(saves=[save(1, first=1)])
    blocks = bench.session.saves[0].blocks
    assert [b.parent for b in blocks] == [KEYS[0], KEYS[1]]
    assert [(b.position, b.tokens) for b in blocks] == [(BLOCK, BLOCK), (2 * BLOCK, BLOCK)]
    assert bench.session.saves[0].pages == [20, 21]
    counts = bench.side.stats.take()
    assert counts["saved_blocks"] == 2
    assert counts["saved_bytes"] == 200


def test_saves_wait_for_as_much_as_the_daemon_can_promise() -> None:
    bench = Bench()
    bench.step(saves=[save(1)])
    bench.session.is_durable = False
    bench.step(saves=[save(2)])
    assert bench.session.waits == ["durable", "accepted"]


def test_copied_is_the_last_order_before_one_that_is_still_read() -> None:
    bench = Bench()
    assert bench.side.copied() == 0
    bench.session.slow = True
    bench.step(saves=[save(1), save(2, first=2)])
    assert bench.side.copied() == 0
    bench.session.saves[0].is_copied = True
    bench.step()
    assert bench.side.copied() == 1
    bench.session.saves[1].is_copied = True
    bench.step()
    assert bench.side.copied() == 2


def test_an_ended_request_is_reported_when_its_saves_are_copied_and_not_before_it_is_asked() -> (
    None
):
    bench = Bench()
    bench.session.slow = True
    assert bench.step(saves=[save(1)])[0].sent == set()
    assert bench.step(report={"a"})[0].sent == set()
    bench.session.saves[0].is_copied = True
    assert bench.step()[0].sent == {"a"}
    assert bench.step()[0].sent == set()
    assert bench.step(report={"b"})[0].sent == {"b"}, "a request without a save under way"


def test_settling_waits_for_copies_of_that_request_only() -> None:
    bench = Bench()
    bench.session.slow = True
    bench.step(saves=[save(1), save(2, name="b")])
    bench.step(settle={"a"})
    first, second = bench.session.saves
    assert first.is_copied
    assert first.waited == 1
    assert not second.is_copied
    assert second.waited == 0


def test_settling_waits_once_for_all_then_cancels_them(monkeypatch) -> None:
    monkeypatch.setattr(worker, "SETTLE_S", 0.05)
    bench = Bench()
    bench.session.slow = True
    bench.step(saves=[save(number) for number in range(1, 6)])
    for saving in bench.session.saves:
        saving.stuck = True
    began = time.monotonic()
    bench.step(settle={"a"})
    assert time.monotonic() - began < 0.2, "one limit, not one for each"
    assert all(saving.cancelled for saving in bench.session.saves)
    assert bench.side.copied() == 5
    assert bench.link.usable(), "what is cancelled says nothing of the daemon"
    assert worker.SETTLE_S + worker.CANCEL_S < 10


def test_pages_that_are_read_whatever_is_done_are_not_given_away_in_silence(monkeypatch) -> None:
    monkeypatch.setattr(worker, "SETTLE_S", 0.01)
    monkeypatch.setattr(worker, "CANCEL_S", 0.01)
    bench = Bench()
    bench.session.slow = True
    bench.step(saves=[save(1)])
    [saving] = bench.session.saves
    saving.stuck = True
    monkeypatch.setattr(saving, "cancel", lambda: None)
    with pytest.raises(RuntimeError, match="no claim"):
        bench.step(settle={"a"})
    # The engine's end is no time to raise.
    monkeypatch.setattr(bench.session, "close", lambda: 1 // 0)
    bench.side.close()


def test_saves_that_fail_are_counted_and_free_their_pages() -> None:
    bench = Bench()
    bench.session.error = ConnectionError("no daemon")
    bench.step(saves=[save(1)])
    assert bench.side.copied() == 1
    assert bench.side.stats.take()["save_failed_blocks"] == 2
    assert bench.step(report={"a"})[0].sent == {"a"}


def test_without_a_daemon_loads_fail_and_saves_do_nothing() -> None:
    def refuse() -> Never:
        raise ConnectionError("no socket")

    bench = Bench()
    bench.link.close()
    bench.side._link = Link(refuse, "test")
    bench.side._link.start(0.05)
    report, bad = bench.step(loads=[load()], saves=[save(1)])
    assert report.loaded == {"a"}
    assert bad == {10, 11, 12}
    bench.side.close()


def test_closing_waits_for_saves_cancels_loads_and_ends_the_session() -> None:
    bench = Bench()
    bench.session.stored.update(KEYS)
    bench.session.slow = True
    bench.step(loads=[load()], saves=[save(1)])
    bench.side.close()
    assert bench.session.restores[0].cancelled
    assert bench.session.saves[0].waited
    assert bench.session.closed
