//! Page mover: parts of a block out of an engine's paged memory, and back into it.
//!
//! Upstairs:   the SDK and the daemon's engine regions; GPU kernels must match it bit for bit.
//! Downstairs: [`layout`] knows the arrays engines keep; here is only base and stride.
//!
//! A serving engine keeps KV in pages: a sequence owns a table of page ids, and token `i` lies in
//! slot `i % page_tokens` of page `table[i / page_tokens]`. A block keeps a part in one canonical
//! order, `[tokens, heads, dim]`, tokens first. [`PagedPart::gather`] makes the second from the
//! first, [`PagedPart::scatter`] the first from the second. Bytes are moved, never changed.
//!
//! ```
//! use kvtier_kernels::paged::PageSpan;
//! use kvtier_kernels::paged::layout::{HeadOrder, LayerPlace, PagedLayout, Place, Widths};
//! use kvtier_proto::{element::Element, layout::PartCode};
//!
//! // [2, 8 pages, 4 tokens, 2 heads, 16 dims] of bf16: all K, then all V.
//! let layout = PagedLayout {
//!     element: Element::Bf16,
//!     pages: 8,
//!     page_tokens: 4,
//!     heads: 2,
//!     widths: Widths::Kv { k: 16, v: 16 },
//!     order: HeadOrder::Nhd,
//!     layers: vec![LayerPlace::Split([
//!         Place { base: 0, page_stride: 256 },
//!         Place { base: 8 * 256, page_stride: 256 },
//!     ])],
//! };
//! let v = layout.part(0, PartCode::V)?;
//! let pool = vec![7_u8; v.pool_bytes()];
//!
//! // Tokens 2 to 9 of a sequence that lies in pages 5, 0 and 3.
//! let span = PageSpan::new(&[5, 0, 3], 2..10, layout.page_tokens, layout.pages)?;
//! let mut part = vec![0; v.part_bytes(&span)];
//! v.gather(&pool, &span, &mut part)?;
//! assert_eq!(part, vec![7; 8 * 2 * 16 * 2]);
//! # Ok::<(), kvtier_kernels::paged::PagedError>(())
//! ```
//!
//! Invariants kept here
//!   G1  Every row of every page lies inside the pool: checked once, when the part is made and
//!       when the pool is given, not a row at a time.
//!   G2  No two rows of a part overlap, so that a scatter writes every byte once.
//!   G3  A span names every page once and only pages that exist; a wrong table is an error that
//!       names the entry, never somebody else's KV.
//!
//! Not here on purpose: no transposed K (`[dim, tokens]`, as vLLM keeps it on CPUs). Such pages
//! are whole and opaque: copy them as they are. No check that two parts do not overlap each
//! other: they lie in the engine's own memory, and it knows.

use std::ops::Range;

use kvtier_proto::element::Element;

use crate::shape::{PartShape, ShapeError};

mod error;
pub mod layout;

pub use error::PagedError;

/// Distances between neighbours in the pool. Unit: bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strides {
    /// From a page to the next.
    pub page: u64,
    /// From a token to the next in its page.
    pub token: u64,
    /// From a head to the next of its token.
    pub head: u64,
}

/// Where one part of one layer lies in an engine's pool, as its tensor says: sizes and strides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartPlace {
    /// Type of the elements.
    pub element: Element,
    /// Pages of the pool.
    pub pages: u32,
    /// Slots of a page. Unit: tokens.
    pub page_tokens: u32,
    /// KV heads; 1 for a latent.
    pub heads: u32,
    /// Elements of one head that belong to this part, one after the other.
    pub dim: u32,
    /// First byte of page 0, slot 0, head 0. Unit: bytes from the start of the pool.
    pub base: u64,
    /// Distances.
    pub strides: Strides,
}

/// One part of one layer in an engine's pool, checked (G1, G2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagedPart {
    place: PartPlace,
    base: usize,
    page_stride: usize,
    token_stride: usize,
    /// Runs of bytes that lie together in a token: one if its heads touch, else one a head.
    runs: usize,
    run_stride: usize,
    run_bytes: usize,
    /// Tokens of a page touch each other too: a page is one run.
    dense: bool,
    pool_bytes: usize,
}

/// A run of tokens of one sequence, and the pages they lie in (G3).
///
/// Made once and used for every layer and part of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSpan<'a> {
    /// Pages of the run only.
    table: &'a [u32],
    /// Slot of the first token in the first page.
    first_slot: u32,
    tokens: u32,
    page_tokens: u32,
    pages: u32,
}

impl<'a> PageSpan<'a> {
    /// Tokens `tokens` (positions in the sequence) by a table of page ids, position 0 first.
    ///
    /// # Errors
    /// [`PagedError`] when the run is empty, the table ends before it, or names a page twice or
    /// one that the pool does not have.
    pub fn new(
        table: &'a [u32],
        tokens: Range<u32>,
        page_tokens: u32,
        pages: u32,
    ) -> Result<Self, PagedError> {
        if page_tokens == 0 {
            return Err(PagedError::Zero {
                field: "page_tokens",
            });
        }
        let Range { start, end } = tokens;
        let count = end.checked_sub(start).filter(|count| *count > 0);
        let tokens = count.ok_or(PagedError::NoTokens { start, end })?;
        let (first, last) = (start / page_tokens, end.div_ceil(page_tokens));
        let covered = table.get(first as usize..last as usize);
        let table_pages = table.len();
        let table = covered.ok_or(PagedError::TableTooShort {
            end,
            page_tokens,
            table_pages,
        })?;
        check_pages(table, first as usize, pages)?;
        Ok(Self {
            table,
            first_slot: start % page_tokens,
            tokens,
            page_tokens,
            pages,
        })
    }

    /// Tokens in the run.
    pub const fn tokens(&self) -> u32 {
        self.tokens
    }

    /// The stretches of the run: page, first slot in it, slots.
    fn stretches(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let mut slot = self.first_slot;
        let mut left = self.tokens;
        self.table.iter().map(move |page| {
            let count = left.min(self.page_tokens - slot);
            let stretch = (*page as usize, slot as usize, count as usize);
            left -= count;
            slot = 0;
            stretch
        })
    }
}

/// G3: ids below `pages`, none twice. `first` is the index of the first entry in the full table.
fn check_pages(table: &[u32], first: usize, pages: u32) -> Result<(), PagedError> {
    let mut seen: Vec<(u32, usize)> = Vec::with_capacity(table.len());
    for (index, page) in (first..).zip(table) {
        if *page >= pages {
            return Err(PagedError::PageOutOfRange {
                index,
                page: *page,
                pages,
            });
        }
        seen.push((*page, index));
    }
    seen.sort_unstable();
    for pair in seen.windows(2) {
        if let [(page, first), (other, second)] = *pair
            && page == other
        {
            return Err(PagedError::PageTwice {
                page,
                first,
                second,
            });
        }
    }
    Ok(())
}

impl PagedPart {
    /// Checks a place: sizes above zero, rows apart from each other, everything addressable.
    ///
    /// # Errors
    /// [`PagedError`] names the number that is wrong.
    pub fn new(place: PartPlace) -> Result<Self, PagedError> {
        let PartPlace {
            pages,
            page_tokens,
            heads,
            dim,
            strides,
            ..
        } = place;
        let fields = [
            ("pages", pages),
            ("page_tokens", page_tokens),
            ("heads", heads),
            ("dim", dim),
        ];
        for (field, value) in fields {
            if value == 0 {
                return Err(PagedError::Zero { field });
            }
        }
        let row = u64::from(dim) * place.element.bytes() as u64;
        let axes = [
            ("page_stride", u64::from(pages), strides.page),
            ("token_stride", u64::from(page_tokens), strides.token),
            ("head_stride", u64::from(heads), strides.head),
        ];
        let extent = extent_without_overlap(row, axes)?;
        let end = place.base.checked_add(extent).ok_or(PagedError::TooLarge)?;
        let bytes = |value: u64| usize::try_from(value).map_err(|_| PagedError::TooLarge);
        let touching = heads == 1 || strides.head == row;
        let token = row.checked_mul(heads.into()).ok_or(PagedError::TooLarge)?;
        Ok(Self {
            place,
            base: bytes(place.base)?,
            page_stride: bytes(strides.page)?,
            token_stride: bytes(strides.token)?,
            runs: if touching { 1 } else { heads as usize },
            run_stride: bytes(strides.head)?,
            run_bytes: bytes(if touching { token } else { row })?,
            dense: touching && (page_tokens == 1 || strides.token == token),
            pool_bytes: bytes(end)?,
        })
    }

    /// The place as it was given.
    pub const fn place(&self) -> &PartPlace {
        &self.place
    }

    /// Least size of a pool that holds every page. Unit: bytes.
    pub const fn pool_bytes(&self) -> usize {
        self.pool_bytes
    }

    /// Size of the part that a span makes. Unit: bytes.
    pub const fn part_bytes(&self, span: &PageSpan<'_>) -> usize {
        self.token_bytes().saturating_mul(span.tokens as usize)
    }

    /// Shape of the part that a span makes, for a codec.
    ///
    /// # Errors
    /// [`ShapeError`] when the span is longer than a block may be.
    pub fn shape(&self, span: &PageSpan<'_>) -> Result<PartShape, ShapeError> {
        let PartPlace {
            element,
            heads,
            dim,
            ..
        } = self.place;
        let width = heads
            .checked_mul(dim)
            .ok_or(ShapeError::TooLarge { bytes: u64::MAX })?;
        let order = kvtier_proto::descriptor::PartOrder::TokenMajor;
        PartShape::new(element, span.tokens, width)?.with_heads(heads, order)
    }

    /// Copies the tokens of a span out of the pool into a part, `[tokens, heads, dim]`.
    ///
    /// # Errors
    /// [`PagedError`] before a byte is copied: pool too small, part of another length, span of
    /// another pool.
    pub fn gather(
        &self,
        pool: &[u8],
        span: &PageSpan<'_>,
        part: &mut [u8],
    ) -> Result<(), PagedError> {
        self.check(span, pool.len(), part.len())?;
        let too_small = PagedError::PoolTooSmall {
            need: self.pool_bytes,
            have: pool.len(),
        };
        self.gather_rows(pool, span, part).ok_or(too_small)
    }

    /// Copies a part, `[tokens, heads, dim]`, into the pages of a span. Everything else in the
    /// pool stays as it is.
    ///
    /// # Errors
    /// As [`PagedPart::gather`].
    pub fn scatter(
        &self,
        part: &[u8],
        span: &PageSpan<'_>,
        pool: &mut [u8],
    ) -> Result<(), PagedError> {
        self.check(span, pool.len(), part.len())?;
        let too_small = PagedError::PoolTooSmall {
            need: self.pool_bytes,
            have: pool.len(),
        };
        self.scatter_rows(part, span, pool).ok_or(too_small)
    }

    /// Bytes of a token in the part.
    const fn token_bytes(&self) -> usize {
        self.runs * self.run_bytes
    }

    fn check(&self, span: &PageSpan<'_>, pool: usize, part: usize) -> Result<(), PagedError> {
        let PartPlace {
            pages, page_tokens, ..
        } = self.place;
        if (span.pages, span.page_tokens) != (pages, page_tokens) {
            let (span_pages, span_page_tokens) = (span.pages, span.page_tokens);
            return Err(PagedError::OtherPool {
                span_pages,
                span_page_tokens,
                pages,
                page_tokens,
            });
        }
        if pool < self.pool_bytes {
            return Err(PagedError::PoolTooSmall {
                need: self.pool_bytes,
                have: pool,
            });
        }
        let want = self.part_bytes(span);
        if part != want {
            return Err(PagedError::PartLength { want, got: part });
        }
        Ok(())
    }

    /// First byte of a slot in the pool. Cannot overflow: G1.
    const fn at(&self, page: usize, slot: usize) -> usize {
        self.base + page * self.page_stride + slot * self.token_stride
    }

    /// `None` never happens: `check` has proven every range (G1).
    fn gather_rows(&self, pool: &[u8], span: &PageSpan<'_>, mut part: &mut [u8]) -> Option<()> {
        for (page, slot, count) in span.stretches() {
            let bytes = count * self.token_bytes();
            let (now, rest) = part.split_at_mut_checked(bytes)?;
            part = rest;
            let start = self.at(page, slot);
            if self.dense {
                now.copy_from_slice(pool.get(start..start + bytes)?);
                continue;
            }
            for (token, to) in now.chunks_exact_mut(self.token_bytes()).enumerate() {
                let start = start + token * self.token_stride;
                for (run, to) in to.chunks_exact_mut(self.run_bytes).enumerate() {
                    let start = start + run * self.run_stride;
                    to.copy_from_slice(pool.get(start..start + self.run_bytes)?);
                }
            }
        }
        Some(())
    }

    /// As `gather_rows`, the other way.
    fn scatter_rows(&self, mut part: &[u8], span: &PageSpan<'_>, pool: &mut [u8]) -> Option<()> {
        for (page, slot, count) in span.stretches() {
            let bytes = count * self.token_bytes();
            let (now, rest) = part.split_at_checked(bytes)?;
            part = rest;
            let start = self.at(page, slot);
            if self.dense {
                pool.get_mut(start..start + bytes)?.copy_from_slice(now);
                continue;
            }
            for (token, from) in now.chunks_exact(self.token_bytes()).enumerate() {
                let start = start + token * self.token_stride;
                for (run, from) in from.chunks_exact(self.run_bytes).enumerate() {
                    let start = start + run * self.run_stride;
                    pool.get_mut(start..start + self.run_bytes)?
                        .copy_from_slice(from);
                }
            }
        }
        Some(())
    }
}

/// Bytes from the first to the last of an array, when no two of its rows overlap (G2).
///
/// Axes are nested by their strides: each must step over all that lies within it. That is
/// stricter than needed and true of every tensor an engine keeps.
fn extent_without_overlap(
    row: u64,
    mut axes: [(&'static str, u64, u64); 3],
) -> Result<u64, PagedError> {
    axes.sort_by_key(|(_, count, stride)| (*stride, *count));
    let mut extent = row;
    for (field, count, stride) in axes {
        if count == 1 {
            continue;
        }
        if stride < extent {
            return Err(PagedError::Overlap {
                field,
                stride,
                within: extent,
            });
        }
        let last = stride.checked_mul(count - 1).ok_or(PagedError::TooLarge)?;
        extent = extent.checked_add(last).ok_or(PagedError::TooLarge)?;
    }
    Ok(extent)
}

#[cfg(test)]
mod tests;
