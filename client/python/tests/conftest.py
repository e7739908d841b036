"""What a test has: a daemon of its own, a small model, caches with known bytes.

Upstairs:   pytest.
Downstairs: the real ``kvtierd``, named by ``KVTIERD`` or found in ``target/debug``.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import kvtier

ROOT = Path(__file__).resolve().parents[3]
START_SECONDS_MAX = 60.0

LAYERS, HEADS, DIM, PAGE, BLOCK = 3, 2, 8, 16, 32

CONFIG = """
[server]
socket = "{home}/d.sock"
metrics = "127.0.0.1:0"
drain_timeout_s = 20
{server}
[state]
dir = "{home}/state"
[host]
capacity = "32 MiB"
hugepages = "off"
[[disk]]
path = "{home}/disk"
capacity = "64 MiB"
segment_size = "4 MiB"
level = "raw"
{disk}
[[namespace]]
name = "default"
uids = [{uid}]
staging_max = "256 MiB"
"""


class Daemon:
    """A ``kvtierd`` over a folder that outlives it."""

    def __init__(self, home: Path, server: str = "", disk: str = "") -> None:
        self.home = home
        self.socket = home / "d.sock"
        self.process: subprocess.Popen[bytes] | None = None
        text = CONFIG.format(home=home, uid=os.geteuid(), server=server, disk=disk)
        (home / "kvtier.toml").write_text(text)

    def start(self) -> "Daemon":
        binary = os.environ.get("KVTIERD", str(ROOT / "target/debug/kvtierd"))
        log = (self.home / "log").open("ab")
        command = [binary, "--config", str(self.home / "kvtier.toml")]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()
        end = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < end:
            try:
                kvtier.connect(self.socket, connect_timeout=1.0)
                return self
            except kvtier.Error:
                assert self.process.poll() is None, (self.home / "log").read_text()
                time.sleep(0.05)
        raise AssertionError(f"no daemon after {START_SECONDS_MAX} s")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=60)
            self.process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    made: list[Daemon] = []

    def make(**settings: str) -> Daemon:
        made.append(Daemon(tmp_path, **settings).start())
        return made[-1]

    yield make
    for daemon in made:
        daemon.kill()


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    return make_daemon()


def model_of(**changes: object) -> kvtier.ModelDescriptor:
    values: dict[str, object] = {
        "model": "tests/small",
        "layers": [kvtier.LayerSpec.attention(HEADS, DIM)] * LAYERS,
        "d_model": HEADS * DIM,
        "block_tokens": BLOCK,
        "element": "f32",
    }
    return kvtier.ModelDescriptor(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def model() -> kvtier.ModelDescriptor:
    return model_of()


def open_session(
    daemon: Daemon, model: kvtier.ModelDescriptor, **options: object
) -> kvtier.Session:
    client = kvtier.connect(daemon.socket)
    return client.open_session(model, **options)  # type: ignore[arg-type]


@pytest.fixture
def session(daemon: Daemon, model: kvtier.ModelDescriptor) -> kvtier.Session:
    return open_session(daemon, model)


class Engine:
    """An engine's paged cache: one array a layer, ``[pages, 2, page, heads, dim]``."""

    def __init__(self, model: kvtier.ModelDescriptor, pages: int, seed: int | None = None) -> None:
        shape = (pages, 2, PAGE, HEADS, DIM)
        self.arrays = [np.zeros(shape, np.float32) for _ in range(LAYERS)]
        if seed is not None:
            random = np.random.default_rng(seed)
            for array in self.arrays:
                array[:] = random.standard_normal(shape, np.float32)
        self.cache = kvtier.PagedCache(model, PAGE)
        for layer, array in enumerate(self.arrays):
            self.cache.add(layer, "k", array[:, 0])
            self.cache.add(layer, "v", array[:, 1])

    def tokens(self, pages: list[int], count: int) -> list[np.ndarray]:
        """K and V of the first tokens of some pages, one array a layer."""
        kept = [array[pages].swapaxes(0, 1).reshape(2, -1, HEADS, DIM) for array in self.arrays]
        return [array[:, :count] for array in kept]

    def same(self, other: "Engine", pages: list[int], others: list[int], count: int) -> bool:
        pairs = zip(self.tokens(pages, count), other.tokens(others, count), strict=True)
        return all(np.array_equal(one, two) for one, two in pairs)


def save_all(
    session: kvtier.Session, engine: Engine, tokens: list[int], pages: list[int]
) -> list[bytes]:
    """Saves a prompt out of an engine, durably. Returns its keys."""
    keys = session.prefix_keys(tokens)
    blocks = session.chain(keys, len(tokens))
    outcomes = session.save_pages(engine.cache, blocks, pages).result(60)
    assert all(outcome.is_stored("durable") for outcome in outcomes), outcomes
    return keys


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
