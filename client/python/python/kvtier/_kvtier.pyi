"""Types of the extension module: the Rust SDK of kvtier for Python.

Every class here is made in Rust (``client/python/src``). What holds everywhere:

* A block that is not there is a value (``Miss``). An exception says that the call did not work;
  ``Error.happened`` says whether it may have had an effect.
* Every wait gives the interpreter free (the GIL is not held), ends by a timeout, and can be
  interrupted by Ctrl-C. A ``timeout`` is in seconds; ``None`` leaves it to the limits of
  ``connect``, which always end. ``start_...`` never waits and returns a handle to poll.
* Payload is never copied by Python: buffers, tensors and pages are read and written in place,
  with the interpreter free.
* Every object can be used from any thread. None survives a fork: in the child each call raises
  ``Forked``, and the child connects anew.
"""

from collections.abc import Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, final

from .types import (
    Acknowledge,
    Array,
    BlockKey,
    CommitFailure,
    Element,
    Happened,
    Miss,
    PartCode,
    PartOrder,
    PayloadKind,
    Quality,
    SaveRefusal,
    Tier,
)

_T = TypeVar("_T")

__version__: str
ROOT: BlockKey
"""Parent of the first block of a prefix: 32 zero bytes."""

# Errors: the variants of the SDK's ``Error``, by the same names.

class Error(Exception):
    """A call did not work. Its kinds follow what the caller can do about it."""

    happened: Happened
    """Whether the call may have had an effect all the same."""
    is_transient: bool
    """True when the same call may work later without a change to it."""
    retry_after: float
    """Earlier calls will fail at once. Unit: seconds; 0 when nothing is known."""

class Connect(Error, ConnectionError):
    """The daemon cannot be reached."""

class Unavailable(Error, ConnectionError):
    """The daemon is away or stops; go on without it."""

class Invalid(Error, ValueError):
    """An argument is out of range; the text names it and what is accepted."""

class Refused(Error, PermissionError):
    """Not permitted, or another protocol version."""

class Busy(Error):
    """A bound is reached; retry when something has been given back."""

class Unimplemented(Error, NotImplementedError):
    """This daemon does not do that."""

class Timeout(Error, TimeoutError):
    """No answer in time."""

class SessionLost(Error, ConnectionError):
    """The session died during the call; the next call opens it again."""

class LeaseLost(Error):
    """Leases were taken back before they were released: discard what was read."""

class LayoutMismatch(Error):
    """Daemon and client disagree about the descriptor: install matching versions."""

class NamespaceChanged(Error):
    """After a reconnect the daemon uses another namespace: open a new session."""

class Region(Error):
    """Shared memory could not be set up."""

class BadReply(Error):
    """The daemon's answer breaks the protocol."""

class Daemon(Error):
    """The daemon failed inside."""

class Forked(Error):
    """The object was made by the process that this one was forked from."""

class Cancelled(Error):
    """The work behind this handle was cancelled."""

# Connecting.

def connect(
    endpoint: str | PathLike[str],
    *,
    connect_timeout: float = 5.0,
    control_timeout: float = 5.0,
    commit_timeout: float = 30.0,
    restore_idle_timeout: float = 30.0,
    inline_timeout: float = 60.0,
    reconnect_pause_min: float = 0.05,
    reconnect_pause_max: float = 2.0,
    reconnect_wait: float = 0.0,
    reopen_wait: float = 30.0,
    descriptor_socket: str | PathLike[str] | None = None,
) -> Client:
    """Connects to the daemon at a path of a Unix socket, or at ``tcp://127.0.0.1:PORT``.

    Raises: ``Invalid``, ``Connect``.
    """

@final
class Client:
    """A daemon that answered."""

    @property
    def endpoint(self) -> str: ...
    def open_session(
        self,
        model: ModelDescriptor,
        *,
        client_name: str = "python",
        staging_bytes: int = 67108864,
        checksum: bool = True,
        reader: ReaderSpec | None = None,
    ) -> Session:
        """Opens a session for blocks of ``model``, over a connection of its own.

        ``staging_bytes`` is memory to fill blocks in: whole 4 KiB pages, at least two blocks; 0
        for a session that only reads.
        Raises: ``Invalid``, ``Refused``, ``Unavailable``, ``LayoutMismatch``, ``Region``,
        ``Connect``, ``Timeout``.
        """

# The model.

@final
class LayerSpec:
    """What one decoder layer stores."""

    @staticmethod
    def attention(
        kv_heads: int, k_dim: int, v_dim: int | None = None, *, sliding_window: int = 0
    ) -> LayerSpec:
        """Multi-head, grouped-query or multi-query attention; heads of this shard."""

    @staticmethod
    def latent(latent_dim: int, rope_dim: int) -> LayerSpec:
        """Multi-head latent attention: a latent and a rope part a token. Unit: elements."""

    @staticmethod
    def shares_with(layer: int) -> LayerSpec:
        """Uses the KV of an earlier layer and stores nothing."""

    @staticmethod
    def state(nbytes: int) -> LayerSpec:
        """Recurrent state after the last token of the block."""

    @staticmethod
    def opaque(*, bytes_per_token: int = 0, bytes_per_block: int = 0) -> LayerSpec:
        """Bytes only the engine understands, such as a block packed for one processor. Name the
        packing in ``revision`` or in ``extra`` of the keys, so that no other meets it."""

@final
class Rope:
    """Rotary position embedding."""

    def __new__(
        cls, theta: float, rotary_dim: int, *, rotate_half: bool = True, scaling: str = ""
    ) -> Self: ...

@final
class Shard:
    """Place of this engine rank in tensor and pipeline parallelism."""

    def __new__(
        cls, *, tp_rank: int = 0, tp_size: int = 1, pp_rank: int = 0, pp_size: int = 1
    ) -> Self: ...

@final
class ModelDescriptor:
    """What the blocks of a session hold. Two descriptors that differ in anything but ``adapter``
    have unrelated keys."""

    def __new__(
        cls,
        model: str,
        layers: Sequence[LayerSpec],
        *,
        d_model: int,
        block_tokens: int = 256,
        element: Element = "bf16",
        order: PartOrder = "token_major",
        revision: str = "",
        weights_fingerprint: bytes = ...,
        adapter: str = "",
        rope: Rope | None = None,
        shard: Shard | None = None,
        k_after_rope: bool = True,
    ) -> Self:
        """Raises ``Invalid`` with every problem at once."""

    @property
    def model(self) -> str: ...
    @property
    def adapter(self) -> str: ...
    @property
    def element(self) -> Element: ...
    @property
    def order(self) -> PartOrder: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def layers(self) -> int:
        """Number of decoder layers."""

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that all keys of this model are derived with."""

    def layout(self, kind: PayloadKind = "kv", *, tokens: int | None = None) -> BlockLayout:
        """Where each part of a block of ``tokens`` tokens (a full block) lies."""

@final
class ReaderSpec:
    """What an engine does with restores while they run. Changes no byte and no key."""

    def __new__(
        cls,
        *,
        two_ended: bool = False,
        layer_events: bool = False,
        hidden_projection: bool = False,
        layers: Sequence[tuple[int, int, int]] | None = None,
    ) -> Self:
        """``layers``: operations a layer takes for a token, for a pair of tokens, for the
        projection of one token's K and V; one for each layer, or none."""

@final
class Part:
    """One part of a block: one tensor of one layer."""

    @property
    def layer(self) -> int: ...
    @property
    def code(self) -> PartCode: ...
    @property
    def offset(self) -> int:
        """First byte in the payload."""

    @property
    def nbytes(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]:
        """``(tokens, heads, dim)`` or ``(heads, tokens, dim)`` for K and V, ``(tokens, width)``
        for latents and hidden states, ``(bytes,)`` for state and opaque bytes."""

    @property
    def element(self) -> Element: ...

@final
class BlockLayout:
    """Where the parts of a block lie in its payload: back to back, layer after layer."""

    @property
    def kind(self) -> PayloadKind: ...
    @property
    def tokens(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def parts(self) -> list[Part]: ...
    def part(self, layer: int, code: PartCode) -> Part | None: ...

# Memory of the engine.

@final
class Memory:
    """Memory at an address, as an array. ``owner`` is kept alive as long as kvtier may use it.

    The caller vouches for the address: kvtier reads and writes what it is told to.
    """

    def __new__(
        cls,
        address: int,
        shape: Sequence[int],
        *,
        itemsize: int = 1,
        strides: Sequence[int] | None = None,
        writable: bool = True,
        owner: object = None,
    ) -> Self:
        """Units: ``strides`` are bytes, one for each dimension, not negative; ``None`` for an
        array without gaps."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes of the elements, gaps left out."""

@final
class PagedCache:
    """An engine's paged KV cache: where the parts of each page lie. Made once, used by every save
    and restore. It keeps the arrays alive.

    A block of kvtier is one page of the engine, or several: ``pages_per_block``.
    """

    def __new__(cls, model: ModelDescriptor, page_tokens: int, *, kind: PayloadKind = "kv") -> Self:
        """``page_tokens`` divides the model's ``block_tokens``."""

    def add(self, layer: int, code: PartCode, array: Array | Memory) -> None:
        """Names the array that holds a part of all pages. Its first dimension is the number of
        the page; the others hold the page's part in the order of the payload, with whatever
        strides: ``[pages, page_tokens, heads, dim]`` (token major) or
        ``[pages, heads, page_tokens, dim]`` (head major) of the model's element size, and any
        shape of the right number of bytes for opaque parts. Views are welcome:
        ``add(3, "k", cache[3][:, 0])``.

        Raises: ``Invalid`` names what does not fit; memory of a device is refused.
        """

    def missing(self) -> list[tuple[int, PartCode]]:
        """Parts that no array was named for; saves and restores refuse such a cache."""

    @property
    def page_tokens(self) -> int: ...
    @property
    def pages_per_block(self) -> int: ...
    @property
    def pages(self) -> int:
        """Pages that every array has."""

@final
class View:
    """Bytes of a slot or a block, in place.

    ``memoryview(view)`` and ``numpy.frombuffer(view, dtype)`` read (and for slots write) without
    a copy; ``torch.from_dlpack(view)`` and ``numpy.from_dlpack(view)`` make a tensor of the part's
    shape and element type. Restored bytes are mapped read-only: a library that ignores that and
    writes is killed by the kernel.
    """

    @property
    def nbytes(self) -> int: ...
    @property
    def readonly(self) -> bool: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def element(self) -> Element: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

# Sessions.

@final
class Pending(Generic[_T]):
    """A call that runs in the background. Dropping it cancels what can be cancelled."""

    def done(self) -> bool:
        """True when ``result`` answers at once. Never waits."""

    def result(self, timeout: float | None = None) -> _T:
        """Waits for the answer, as often as it is asked. Raises what the call raises, and
        ``Timeout`` when ``timeout`` passes first (the call goes on)."""

    def cancel(self) -> None: ...

@final
class BlockStatus:
    """What is known about one block: it is on ``tier``, or missing for ``miss``."""

    @property
    def tier(self) -> Tier | None: ...
    @property
    def miss(self) -> Miss | None: ...
    @property
    def is_present(self) -> bool: ...

@final
class Lookup:
    """Answer of a lookup."""

    @property
    def prefix_blocks(self) -> int:
        """Leading blocks that can all be restored."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens in them."""

    @property
    def blocks(self) -> list[BlockStatus]:
        """One for each key; a prefix lookup ends with the first missing block."""

@final
class Prefetched:
    """Answer of a prefetch, in blocks."""

    @property
    def resident(self) -> int: ...
    @property
    def started(self) -> int: ...

@final
class Variant:
    """One stored form of a block."""

    @property
    def kind(self) -> PayloadKind: ...
    @property
    def tier(self) -> Tier: ...
    @property
    def level(self) -> int: ...
    @property
    def level_name(self) -> str: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def raw_bytes(self) -> int: ...
    @property
    def leases(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def parent(self) -> BlockKey: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def place(self) -> str: ...
    @property
    def device(self) -> int | None: ...

@final
class Explanation:
    """Where a block is, and why a restore would miss."""

    @property
    def variants(self) -> list[Variant]: ...
    @property
    def miss(self) -> Miss | None: ...
    @property
    def notes(self) -> list[str]: ...

@final
class SaveBlock:
    """A block to save: its name, place in the prefix and size."""

    def __new__(
        cls,
        key: BlockKey,
        *,
        tokens: int,
        parent: BlockKey | None = None,
        position: int = 0,
        kind: PayloadKind = "kv",
        opaque_bytes: int = 0,
    ) -> Self:
        """``parent`` is ``ROOT`` where none is given; ``position`` is the index of the first token
        in the prefix; ``opaque_bytes`` the size of a block of kind ``opaque`` where the model gives
        none."""

    @property
    def key(self) -> BlockKey: ...
    @property
    def parent(self) -> BlockKey: ...
    @property
    def position(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def kind(self) -> PayloadKind: ...
    @property
    def opaque_bytes(self) -> int: ...

@final
class SaveOutcome:
    """What became of one block of a reserve, a commit or a save."""

    @property
    def status(self) -> Literal["stored", "already", "refused", "failed"]: ...
    @property
    def acknowledged(self) -> Acknowledge | None:
        """What is promised, for ``stored`` and ``already``."""

    @property
    def reason(self) -> SaveRefusal | CommitFailure | None:
        """Why not, for ``refused`` and ``failed``."""

    def is_stored(self, at_least: Acknowledge = "accepted") -> bool: ...

@final
class Session:
    """A session of one model in one namespace. The daemon's side ends with ``close`` (or the last
    reference) and the last slot, block and restore that came from it. When the daemon restarts,
    calls under way raise ``SessionLost``, and the next call opens the session again."""

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...
    @property
    def model(self) -> ModelDescriptor: ...
    @property
    def namespace(self) -> str: ...
    @property
    def namespace_id(self) -> int: ...
    @property
    def daemon_version(self) -> str: ...
    @property
    def is_durable(self) -> bool:
        """True when blocks can reach a durable tier."""

    @property
    def is_shared(self) -> bool:
        """True when payload travels through shared memory, false when inline."""

    @property
    def state(self) -> Literal["open", "draining", "lost"]:
        """What is known about the daemon's side. Asks nothing."""

    @property
    def state_reason(self) -> str:
        """Why it is draining or lost; empty while it is open."""

    def wait_not_open(self, timeout: float | None = None) -> bool:
        """Waits until the session is draining or lost. False when ``timeout`` passes first."""

    def reopen(self) -> None:
        """Opens a lost session again and keeps trying for ``reopen_wait``."""

    def flush(self) -> None:
        """Waits until everything dropped before has been given back to the daemon."""

    # Names.

    def prefix_keys(
        self,
        tokens: Sequence[int] | Array,
        *,
        extra: bytes = ...,
        salt: str = "",
        adapter: str | None = None,
    ) -> list[BlockKey]:
        """Keys of all blocks of a prompt; the last block may be short.

        ``tokens``: ids from the start of the prompt, a sequence or an array of 32- or 64-bit
        integers. ``extra`` goes into every key: name an opaque packing here. ``salt`` keeps
        prompts of different tenants of one engine apart. ``adapter`` stands for the model's.
        """

    def derive_key(
        self,
        parent: BlockKey,
        tokens: Sequence[int] | Array,
        *,
        extra: bytes = ...,
        salt: str = "",
        adapter: str | None = None,
    ) -> BlockKey:
        """Key of the block that follows ``parent`` (``ROOT`` for the first)."""

    def hash_keys(
        self,
        hashes: Sequence[bytes],
        *,
        extra: bytes = ...,
        salt: str = "",
        adapter: str | None = None,
    ) -> list[BlockKey]:
        """Keys from the engine's own block hashes, one each. A hash must name the block and all
        before it, as vLLM's do. Each key stands for itself: derive them in any portions. Where
        a block has several pages, give the hash of its last page."""

    def chain(
        self, keys: Sequence[BlockKey], tokens: int, *, kind: PayloadKind = "kv", first: int = 0
    ) -> list[SaveBlock]:
        """Blocks of one prefix of ``tokens`` tokens, from block ``first`` on, to save. ``keys`` are
        those of the whole prefix."""

    # Questions and hints.

    def lookup(
        self,
        keys: Sequence[BlockKey],
        kind: PayloadKind = "kv",
        *,
        accept: Quality = "exact",
        tokens: int | None = None,
    ) -> Lookup:
        """Says how much of a prefix can be restored now. ``keys``: 1 to 4096, oldest first;
        ``tokens``: those of the prompt, where its last block may be short."""

    def start_lookup(
        self,
        keys: Sequence[BlockKey],
        kind: PayloadKind = "kv",
        *,
        accept: Quality = "exact",
        tokens: int | None = None,
    ) -> Pending[Lookup]: ...
    def lookup_each(self, keys: Sequence[BlockKey], kind: PayloadKind = "kv") -> Lookup:
        """As ``lookup``, with a status for every key."""

    def prefetch(
        self, keys: Sequence[BlockKey], kind: PayloadKind = "kv", *, accept: Quality = "exact"
    ) -> Prefetched:
        """Starts moving blocks to the daemon's memory."""

    def start_prefetch(
        self, keys: Sequence[BlockKey], kind: PayloadKind = "kv", *, accept: Quality = "exact"
    ) -> Pending[Prefetched]: ...
    def pin(self, keys: Sequence[BlockKey], ttl: float, kind: PayloadKind = "kv") -> int:
        """Keeps blocks from eviction for ``ttl`` seconds. Returns how many exist."""

    def unpin(self, keys: Sequence[BlockKey], kind: PayloadKind = "kv") -> int: ...
    def explain(self, key: BlockKey) -> Explanation: ...
    def wipe(self) -> int:
        """Forgets every block of this session's namespace. Returns how many there were."""

    def watch_events(self) -> Events: ...
    def report_prefill(self, before: int, tokens: int, seconds: float) -> None:
        """Tells the daemon how long a prefill step took: ``tokens`` computed after ``before``.
        Never waits."""

    def quality_of(self, key: BlockKey) -> Quality:
        """How good what is computed behind a block can be, as far as this session knows: as good as
        the worst that it restored there. A block saved behind it is declared as no better."""

    def set_quality(self, keys: Sequence[BlockKey], quality: Quality) -> None:
        """Says how good the engine's own blocks are, one by one: "exact" after they were computed
        anew, worse where another session restored them."""

    # Saving.

    def save_pages(
        self,
        cache: PagedCache,
        blocks: Sequence[SaveBlock],
        pages: Sequence[int],
        *,
        wait: Acknowledge = "durable",
    ) -> Saving:
        """Saves blocks out of the engine's cache, in the background. ``pages`` names the pages
        block after block, ``pages_per_block`` each; the last pages of a short block may be left
        out. Pages must not change until ``Saving.copied`` says so. What is stored already is
        not read. Never waits."""

    def reserve(self, blocks: Sequence[SaveBlock]) -> list[Slot | SaveOutcome]:
        """A slot to fill for each block that is new, or why there is none (``already``,
        ``refused``), in order. 1 to 4096 blocks."""

    def start_reserve(self, blocks: Sequence[SaveBlock]) -> Pending[list[Slot | SaveOutcome]]: ...
    def commit(self, slots: Sequence[Slot], wait: Acknowledge = "durable") -> list[SaveOutcome]:
        """Hands filled slots over and waits until each is stored. Takes the slots.

        Raises: ``Invalid`` when a part is not filled, ``BufferError`` while a view of a slot is
        in use; the slots are still the caller's then.
        """

    def start_commit(self, slots: Sequence[Slot], wait: Acknowledge = "durable") -> Saving:
        """As ``commit``, in the background."""

    def wait_durable(self, keys: Sequence[BlockKey]) -> list[SaveOutcome]:
        """Waits until blocks that were accepted before are durable."""

    # Restoring.

    def restore_pages(
        self,
        cache: PagedCache,
        keys: Sequence[BlockKey],
        pages: Sequence[int],
        *,
        accept: Quality = "exact",
        deadline: float | None = None,
        scattered: bool = False,
        after: BlockKey | None = None,
        two_ended: tuple[int, int] | None = None,
    ) -> Restoring:
        """Restores blocks into the engine's cache, in the background: each is copied to its pages
        as it comes, layer after layer. ``pages`` as for ``save_pages``. Never waits.

        ``deadline``: seconds; what has not come by then is missing. ``scattered``: every block
        stands for itself; otherwise nothing comes after the first miss. ``after``: the block before
        the first key, where the engine has that already. ``two_ended``: tokens of the prompt before
        the first key, tokens computed after the last block; the engine computes from the front
        meanwhile, by ``Restoring.next_compute``.
        """

    def restore(
        self,
        keys: Sequence[BlockKey],
        kind: PayloadKind = "kv",
        *,
        accept: Quality = "exact",
        deadline: float | None = None,
        scattered: bool = False,
        after: BlockKey | None = None,
        two_ended: tuple[int, int] | None = None,
    ) -> Restore:
        """Starts a restore that hands out blocks to read in place, as events."""

    def release(self, blocks: Sequence[LeasedBlock]) -> None:
        """Gives leases back and confirms that all were alive until now. Takes the blocks.

        Raises: ``LeaseLost``, ``SessionLost``, ``Timeout``: discard what was read.
        ``BufferError`` while a view of a block is in use; the blocks are still the caller's then.
        """

@final
class Filling:
    """``with slot.fill_part(0, "k") as view: ...``: counts as written when the body ends without
    an exception."""

    def __enter__(self) -> View: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

@final
class Slot:
    """A place for one block, to fill and commit. Dropping it gives the place back.

    Parts may be written in any order, more than once, and by several threads where they write
    different parts.
    """

    @property
    def block(self) -> SaveBlock: ...
    @property
    def layout(self) -> BlockLayout: ...
    def missing(self) -> list[tuple[int, PartCode]]:
        """Parts that are not written yet."""

    def gather(
        self, cache: PagedCache, pages: Sequence[int], layers: Sequence[int] | None = None
    ) -> None:
        """Copies the parts of these layers (all) out of the engine's pages."""

    def write_part(self, layer: int, code: PartCode, source: Array | Memory) -> None:
        """Copies one part in: an array of the part's bytes, in row-major order of whatever
        strides."""

    def write(self, source: Array | Memory) -> None:
        """Copies the whole payload in."""

    def fill_part(self, layer: int, code: PartCode) -> Filling:
        """Lets the caller write one part in place, all of it."""

    def fill(self) -> Filling:
        """Lets the caller write the whole payload in place."""

    def release(self) -> None:
        """Gives the place back. Raises ``BufferError`` while a view is in use."""

@final
class Saving:
    """Blocks on their way to the daemon. Dropping it leaves them on their way. Once a save with
    ``wait="durable"`` is accepted, its blocks can be restored."""

    def copied(self) -> bool:
        """True when the engine's pages are no longer read."""

    def accepted(self) -> bool:
        """True when the daemon has taken everything that it takes. Never waits."""

    def done(self) -> bool:
        """True when everything is as durable as was asked, or the save has failed."""

    def wait_copied(self, timeout: float | None = None) -> bool: ...
    def wait_accepted(self, timeout: float | None = None) -> bool: ...
    def result(self, timeout: float | None = None) -> list[SaveOutcome]:
        """One outcome a block, in order. Raises what went wrong with the save as a whole."""

    def cancel(self) -> None:
        """Saves nothing that is not on its way yet. The pages are no longer read when
        ``copied`` says so."""

@final
class LeasedBlock:
    """A restored block, read in place. Dropping it, or ``release``, gives the lease back.
    ``memoryview(block)`` is its payload."""

    @property
    def index(self) -> int:
        """Index into the keys of the restore."""

    @property
    def key(self) -> BlockKey: ...
    @property
    def tokens(self) -> int: ...
    @property
    def tier(self) -> Tier: ...
    @property
    def level(self) -> int: ...
    @property
    def quality(self) -> Quality:
        """The worse of its level and of what it was computed from."""

    @property
    def layout(self) -> BlockLayout: ...
    @property
    def nbytes(self) -> int: ...
    def part(self, layer: int, code: PartCode) -> View: ...
    def page(self, layer: int) -> View:
        """All parts of one layer, back to back, as bytes."""

    def payload(self) -> View: ...
    def scatter(
        self, cache: PagedCache, pages: Sequence[int], layers: Sequence[int] | None = None
    ) -> None:
        """Copies the parts of these layers (all) to the engine's pages."""

    def copy_part(self, layer: int, code: PartCode, target: Array | Memory) -> None: ...
    def copy(self, target: Array | Memory) -> None: ...
    def release(self) -> None:
        """Raises ``BufferError`` while a view is in use. ``Session.release`` confirms it."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class RestorePlan:
    """What will happen to each block asked for. Comes first, once."""

    @property
    def blocks(self) -> list[BlockStatus]: ...

@final
class RestoreSummary:
    """How a restore ended. Comes last, once."""

    @property
    def usable_blocks(self) -> int:
        """Leading blocks that all arrived, or that the engine had computed."""

    @property
    def missed(self) -> list[tuple[int, Miss]]:
        """Index and reason of the blocks that did not arrive."""

    @property
    def cancelled(self) -> bool: ...

@final
class Restore:
    """A running restore, as events. Dropping it cancels; blocks that were handed out stay."""

    def next(
        self, timeout: float | None = None
    ) -> RestorePlan | LeasedBlock | RestoreSummary | None:
        """The next event; ``None`` after the summary. Raises ``Timeout`` when ``timeout`` passes
        first; no event is lost by that."""

    def try_next(self) -> RestorePlan | LeasedBlock | RestoreSummary | None:
        """The next event if there is one; ``None`` when there is none now, or it has ended."""

    def ended(self) -> bool:
        """True when the last event has been handed out, or the restore has failed."""

    def __iter__(self) -> Iterator[RestorePlan | LeasedBlock | RestoreSummary]: ...
    def __next__(self) -> RestorePlan | LeasedBlock | RestoreSummary: ...
    def collect(self) -> tuple[list[LeasedBlock], RestoreSummary]:
        """Waits for all of it: the blocks that arrived, by index, and how it ended."""

    def progress(self, computed_blocks: int) -> None:
        """Leading blocks that the engine has computed itself meanwhile. Never waits."""

    def cancel(self) -> None: ...
    def wait(self, timeout: float | None = None) -> None:
        """Waits for an event, or for a block that ``compute_end`` gives out now."""

    def compute_end(self) -> ComputeEnd: ...

@final
class ComputeEnd:
    """The engine's end of a two-ended restore. Never waits."""

    def next(self) -> int | Literal["wait", "finished"]:
        """The block to compute now; ``"wait"`` for what is loading; ``"finished"`` when every
        block is here. A block that was given out belongs to the caller, who computes it and says
        so."""

    def computed(
        self, index: int, *, before: int = 0, tokens: int = 0, seconds: float = 0.0
    ) -> None:
        """A block that was given out is in the engine's cache; with how long that took, later
        restores are planned better."""

@final
class Restoring:
    """A restore into the engine's cache that runs in the background. Dropping it cancels.

    A block or layer that is ready is in its pages. That all of it was right is known at the end:
    ``result`` confirms every lease. When it raises, discard what was ready.
    """

    def poll(self) -> list[int]:
        """Blocks that became ready since the last call, in the order in which they came. Never
        waits."""

    def ready(self) -> list[int]:
        """All blocks that are ready, by index. Never waits."""

    def layer_ready(self, layer: int) -> bool:
        """True when this layer of every block that comes is in its pages."""

    def wait_layer(self, layer: int, timeout: float | None = None) -> bool:
        """Waits for ``layer_ready``, or the end of the restore. False when ``timeout`` passes
        first. Raises what the restore raises."""

    def wait_block(self, index: int, timeout: float | None = None) -> bool:
        """Waits until the block is ready, or the restore has ended without it (False)."""

    def done(self) -> bool:
        """True when ``result`` answers at once. Never waits."""

    def result(self, timeout: float | None = None) -> RestoreSummary:
        """Waits for the end: every block that came is in its pages and confirmed."""

    def progress(self, computed_blocks: int) -> None: ...
    def cancel(self) -> None:
        """Asks it to stop. Pages are no longer written once ``done`` is true."""

    def next_compute(self) -> int | Literal["wait", "finished"]:
        """As ``ComputeEnd.next``; also ``"wait"`` while a block is being copied to its pages."""

    def computed(
        self, index: int, *, before: int = 0, tokens: int = 0, seconds: float = 0.0
    ) -> None: ...
    def wait_event(self, timeout: float | None = None) -> bool:
        """Waits until something is new since the last call: a block, a layer, a block to compute,
        the end. False when ``timeout`` passes first."""

# Events.

@final
class BlockEvent:
    """What happened to a block of the namespace."""

    @property
    def key(self) -> BlockKey:
        """``ROOT`` when events were dropped."""

    @property
    def change(self) -> Literal["stored", "removed", "dropped"]: ...
    @property
    def tier(self) -> Tier | None: ...
    @property
    def dropped(self) -> int:
        """Events that this watcher was too slow for."""

    @property
    def reason(self) -> Miss | None: ...

@final
class Events:
    """A stream of events. Dropping it ends the watch."""

    def next(self, timeout: float | None = None) -> BlockEvent | None:
        """The next event; ``None`` when the daemon ends the stream. Without a ``timeout`` it
        waits as long as nothing happens and the session lives."""

    def try_next(self) -> BlockEvent | None:
        """The next event if there is one."""

    def __iter__(self) -> Iterator[BlockEvent]: ...
    def __next__(self) -> BlockEvent: ...
