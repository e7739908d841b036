//! Slots on their way from reserved to filled: the type says which parts are written.
//!
//! Upstairs:   engines fill a slot part by part, as layers finish; `save` commits filled ones.
//! Downstairs: `shm` for staged slots, plain memory where no region can be shared.
//!
//! ```text
//!   reserve          finish              commit
//!   ------> Reserved -------> FilledSlot -------> (the daemon's)
//!              |  ^   Unfilled    |
//!              |  +------ some part is missing
//!              v                  v
//!            drop: released in the background
//! ```
//!
//! Invariants kept here
//!   T1  A `FilledSlot` exists only when every part of its layout was written.
//!   T2  A slot is given back when it is dropped, unless it was committed.

use std::fmt;
use std::sync::Arc;

use kvtier_proto::{BlockLayout, Part, PartCode, v1};

use crate::error::Error;
use crate::link::Link;
use crate::save::SaveBlock;
use crate::shm::Span;

/// Why bytes cannot be written into a slot. Nothing was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FillError {
    /// The block has no such part.
    #[error("layer {layer} of this block has no part {code:?}")]
    NoSuchPart {
        /// Index of the layer.
        layer: u32,
        /// The part asked for.
        code: PartCode,
    },
    /// The layer stores nothing in this block.
    #[error("layer {layer} stores nothing in this block")]
    NoSuchPage {
        /// Index of the layer.
        layer: u32,
    },
    /// The bytes do not have the size of the place.
    #[error("{given} bytes for layer {layer}; accepted: exactly {wanted}")]
    WrongLength {
        /// Index of the layer.
        layer: u32,
        /// Bytes the place has.
        wanted: usize,
        /// Bytes that were given.
        given: usize,
    },
    /// Rows do not follow those that were written before, or are more than there are.
    #[error(
        "rows {first}.. of layer {layer}, {rows} of them; accepted: from 0 ..= {next}, to {end}"
    )]
    Rows {
        /// Index of the layer.
        layer: u32,
        /// The first row that was given.
        first: u32,
        /// Rows that were given.
        rows: usize,
        /// The first row that is not written.
        next: u32,
        /// Rows of the part.
        end: u32,
    },
}

impl From<FillError> for Error {
    fn from(error: FillError) -> Self {
        Error::invalid(error.to_string())
    }
}

/// Where the bytes of a slot are.
pub(crate) enum Place {
    /// In the staging region of a link.
    Staged(StagedSlot),
    /// In memory of this process, to travel inline.
    Owned(OwnedSlot),
}

impl Place {
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Staged(slot) => slot.span.as_ref().map_or(&[], Span::bytes),
            Self::Owned(slot) => &slot.bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Staged(slot) => slot.span.as_mut().map_or(&mut [], Span::bytes_mut),
            Self::Owned(slot) => &mut slot.bytes,
        }
    }
}

/// A granted place in a staging region.
pub(crate) struct StagedSlot {
    /// `None` once the slot was handed over.
    span: Option<Span>,
    slot: v1::Slot,
    link: Arc<Link>,
}

impl StagedSlot {
    pub(crate) fn new(span: Span, slot: v1::Slot, link: Arc<Link>) -> Self {
        let span = Some(span);
        Self { span, slot, link }
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Ends this side's access, so that the daemon may take the bytes and grant the place again.
    pub(crate) fn hand_over(mut self) -> v1::Slot {
        self.span = None;
        self.slot
    }
}

impl Drop for StagedSlot {
    fn drop(&mut self) {
        if let Some(span) = self.span.take() {
            // The claim ends first: the daemon may grant the place again at once.
            drop(span);
            self.link.releases.put_slot(self.slot);
        }
    }
}

/// Memory of this process, counted against the session's staging size.
pub(crate) struct OwnedSlot {
    pub(crate) bytes: Vec<u8>,
    pub(crate) _room: tokio::sync::OwnedSemaphorePermit,
}

/// A place for one block, not yet filled. Dropping it gives the place back.
///
/// Parts may be written in any order and more than once, as layers finish.
///
/// ```no_run
/// # use kvtier_client::{Error, FilledSlot, PartCode, ReservedSlot};
/// # fn fill(mut slot: ReservedSlot, k: &[Vec<u8>], v: &[Vec<u8>]) -> Result<FilledSlot, Error> {
/// for (layer, (k, v)) in (0u32..).zip(k.iter().zip(v)) {
///     slot.write_part(layer, PartCode::K, k)?;
///     slot.write_part(layer, PartCode::V, v)?;
/// }
/// Ok(slot.finish()?)
/// # }
/// ```
///
/// A slot that is not filled cannot be committed:
///
/// ```compile_fail
/// # use kvtier_client::{Acknowledge, ReservedSlot, Session};
/// # async fn commit(session: Session, slot: ReservedSlot) {
/// session.commit(vec![slot], Acknowledge::Accepted).await;
/// # }
/// ```
pub struct ReservedSlot {
    block: SaveBlock,
    layout: Arc<BlockLayout>,
    /// Rows that are written of each part, in payload order: all of them, or leading ones.
    rows: Vec<u32>,
    place: Place,
    checksum: bool,
}

impl ReservedSlot {
    pub(crate) fn new(
        block: SaveBlock,
        layout: Arc<BlockLayout>,
        place: Place,
        checksum: bool,
    ) -> Self {
        let rows = vec![0; layout.parts().len()];
        Self {
            block,
            layout,
            rows,
            place,
            checksum,
        }
    }

    /// The block that goes here.
    pub fn block(&self) -> &SaveBlock {
        &self.block
    }

    /// Where each part lies.
    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    /// Copies one part in. Units: exactly the part's bytes.
    /// Errors: [`FillError`]; nothing was written. Blocks for one copy.
    pub fn write_part(
        &mut self,
        layer: u32,
        code: PartCode,
        bytes: &[u8],
    ) -> Result<(), FillError> {
        let wanted = self.part(layer, code)?.1.len;
        same_length(layer, wanted, bytes.len())?;
        self.fill_part(layer, code, |place| place.copy_from_slice(bytes))
    }

    /// Lets `fill` write one part in place: a gather without a copy in between. `fill` must write
    /// all of it; the memory holds whatever was there before.
    /// Errors: [`FillError`]; `fill` was not called. Blocks as long as `fill` does.
    pub fn fill_part(
        &mut self,
        layer: u32,
        code: PartCode,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), FillError> {
        let (index, part) = self.part(layer, code)?;
        if let Some(place) = self
            .place
            .bytes_mut()
            .get_mut(part.offset..part.offset + part.len)
        {
            fill(place);
        }
        self.mark(index, part.rows);
        Ok(())
    }

    /// Where the payload lies, `layout().payload_len()` bytes, for whoever fills it from outside of
    /// Rust. It stays there until the slot is finished or dropped; say what was written with
    /// [`mark_written`](Self::mark_written).
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.place.bytes_mut().as_mut_ptr()
    }

    /// Says that one part was written through [`as_mut_ptr`](Self::as_mut_ptr), all of it.
    /// Errors: [`FillError`] when there is no such part.
    pub fn mark_written(&mut self, layer: u32, code: PartCode) -> Result<(), FillError> {
        let (index, part) = self.part(layer, code)?;
        self.mark(index, part.rows);
        Ok(())
    }

    /// Copies some rows of a token-major part in; the part is written once all rows are, in order.
    pub(crate) fn write_rows(
        &mut self,
        layer: u32,
        code: PartCode,
        first: u32,
        bytes: &[u8],
    ) -> Result<(), FillError> {
        let (index, part) = self.part(layer, code)?;
        let row = part.len / usize::try_from(part.rows).unwrap_or(1).max(1);
        same_length(layer, bytes.len().next_multiple_of(row), bytes.len())?;
        let rows = bytes.len() / row;
        let next = self.rows.get(index).copied().unwrap_or_default();
        let end = usize::try_from(first).map_or(usize::MAX, |first| first + rows);
        let last = u32::try_from(end).ok();
        let Some(last) = last.filter(|last| first <= next && *last <= part.rows) else {
            return Err(FillError::Rows {
                layer,
                first,
                rows,
                next,
                end: part.rows,
            });
        };
        let end = part.offset + end * row;
        if let Some(place) = self.place.bytes_mut().get_mut(end - bytes.len()..end) {
            place.copy_from_slice(bytes);
        }
        self.mark(index, next.max(last));
        Ok(())
    }

    /// Copies all parts of one layer in, back to back in payload order (K then V).
    /// Errors: [`FillError`]; nothing was written. Blocks for one copy.
    pub fn write_page(&mut self, layer: u32, bytes: &[u8]) -> Result<(), FillError> {
        let page = self
            .layout
            .page(layer)
            .ok_or(FillError::NoSuchPage { layer })?;
        same_length(layer, page.len(), bytes.len())?;
        if let Some(place) = self.place.bytes_mut().get_mut(page) {
            place.copy_from_slice(bytes);
        }
        let parts = self.layout.parts().iter().zip(&mut self.rows);
        for (part, rows) in parts.filter(|(part, _)| part.layer == layer) {
            *rows = part.rows;
        }
        Ok(())
    }

    /// Lets `fill` write every part, in payload order.
    pub(crate) fn fill_all(&mut self, mut fill: impl FnMut(&SaveBlock, &Part, &mut [u8])) {
        let bytes = self.place.bytes_mut();
        for part in self.layout.parts() {
            if let Some(place) = bytes.get_mut(part.offset..part.offset + part.len) {
                fill(&self.block, part, place);
            }
        }
        for (part, rows) in self.layout.parts().iter().zip(&mut self.rows) {
            *rows = part.rows;
        }
    }

    /// Layers of which every part is written, in order.
    pub fn filled_layers(&self) -> Vec<u32> {
        let mut layers: Vec<u32> = Vec::new();
        let mut unfinished = None;
        for (part, rows) in self.layout.parts().iter().zip(&self.rows) {
            let filled = *rows == part.rows;
            if !filled {
                unfinished = Some(part.layer);
                if layers.last() == Some(&part.layer) {
                    layers.pop();
                }
            } else if unfinished != Some(part.layer) && layers.last() != Some(&part.layer) {
                layers.push(part.layer);
            }
        }
        layers
    }

    /// Parts that are not written yet, in payload order.
    pub fn missing(&self) -> Vec<(u32, PartCode)> {
        let parts = self.layout.parts().iter().zip(&self.rows);
        let missing = parts.filter(|(part, rows)| **rows != part.rows);
        missing.map(|(part, _)| (part.layer, part.code)).collect()
    }

    /// Ends filling. Computes the checksum when the session asks for it.
    /// Errors: [`Unfilled`] with the slot itself, which can be filled on. Blocks for one pass
    /// over the payload.
    pub fn finish(self) -> Result<FilledSlot, Unfilled> {
        let missing = self.missing();
        if !missing.is_empty() {
            let slot = Box::new(self);
            return Err(Unfilled { slot, missing });
        }
        let crc32 = self.checksum.then(|| crc32fast::hash(self.place.bytes()));
        Ok(FilledSlot {
            block: self.block,
            layout: self.layout,
            place: self.place,
            crc32,
        })
    }

    fn part(&self, layer: u32, code: PartCode) -> Result<(usize, Part), FillError> {
        let mut parts = self.layout.parts().iter().enumerate();
        let found = parts.find(|(_, part)| part.layer == layer && part.code == code);
        let found = found.map(|(index, part)| (index, *part));
        found.ok_or(FillError::NoSuchPart { layer, code })
    }

    fn mark(&mut self, index: usize, rows: u32) {
        if let Some(written) = self.rows.get_mut(index) {
            *written = rows;
        }
    }
}

fn same_length(layer: u32, wanted: usize, given: usize) -> Result<(), FillError> {
    if wanted == given {
        return Ok(());
    }
    Err(FillError::WrongLength {
        layer,
        wanted,
        given,
    })
}

impl fmt::Debug for ReservedSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReservedSlot")
            .field("block", &self.block)
            .field("missing_parts", &self.missing().len())
            .finish_non_exhaustive()
    }
}

/// A slot of which every part is written. Commit it with [`Session::commit`]; dropping it gives
/// the place back and stores nothing.
///
/// [`Session::commit`]: crate::Session::commit
pub struct FilledSlot {
    pub(crate) block: SaveBlock,
    pub(crate) layout: Arc<BlockLayout>,
    pub(crate) place: Place,
    pub(crate) crc32: Option<u32>,
}

impl FilledSlot {
    /// The block that is here.
    pub fn block(&self) -> &SaveBlock {
        &self.block
    }

    /// Where each part lies.
    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    /// The whole payload.
    pub fn payload(&self) -> &[u8] {
        self.place.bytes()
    }
}

impl fmt::Debug for FilledSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilledSlot")
            .field("block", &self.block)
            .finish_non_exhaustive()
    }
}

/// A slot was finished before every part was written.
#[derive(Debug, thiserror::Error)]
#[error("{} parts are not written; the first is {:?}", missing.len(), missing.first())]
pub struct Unfilled {
    /// The slot, to fill on.
    pub slot: Box<ReservedSlot>,
    /// Layer and code of each part that is missing.
    pub missing: Vec<(u32, PartCode)>,
}

impl From<Unfilled> for Error {
    fn from(unfilled: Unfilled) -> Self {
        Error::invalid(unfilled.to_string())
    }
}
