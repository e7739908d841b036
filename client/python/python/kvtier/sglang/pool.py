"""Where the pieces of each page lie in SGLang's host pool, and what they are.

Upstairs:   `storage` describes a pool once; `mover` hands its cache to each transfer.
Downstairs: the pool's own `get_page_buffer_meta`; `kvtier.PagedCache`.

Invariants kept here
  P1  A piece is taken only where its address grows by the same step from page to page, and lies in
      a buffer of the pool for every page.
  P2  The pieces of a page are all of its bytes: as many as the pool says that its tokens take.
  P3  Where the pool also hands pages out as one flat tensor, pieces are in the order of that
      tensor, so that a block is the same whichever way it came.

What does not fit is refused by name when SGLang starts. A guess would cost wrong bytes later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PAGE_TOKENS_MIN = 16
PAGE_TOKENS_MAX = 2048
PIECES_MAX = 1024
WIDTH_MAX = 65536

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
"""Layouts of the host pool that are kept."""

ELEMENTS = {"bfloat16": ("bf16", 2), "float16": ("f16", 2), "float32": ("f32", 4)}
"""Element types in which the daemon finds exponents to compress. All else is bytes."""


@dataclass(frozen=True)
class Piece:
    """A run of bytes that every page has. Units: bytes."""

    base: int
    stride: int
    nbytes: int


@dataclass(frozen=True)
class HostPages:
    """The pages of a host pool."""

    layout: str
    page_tokens: int
    pages: int
    dtype: str
    pieces: tuple[Piece, ...]
    flat: bool
    """True when a page as one flat tensor has the bytes of its pieces, in their order."""
    owner: Any

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def element(self) -> str:
        """Type of all that is stored; bytes where pieces are no rows of values, one a token."""
        name, size = ELEMENTS.get(self.dtype, ("u8", 1))
        row = size * self.page_tokens
        whole = all(p.nbytes % row == 0 and p.nbytes // row <= WIDTH_MAX for p in self.pieces)
        return name if whole else "u8"

    def width(self, piece: Piece) -> int | None:
        """Values of a piece that a token takes; None where it is stored as bytes."""
        if self.element == "u8":
            return None
        return piece.nbytes // (ELEMENTS[self.dtype][1] * self.page_tokens)

    def layers(self, kvtier: Any) -> list[Any]:
        """Every piece, as a layer of the descriptor."""
        layers = []
        for piece in self.pieces:
            width = self.width(piece)
            if width is None:
                layers.append(kvtier.LayerSpec.opaque(bytes_per_block=piece.nbytes))
            else:
                layers.append(kvtier.LayerSpec.latent(width, 0))
        return layers

    def cache(self, kvtier: Any, model: Any) -> Any:
        """The pool, as the SDK reads and writes it."""
        cache = kvtier.PagedCache(model, self.page_tokens)
        for layer, piece in enumerate(self.pieces):
            width = self.width(piece)
            if width is None:
                row, steps, size = [piece.nbytes], [1], 1
            else:
                size = ELEMENTS[self.dtype][1]
                row, steps = [self.page_tokens, width], [width * size, size]
            memory = kvtier.Memory(
                piece.base,
                [self.pages, *row],
                itemsize=size,
                strides=[piece.stride, *steps],
                owner=[self.owner, *_buffers(self.owner)],
            )
            cache.add(layer, "opaque" if width is None else "latent", memory)
        return cache

    def numbers(self, indices: Any, count: int) -> list[int] | None:
        """Page numbers of the tokens' indices; None unless they are `count` whole pages."""
        if indices is None:
            return None
        tokens, size = indices.tolist(), self.page_tokens
        if len(tokens) != count * size:
            return None
        numbers = []
        for at in range(0, len(tokens), size):
            first = tokens[at]
            page = tokens[at : at + size]
            if first % size or not 0 <= first < self.pages * size:
                return None
            if page != list(range(first, first + size)):
                return None
            numbers.append(first // size)
        return numbers


class _Indices(list[int]):
    """Token indices, as far as pools look at them: without torch."""

    def tolist(self) -> list[int]:
        return list(self)

    def numel(self) -> int:
        return len(self)


def describe(pool: Any) -> HostPages:
    """The pages of a pool; ValueError says what does not fit and what is accepted."""
    # Pools of several kinds come as a group: pages of the anchor are the KV pages.
    pool = getattr(getattr(pool, "anchor_entry", None), "host_pool", pool)
    layout, tokens = str(pool.layout), int(pool.page_size)
    if layout not in LAYOUTS:
        raise ValueError(f"the host pool's layout is {layout}; accepted: {', '.join(LAYOUTS)}")
    if not PAGE_TOKENS_MIN <= tokens <= PAGE_TOKENS_MAX:
        raise ValueError(
            f"--page-size is {tokens}; accepted: {PAGE_TOKENS_MIN} to {PAGE_TOKENS_MAX}"
        )
    if int(getattr(pool, "dcp_size", 1) or 1) != 1:
        raise ValueError(f"decode context parallelism is {pool.dcp_size}; accepted: 1")
    pages = int(pool.size) // tokens
    pieces = _pieces(pool, tokens, pages)
    _check_bytes(pool, pieces, tokens, pages)
    order = _flat_order(pool, pieces)
    return HostPages(
        layout=layout,
        page_tokens=tokens,
        pages=pages,
        dtype=str(pool.dtype).removeprefix("torch."),
        pieces=tuple(pieces if order is None else order),
        flat=order is not None,
        owner=pool,
    )


def _pieces(pool: Any, tokens: int, pages: int) -> list[Piece]:
    """Runs of a page, in the pool's order (P1)."""
    if pages < 1:
        raise ValueError("the host pool has no pages")
    probed = {}
    for page in {0, min(1, pages - 1), pages // 2, pages - 1}:
        indices = _Indices(range(page * tokens, (page + 1) * tokens))
        found = pool.get_page_buffer_meta(indices)
        if not found or not found[0] or len(found[0]) != len(found[1]):
            raise ValueError(f"the host pool {type(pool).__name__} does not say where pages lie")
        probed[page] = list(zip(map(int, found[0]), map(int, found[1]), strict=True))
    if len(probed[0]) > PIECES_MAX:
        raise ValueError(f"a page has {len(probed[0])} pieces; accepted: at most {PIECES_MAX}")
    pieces = []
    for index, (base, nbytes) in enumerate(probed[0]):
        stride = probed[min(1, pages - 1)][index][0] - base if pages > 1 else nbytes
        pieces.append(Piece(base, stride, nbytes))
    for page, found in probed.items():
        if found != [(piece.base + page * piece.stride, piece.nbytes) for piece in pieces]:
            raise ValueError("pages of the host pool do not follow one another in equal steps")
    return pieces


def _buffers(pool: Any) -> list[Any]:
    """Tensors of a pool."""
    if hasattr(pool, "get_hybrid_pool_buffer"):
        found = pool.get_hybrid_pool_buffer()
    else:
        found = getattr(pool, "kv_buffer", None)
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [found]


def _check_bytes(pool: Any, pieces: Sequence[Piece], tokens: int, pages: int) -> None:
    """Every piece is in a buffer, and they are all of a page (P1, P2)."""
    ranges = []
    for buffer in _buffers(pool):
        if buffer.device.type != "cpu":
            raise ValueError(f"the host pool is in memory of {buffer.device.type}; accepted: cpu")
        start = int(buffer.data_ptr())
        ranges.append((start, start + buffer.numel() * buffer.element_size()))
    for piece in pieces:
        end = piece.base + (pages - 1) * piece.stride + piece.nbytes
        inside = any(start <= piece.base and end <= stop for start, stop in ranges)
        if piece.nbytes <= 0 or piece.stride < piece.nbytes or not inside:
            raise ValueError("the host pool names bytes outside of its buffers")
    whole = int(pool.size_per_token) * tokens
    found = sum(piece.nbytes for piece in pieces)
    if found != whole:
        raise ValueError(f"the host pool names {found} bytes a page, of {whole}")


def _flat_order(pool: Any, pieces: Sequence[Piece]) -> list[Piece] | None:
    """Pieces in the order of a flat page (P3); None where the pool has no such pages."""
    try:
        view = pool.get_data_page(0, flat=False)
    except Exception:  # not every pool has them
        return None
    shape, strides = list(view.shape), list(view.stride())
    size, run = int(view.element_size()), 1
    while shape and (shape[-1] == 1 or strides[-1] == run):
        run *= shape.pop()
        strides.pop()
    offsets = [0]
    for length, stride in zip(shape, strides, strict=True):
        offsets = [offset + i * stride for offset in offsets for i in range(length)]
        if len(offsets) > len(pieces):
            return None
    runs = [(int(view.data_ptr()) + offset * size, run * size) for offset in offsets]
    named = {(piece.base, piece.nbytes): piece for piece in pieces}
    if len(named) != len(pieces) or set(runs) != set(named):
        return None
    return [named[one] for one in runs]
