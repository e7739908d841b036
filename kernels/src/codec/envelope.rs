//! What all coded levels have around their own stream: header, CRC, and the way out when a part
//! does not shrink.
//!
//! Upstairs:   every codec but raw.
//! Downstairs: [`super::header`].
//!
//! Invariants kept here
//!   K1  A part that would grow is stored behind its header as it is.
//!   K3  Decoded bytes are checked against the CRC of the raw ones, by [`open`] and nobody else.

use super::header::{Form, HEADER_BYTES, Header};
use super::raw::exact_length;
use super::{Codec, DecodeError, EncodeError, check_decode, check_encode};
use crate::shape::PartShape;

/// Largest stored part behind a header. Unit: bytes.
pub(super) fn bytes_max(shape: &PartShape) -> usize {
    HEADER_BYTES + shape.raw_bytes()
}

/// Encodes a part: `code` writes the level's stream into its argument, as long as `raw`, and
/// returns the size; `None` when it does not fit.
pub(super) fn seal(
    codec: &dyn Codec,
    shape: &PartShape,
    (raw, out): (&[u8], &mut [u8]),
    code: impl FnOnce(&mut [u8]) -> Result<Option<usize>, EncodeError>,
) -> Result<usize, EncodeError> {
    check_encode(codec, shape, raw, out)?;
    let (want, got) = (bytes_max(shape), out.len());
    let too_small = || EncodeError::OutTooSmall { want, got };
    let out = out.get_mut(..want).ok_or_else(too_small)?;
    let (head, body) = out
        .split_first_chunk_mut::<HEADER_BYTES>()
        .ok_or_else(too_small)?;
    let (form, len) = match code(body)? {
        Some(len) => (Form::Coded, len),
        None => {
            body.copy_from_slice(raw);
            (Form::Stored, raw.len())
        }
    };
    let raw_len = u32::try_from(raw.len()).map_err(|_| EncodeError::RawLength {
        want: u32::MAX as usize,
        got: raw.len(),
    })?;
    let header = Header {
        level: codec.level().0,
        form,
        table_version: codec.table_version(),
        raw_len,
        raw_crc: crc32fast::hash(raw),
    };
    *head = header.to_bytes();
    Ok(HEADER_BYTES + len)
}

/// Decodes a part: `decode` turns the level's stream into the whole of `out` and returns the CRC
/// of it.
pub(super) fn open(
    codec: &dyn Codec,
    shape: &PartShape,
    (stored, out): (&[u8], &mut [u8]),
    decode: impl FnOnce(&[u8], &mut [u8]) -> Result<u32, DecodeError>,
) -> Result<(), DecodeError> {
    check_decode(shape, out)?;
    let (header, body) = Header::read(shape, codec.level().0, codec.table_version(), stored)?;
    let got = match header.form {
        Form::Stored => {
            exact_length(body, out.len())?;
            out.copy_from_slice(body);
            crc32fast::hash(out)
        }
        Form::Coded => decode(body, out)?,
    };
    let want = header.raw_crc;
    if want == got {
        Ok(())
    } else {
        Err(DecodeError::Checksum { want, got })
    }
}
