"""Block maths, names, layouts and settings of the vLLM connector."""

import threading
from types import SimpleNamespace

import pytest

from kvtier.vllm import identity
from kvtier.vllm.chain import Chain, full_blocks, stored_run
from kvtier.vllm.geometry import Geometry, LayerPage, geometry_of, unsupported
from kvtier.vllm.link import DaemonDirectory, Link, PendingLookup, ShardNames
from kvtier.vllm.options import Options
from kvtier.vllm.stats import Stats, merge, reduce
from vllm_fakes import Names


def test_a_chain_names_the_same_blocks_in_any_portions() -> None:
    tokens = list(range(23))
    whole = Chain(Names().name, 4, lambda _: b"", True).extend(tokens, 99)
    parts = Chain(Names().name, 4, lambda _: b"", False)
    for known in (3, 4, 11, 12, 23):
        parts.extend(tokens[:known], 99)
    assert parts.keys == whole
    assert len(whole) == 5
    assert parts.parent(0) == bytes(32)
    assert parts.parent(3) == whole[2]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (3, 0), (4, 1), (5, 1), (8, 2)])
def test_a_tail_fills_no_block(tokens, blocks) -> None:
    assert full_blocks(tokens, 4) == blocks


def test_a_stored_run_ends_at_the_first_gap_and_at_the_limit() -> None:
    assert stored_run([True, True, False, True], 0, 9) == 2
    assert stored_run([True, True, False, True], 1, 9) == 1
    assert stored_run([True, True, True], 0, 2) == 2
    assert stored_run([], 0, 5) == 0


def test_fields_of_a_digest_cannot_run_into_each_other() -> None:
    assert identity.digest([("a", b"bc")]) != identity.digest([("ab", b"c")])
    assert identity.digest([("a", b"b"), ("a", b"")]) != identity.digest([("a", b"ba")])


def test_an_ordinary_request_has_no_extra() -> None:
    assert identity.prefix_extra([], None, b"") == b""
    assert identity.prefix_extra([], "salt", b"") != identity.prefix_extra([], None, b"salt")


def test_a_commit_is_read_from_the_path_of_a_snapshot() -> None:
    path = "/c/hub/models--o--n/snapshots/abc123/config.json"
    assert identity.commit_of(path) == "abc123"
    assert identity.commit_of("/models/mine") == ""
    assert identity.commit_of("/models/snapshots/latest") == ""


def test_options_name_every_problem_at_once() -> None:
    with pytest.raises(ValueError, match="is no setting") as error:
        Options.parse({"sokcet": "x", "save": "yes", "min_load_blocks": 0}, {})
    for part in ("sokcet is no setting", "save is 'yes'", "min_load_blocks is 0"):
        assert part in str(error.value)
    assert Options.parse({"load_timeout_s": 3}, {}).load_timeout_s == 3.0
    with pytest.raises(ValueError, match="load_timeout_s is nan"):
        Options.parse({"load_timeout_s": float("nan")}, {})


@pytest.mark.parametrize("value", [False, 0, "no"])
def test_a_load_before_the_step_is_refused_since_its_failure_comes_too_late(value) -> None:
    with pytest.raises(ValueError, match="accepted: true"):
        Options.parse({"async_load": value}, {})
    assert Options.parse({"async_load": True}, {}) == Options.parse({}, {})


def test_the_socket_comes_from_the_setting_then_the_variable_then_the_package() -> None:
    assert Options.parse({}, {}).socket == "/run/kvtier/kvtierd.sock"
    environ = {"KVTIER_SOCKET": "/e"}
    assert Options.parse({}, environ).socket == "/e"
    assert Options.parse({"socket": "/s"}, environ).socket == "/s"


def test_a_role_switches_saving_or_loading_off() -> None:
    both = Options().of_role(True, True)
    assert both.save
    assert both.load
    assert not Options().of_role(False, True).save
    assert not Options().of_role(True, False).load


def spec(dtype="torch.bfloat16", nbytes=4096, block=16):
    return SimpleNamespace(dtype=dtype, page_size_bytes=nbytes, block_size=block)


def config(specs, layout="LBHNC", groups=None):
    own = {f"layer{i}": s for i, s in enumerate(specs)}
    group = SimpleNamespace(
        layer_names=list(own), kv_cache_spec=SimpleNamespace(kv_cache_specs=own, block_size=16)
    )
    return SimpleNamespace(kv_cache_groups=groups or [group], kv_cache_layout=layout)


def test_values_of_one_type_are_declared_as_such_and_anything_else_as_bytes() -> None:
    typed = geometry_of(config([spec(), spec()]))
    assert typed.element == "bf16"
    assert typed.width(typed.layers[0]) == 128
    assert typed.block_bytes == 8192
    for other in (
        config([spec(), spec("torch.float16")]),
        config([spec(nbytes=4098)]),
        config([spec()], layout="LHBNC"),
        config([spec("torch.strange")]),
    ):
        geometry = geometry_of(other)
        assert geometry.element == "u8"
        assert geometry.width(geometry.layers[0]) is None


def test_an_engine_that_cannot_be_kept_says_why() -> None:
    parallel = SimpleNamespace(pipeline_parallel_size=1)
    full = lambda _: "full_attention"  # noqa: E731
    assert unsupported(config([spec()]), parallel, full) is None
    assert "pipeline" in unsupported(
        config([spec()]), SimpleNamespace(pipeline_parallel_size=2), full
    )
    assert "sliding" in unsupported(config([spec()]), parallel, lambda _: "sliding_window")
    two = config([spec()]).kv_cache_groups * 2
    assert "2 KV cache groups" in unsupported(config([], groups=two), parallel, full)


class FakeKvtier:
    """The package's descriptor, as a tuple."""

    class LayerSpec:
        latent = staticmethod(lambda width, rope: ("latent", width, rope))
        opaque = staticmethod(lambda bytes_per_block: ("opaque", bytes_per_block))

    Shard = staticmethod(lambda **shard: shard)
    ModelDescriptor = staticmethod(lambda *args, **named: (args, named))


def test_descriptors_differ_by_every_fact_and_agree_between_processes() -> None:
    from kvtier.vllm.geometry import descriptor

    layers = (LayerPage("a", 4096, "bfloat16"),)
    model = {"name": "m", "revision": "r", "weights": b"w", "d_model": 8}

    def made(geometry=None, facts=None, shard=(0, 1)):
        geometry = geometry or Geometry(16, layers, True)
        return repr(descriptor(FakeKvtier, geometry, model, facts or {"isa": "vec"}, shard))

    same = made()
    assert same == made()
    others = [
        made(facts={"isa": "amx"}),
        made(facts={"isa": "vec", "block": 1}),
        made(shard=(1, 2)),
        made(geometry=Geometry(32, layers, True)),
        made(geometry=Geometry(16, (LayerPage("a", 4096, "float16"),), True)),
        made(geometry=Geometry(16, (LayerPage("b", 4096, "bfloat16"),), True)),
    ]
    assert len({same, *others}) == 7


def test_statistics_add_up_and_begin_anew() -> None:
    stats = Stats()
    stats.count("loaded_blocks", 2)
    stats.count("no such counter", 2)
    stats.observe("load_seconds", 0.5)
    taken = stats.take()
    assert taken == {"loaded_blocks": 2, "load_seconds": [0.5]}
    assert stats.take() == {}
    both = merge(taken, {"loaded_blocks": 1, "load_seconds": [1.5], "lookups": 1})
    assert both == {"loaded_blocks": 3, "load_seconds": [0.5, 1.5], "lookups": 1}
    assert reduce(both)["load_seconds_mean"] == 1.0


def test_a_link_keeps_trying_and_says_once_that_the_daemon_is_away(caplog) -> None:
    caplog.set_level("INFO", "vllm.kvtier")
    attempts, up = [], threading.Event()

    def connect():
        attempts.append(1)
        if not up.is_set():
            raise ConnectionError("no socket")
        return ["session"]

    link = Link(connect, "test")
    link.start(0.35)
    assert link.usable() is None
    assert len(attempts) >= 2
    up.set()
    for thread in threading.enumerate():
        if thread.name == "kvtier":
            thread.join(5)
    assert link.sessions() == (1, ["session"])
    texts = [record.getMessage() for record in caplog.records]
    assert sum("cannot be used" in text for text in texts) == 1
    assert sum("can be used again" in text for text in texts) == 1


class Answer:
    """A lookup that has answered."""

    def __init__(self, tiers) -> None:
        self.tiers = tiers

    def done(self) -> bool:
        return True

    def result(self, timeout=None):
        blocks = [SimpleNamespace(tier=tier) for tier in self.tiers]
        return SimpleNamespace(prefix_blocks=len(blocks), blocks=blocks)


class NamingSession:
    """A session that counts its calls."""

    def __init__(self) -> None:
        self.names, self.calls = Names(), 0

    def prefix_keys(self, tokens, *, extra):
        self.calls += 1
        return self.names.name(bytes(32), tokens, 4, extra)

    def derive_key(self, parent, tokens, *, extra):
        self.calls += 1
        return self.names.name(parent, tokens, 4, extra)[0]


def test_a_prompt_is_named_in_one_call_and_in_portions_the_same() -> None:
    session, tokens = NamingSession(), list(range(42))
    whole = Chain(ShardNames(session).name, 4, lambda _: b"x", True).extend(tokens, 99)
    assert session.calls == 1
    parts = Chain(ShardNames(session).name, 4, lambda _: b"x", True)
    for known in (9, 10, 42):
        parts.extend(tokens[:known], 99)
    assert parts.keys == whole
    assert len(whole) == 10


class ChangingSession:
    """A session whose daemon has another namespace than the one it was opened in."""

    def __init__(self) -> None:
        self.asked = []

    def start_lookup(self, keys):
        self.asked.append(keys)
        return self

    def done(self) -> bool:
        return True

    def result(self, timeout=None):
        raise NamespaceChanged("another namespace")


class NamespaceChanged(Exception):
    """Of the SDK, by its name."""


def test_a_probe_notices_that_the_namespace_is_another_and_names_change() -> None:
    opened = []

    def connect():
        opened.append(ChangingSession())
        return [opened[-1]]

    link = Link(connect, "test")
    link.start(5.0)
    directory = DaemonDirectory(link)
    before = directory.names()[0]
    directory.probe()
    assert len(opened[0].asked) == 1
    directory.probe()
    for thread in threading.enumerate():
        if thread.name == "kvtier":
            thread.join(5)
    assert len(opened) == 2
    assert directory.names()[0] != before


def test_of_several_ranks_the_shortest_prefix_and_the_slower_tier_count() -> None:
    link = Link(list, "test")
    lookup = PendingLookup(link, [Answer(["host", "host", "disk"]), Answer(["disk", "host"])], 0)
    assert lookup.poll() == ["disk", "host"]
