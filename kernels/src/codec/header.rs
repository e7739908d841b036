//! Header of a coded part, 12 bytes, little-endian. Level raw has none.
//!
//! | off | len | field         | meaning                                             |
//! |----:|----:|---------------|-----------------------------------------------------|
//! |   0 |   1 | level         | number of the level that wrote it                   |
//! |   1 |   1 | form          | 0 raw bytes follow (did not shrink), 1 coded        |
//! |   2 |   2 | table version | low half of the tables' identity; 0 where none are  |
//! |   4 |   4 | raw length    | bytes after decoding; equals the shape's            |
//! |   8 |   4 | raw CRC       | crc32 (IEEE) of the raw bytes                       |
//!
//! Upstairs:   every codec but raw.
//! Downstairs: nothing.
//!
//! Invariants kept here
//!   K3  The CRC is of the *raw* bytes: it covers what the page's CRC over stored bytes cannot,
//!       a defect of coder, decoder or memory between the two.
//!
//! Not here on purpose: no element type and no width. The record's layout fingerprint says them,
//! and bytes decoded under another shape fail the CRC.

use super::DecodeError;
use crate::shape::PartShape;

/// Size of the header. Unit: bytes.
pub const HEADER_BYTES: usize = 12;

/// What follows the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Form {
    /// The raw bytes: the part did not shrink.
    Stored = 0,
    /// The level's own stream.
    Coded = 1,
}

/// Header of a coded part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Number of the level.
    pub level: u8,
    /// What follows.
    pub form: Form,
    /// Version of the static tables; 0 where there are none.
    pub table_version: u16,
    /// Size after decoding. Unit: bytes.
    pub raw_len: u32,
    /// crc32 (IEEE) of the raw bytes.
    pub raw_crc: u32,
}

impl Header {
    /// The bytes as they are stored.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let [t0, t1] = self.table_version.to_le_bytes();
        let [l0, l1, l2, l3] = self.raw_len.to_le_bytes();
        let [c0, c1, c2, c3] = self.raw_crc.to_le_bytes();
        [
            self.level,
            self.form as u8,
            t0,
            t1,
            l0,
            l1,
            l2,
            l3,
            c0,
            c1,
            c2,
            c3,
        ]
    }

    /// Splits stored bytes into a header, checked against the shape and the codec's level and
    /// table version, and what follows.
    ///
    /// # Errors
    /// [`DecodeError`] naming the field that is not what this codec writes.
    pub fn read<'a>(
        shape: &PartShape,
        level: u8,
        table_version: u16,
        stored: &'a [u8],
    ) -> Result<(Self, &'a [u8]), DecodeError> {
        let truncated = DecodeError::Truncated {
            need: HEADER_BYTES,
            have: stored.len(),
        };
        let (head, body) = stored
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or(truncated)?;
        let [l, form, t0, t1, l0, l1, l2, l3, c0, c1, c2, c3] = *head;
        let stored_version = u16::from_le_bytes([t0, t1]);
        let raw_len = u32::from_le_bytes([l0, l1, l2, l3]);
        let raw_crc = u32::from_le_bytes([c0, c1, c2, c3]);
        let header = |field, got, want| Err(DecodeError::Header { field, got, want });
        if l != level {
            return header("level", l.into(), level.into());
        }
        let form = match form {
            0 => Form::Stored,
            1 => Form::Coded,
            other => return header("form", other.into(), 1),
        };
        if stored_version != table_version {
            return Err(DecodeError::TableVersion {
                stored: stored_version,
                held: table_version,
            });
        }
        let want = shape.raw_bytes() as u64;
        if u64::from(raw_len) != want {
            return header("raw length", raw_len.into(), want);
        }
        Ok((
            Self {
                level: l,
                form,
                table_version,
                raw_len,
                raw_crc,
            },
            body,
        ))
    }
}
