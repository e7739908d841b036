"""The scheduler's side of the vLLM connector, with a scheduler and a daemon that are fakes."""

from types import SimpleNamespace

import pytest

from kvtier.vllm import scheduler, weights
from kvtier.vllm.options import Options
from kvtier.vllm.scheduler import SchedulerSide
from vllm_fakes import BLOCK, Clock, FakeDirectory, Request, step


class Bench:
    """A scheduler's side with everything around it."""

    def __init__(self, ranks=1, **options) -> None:
        self.directory = FakeDirectory(ranks)
        self.clock = Clock()
        self.options = Options(**options)
        self.side = SchedulerSide(self.options, BLOCK, self.directory, self.clock)

    def arrive(self, name="a", tokens=14, first=0, **fields):
        request = Request(name, list(range(first, first + tokens)), **fields)
        self.side.on_new_request(request)
        return request

    def load(self, request, pages, computed=0):
        external, between = self.side.matched(request, computed)
        self.side.allocated(request, pages, external)
        return external, between


def test_a_prompt_that_is_stored_is_matched_in_whole_blocks_and_loaded_between_steps() -> None:
    bench = Bench()
    request = Request("a", list(range(14)))
    bench.directory.store(request, 3)
    bench.side.on_new_request(request)
    assert bench.load(request, [7, 8, 9, 10]) == (12, True)
    orders = bench.side.build(step())
    [load] = orders.loads
    assert load.pages == [7, 8, 9]
    assert len(load.keys[0]) == 3
    assert orders.idle
    assert not orders.saves
    assert bench.side.build(step()).loads == []


def test_a_prompt_of_whole_blocks_is_matched_to_its_end() -> None:
    bench = Bench()
    request = Request("a", list(range(12)))
    bench.directory.store(request, 3)
    assert bench.side.matched(request, 0) == (12, True)


def test_matching_does_not_wait_for_an_answer_and_gives_up_after_its_limit() -> None:
    bench = Bench(lookup_timeout_s=0.25)
    request = Request("a", list(range(14)))
    bench.directory.store(request, 3)
    bench.directory.held = True
    bench.side.on_new_request(request)
    assert bench.side.matched(request, 0) == (None, False)
    bench.clock.now += 0.2
    assert bench.side.matched(request, 0) == (None, False)
    bench.clock.now += 0.1
    assert bench.side.matched(request, 0) == (0, False)
    assert bench.directory.lookups[0].cancelled
    bench.directory.held = False
    assert bench.side.matched(request, 0) == (0, False), "a request is decided once"
    assert bench.side.stats.take()["lookup_timeouts"] == 1


def test_asking_again_has_no_effect_and_costs_no_second_lookup() -> None:
    bench = Bench()
    request = Request("a", list(range(14)))
    bench.directory.store(request, 2)
    answers = [bench.side.matched(request, 0) for _ in range(5)]
    assert answers == [(8, True)] * 5
    assert len(bench.directory.lookups) == 1
    assert bench.side.build(step()).is_empty()


def test_an_answer_that_has_grown_old_is_asked_for_again() -> None:
    bench = Bench()
    request = Request("a", list(range(14)))
    bench.directory.store(request, 2)
    assert bench.side.matched(request, 0) == (8, True)
    bench.directory.stored.clear()
    bench.clock.now += 10
    assert bench.side.matched(request, 0)[0] in (None, 0)
    assert bench.side.matched(request, 0) == (0, False)


def test_only_blocks_beyond_what_the_engine_has_are_matched() -> None:
    bench = Bench()
    request = Request("a", list(range(18)))
    bench.directory.store(request, 4)
    assert bench.load(request, [3, 4, 5, 6, 7], computed=8) == (8, True)
    [load] = bench.side.build(step()).loads
    assert load.pages == [5, 6]


def test_blocks_after_one_that_only_the_engine_has_are_found() -> None:
    bench = Bench()
    request = Request("a", list(range(18)))
    bench.directory.store(request, 4)
    first = bench.directory.ranks[0].name(bytes(32), list(range(4)), BLOCK, b"")[0]
    del bench.directory.stored[first]
    bench.side.on_new_request(request)
    answers = {bench.side.matched(request, 8)[0] for _ in range(2)}
    assert answers <= {None, 8}
    assert bench.side.matched(request, 8) == (8, True)


def test_a_lookup_that_fails_means_that_the_request_is_computed() -> None:
    bench = Bench()
    request = bench.arrive()
    bench.directory.error = ConnectionError("gone")
    assert bench.side.matched(request, 0) == (0, False)
    assert bench.side.stats.take()["lookup_failures"] == 1


def test_a_daemon_that_is_away_matches_nothing_and_requests_after_its_return_do() -> None:
    bench = Bench()
    bench.directory.away = True
    request = bench.arrive()
    assert bench.side.matched(request, 0) == (0, False)
    bench.directory.away = False
    bench.directory.store(request, 3)
    assert bench.side.matched(request, 0) == (12, True)


def test_a_run_that_is_shorter_than_the_least_is_not_loaded() -> None:
    bench = Bench(min_load_blocks=3)
    request = Request("a", list(range(14)))
    bench.directory.store(request, 2)
    assert bench.side.matched(request, 0) == (0, False)
    bench.directory.store(request, 3)
    other = Request("b", list(range(14)))
    assert bench.side.matched(other, 0) == (12, True)


def test_every_rank_must_have_a_block_for_it_to_be_matched() -> None:
    bench = Bench(ranks=2)
    request = Request("a", list(range(14)))
    bench.directory.store(request, 3)
    third = bench.directory.ranks[1].name(bytes(32), list(range(12)), BLOCK, b"")[2]
    del bench.directory.stored[third]
    assert bench.load(request, [1, 2, 3, 4]) == (8, True)
    [load] = bench.side.build(step()).loads
    assert len(load.keys) == 2
    assert load.keys[0] != load.keys[1]


def test_blocks_are_saved_once_they_are_full_in_chunks_and_while_decoding() -> None:
    bench = Bench()
    request = bench.arrive(tokens=10)
    bench.side.matched(request, 0)
    orders = bench.side.build(step(new=[("a", 0, [5, 6])], scheduled={"a": 6}))
    assert [(o.first, o.pages) for o in orders.saves] == [(0, [5])]
    orders = bench.side.build(step(cached=[("a", 6, [7])], scheduled={"a": 4}))
    assert [(o.first, o.pages) for o in orders.saves] == [(1, [6])]
    # Token 10 is known and computed in this step, token 11 in the next.
    request.output += [100]
    assert not bench.side.build(step(cached=[("a", 10, [])], scheduled={"a": 1})).saves
    request.output += [101]
    orders = bench.side.build(step(cached=[("a", 11, [])], scheduled={"a": 1}))
    assert [(o.first, o.pages) for o in orders.saves] == [(2, [7])]
    assert (
        orders.saves[0].parents[0]
        == bench.directory.ranks[0].name(bytes(32), list(range(8)), BLOCK, b"")[1]
    )


def test_a_long_prefix_is_saved_in_several_orders() -> None:
    bench = Bench()
    blocks = 2500
    request = bench.arrive(tokens=blocks * BLOCK)
    bench.side.matched(request, 0)
    pages = list(range(1, blocks + 1))
    orders = bench.side.build(step(new=[("a", 0, pages)], scheduled={"a": blocks * BLOCK}))
    assert [(o.first, len(o.pages)) for o in orders.saves] == [(0, 1024), (1024, 1024), (2048, 452)]
    assert [page for o in orders.saves for page in o.pages] == pages


def test_tokens_that_are_drafts_only_fill_no_block() -> None:
    bench = Bench()
    request = bench.arrive(tokens=7)
    bench.side.matched(request, 0)
    orders = bench.side.build(step(new=[("a", 0, [5, 6, 7])], scheduled={"a": 7}))
    assert [o.pages for o in orders.saves] == [[5]]
    # Five tokens in the step, of which one is known: blocks 1 and 2 are not what they will be.
    request.output += [100]
    orders = bench.side.build(step(cached=[("a", 7, [])], scheduled={"a": 5}))
    assert [o.pages for o in orders.saves] == [[6]]
    assert not bench.side.build(step(cached=[("a", 8, [])], scheduled={"a": 4})).saves


def test_generated_blocks_are_left_out_when_asked() -> None:
    bench = Bench(save_output=False)
    request = bench.arrive(tokens=5)
    bench.side.matched(request, 0)
    assert bench.side.build(step(new=[("a", 0, [1, 2])], scheduled={"a": 5})).saves
    request.output += [9, 9, 9]
    assert not bench.side.build(step(cached=[("a", 7, [])], scheduled={"a": 1})).saves


def test_what_is_stored_or_loaded_is_not_saved_again() -> None:
    bench = Bench()
    request = Request("a", list(range(14)))
    bench.directory.store(request, 2)
    bench.load(request, [1, 2, 3, 4])
    bench.side.build(step())
    bench.side.learned({"a"}, set(), set(), 0)
    orders = bench.side.build(step(new=[("a", 8, [1, 2, 3, 4])], scheduled={"a": 6}))
    assert [(o.first, o.pages) for o in orders.saves] == [(2, [3])]


def test_blocks_that_only_the_engine_has_are_saved() -> None:
    bench = Bench()
    request = bench.arrive(tokens=14)
    assert bench.side.matched(request, 8) == (0, False)
    orders = bench.side.build(step(new=[("a", 8, [1, 2, 3, 4])], scheduled={"a": 6}))
    assert [(o.first, o.pages) for o in orders.saves] == [(0, [1, 2, 3])]


def test_pages_that_did_not_load_are_computed_saved_and_not_asked_for_again() -> None:
    bench = Bench()
    request = Request("a", list(range(14)))
    bench.directory.store(request, 3)
    bench.load(request, [1, 2, 3, 4])
    bench.side.build(step())
    bench.side.learned({"a"}, set(), {2, 3}, 0)
    assert bench.side.matched(request, 0) == (0, False)
    orders = bench.side.build(step(new=[("a", 4, [1, 2, 3, 4])], scheduled={"a": 10}))
    assert [(o.first, o.pages) for o in orders.saves] == [(1, [2, 3])]


def test_pages_of_an_ended_request_stay_until_its_saves_are_copied() -> None:
    bench = Bench()
    request = bench.arrive()
    bench.side.matched(request, 0)
    orders = bench.side.build(step(new=[("a", 0, [1, 2, 3, 4])], scheduled={"a": 14}))
    number = orders.saves[-1].number
    bench.side.learned(set(), set(), set(), number - 1)
    assert bench.side.finished(request)
    assert bench.side.has_delayed()
    assert bench.side.build(step()).report == {"a"}
    assert bench.side.build(step()).report == set()
    bench.side.learned(set(), {"a"}, set(), number)
    assert not bench.side.has_delayed()


def test_pages_of_an_ended_request_are_free_at_once_when_all_is_copied() -> None:
    bench = Bench()
    request = bench.arrive()
    bench.side.matched(request, 0)
    orders = bench.side.build(step(new=[("a", 0, [1, 2, 3, 4])], scheduled={"a": 14}))
    bench.side.learned(set(), set(), set(), orders.saves[-1].number)
    assert not bench.side.finished(request)
    assert bench.side.build(step()).report == set()


def test_a_request_that_ends_while_it_loads_is_reported_by_its_load_alone() -> None:
    bench = Bench()
    request = Request("a", list(range(14)))
    bench.directory.store(request, 3)
    bench.load(request, [1, 2, 3, 4])
    bench.side.build(step())
    assert not bench.side.finished(request)
    assert bench.side.build(step()).report == set()


def test_a_preempted_request_is_settled_and_its_new_pages_are_not_saved_twice() -> None:
    bench = Bench()
    request = bench.arrive()
    bench.side.matched(request, 0)
    bench.side.build(step(new=[("a", 0, [1, 2, 3, 4])], scheduled={"a": 14}))
    orders = bench.side.build(step(preempted={"a"}))
    assert orders.settle == {"a"}
    request.output += [50, 51]
    orders = bench.side.build(
        step(cached=[("a", 0, [11, 12, 13, 14])], scheduled={"a": 16}, resumed={"a"})
    )
    assert [(o.first, o.pages) for o in orders.saves] == [(3, [14])]


def test_a_preempted_request_may_load_what_was_saved_of_it() -> None:
    bench = Bench()
    request = bench.arrive()
    bench.side.matched(request, 0)
    bench.side.build(step(new=[("a", 0, [1, 2, 3, 4])], scheduled={"a": 14}))
    request.output += [50, 51, 52]
    bench.side.build(step(preempted={"a"}))
    bench.directory.store(request, 4)
    bench.clock.now += 10
    assert bench.side.matched(request, 0)[0] == 16
    assert bench.load(request, [21, 22, 23, 24, 25]) == (16, True)


def test_a_request_aborted_after_preemption_is_settled_all_the_same() -> None:
    bench = Bench()
    request = bench.arrive()
    bench.side.matched(request, 0)
    bench.side.build(step(new=[("a", 0, [1, 2, 3, 4])], scheduled={"a": 14}))
    assert bench.side.finished(request)
    orders = bench.side.build(step(preempted={"a"}))
    assert orders.settle == {"a"}
    assert orders.report == {"a"}


def test_more_than_the_backlog_is_dropped_and_counted() -> None:
    bench = Bench(save_backlog_blocks=3)
    for name, first in (("a", 0), ("b", 1000)):
        bench.side.matched(bench.arrive(name, 12, first), 0)
    orders = bench.side.build(
        step(
            new=[("a", 0, [1, 2, 3]), ("b", 0, [4, 5, 6])],
            scheduled={"a": 12, "b": 12},
        )
    )
    assert [o.req_id for o in orders.saves] == ["a"]
    assert bench.side.stats.take()["save_dropped_blocks"] == 3
    bench.side.learned(set(), set(), set(), orders.saves[0].number)
    bench.side.matched(bench.arrive("c", 12, 2000), 0)
    assert bench.side.build(step(new=[("c", 0, [7, 8, 9])], scheduled={"c": 12})).saves


def feature(name, offset, length):
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(identifier=name, mm_hash=None, mm_position=place)


def lora(path, name="x", number=1, again=False):
    return SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=str(path), load_inplace=again
    )


def adapter(folder, content=b"\0"):
    """An adapter's files."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(content * 100)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_salt": "tenant"},
        {"mm_features": [feature("cat", 1, 2)]},
    ],
)
def test_salt_and_images_keep_equal_tokens_apart(fields) -> None:
    bench = Bench()
    plain = Request("a", list(range(14)))
    bench.directory.store(plain, 3)
    assert bench.side.matched(plain, 0) == (12, True)
    other = Request("b", list(range(14)), **fields)
    assert bench.side.matched(other, 0) == (0, False)


def saved_keys(bench, name, **fields):
    """Names under which a request is saved; None where it is not."""
    request = Request(name, list(range(14)), **fields)
    bench.side.on_new_request(request)
    bench.side.matched(request, 0)
    orders = bench.side.build(step(new=[(name, 0, [1, 2, 3, 4])], scheduled={name: 14}))
    bench.side.finished(request)
    return orders.saves[0].keys[0] if orders.saves else None


def test_adapters_keep_equal_tokens_apart(tmp_path) -> None:
    bench = Bench()
    first = lora(adapter(tmp_path / "a"))
    keys = [
        saved_keys(bench, "plain"),
        saved_keys(bench, "a", lora_request=first),
        saved_keys(bench, "b", lora_request=lora(tmp_path / "a", "y", 2)),
        saved_keys(bench, "c", lora_request=lora(adapter(tmp_path / "b", b"\1"))),
    ]
    assert all(keys)
    assert len({bytes(names[0]) for names in keys}) == 4
    assert saved_keys(bench, "d", lora_request=first) == keys[1]


def test_an_adapter_whose_files_change_is_kept_only_when_it_is_loaded_again(tmp_path) -> None:
    bench = Bench()
    before = saved_keys(bench, "a", lora_request=lora(adapter(tmp_path / "a")))
    adapter(tmp_path / "a", b"\1")
    # Nobody knows which of the two the engine has.
    assert saved_keys(bench, "b", lora_request=lora(tmp_path / "a")) is None
    after = saved_keys(bench, "c", lora_request=lora(tmp_path / "a", again=True))
    assert after not in (None, before)
    assert saved_keys(bench, "d", lora_request=lora(tmp_path / "a")) == after


def test_an_adapter_without_files_is_not_kept_and_the_log_says_so_once(caplog) -> None:
    bench = Bench()
    for name in ("a", "b"):
        assert saved_keys(bench, name, lora_request=lora("somebody/adapter")) is None
    said = [r for r in caplog.records if "somebody/adapter" in r.getMessage()]
    assert len(said) == 1
    assert bench.side.stats.take()["left_requests"] == 2


def test_an_adapter_is_read_once_however_many_requests_use_it(tmp_path, monkeypatch) -> None:
    reads = []
    real = weights.sample
    monkeypatch.setattr(weights, "sample", lambda path: reads.append(path) or real(path))
    bench = Bench()
    for name in ("a", "b", "c"):
        assert saved_keys(bench, name, lora_request=lora(adapter_once(tmp_path / "a")))
    assert len(reads) == 2


def adapter_once(folder):
    return folder if folder.exists() else adapter(folder)


def test_files_that_cannot_be_read_leave_a_request_to_the_engine(tmp_path, monkeypatch) -> None:
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(weights, "sample", refuse)
    bench = Bench()
    used = lora(adapter(tmp_path / "a"))
    assert saved_keys(bench, "a", lora_request=used) is None
    assert saved_keys(bench, "plain")


def test_an_error_at_any_call_leaves_the_request_and_not_the_engine(monkeypatch) -> None:
    bench = Bench()
    names = bench.directory.ranks[0]
    good = names.name

    def fail(*_):
        raise OSError("no file")

    request = Request("a", list(range(14)))
    bench.directory.store(request, 3)
    other = bench.arrive("b", first=100)
    bench.side.matched(other, 0)
    monkeypatch.setattr(names, "name", fail)
    bench.side.on_new_request(request)
    assert bench.side.matched(request, 0) == (0, False)
    # A request that fails while orders are made takes no order of another with it.
    monkeypatch.setattr(names, "name", good)
    third = bench.arrive("c", tokens=30, first=200)
    bench.side.matched(third, 0)
    bench.side._requests["c"].chains[0]._name = fail
    bench.side._requests["c"].chains[0].keys.clear()
    orders = bench.side.build(
        step(new=[("c", 0, list(range(8))), ("b", 0, [8, 9, 10])], scheduled={"c": 30, "b": 14})
    )
    assert [order.req_id for order in orders.saves] == ["b"]
    assert not bench.side.finished(third)
    assert not bench.side.finished(request)


def test_a_load_that_cannot_be_ordered_is_ordered_to_fail(monkeypatch) -> None:
    bench = Bench()
    request = Request("a", list(range(14)))
    bench.directory.store(request, 3)
    assert bench.side.matched(request, 0) == (12, True)
    tracked = bench.side._requests["a"]
    monkeypatch.setattr(tracked, "keys", lambda blocks: 1 // 0)
    bench.side.allocated(request, [1, 2, 3, 4], 12)
    [load] = bench.side.build(step()).loads
    assert load.keys == [[]]
    assert load.pages == [1, 2, 3]


def test_an_image_changes_its_block_and_those_after_it_only() -> None:
    bench = Bench()
    requests = [
        Request(name, list(range(14)), mm_features=[feature(image, 5, 2)])
        for name, image in (("a", "cat"), ("b", "dog"), ("c", "cat"))
    ]
    saves = {}
    for request in requests:
        bench.side.matched(request, 0)
        orders = bench.side.build(
            step(new=[(request.request_id, 0, [1, 2, 3, 4])], scheduled={request.request_id: 14})
        )
        saves[request.request_id] = orders.saves[0].keys[0]
    assert saves["a"] == saves["c"]
    same = [x == y for x, y in zip(saves["a"], saves["b"], strict=False)]
    assert same == [True, False, False]


@pytest.mark.parametrize("fields", [{"prompt_embeds": object()}, {"resumable": True}])
def test_what_tokens_do_not_tell_is_neither_loaded_nor_saved(fields) -> None:
    bench = Bench()
    request = Request("a", list(range(14)), **fields)
    bench.directory.store(request, 3)
    bench.side.on_new_request(request)
    assert bench.side.matched(request, 0) == (0, False)
    assert not bench.side.build(step(new=[("a", 0, [1, 2, 3, 4])], scheduled={"a": 14})).saves
    assert not bench.side.finished(request)


def test_after_a_reset_of_the_cache_nothing_from_before_is_loaded_or_saved() -> None:
    bench = Bench()
    before = bench.arrive("a", 14)
    bench.directory.store(before, 3)
    bench.side.forget_cache()
    assert bench.side.matched(before, 0) == (0, False)
    assert not bench.side.build(step(new=[("a", 0, [1, 2, 3, 4])], scheduled={"a": 14})).saves
    after = Request("b", list(range(14)))
    assert bench.side.matched(after, 0) == (0, False)
    assert bench.side.build(step(new=[("b", 0, [5, 6, 7, 8])], scheduled={"b": 14})).saves


def test_names_of_an_older_session_are_not_used() -> None:
    bench = Bench()
    request = bench.arrive()
    bench.directory.store(request, 3)
    bench.directory.generation += 1
    assert bench.side.matched(request, 0) == (0, False)


def test_a_load_of_other_tokens_than_were_matched_is_ordered_to_fail() -> None:
    bench = Bench()
    request = Request("a", list(range(14)))
    bench.directory.store(request, 2)
    bench.side.matched(request, 0)
    bench.side.allocated(request, [1, 2, 3, 4], 12)
    [load] = bench.side.build(step()).loads
    assert load.keys == [[]]
    assert load.pages == [1, 2, 3]


def test_an_engine_that_only_saves_probes_its_sessions_and_others_do_not_while_they_ask() -> None:
    bench = Bench(load=False)
    bench.side.build(step())
    assert bench.directory.probes == 0
    for _ in range(3):
        bench.clock.now += 6
        bench.side.build(step())
        bench.side.build(step())
    assert bench.directory.probes == 3
    bench = Bench()
    for number in range(3):
        bench.clock.now += 6
        bench.arrive(str(number), first=1000 * number)
        bench.side.build(step())
    assert bench.directory.probes == 0


@pytest.mark.parametrize("found", [b"other", b""])
def test_a_worker_that_has_other_blocks_ends_keeping_and_the_log_says_so_once(
    found, caplog
) -> None:
    bench = Bench()
    bench.side._shards = {0: b"same", 1: b"same"}
    request = bench.arrive()
    bench.directory.store(request, 3)
    bench.side.learned(set(), set(), set(), 0, {0: b"same", 1: b"same"})
    assert bench.side.matched(request, 0) == (12, True)
    for _ in range(2):
        bench.side.learned(set(), set(), set(), 0, {0: b"same", 1: found})
    assert bench.side.matched(request, 0) == (0, False)
    assert bench.side.matched(bench.arrive("b"), 0) == (0, False)
    assert not bench.side.build(step(new=[("a", 0, [1, 2, 3, 4])], scheduled={"a": 14})).saves
    assert sum("other blocks" in record.getMessage() for record in caplog.records) == 1


def test_roles_switch_sides_off() -> None:
    bench = Bench(load=False)
    request = Request("a", list(range(14)))
    bench.directory.store(request, 3)
    bench.side.on_new_request(request)
    assert bench.side.matched(request, 0) == (0, False)
    assert not bench.directory.lookups
    bench = Bench(save=False)
    bench.side.matched(bench.arrive(), 0)
    assert not bench.side.build(step(new=[("a", 0, [1, 2, 3, 4])], scheduled={"a": 14})).saves


def test_tokens_to_load_are_told_by_tier() -> None:
    bench = Bench()
    request = Request("a", list(range(18)))
    bench.directory.store(request, 4, "disk")
    bench.directory.store(request, 1, "host")
    bench.load(request, [1, 2, 3, 4, 5])
    assert bench.side.sources(request, 16) == {"host": 4, "disk": 12}


def test_blocks_after_the_longest_question_are_asked_for_when_the_engine_has_the_others(
    monkeypatch,
) -> None:
    monkeypatch.setattr(scheduler, "LOOKUP_KEYS_MAX", 2)
    bench = Bench()
    request = Request("a", list(range(18)))
    bench.directory.store(request, 4)
    bench.side.on_new_request(request)
    assert bench.side.matched(request, 8)[0] in (None, 8)
    assert bench.side.matched(request, 8) == (8, True)
    # What was asked for and is not there is not asked for again.
    monkeypatch.undo()
    bench = Bench()
    bench.directory.store(request, 2)
    bench.side.on_new_request(request)
    assert [bench.side.matched(request, 8) for _ in range(3)] == [(0, False)] * 3
    assert len(bench.directory.lookups) == 1
