//! What lies on the device, byte by byte. The tables in this folder are the specification;
//! `docs/FORMAT.md` repeats them and a test keeps the two equal.
//!
//! Upstairs:   `image` builds records, `read` verifies them, `recover` and `verify` scan them.
//! Downstairs: nothing: slices in, values out.
//!
//! Everything is little-endian and starts on a 4096-byte boundary. Decoders take any bytes,
//! check each field before they use it, and never allocate by a length they have not bounded.
//!
//! Not here on purpose: no I/O, no policy. No `usize` is ever written.

pub(crate) mod fields;
pub(crate) use fields::index;
pub mod record;
pub mod segment;
pub mod superblock;

pub use record::{Head, Header, Part, PartCode, Stamp};
pub use segment::{Footer, SegmentHeader, Trailer};
pub use superblock::{CleanClose, Superblock, Wiped};

use kvtier_proto::{BlockKey, LayoutFingerprint, Level, NamespaceId, PayloadKind, Quality};

/// Everything on the device is aligned to this. Unit: bytes.
pub const BLOCK: u64 = 4096;

/// The one format version that is written and read.
pub const VERSION: u16 = 1;

/// Random identity of one store. A record of another store is no record here. Tenants never
/// learn it, so they cannot forge a record inside a payload.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StoreId(pub [u8; 16]);

impl std::fmt::Debug for StoreId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, ..] = self.0;
        write!(f, "StoreId({a:02x}{b:02x}..)")
    }
}

/// Where a record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Number of the segment file.
    pub segment: u32,
    /// Offset of the record's first byte in the file. Unit: bytes, a multiple of [`BLOCK`].
    pub offset: u64,
    /// Length of the whole image. Unit: bytes, a multiple of [`BLOCK`].
    pub len: u32,
    /// Length of the image's head room. Unit: bytes, a multiple of [`BLOCK`].
    pub head_len: u32,
    /// Epoch of the segment when the record was written.
    pub epoch: u64,
    /// Store-wide number of the put; a higher one came later. A forwarded copy keeps it.
    pub sequence: u64,
}

/// What a segment's footer says of one record: enough to find it and to name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Whose block.
    pub namespace: NamespaceId,
    /// Which block.
    pub key: BlockKey,
    /// The block before it in its prefix.
    pub parent: BlockKey,
    /// What its bytes mean.
    pub layout: LayoutFingerprint,
    /// What its bytes are.
    pub kind: PayloadKind,
    /// Codec level of its parts.
    pub level: Level,
    /// What its bytes had gone through before they were stored.
    pub through: Quality,
    /// Tokens it holds.
    pub tokens: u32,
    /// Index of its first token in the prefix.
    pub position: u32,
    /// Where it lies.
    pub place: Place,
}

/// `len` rounded up to whole blocks.
pub const fn padded(len: u64) -> u64 {
    len.next_multiple_of(BLOCK)
}

#[cfg(test)]
mod tests;
