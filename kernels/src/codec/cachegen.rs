//! Level cachegen: CacheGen as its authors and LMCache published it in code. A level to compare
//! with, for who knows it; nothing is tuned.
//!
//! Upstairs:   [`Registry::with_baselines`](crate::Registry::with_baselines).
//! Downstairs: [`floats`] reads and writes elements, [`crate::rans`] codes.
//!
//! Liu et al., SIGCOMM 2024 (arXiv:2310.07240), in the code of which there is no delta: a token's
//! values are divided by the largest of them, and rounded to 31 steps (K of the first 10 layers, V
//! of the first 2, all of a model of less than 10 layers) or 15. Each channel has frequencies of
//! its own, counted in this part and stored with it, 33 numbers of 16 bits as LMCache has them.
//! Instead of its arithmetic coder these tables drive ours. What is neither K nor V goes as K.
//!
//! After the [header](super::header):
//!
//! | off | len  | field   | meaning                                                            |
//! |----:|-----:|---------|--------------------------------------------------------------------|
//! |   0 |  t e | maxima  | the largest size of each token's values, as an element             |
//! |     | 66 c | tables  | u16 for each channel and step: how many of [`SCALE`] are below it  |
//! |     |      | symbols | a rANS stream: channel after channel, each padded to whole steps   |
//!
//! Invariants kept here
//!   Q1  An error is at most half a step of the token with the largest values.
//!   Q2  A part with a value that is not finite, or larger than `LARGEST`, is stored as it is.

use kvtier_proto::Level;
use kvtier_proto::layout::PartCode;

use super::quant::floats;
use super::reader::Reader;
use super::rows::Rows;
use super::{Codec, DecodeError, EncodeError, envelope};
use crate::rans::reference::Encoder;
use crate::rans::{Codes, Decoder, Frequencies, LANES, SCALE, Slots};
use crate::shape::PartShape;
use crate::simd;

/// Largest size of a value.
pub(super) const LARGEST: f32 = 1e38;
/// Numbers of a channel's table.
const TABLE: usize = 33;
/// Bytes of a channel's table.
const TABLE_BYTES: usize = 2 * TABLE;

/// The level.
#[derive(Debug, Clone, Copy, Default)]
pub struct CacheGen;

impl Codec for CacheGen {
    fn level(&self) -> Level {
        Level::CACHEGEN
    }

    fn applies(&self, shape: &PartShape) -> bool {
        floats::is_float(shape.element())
    }

    fn encode(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Result<usize, EncodeError> {
        let code = |body: &mut [u8]| encode_part(shape, raw, body);
        let decode = |body: &[u8], out: &mut [u8]| decode_part(shape, body, out);
        envelope::seal_lossy(self, shape, (raw, out), code, decode)
    }

    fn decode(&self, shape: &PartShape, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        envelope::open(self, shape, (stored, out), |body, out| {
            decode_part(shape, body, out)
        })
    }

    fn error_in(&self, shape: &PartShape, stored: &[u8]) -> Result<f32, DecodeError> {
        envelope::coded(self, shape, stored, |body| {
            let len = shape.tokens() as usize * shape.element().bytes();
            let maxima = floats::read(shape.element(), body.get(..len).unwrap_or_default());
            maxima.into_iter().fold(0.0, f32::max) / (2.0 * steps(shape))
        })
    }
}

/// Steps from 0 to the largest value.
const fn steps(shape: &PartShape) -> f32 {
    let careful = match shape.code() {
        PartCode::V => 2,
        _ => 10,
    };
    let few = shape.layers() > 0 && shape.layers() < 10;
    if few || shape.layer() < careful {
        15.0
    } else {
        7.0
    }
}

fn encode_part(shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Option<usize> {
    let values = floats::read(shape.element(), raw);
    if !values.iter().all(|value| value.abs() <= LARGEST) {
        return None;
    }
    let rows = Rows::of(shape);
    let mut maxima = vec![0_f32; rows.tokens];
    for (value, (token, _)) in values.iter().zip(rows.places()) {
        let largest = maxima.get_mut(token)?;
        *largest = largest.max(value.abs());
    }
    let (to, room) = out.split_at_mut_checked(rows.tokens * shape.element().bytes())?;
    floats::write(shape.element(), &maxima, to);
    let padded = rows.tokens.next_multiple_of(LANES);
    let mut symbols = vec![0; padded * rows.channels];
    for (value, (token, channel)) in values.iter().zip(rows.places()) {
        let largest = *maxima.get(token)?;
        *symbols.get_mut(channel * padded + token)? = symbol(value / largest, steps(shape));
    }
    let (tables, stream) = room.split_at_mut_checked(TABLE_BYTES * rows.channels)?;
    let each = symbols
        .chunks_mut(padded)
        .zip(tables.chunks_mut(TABLE_BYTES));
    for (symbols, table) in each {
        let mut weights = [0; 256];
        for symbol in symbols.iter().take(rows.tokens) {
            *weights.get_mut(usize::from(*symbol))? += 1;
        }
        let frequencies = Frequencies::in_proportion(&weights)?;
        let first = *symbols.first()?;
        symbols.get_mut(rows.tokens..)?.fill(first);
        let mut below = 0;
        for (bytes, frequency) in table
            .as_chunks_mut::<2>()
            .0
            .iter_mut()
            .zip(frequencies.get())
        {
            *bytes = u16::to_le_bytes(below);
            below += frequency;
        }
    }
    let mut encoder = Encoder::new(stream);
    let each = symbols.chunks(padded).zip(tables.chunks(TABLE_BYTES));
    for (symbols, table) in each.rev() {
        let codes = Codes::new(&frequencies(table)?);
        simd::rans_encode_run(&mut encoder, &codes, symbols)?;
    }
    let len = rows.tokens * shape.element().bytes() + TABLE_BYTES * rows.channels;
    let len = len + encoder.end()?;
    (len < raw.len()).then_some(len)
}

/// The nearest step of a part of the largest value; not a number where that is 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped, and 0 for what is no number"
)]
fn symbol(part: f32, steps: f32) -> u8 {
    if part.is_nan() {
        return steps as u8;
    }
    (part * steps + steps).round().clamp(0.0, 2.0 * steps) as u8
}

fn decode_part(shape: &PartShape, body: &[u8], out: &mut [u8]) -> Result<u32, DecodeError> {
    let rows = Rows::of(shape);
    let mut stored = Reader {
        left: body,
        total: body.len(),
    };
    let maxima = stored.take(rows.tokens * shape.element().bytes())?;
    let maxima = floats::read(shape.element(), maxima);
    let tables = stored.take(TABLE_BYTES * rows.channels)?;
    let stream = |source| DecodeError::Stream { stream: 0, source };
    let mut decoder = Decoder::new(stored.left).map_err(stream)?;
    let padded = rows.tokens.next_multiple_of(LANES);
    let mut symbols = vec![0; padded * rows.channels];
    for (symbols, table) in symbols.chunks_mut(padded).zip(tables.chunks(TABLE_BYTES)) {
        let frequencies = frequencies(table).ok_or(DecodeError::Header {
            field: "sum of frequencies",
            got: 0,
            want: SCALE as u64,
        })?;
        decoder
            .run(&Slots::new(&frequencies), symbols)
            .map_err(stream)?;
    }
    decoder.end().map_err(stream)?;
    let steps = steps(shape);
    let value = |(token, channel): (usize, usize)| {
        let symbol = symbols.get(channel * padded + token).copied().unwrap_or(0);
        let largest = maxima.get(token).copied().unwrap_or(0.0);
        (f32::from(symbol) - steps) / steps * largest
    };
    let values: Vec<f32> = rows.places().map(value).collect();
    floats::write(shape.element(), &values, out);
    Ok(crc32fast::hash(out))
}

/// Frequencies of a stored table: each is up to the next number, the last up to [`SCALE`].
fn frequencies(table: &[u8]) -> Option<Frequencies> {
    let mut frequencies = [0; 256];
    let below = table
        .as_chunks::<2>()
        .0
        .iter()
        .map(|bytes| u16::from_le_bytes(*bytes));
    let ends = below.clone().skip(1).chain(u16::try_from(SCALE));
    for ((frequency, below), end) in frequencies.iter_mut().zip(below).zip(ends) {
        *frequency = end.checked_sub(below)?;
    }
    Frequencies::new(frequencies)
}

#[cfg(test)]
mod tests;
