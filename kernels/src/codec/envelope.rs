//! What all coded levels have around their own stream: header, CRC, and the way out when a part
//! does not shrink.
//!
//! A lossy level's CRC is of what decoding gives, which encoding finds out by decoding: decoders
//! are exact to the bit on every machine, or a part is a miss there.
//!
//! Upstairs:   every codec but raw.
//! Downstairs: [`super::header`], [`floats`].
//!
//! Invariants kept here
//!   K1  A part that would grow is stored behind its header as it is.
//!   K3  Decoded bytes are checked against the CRC in the header, by [`open`] and nobody else.

use std::cell::Cell;

use kvtier_proto::Level;

use super::header::{Form, HEADER_BYTES, Header};
use super::quant::floats;
use super::raw::exact_length;
use super::{Codec, DecodeError, EncodeError, check_decode, check_encode};
use crate::shape::PartShape;

/// What the header says of the tables.
fn table_version(codec: &dyn Codec) -> u16 {
    let [low, high, ..] = codec.tables().to_le_bytes();
    u16::from_le_bytes([low, high])
}

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
    seal_as(codec, shape, (raw, out), code, |_| Ok(crc32fast::hash(raw)))
}

/// [`seal`] for a lossy level: `decode` is the one that [`open`] gets. A part that decodes to a
/// value that is not finite is stored as it is: no declared error allows that.
pub(super) fn seal_lossy(
    codec: &dyn Codec,
    shape: &PartShape,
    (raw, out): (&[u8], &mut [u8]),
    code: impl FnOnce(&mut [u8]) -> Option<usize>,
    decode: impl FnOnce(&[u8], &mut [u8]) -> Result<u32, DecodeError>,
) -> Result<usize, EncodeError> {
    let known = Cell::new(0);
    let code = |body: &mut [u8]| {
        let Some(len) = code(body) else {
            return Ok(None);
        };
        let mut back = vec![0; raw.len()];
        let crc = decode(body.get(..len).unwrap_or_default(), &mut back)
            .map_err(|problem| EncodeError::Compressor(std::io::Error::other(problem)))?;
        known.set(crc);
        let values = floats::read(shape.element(), &back);
        let finite = values.iter().all(|value| value.is_finite());
        Ok(finite.then_some(len))
    };
    seal_as(codec, shape, (raw, out), code, |_| Ok(known.get()))
}

/// [`seal`] for a lossy level that knows the CRC of what its stream decodes to: `code` returns the
/// size and the CRC.
pub(super) fn seal_restored(
    codec: &dyn Codec,
    shape: &PartShape,
    (raw, out): (&[u8], &mut [u8]),
    code: impl FnOnce(&mut [u8]) -> Option<(usize, u32)>,
) -> Result<usize, EncodeError> {
    let known = Cell::new(0);
    let code = |body: &mut [u8]| {
        let coded = code(body);
        known.set(coded.map_or(0, |(_, crc)| crc));
        Ok(coded.map(|(len, _)| len))
    };
    seal_as(codec, shape, (raw, out), code, |_| Ok(known.get()))
}

/// [`seal`], where `crc` finds the CRC of what the coded stream decodes to.
fn seal_as(
    codec: &dyn Codec,
    shape: &PartShape,
    (raw, out): (&[u8], &mut [u8]),
    code: impl FnOnce(&mut [u8]) -> Result<Option<usize>, EncodeError>,
    crc: impl FnOnce(&[u8]) -> Result<u32, EncodeError>,
) -> Result<usize, EncodeError> {
    check_encode(codec, shape, raw, out)?;
    let (want, got) = (bytes_max(shape), out.len());
    let too_small = || EncodeError::OutTooSmall { want, got };
    let out = out.get_mut(..want).ok_or_else(too_small)?;
    let (head, body) = out
        .split_first_chunk_mut::<HEADER_BYTES>()
        .ok_or_else(too_small)?;
    let (form, len, raw_crc) = match code(body)? {
        Some(len) => (Form::Coded, len, crc(body.get(..len).unwrap_or_default())?),
        None => {
            body.copy_from_slice(raw);
            (Form::Stored, raw.len(), crc32fast::hash(raw))
        }
    };
    let raw_len = u32::try_from(raw.len()).map_err(|_| EncodeError::RawLength {
        want: u32::MAX as usize,
        got: raw.len(),
    })?;
    let header = Header {
        level: codec.level().0,
        form,
        table_version: table_version(codec),
        raw_len,
        raw_crc,
    };
    *head = header.to_bytes();
    Ok(HEADER_BYTES + len)
}

/// The largest error of a stored part, as `error` finds it in the level's stream; 0 when the part
/// is stored as it is.
pub(super) fn coded(
    codec: &dyn Codec,
    shape: &PartShape,
    stored: &[u8],
    error: impl FnOnce(&[u8]) -> f32,
) -> Result<f32, DecodeError> {
    let (header, body) = Header::read(shape, codec.level().0, table_version(codec), stored)?;
    Ok(match header.form {
        Form::Stored => 0.0,
        Form::Coded => error(body),
    })
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
    if !codec.applies(shape) {
        return Err(DecodeError::Header {
            field: "level",
            got: codec.level().0.into(),
            want: Level::RAW.0.into(),
        });
    }
    let (header, body) = Header::read(shape, codec.level().0, table_version(codec), stored)?;
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
