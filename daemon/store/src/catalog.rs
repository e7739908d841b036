//! The catalog: a copy of the index on disk, so that a clean restart reads no segment.
//!
//! Upstairs:   `store` tells it what changed, `recover` asks it first.
//! Downstairs: `catalog::sled`, or nothing: every caller works without one.
//!
//! The catalog is disposable. It is trusted in one case only: the superblock, which is ours and
//! durable, says that it was closed in order, and store, incarnation, number of rows and a sum
//! over all rows agree. Anything else, an error and a panic included, moves it aside and the
//! index is rebuilt from the segments (sled#1533: a snapshot that cannot be opened after an
//! abrupt stop; a power cut loses what sled said was flushed).
//!
//! Invariants kept here
//!   C1  Nothing is acknowledged on the catalog's word, and a row only ever leads to a read that
//!       checks the record itself.
//!
//! Rows are kept by segment, a few dozen in a piece: a library that keeps one row a block needs
//! several times the memory of the index itself, and a second for each million at every opening.
//!
//! Not here on purpose: nothing between opening and close. A catalog is never trusted after
//! anything but a close, so that what is written before one only costs; and a library that is not
//! open holds no memory. What changed is remembered by segment and written at the close.

mod sled;

use std::collections::BTreeSet;

use kvtier_proto::{BlockKey, Level, NamespaceId, PayloadKind, Quality};

use crate::format::fields::{array, put, u8_at, u32_at, u64_at};
use crate::format::{BLOCK, CleanClose, Place, StoreId, Superblock};
use crate::index::{Index, Stored};
use crate::planted::{Bug, planted};

pub use self::sled::SledCatalog;

/// Rows of a piece. Unit: rows; 4 KiB. Sled keeps up to 256 pages of 16 pieces in memory at least.
const PIECE_ROWS: usize = 64;
/// Bytes of a row.
pub(crate) const ROW_LEN: usize = 64;
/// The form of rows and pieces. A catalog of another form is rebuilt.
const FORM: u32 = 2;

/// Why the catalog cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// There is none.
    #[error("catalog is missing: its folder is not there")]
    Missing,
    /// It contradicts the superblock or itself.
    #[error("catalog is unsound: {what}")]
    Unsound {
        /// What was found.
        what: String,
    },
    /// Its library failed, by an error or a panic.
    #[error("catalog failed: {what}")]
    Library {
        /// What it said.
        what: String,
    },
    /// Its folder cannot be moved or made.
    #[error("catalog folder")]
    Folder(#[from] std::io::Error),
}

/// Whose rows, of which life, and what they must add up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Identity of the store.
    pub store_id: StoreId,
    /// The life that closed it.
    pub incarnation: u32,
    /// What the superblock says of it.
    pub close: CleanClose,
}

impl Stamp {
    /// Stamp of what the index holds now.
    pub(crate) fn of(superblock: &Superblock, index: &Index) -> Self {
        let mut sum = Sum::default();
        index.iter().for_each(|stored| sum.add(&stored));
        let Superblock {
            store_id,
            incarnation,
            ..
        } = *superblock;
        Self {
            store_id,
            incarnation,
            close: sum.close(),
        }
    }

    /// 40 bytes for the catalog to keep.
    pub fn to_bytes(&self) -> [u8; 40] {
        let mut bytes = [0; 40];
        put(&mut bytes, 0, &self.store_id.0);
        put(&mut bytes, 16, &self.incarnation.to_le_bytes());
        put(&mut bytes, 20, &self.close.rows.to_le_bytes());
        put(&mut bytes, 28, &self.close.digest.to_le_bytes());
        put(&mut bytes, 36, &FORM.to_le_bytes());
        bytes
    }
}

/// Some rows of one segment.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// Number of the segment.
    pub segment: u32,
    /// Which piece of its rows, from 0 without a gap.
    pub number: u32,
    /// The rows; none only in the last piece.
    pub rows: &'a [Stored],
    /// There are no more pieces behind it: those of an earlier time are gone.
    pub last: bool,
}

/// Something that keeps rows between a clean close and the next opening.
pub trait Catalog: std::fmt::Debug + Send {
    /// Gives every row to `each` when `stamp` is what [`Catalog::close`] was given last.
    fn load(&mut self, stamp: &Stamp, each: &mut dyn FnMut(&Stored)) -> Result<(), CatalogError>;

    /// Moves whatever is there aside: the next is empty.
    fn reset(&mut self) -> Result<(), CatalogError>;

    /// Adds or replaces a piece of a segment's rows.
    fn put(&mut self, piece: &Piece<'_>) -> Result<(), CatalogError>;

    /// Writes the stamp and everything else out, and ends.
    fn close(&mut self, stamp: &Stamp) -> Result<(), CatalogError>;
}

/// A sum over rows that does not depend on their order: any lost, added or changed row shows.
#[derive(Debug, Default)]
pub(crate) struct Sum {
    rows: u64,
    digest: u64,
}

impl Sum {
    pub(crate) fn add(&mut self, stored: &Stored) {
        // Each step can be undone, so that rows that differ in one word never meet.
        let row = row_of(stored);
        let (words, _) = row.as_chunks::<8>();
        let mixed = words.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, word| {
            let hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            hash ^ (hash >> 32)
        });
        self.rows += 1;
        self.digest = self.digest.wrapping_add(mixed ^ (mixed >> 29));
    }

    pub(crate) fn close(&self) -> CleanClose {
        CleanClose {
            rows: self.rows,
            digest: self.digest,
        }
    }
}

/// A row: namespace, segment, key, sequence, block, blocks, layout tag, kind, level, head blocks.
pub(crate) fn row_of(stored: &Stored) -> [u8; ROW_LEN] {
    let place = &stored.place;
    let blocks = |bytes: u64| {
        u32::try_from(bytes / BLOCK)
            .unwrap_or(u32::MAX)
            .to_le_bytes()
    };
    let [head_blocks, ..] = blocks(u64::from(place.head_len));
    let mut row = [0; ROW_LEN];
    put(&mut row, 0, &stored.namespace.0.to_le_bytes());
    put(&mut row, 4, &place.segment.to_le_bytes());
    put(&mut row, 8, &stored.key.0);
    put(&mut row, 40, &place.sequence.to_le_bytes());
    put(&mut row, 48, &blocks(place.offset));
    put(&mut row, 52, &blocks(u64::from(place.len)));
    put(&mut row, 56, &stored.layout_tag.to_le_bytes());
    put(
        &mut row,
        60,
        &[
            stored.kind as u8,
            stored.level.0,
            head_blocks,
            stored.through as u8,
        ],
    );
    row
}

/// Reads a row back. `None` when it is not one.
pub(crate) fn read_row(row: &[u8]) -> Option<Stored> {
    if row.len() != ROW_LEN {
        return None;
    }
    let bytes = |blocks: u32| u64::from(blocks) * BLOCK;
    Some(Stored {
        namespace: NamespaceId(u32_at(row, 0)?),
        key: BlockKey(array(row, 8)?),
        kind: PayloadKind::from_number(u8_at(row, 60)?)?,
        level: Level(u8_at(row, 61)?),
        through: Quality::from_number(u8_at(row, 63)?)?,
        layout_tag: u32_at(row, 56)?,
        pinned: false,
        place: Place {
            segment: u32_at(row, 4)?,
            offset: bytes(u32_at(row, 48)?),
            len: u32::try_from(bytes(u32_at(row, 52)?)).ok()?,
            head_len: u32::try_from(bytes(u32::from(u8_at(row, 62)?))).ok()?,
            epoch: 0,
            sequence: u64_at(row, 40)?,
        },
    })
}

/// Segments whose rows the catalog does not have as they are.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    /// Without a catalog nothing is remembered.
    on: bool,
    segments: BTreeSet<u32>,
}

impl Changed {
    pub(crate) fn start(&mut self) {
        self.on = true;
    }

    /// A segment is sealed: it got its rows.
    pub(crate) fn sealed(&mut self, segment: u32) {
        if self.on {
            self.segments.insert(segment);
        }
    }

    /// A row is not where it was.
    pub(crate) fn removed(&mut self, stored: &Stored) {
        if self.on && !planted(Bug::CatalogKeepsRemoved) {
            self.segments.insert(stored.place.segment);
        }
    }

    /// Writes the rows of every segment that was noted.
    pub(crate) fn write(
        &mut self,
        catalog: &mut dyn Catalog,
        index: &Index,
    ) -> Result<(), CatalogError> {
        while let Some(segment) = self.segments.pop_first() {
            let mut rows = index.in_segment(segment).peekable();
            for number in 0.. {
                let some: Vec<Stored> = rows.by_ref().take(PIECE_ROWS).collect();
                let last = rows.peek().is_none();
                catalog.put(&Piece {
                    segment,
                    number,
                    rows: &some,
                    last,
                })?;
                if last {
                    break;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
