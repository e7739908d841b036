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
//! Not here on purpose: no write on the way of a put. Rows are written in portions when the store
//! has nothing to report, and the rest at the close.

mod sled;

use std::collections::VecDeque;

use kvtier_proto::{BlockKey, Level, NamespaceId, PayloadKind};

use crate::format::fields::{array, put, u8_at, u32_at, u64_at};
use crate::format::{BLOCK, CleanClose, Place, StoreId, Superblock};
use crate::index::{Index, Stored};
use crate::planted::{Bug, planted};

pub use self::sled::SledCatalog;

/// Rows handled between two looks at the device. Unit: rows; about a millisecond of sled's time.
const PORTION: usize = 256;
/// Bytes of a row's key: namespace and block key.
pub(crate) const ROW_KEY_LEN: usize = 36;
/// Bytes of a row's value.
pub(crate) const ROW_LEN: usize = 32;

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

    /// 36 bytes for the catalog to keep.
    pub fn to_bytes(&self) -> [u8; 36] {
        let mut bytes = [0; 36];
        put(&mut bytes, 0, &self.store_id.0);
        put(&mut bytes, 16, &self.incarnation.to_le_bytes());
        put(&mut bytes, 20, &self.close.rows.to_le_bytes());
        put(&mut bytes, 28, &self.close.digest.to_le_bytes());
        bytes
    }
}

/// Something that keeps rows between a clean close and the next opening.
pub trait Catalog: std::fmt::Debug + Send {
    /// Gives every row to `each` when `stamp` is what [`Catalog::close`] was given last.
    fn load(&mut self, stamp: &Stamp, each: &mut dyn FnMut(&Stored)) -> Result<(), CatalogError>;

    /// Moves whatever is there aside and starts empty.
    fn reset(&mut self) -> Result<(), CatalogError>;

    /// Adds or replaces rows.
    fn put(&mut self, rows: &[Stored]) -> Result<(), CatalogError>;

    /// Takes rows out.
    fn remove(&mut self, keys: &[(NamespaceId, BlockKey)]) -> Result<(), CatalogError>;

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
        // FNV-1a, then a finisher, so that sums of similar rows do not cancel.
        let (key, row) = (row_key(stored.namespace, &stored.key), row_of(stored));
        let fnv = key
            .iter()
            .chain(&row)
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
            });
        let mixed = (fnv ^ (fnv >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
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

/// Key of a row.
pub(crate) fn row_key(namespace: NamespaceId, key: &BlockKey) -> [u8; ROW_KEY_LEN] {
    let mut bytes = [0; ROW_KEY_LEN];
    put(&mut bytes, 0, &namespace.0.to_le_bytes());
    put(&mut bytes, 4, &key.0);
    bytes
}

/// Value of a row: segment, block, blocks, layout tag, sequence, kind, level, head blocks.
pub(crate) fn row_of(stored: &Stored) -> [u8; ROW_LEN] {
    let place = &stored.place;
    let blocks = |bytes: u64| {
        u32::try_from(bytes / BLOCK)
            .unwrap_or(u32::MAX)
            .to_le_bytes()
    };
    let [head_blocks, ..] = blocks(u64::from(place.head_len));
    let mut row = [0; ROW_LEN];
    put(&mut row, 0, &place.segment.to_le_bytes());
    put(&mut row, 4, &blocks(place.offset));
    put(&mut row, 8, &blocks(u64::from(place.len)));
    put(&mut row, 12, &stored.layout_tag.to_le_bytes());
    put(&mut row, 16, &place.sequence.to_le_bytes());
    put(
        &mut row,
        24,
        &[stored.kind as u8, stored.level.0, head_blocks],
    );
    row
}

/// Reads a row back. `None` when it is not one.
pub(crate) fn read_row(key: &[u8], row: &[u8]) -> Option<Stored> {
    if key.len() != ROW_KEY_LEN || row.len() != ROW_LEN {
        return None;
    }
    let bytes = |blocks: u32| u64::from(blocks) * BLOCK;
    Some(Stored {
        namespace: NamespaceId(u32_at(key, 0)?),
        key: BlockKey(array(key, 4)?),
        kind: PayloadKind::from_number(u8_at(row, 24)?)?,
        level: Level(u8_at(row, 25)?),
        layout_tag: u32_at(row, 12)?,
        pinned: false,
        place: Place {
            segment: u32_at(row, 0)?,
            offset: bytes(u32_at(row, 4)?),
            len: u32::try_from(bytes(u32_at(row, 8)?)).ok()?,
            head_len: u32::try_from(bytes(u32::from(u8_at(row, 26)?))).ok()?,
            epoch: 0,
            sequence: u64_at(row, 16)?,
        },
    })
}

/// What the catalog has not heard yet.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// Without a catalog nothing is remembered.
    on: bool,
    sealed: VecDeque<u32>,
    rows: Vec<Stored>,
    removed: VecDeque<(NamespaceId, BlockKey)>,
}

impl Work {
    pub(crate) fn start(&mut self) {
        self.on = true;
    }

    /// The rows of a segment are complete.
    pub(crate) fn sealed(&mut self, segment: u32) {
        if self.on {
            self.sealed.push_back(segment);
        }
    }

    pub(crate) fn removed(&mut self, stored: &Stored) {
        if self.on && !planted(Bug::CatalogKeepsRemoved) {
            self.removed.push_back((stored.namespace, stored.key));
        }
    }

    /// Hands over at most [`PORTION`] rows. True when there is more.
    pub(crate) fn portion(
        &mut self,
        catalog: &mut dyn Catalog,
        index: &Index,
    ) -> Result<bool, CatalogError> {
        if self.rows.is_empty()
            && let Some(segment) = self.sealed.pop_front()
        {
            self.rows = index.in_segment(segment).collect();
        }
        let keep = self.rows.len().saturating_sub(PORTION);
        let mut rows = self.rows.split_off(keep);
        rows.retain(|row| {
            index
                .get(row.namespace, &row.key)
                .is_some_and(|here| here.place == row.place)
        });
        if !rows.is_empty() {
            catalog.put(&rows)?;
        }
        let take = self.removed.len().min(PORTION);
        let mut keys: Vec<_> = self.removed.drain(..take).collect();
        keys.retain(|(namespace, key)| index.get(*namespace, key).is_none());
        if !keys.is_empty() {
            catalog.remove(&keys)?;
        }
        Ok(!(self.rows.is_empty() && self.sealed.is_empty() && self.removed.is_empty()))
    }

    /// Hands over everything.
    pub(crate) fn finish(
        &mut self,
        catalog: &mut dyn Catalog,
        index: &Index,
    ) -> Result<(), CatalogError> {
        while self.portion(catalog, index)? {}
        Ok(())
    }
}

#[cfg(test)]
mod tests;
