//! Level cachegen_paper: CacheGen as its paper describes it. A level to compare with, for who
//! knows it; nothing is tuned.
//!
//! Upstairs:   [`Registry::with_baselines`](crate::Registry::with_baselines).
//! Downstairs: [`floats`] reads and writes elements, [`crate::rans`] codes.
//!
//! Liu et al., SIGCOMM 2024 (arXiv:2310.07240): of every 10 tokens the first is an anchor of 8
//! bits a value, the others are their difference to it, rounded to steps of 0.5 (first third of
//! the layers), 1 or 1.5 times what the differences of their channel are in the root mean square.
//! Where nobody said how many layers there are, a step is 1 of these. The paper profiles one
//! distribution a layer and channel; here all channels of a part share one, which the part
//! carries: in steps of their own size they differ little.
//!
//! After the [header](super::header):
//!
//! | off | len     | field   | meaning                                                         |
//! |----:|--------:|---------|-----------------------------------------------------------------|
//! |   0 |     2 c | steps   | of each channel, bf16                                           |
//! |     | a (e+c) | anchors | the largest size of its values, as an element; i8 a value       |
//! |     |       2 | symbols | the least symbol, and how many there are from it on             |
//! |     |     2 s | table   | u16 frequency of each                                           |
//! |     |         | stream  | rANS: the differences token after token, padded to whole steps  |
//!
//! A symbol is 128 more than the steps of a difference, of which there are never 128: a value is
//! at most the root of 2,048 tokens times the root mean square of all, 91 steps.
//!
//! Invariants kept here
//!   Q1  An error is at most half a step, or that of an anchor.
//!   Q2  A part with a value that is not finite, or larger than `LARGEST`, is stored as it is.

use kvtier_proto::Level;

use super::cachegen::LARGEST;
use super::quant::floats;
use super::reader::Reader;
use super::rows::Rows;
use super::{Codec, DecodeError, EncodeError, envelope};
use crate::rans::{Codes, Decoder, Frequencies, LANES, SCALE, Slots, encode};
use crate::shape::PartShape;

/// Tokens of a group, the anchor with them.
const GROUP: usize = 10;
/// Largest code of an anchor.
const ANCHOR: f32 = 127.0;
/// Symbol of no difference.
const ZERO: f32 = 128.0;

/// The level.
#[derive(Debug, Clone, Copy, Default)]
pub struct CacheGenPaper;

impl Codec for CacheGenPaper {
    fn level(&self) -> Level {
        Level::CACHEGEN_PAPER
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
            let mut stored = Reader {
                left: body,
                total: body.len(),
            };
            let Ok((steps, anchors)) = read_lead(shape, &mut stored) else {
                return f32::INFINITY;
            };
            let largest = |numbers: &mut dyn Iterator<Item = f32>| numbers.fold(0.0, f32::max);
            let step = largest(&mut steps.iter().copied());
            let anchor = largest(&mut anchors.iter().map(|(size, _)| *size));
            f32::max(step / 2.0, anchor / (2.0 * ANCHOR))
        })
    }
}

/// Size of a step, in root mean squares.
fn bin(shape: &PartShape) -> f32 {
    match (3 * shape.layer()).checked_div(shape.layers()) {
        Some(0) => 0.5,
        None | Some(1) => 1.0,
        Some(_) => 1.5,
    }
}

/// The values of a part by token, whatever their order.
fn by_token(rows: Rows, values: &[f32]) -> Vec<f32> {
    let mut sorted = vec![0.0; values.len()];
    for (value, (token, channel)) in values.iter().zip(rows.places()) {
        if let Some(to) = sorted.get_mut(token * rows.channels + channel) {
            *to = *value;
        }
    }
    sorted
}

/// A value of an anchor.
fn anchor_value(code: i8, size: f32) -> f32 {
    f32::from(code) / ANCHOR * size
}

fn encode_part(shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Option<usize> {
    let values = floats::read(shape.element(), raw);
    if !values.iter().all(|value| value.abs() <= LARGEST) {
        return None;
    }
    let rows = Rows::of(shape);
    let values = by_token(rows, &values);
    let element = shape.element().bytes();
    let whole = out.len();
    let (steps_to, mut room) = out.split_at_mut_checked(2 * rows.channels)?;
    let mut differences = Vec::with_capacity(values.len());
    for group in values.chunks(GROUP * rows.channels) {
        let (first, others) = group.split_at_checked(rows.channels)?;
        let size = first
            .iter()
            .fold(0.0, |size, value| f32::max(size, value.abs()));
        let (to, left) = room.split_at_mut_checked(element + rows.channels)?;
        room = left;
        let (size_to, codes) = to.split_at_mut_checked(element)?;
        floats::write(shape.element(), &[size], size_to);
        let mut anchor = Vec::with_capacity(rows.channels);
        for (to, value) in codes.iter_mut().zip(first) {
            #[expect(clippy::cast_possible_truncation, reason = "at most 127, NaN is 0")]
            let code = (value / size * ANCHOR).round() as i8;
            *to = code.cast_unsigned();
            anchor.push(anchor_value(code, size));
        }
        let anchors = anchor.iter().cycle();
        differences.extend(
            others
                .iter()
                .zip(anchors)
                .map(|(value, anchor)| value - anchor),
        );
    }
    let steps = steps_of(shape, rows, &differences)?;
    for (bytes, step) in steps_to.as_chunks_mut::<2>().0.iter_mut().zip(&steps) {
        *bytes = floats::bf16_bits(*step).to_le_bytes();
    }
    let mut symbols: Vec<u8> = Vec::with_capacity(differences.len() + LANES);
    for (difference, step) in differences.iter().zip(steps.iter().cycle()) {
        let count = if *step > 0.0 { difference / step } else { 0.0 };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "91 steps at most"
        )]
        symbols.push((count.round() + ZERO) as u8);
    }
    let room = put_symbols(&mut symbols, room)?;
    let len = whole - room.len();
    (len < raw.len()).then_some(len)
}

/// Steps of the channels; `None` when one is not finite.
fn steps_of(shape: &PartShape, rows: Rows, differences: &[f32]) -> Option<Vec<f32>> {
    let mut squares = vec![0_f64; rows.channels];
    for row in differences.chunks(rows.channels) {
        for (sum, difference) in squares.iter_mut().zip(row) {
            *sum += f64::from(*difference) * f64::from(*difference);
        }
    }
    let count = (differences.len() / rows.channels).max(1) as f64;
    let step = |sum: &f64| {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "no larger than a difference"
        )]
        let size = (sum / count).sqrt() as f32;
        let step = floats::bf16_above(size * bin(shape));
        step.is_finite().then_some(step)
    };
    squares.iter().map(step).collect()
}

/// Writes table and stream to the front of `room` and returns the rest of it.
fn put_symbols<'a>(symbols: &mut Vec<u8>, room: &'a mut [u8]) -> Option<&'a mut [u8]> {
    let mut weights = [0_u64; 256];
    for symbol in symbols.iter() {
        *weights.get_mut(usize::from(*symbol))? += 1;
    }
    let likeliest = (0..=u8::MAX)
        .zip(weights)
        .max_by_key(|(_, weight)| *weight)?
        .0;
    // One count where there is no difference at all: a part of anchors has a table as well.
    *weights.get_mut(usize::from(likeliest))? += 1;
    symbols.resize(symbols.len().next_multiple_of(LANES), likeliest);
    let frequencies = Frequencies::in_proportion(&weights)?;
    let used = |frequency: &u16| *frequency > 0;
    let least = frequencies.get().iter().position(used)?;
    let end = frequencies.get().iter().rposition(used)? + 1;
    let (range, room) = room.split_first_chunk_mut::<2>()?;
    *range = [
        u8::try_from(least).ok()?,
        u8::try_from(end - least - 1).ok()?,
    ];
    let (table, room) = room.split_at_mut_checked(2 * (end - least))?;
    let frequency = frequencies.get().iter().skip(least);
    for (bytes, frequency) in table.as_chunks_mut::<2>().0.iter_mut().zip(frequency) {
        *bytes = frequency.to_le_bytes();
    }
    let len = encode(&Codes::new(&frequencies), symbols, room)?;
    room.get_mut(len..)
}

/// Size and codes of an anchor.
type Anchor<'a> = (f32, &'a [u8]);

/// Steps of the channels, and the anchors.
fn read_lead<'a>(
    shape: &PartShape,
    stored: &mut Reader<'a>,
) -> Result<(Vec<f32>, Vec<Anchor<'a>>), DecodeError> {
    let rows = Rows::of(shape);
    let steps = stored.take(2 * rows.channels)?.as_chunks::<2>().0.iter();
    let steps = steps.map(|bytes| floats::bf16(u16::from_le_bytes(*bytes)));
    let mut anchors = Vec::with_capacity(rows.tokens.div_ceil(GROUP));
    for _ in (0..rows.tokens).step_by(GROUP) {
        let size = floats::read(shape.element(), stored.take(shape.element().bytes())?);
        let size = size.first().copied().unwrap_or(0.0);
        anchors.push((size, stored.take(rows.channels)?));
    }
    Ok((steps.collect(), anchors))
}

fn decode_part(shape: &PartShape, body: &[u8], out: &mut [u8]) -> Result<u32, DecodeError> {
    let rows = Rows::of(shape);
    let mut stored = Reader {
        left: body,
        total: body.len(),
    };
    let (steps, anchors) = read_lead(shape, &mut stored)?;
    let [least, more] = *stored.chunk::<2>()?;
    let table = stored.take(2 * (usize::from(more) + 1))?.as_chunks::<2>().0;
    let mut frequencies = [0; 256];
    for (frequency, bytes) in frequencies.iter_mut().skip(least.into()).zip(table) {
        *frequency = u16::from_le_bytes(*bytes);
    }
    let frequencies = Frequencies::new(frequencies).ok_or(DecodeError::Header {
        field: "sum of frequencies",
        got: 0,
        want: SCALE as u64,
    })?;
    let differences = (rows.tokens - anchors.len()) * rows.channels;
    let mut symbols = vec![0; differences.next_multiple_of(LANES)];
    let stream = |source| DecodeError::Stream { stream: 0, source };
    let mut decoder = Decoder::new(stored.left).map_err(stream)?;
    decoder
        .run(&Slots::new(&frequencies), &mut symbols)
        .map_err(stream)?;
    decoder.end().map_err(stream)?;
    let value = |(token, channel): (usize, usize)| {
        let (group, place) = (token / GROUP, token % GROUP);
        let (size, codes) = anchors.get(group).copied().unwrap_or_default();
        let code = codes.get(channel).copied().unwrap_or(0);
        let anchor = anchor_value(code.cast_signed(), size);
        if place == 0 {
            return anchor;
        }
        let row = group * (GROUP - 1) + place - 1;
        let symbol = symbols
            .get(row * rows.channels + channel)
            .copied()
            .unwrap_or(0);
        let step = steps.get(channel).copied().unwrap_or(0.0);
        (f32::from(symbol) - ZERO) * step + anchor
    };
    let values: Vec<f32> = rows.places().map(value).collect();
    floats::write(shape.element(), &values, out);
    Ok(crc32fast::hash(out))
}

#[cfg(test)]
mod tests;
