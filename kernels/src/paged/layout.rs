//! The arrays that serving engines keep, in the engines' own terms.
//!
//! Upstairs:   engine adapters and regions describe their pool with one of these.
//! Downstairs: [`super::PagedPart`], to which everything here comes down.
//!
//! | array of one layer                       | order  | place of a layer                      |
//! |------------------------------------------|--------|---------------------------------------|
//! | `[2, pages, tokens, heads, dim]`         | `Nhd`  | `Split`, V half the array behind K    |
//! | `[pages, 2, tokens, heads, dim]`         | `Nhd`  | `Split`, V one page behind K          |
//! | `[pages, 2, heads, tokens, dim]`         | `Hnd`  | the same; page stride is twice a page |
//! | two arrays `[pages, tokens, heads, dim]` | `Nhd`  | `Split`                               |
//! | `[pages, heads, tokens, k_dim + v_dim]`  | `Hnd`  | `Interleaved`                         |
//! | `[pages, tokens, latent + rope]` (MLA)   | either | `Interleaved`, one head               |
//!
//! Layers with other head counts or widths (hybrid models) are another `PagedLayout`. A tensor
//! with strides that none of these has can be given to [`PagedPart::new`] as it is.
//!
//! Not here on purpose: no names of engines. What an engine keeps changes with its version and
//! its attention backend; its adapter asks the tensor.

use kvtier_proto::element::Element;
use kvtier_proto::layout::PartCode;

use super::{PagedError, PagedPart, PartPlace, Strides};

/// Which of token and head comes first inside a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadOrder {
    /// `[tokens, heads, dim]`
    Nhd,
    /// `[heads, tokens, dim]`
    Hnd,
}

/// What a token keeps in a head of a layer. Unit: elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Widths {
    /// Keys and values, of widths of their own.
    Kv {
        /// Width of a K head.
        k: u32,
        /// Width of a V head.
        v: u32,
    },
    /// MLA: a compressed latent and a rope part, shared by all heads.
    Latent {
        /// Width of the latent.
        latent: u32,
        /// Width of the rope part; 0 when there is none.
        rope: u32,
    },
}

/// Where an array begins, and how far its pages are apart. Unit: bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First byte of page 0, from the start of the pool.
    pub base: u64,
    /// From a page to the next.
    pub page_stride: u64,
}

/// Where a layer lies in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerPlace {
    /// K and V (latent and rope) in arrays of their own.
    Split([Place; 2]),
    /// One array: the row of a head is its K and then its V (its latent and then its rope).
    Interleaved(Place),
}

/// The paged memory of one group of like layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagedLayout {
    /// Type of the elements.
    pub element: Element,
    /// Pages of the pool.
    pub pages: u32,
    /// Slots of a page. Unit: tokens.
    pub page_tokens: u32,
    /// KV heads of this shard; 1 for MLA.
    pub heads: u32,
    /// What a head keeps.
    pub widths: Widths,
    /// Order inside a page.
    pub order: HeadOrder,
    /// Where each layer lies.
    pub layers: Vec<LayerPlace>,
}

impl PagedLayout {
    /// One part of one layer, checked and ready to move.
    ///
    /// # Errors
    /// [`PagedError`] when there is no such layer or part, or its numbers make no array.
    pub fn part(&self, layer: usize, code: PartCode) -> Result<PagedPart, PagedError> {
        let layers = self.layers.len();
        let place = self
            .layers
            .get(layer)
            .ok_or(PagedError::NoLayer { layer, layers })?;
        let [first, second] = self.columns();
        let is_first = first.0 == code;
        let column = if is_first { first } else { second };
        if column.0 != code || column.1 == 0 {
            let kept = [first, second].map(|(code, dim)| (dim > 0).then_some(code));
            return Err(PagedError::NoPart { part: code, kept });
        }
        let size = self.element.bytes() as u64;
        let (dim, first_dim) = (column.1, u64::from(first.1));
        let (array, pitch, skip) = match place {
            LayerPlace::Split([array, _]) if is_first => (array, u64::from(dim), 0),
            LayerPlace::Split([_, array]) => (array, u64::from(dim), 0),
            LayerPlace::Interleaved(array) => {
                let skip = if is_first { 0 } else { first_dim };
                (array, first_dim + u64::from(second.1), skip)
            }
        };
        let base = array
            .base
            .checked_add(skip * size)
            .ok_or(PagedError::TooLarge)?;
        let strides = self.strides(array.page_stride, pitch * size)?;
        PagedPart::new(PartPlace {
            element: self.element,
            pages: self.pages,
            page_tokens: self.page_tokens,
            heads: self.heads,
            dim,
            base,
            strides,
        })
    }

    /// The two things a head keeps, and their widths.
    const fn columns(&self) -> [(PartCode, u32); 2] {
        match self.widths {
            Widths::Kv { k, v } => [(PartCode::K, k), (PartCode::V, v)],
            Widths::Latent { latent, rope } => [(PartCode::Latent, latent), (PartCode::Rope, rope)],
        }
    }

    /// Strides of a dense page whose heads are `pitch` bytes wide.
    fn strides(&self, page: u64, pitch: u64) -> Result<Strides, PagedError> {
        let times = |count: u32| pitch.checked_mul(count.into()).ok_or(PagedError::TooLarge);
        Ok(match self.order {
            HeadOrder::Nhd => Strides {
                page,
                token: times(self.heads)?,
                head: pitch,
            },
            HeadOrder::Hnd => Strides {
                page,
                token: pitch,
                head: times(self.page_tokens)?,
            },
        })
    }
}
