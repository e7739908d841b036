//! The superblock: who the store is, which life it lives, and what was wiped.
//!
//! Upstairs:   `superblock` (the module that reads and writes it), `recover`.
//! Downstairs: `crc32fast`.
//!
//! `superblock.kvs` holds two slots of 64 KiB. Every change is written to slot 0, synced, written
//! to slot 1, synced, and read back before it counts: a torn write spoils one slot, and damage to
//! one slot later never brings back an older truth.
//!
//! Superblock slot: 65536 bytes.
//!
//! | off   | len | field        | meaning                                                     |
//! |------:|----:|--------------|-------------------------------------------------------------|
//! |     0 |   4 | magic        | "KVB1"                                                      |
//! |     4 |   2 | version      | 1                                                           |
//! |     6 |   2 | reserved     | zero                                                        |
//! |     8 |  16 | store_id     | random, chosen when the store was made                      |
//! |    24 |   8 | revision     | counts changes; of two sound slots the higher one counts    |
//! |    32 |   4 | incarnation  | counts openings: upper bits of every epoch and sequence     |
//! |    36 |   4 | wiped        | rows of the wipe table, at most 4096                        |
//! |    40 |   8 | segment_size | length of every segment file                                |
//! |    48 |   8 | floor        | records with a lower sequence are gone in every namespace   |
//! |    56 |   4 | clean        | 1: closed in order and the catalog below is whole; else 0   |
//! |    60 |   4 | reserved     | zero                                                        |
//! |    64 |   8 | rows         | rows of the catalog at the close                            |
//! |    72 |   8 | digest       | sum over the catalog's rows, see `catalog`                  |
//! |    80 |  16 | reserved     | zero                                                        |
//! |    96 |  12 | wiped        | namespace (4 bytes), sequence (8 bytes); repeated           |
//! | 65532 |   4 | crc          | crc32 of bytes 0..65532                                     |
//!
//! Not here on purpose: no list of segments. The directory and the segment headers say it, and
//! what is said once cannot disagree.

use kvtier_proto::NamespaceId;

use super::fields::{array, crc_of, is_sealed, put, u16_at, u32_at, u64_at};
use super::{BLOCK, StoreId, VERSION};

/// First bytes of a slot.
pub const SUPERBLOCK_MAGIC: [u8; 4] = *b"KVB1";
/// Name of the file.
pub const SUPERBLOCK_NAME: &str = "superblock.kvs";
/// Bytes of a slot.
pub const SLOT_LEN: u64 = 64 << 10;
/// Slots in the file.
pub const SLOTS: u64 = 2;
/// Most namespaces whose wipes are remembered one by one. When one more is wiped, the floor
/// rises instead: everything older goes, in every namespace.
pub const WIPED_MAX: usize = 4096;

const AT_STORE_ID: usize = 8;
const AT_REVISION: usize = 24;
const AT_INCARNATION: usize = 32;
const AT_WIPED_COUNT: usize = 36;
const AT_SEGMENT_SIZE: usize = 40;
const AT_FLOOR: usize = 48;
const AT_CLEAN: usize = 56;
const AT_ROWS: usize = 64;
const AT_DIGEST: usize = 72;
const AT_WIPED: usize = 96;
const WIPED_LEN: usize = 12;
const AT_CRC: usize = 65_532;

const _: () = {
    assert!(AT_CRC as u64 + 4 == SLOT_LEN);
    assert!(AT_WIPED + WIPED_MAX * WIPED_LEN <= AT_CRC);
    assert!(SLOT_LEN.is_multiple_of(BLOCK));
};

/// One row of the wipe table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wiped {
    /// Whose records.
    pub namespace: NamespaceId,
    /// Those with a lower sequence are gone.
    pub below: u64,
}

/// What a clean close left: the catalog may be trusted when it agrees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CleanClose {
    /// Rows of the catalog.
    pub rows: u64,
    /// Sum over its rows.
    pub digest: u64,
}

/// One slot, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Identity of the store.
    pub store_id: StoreId,
    /// Counts changes.
    pub revision: u64,
    /// Counts openings for writing.
    pub incarnation: u32,
    /// Length of every segment file. Unit: bytes.
    pub segment_size: u64,
    /// Records with a lower sequence are gone, whosever they are.
    pub floor: u64,
    /// Set between a clean close and the next opening.
    pub clean: Option<CleanClose>,
    /// Wipes by namespace, in the order of the namespace numbers.
    pub wiped: Vec<Wiped>,
}

impl Superblock {
    /// Fills `slot`, which is [`SLOT_LEN`] long.
    pub(crate) fn encode(&self, slot: &mut [u8]) {
        slot.fill(0);
        put(slot, 0, &SUPERBLOCK_MAGIC);
        put(slot, 4, &VERSION.to_le_bytes());
        put(slot, AT_STORE_ID, &self.store_id.0);
        put(slot, AT_REVISION, &self.revision.to_le_bytes());
        put(slot, AT_INCARNATION, &self.incarnation.to_le_bytes());
        let wiped = u32::try_from(self.wiped.len().min(WIPED_MAX)).unwrap_or_default();
        put(slot, AT_WIPED_COUNT, &wiped.to_le_bytes());
        put(slot, AT_SEGMENT_SIZE, &self.segment_size.to_le_bytes());
        put(slot, AT_FLOOR, &self.floor.to_le_bytes());
        if let Some(clean) = self.clean {
            put(slot, AT_CLEAN, &1u32.to_le_bytes());
            put(slot, AT_ROWS, &clean.rows.to_le_bytes());
            put(slot, AT_DIGEST, &clean.digest.to_le_bytes());
        }
        for (number, row) in self.wiped.iter().take(WIPED_MAX).enumerate() {
            put(
                slot,
                AT_WIPED + number * WIPED_LEN,
                &row.namespace.0.to_le_bytes(),
            );
            put(
                slot,
                AT_WIPED + number * WIPED_LEN + 4,
                &row.below.to_le_bytes(),
            );
        }
        let crc = crc_of(slot, 0, AT_CRC).unwrap_or_default();
        put(slot, AT_CRC, &crc.to_le_bytes());
    }

    /// Version of a sound slot, this one or another: magic, version and checksum keep their places
    /// in every version.
    pub fn version_of(slot: &[u8]) -> Option<u16> {
        let sound = array(slot, 0) == Some(SUPERBLOCK_MAGIC) && is_sealed(slot, AT_CRC);
        u16_at(slot, 4).filter(|_| sound)
    }

    /// Reads a slot. `None` when it is not a sound superblock of this version.
    pub fn decode(slot: &[u8]) -> Option<Self> {
        let sound = Self::version_of(slot) == Some(VERSION);
        let count = u32_at(slot, AT_WIPED_COUNT)? as usize;
        if !sound || count > WIPED_MAX {
            return None;
        }
        let rows = slot.get(AT_WIPED..AT_WIPED + count * WIPED_LEN)?;
        let wiped = rows.chunks_exact(WIPED_LEN).map(|row| {
            Some(Wiped {
                namespace: NamespaceId(u32_at(row, 0)?),
                below: u64_at(row, 4)?,
            })
        });
        let wiped: Vec<Wiped> = wiped.collect::<Option<_>>()?;
        // Out of order, a search would overlook a wipe.
        if !wiped.is_sorted_by(|a, b| a.namespace < b.namespace) {
            return None;
        }
        let close = CleanClose {
            rows: u64_at(slot, AT_ROWS)?,
            digest: u64_at(slot, AT_DIGEST)?,
        };
        Some(Self {
            store_id: StoreId(array(slot, AT_STORE_ID)?),
            revision: u64_at(slot, AT_REVISION)?,
            incarnation: u32_at(slot, AT_INCARNATION)?,
            segment_size: u64_at(slot, AT_SEGMENT_SIZE)?,
            floor: u64_at(slot, AT_FLOOR)?,
            clean: (u32_at(slot, AT_CLEAN)? == 1).then_some(close),
            wiped,
        })
    }

    /// True when a record of `namespace` with `sequence` was wiped.
    pub fn is_wiped(&self, namespace: NamespaceId, sequence: u64) -> bool {
        sequence < self.wiped_below(namespace)
    }

    /// Records of `namespace` with a lower sequence were wiped.
    pub fn wiped_below(&self, namespace: NamespaceId) -> u64 {
        let row = self
            .wiped
            .binary_search_by_key(&namespace, |row| row.namespace);
        row.ok()
            .and_then(|at| self.wiped.get(at))
            .map_or(0, |row| row.below)
            .max(self.floor)
    }

    /// Remembers that every record of `namespace` below `sequence` is gone.
    pub(crate) fn wipe(&mut self, namespace: NamespaceId, sequence: u64) {
        match self
            .wiped
            .binary_search_by_key(&namespace, |row| row.namespace)
        {
            Ok(at) => {
                if let Some(row) = self.wiped.get_mut(at) {
                    row.below = row.below.max(sequence);
                }
            }
            Err(_) if self.wiped.len() >= WIPED_MAX => {
                // A wipe that is repeated may be older than others in the table.
                let rows = self.wiped.drain(..).map(|row| row.below);
                self.floor = rows.fold(self.floor.max(sequence), u64::max);
            }
            Err(at) => self.wiped.insert(
                at,
                Wiped {
                    namespace,
                    below: sequence,
                },
            ),
        }
    }
}

#[cfg(test)]
mod tests;
