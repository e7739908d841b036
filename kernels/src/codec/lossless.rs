//! Level 1, lossless: exponents of 16-bit floats through interleaved rANS, their other bits as
//! they are. Bit-exact.
//!
//! Upstairs:   [`super::registry`].
//! Downstairs: [`super::halves`] takes values apart, [`crate::rans`] codes their exponents.
//!
//! Values of KV spread over few exponents, and nothing else of them is any shorter than it is
//! (CODECS.md has the measurements). So the exponents of two values are one symbol, and sign
//! and mantissa are copied. What is no 16-bit float goes as [`byte_planes`] has it. Else, after
//! the [header](super::header):
//!
//! | off | len | field       | meaning                                                         |
//! |----:|----:|-------------|-----------------------------------------------------------------|
//! |   0 |   1 | base        | least exponent of the window ([`Window`])                       |
//! |   1 |   3 | reserved    | 0                                                               |
//! |   4 |  32 | frequencies | u16 for each nibble; they sum to [`SCALE`]                       |
//! |  36 |     | streams     | of [`STREAM_GROUPS`] groups each, the last one of fewer          |
//! |     |     | tail        | the last values as they are, where they are no whole group      |
//!
//! A stream:
//!
//! | off | len | field   | meaning                                                              |
//! |----:|----:|---------|----------------------------------------------------------------------|
//! |   0 |   4 | escapes | exponents outside the window                                         |
//! |   4 |   4 | coded   | bytes of the rANS stream                                             |
//! |   8 |   n | rest    | sign and mantissa, [`Kind::plane_bytes`] a group                      |
//! |     |   c | symbols | the rANS stream                                                      |
//! |     | 3 e | escaped | u16 value of the stream, u8 exponent; by rising value                |
//!
//! A symbol's frequency is the product of its nibbles', so a part carries 16 numbers and no more.
//! They are taken from a sample of the part: what a full count would gain is below 0.02 %.
//!
//! Invariants kept here
//!   K2  Decoding keeps no memory beside a few KiB of the stack, encoding 32 KiB a thread.
//!
//! Not here on purpose: no tables of a model. 36 bytes a part are all that they would save.

use std::cell::RefCell;

use kvtier_proto::Level;

use super::halves::{ESCAPE, GROUP, GROUP_SYMBOLS, Kind, PlanesMut, Window};
use super::raw::exact_length;
use super::reader::Reader;
use super::{Codec, DecodeError, EncodeError, byte_planes, envelope};
use crate::rans::{
    Codes, Decoder, Frequencies, SCALE, Slots, StreamError, encode, stream_bytes_max,
};
use crate::shape::PartShape;
use crate::simd;

/// Groups of a stream: 65,536 values, whose numbers are of 16 bits.
pub const STREAM_GROUPS: usize = 1024;
/// Groups that are decoded and put together at a time, in a core's first cache.
const CHUNK_GROUPS: usize = 64;
/// Groups in a row that are counted, and how many such runs of a part.
const SAMPLE_RUN: usize = 16;
const SAMPLE_RUNS: usize = 8;
/// Bytes of window and frequencies.
const TABLE_BYTES: usize = 36;
/// Bytes of an escaped exponent.
const ESCAPE_BYTES: usize = 3;
const GROUP_BYTES: usize = 2 * GROUP;

/// Level 1. One value serves all threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lossless;

impl Lossless {
    /// The codec; it has no settings.
    pub const fn new() -> Self {
        Self
    }
}

impl Codec for Lossless {
    fn level(&self) -> Level {
        Level::LOSSLESS
    }

    fn applies(&self, _shape: &PartShape) -> bool {
        true
    }

    fn encode(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Result<usize, EncodeError> {
        envelope::seal(self, shape, (raw, out), |body| {
            match Kind::of(shape.element()) {
                Some(kind) => Ok(encode_part(kind, raw, body)),
                None => byte_planes::encode_body(shape.element(), raw, body)
                    .map_err(EncodeError::Compressor),
            }
        })
    }

    fn decode(&self, shape: &PartShape, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        envelope::open(self, shape, (stored, out), |body, out| {
            match Kind::of(shape.element()) {
                Some(kind) => decode_part(kind, body, out),
                None => byte_planes::decode_body(shape.element(), body, out),
            }
        })
    }
}

/// Window and frequencies of a part, as it carries them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Model {
    window: Window,
    nibbles: [u16; 16],
}

impl Model {
    /// What is expected of a part, after a sample of its groups.
    fn of(kind: Kind, groups: &[[u8; GROUP_BYTES]]) -> Self {
        // Neighbours count apart: one does not wait for the other's sum.
        let mut tables = [[0_u32; 256]; 4];
        // Runs, not single groups: what is not in the cache yet comes in one go.
        let runs = groups.len().div_ceil(SAMPLE_RUN);
        let stride = SAMPLE_RUN * (runs / SAMPLE_RUNS).max(1);
        for run in groups.chunks(stride).take(SAMPLE_RUNS) {
            let run = run.get(..SAMPLE_RUN).unwrap_or(run).as_flattened();
            for values in run.as_chunks::<2>().0.as_chunks::<4>().0 {
                for (value, table) in values.iter().zip(&mut tables) {
                    let exponent = kind.exponent(u16::from_le_bytes(*value));
                    if let Some(count) = table.get_mut(usize::from(exponent)) {
                        *count += 1;
                    }
                }
            }
        }
        let mut counts = [0_u64; 256];
        for table in tables {
            for (sum, count) in counts.iter_mut().zip(table) {
                *sum += u64::from(count);
            }
        }
        let window = Window::of(&counts);
        let mut weights = [0; 256];
        for (exponent, count) in (0_u8..=255).zip(counts) {
            let nibble = usize::from(window.nibble(exponent));
            if let Some(weight) = weights.get_mut(nibble) {
                // Four counts for each that was seen: one more is little, and makes codes of all.
                *weight += 4 * count;
            }
        }
        let mut nibbles = [0; 16];
        for weight in weights.iter_mut().take(nibbles.len()) {
            *weight += 1;
        }
        if let Some(frequencies) = Frequencies::in_proportion(&weights) {
            nibbles.copy_from_slice(frequencies.get().first_chunk::<16>().unwrap_or(&[0; 16]));
        }
        Self { window, nibbles }
    }

    fn to_bytes(&self) -> [u8; TABLE_BYTES] {
        let mut bytes = [0; TABLE_BYTES];
        if let Some((first, rest)) = bytes.split_first_chunk_mut::<4>() {
            *first = [self.window.base, 0, 0, 0];
            for (bytes, frequency) in rest.as_chunks_mut::<2>().0.iter_mut().zip(self.nibbles) {
                *bytes = frequency.to_le_bytes();
            }
        }
        bytes
    }

    fn read(bytes: &[u8; TABLE_BYTES]) -> Result<Self, DecodeError> {
        let [base, reserved @ .., _, _] = *bytes.first_chunk::<6>().unwrap_or(&[0; 6]);
        if reserved != [0; 3] {
            let [a, b, c] = reserved;
            return Err(DecodeError::Header {
                field: "reserved bytes",
                got: u32::from_le_bytes([a, b, c, 0]).into(),
                want: 0,
            });
        }
        let mut nibbles = [0; 16];
        let stored = bytes.get(4..).unwrap_or_default().as_chunks::<2>().0;
        for (nibble, bytes) in nibbles.iter_mut().zip(stored) {
            *nibble = u16::from_le_bytes(*bytes);
        }
        let sum: u64 = nibbles.iter().copied().map(u64::from).sum();
        if sum != SCALE as u64 {
            return Err(DecodeError::Header {
                field: "sum of frequencies",
                got: sum,
                want: SCALE as u64,
            });
        }
        let window = Window { base };
        Ok(Self { window, nibbles })
    }

    /// How often pairs are expected.
    fn pairs(&self) -> Result<Frequencies, DecodeError> {
        let mut weights = [0; 256];
        let pairs = self
            .nibbles
            .iter()
            .flat_map(|high| self.nibbles.iter().map(move |low| (low, high)));
        for (weight, (low, high)) in weights.iter_mut().zip(pairs) {
            *weight = u64::from(*low) * u64::from(*high);
        }
        Frequencies::in_proportion(&weights).ok_or(DecodeError::Header {
            field: "sum of frequencies",
            got: 0,
            want: SCALE as u64,
        })
    }
}

thread_local! {
    /// Symbols of a stream: they are encoded from their end.
    static SYMBOLS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Encoded size, or `None` when the part does not shrink. `out` is as long as `raw`.
fn encode_part(kind: Kind, raw: &[u8], out: &mut [u8]) -> Option<usize> {
    let groups = raw.as_chunks::<GROUP_BYTES>().0;
    let tail = raw.get(groups.len() * GROUP_BYTES..)?;
    let model = Model::of(kind, groups);
    let codes = Codes::new(&model.pairs().ok()?);
    let (head, mut room) = out.split_first_chunk_mut::<TABLE_BYTES>()?;
    *head = model.to_bytes();
    let whole = room.len();
    for groups in groups.chunks(STREAM_GROUPS) {
        room = SYMBOLS.with_borrow_mut(|symbols| {
            symbols.resize(STREAM_GROUPS * GROUP_SYMBOLS, 0);
            let symbols = symbols.get_mut(..groups.len() * GROUP_SYMBOLS)?;
            encode_stream((kind, model.window, &codes), groups, symbols, room)
        })?;
    }
    room.split_at_mut_checked(tail.len())?
        .0
        .copy_from_slice(tail);
    let len = TABLE_BYTES + whole - room.len() + tail.len();
    (len < raw.len()).then_some(len)
}

/// Writes one stream to the front of `room` and returns the rest of it.
fn encode_stream<'a>(
    (kind, window, codes): (Kind, Window, &Codes),
    groups: &[[u8; GROUP_BYTES]],
    symbols: &mut [u8],
    room: &'a mut [u8],
) -> Option<&'a mut [u8]> {
    let (lengths, room) = room.split_first_chunk_mut::<8>()?;
    let (rest, room) = room.split_at_mut_checked(groups.len() * kind.plane_bytes())?;
    let raw = groups.as_flattened();
    let planes = PlanesMut {
        symbols: &mut *symbols,
        rest,
    };
    simd::split(kind, window, raw, planes);
    let most = room.len().min(stream_bytes_max(symbols.len()));
    let coded = encode(codes, symbols, room.get_mut(..most)?)?;
    let (_, mut room) = room.split_at_mut_checked(coded)?;
    let mut escapes = 0_u32;
    for (value, exponent) in escaped(kind, symbols, raw) {
        let (entry, left) = room.split_first_chunk_mut::<ESCAPE_BYTES>()?;
        let [v0, v1] = value.to_le_bytes();
        *entry = [v0, v1, exponent];
        (escapes, room) = (escapes + 1, left);
    }
    let (a, b) = lengths.split_at_mut(4);
    a.copy_from_slice(&escapes.to_le_bytes());
    b.copy_from_slice(&u32::try_from(coded).ok()?.to_le_bytes());
    Some(room)
}

/// Numbers and exponents of the values whose nibble is [`ESCAPE`], by rising number.
fn escaped(kind: Kind, symbols: &[u8], raw: &[u8]) -> impl Iterator<Item = (u16, u8)> {
    let is_escape = |symbol: u8| symbol & 15 == ESCAPE || symbol >> 4 == ESCAPE;
    let symbols = symbols.as_chunks::<GROUP_SYMBOLS>().0.iter();
    let values = raw.as_chunks::<GROUP_BYTES>().0;
    let groups = symbols
        .zip(values)
        .zip((0..=u16::MAX).step_by(GROUP))
        .filter(move |((symbols, _), _)| {
            symbols
                .iter()
                .fold(false, |any, symbol| any | is_escape(*symbol))
        });
    groups.flat_map(move |((symbols, values), first)| {
        let low = symbols.iter().map(|symbol| symbol & 15);
        let high = symbols.iter().map(|symbol| symbol >> 4);
        let values = values.as_chunks::<2>().0.iter();
        let all = low.chain(high).zip(values).zip(first..=u16::MAX);
        all.filter(|((nibble, _), _)| *nibble == ESCAPE)
            .map(move |((_, value), number)| {
                let exponent = kind.exponent(u16::from_le_bytes(*value));
                (number, exponent)
            })
    })
}

/// CRC of the decoded bytes.
fn decode_part(kind: Kind, body: &[u8], out: &mut [u8]) -> Result<u32, DecodeError> {
    let mut stored = Reader {
        left: body,
        total: body.len(),
    };
    let model = Model::read(stored.chunk::<TABLE_BYTES>()?)?;
    let slots = Slots::new(&model.pairs()?);
    let mut crc = crc32fast::Hasher::new();
    let (groups, tail) = out.as_chunks_mut::<GROUP_BYTES>();
    for (index, groups) in groups.chunks_mut(STREAM_GROUPS).enumerate() {
        let stream = Stream::read(kind, groups.len(), &mut stored)?;
        stream
            .decode((kind, model.window, &slots), groups, &mut crc)
            .map_err(|source| DecodeError::Stream {
                stream: index,
                source,
            })?;
    }
    tail.copy_from_slice(stored.take(tail.len())?);
    crc.update(tail);
    exact_length(stored.left, 0)?;
    Ok(crc.finalize())
}

/// The pieces of a stream.
struct Stream<'a> {
    rest: &'a [u8],
    coded: &'a [u8],
    escapes: &'a [[u8; ESCAPE_BYTES]],
}

impl<'a> Stream<'a> {
    fn read(kind: Kind, groups: usize, stored: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let escapes = u32::from_le_bytes(*stored.chunk()?) as usize;
        let coded = u32::from_le_bytes(*stored.chunk()?) as usize;
        let values = groups * GROUP;
        if escapes > values {
            return Err(DecodeError::Header {
                field: "escapes",
                got: escapes as u64,
                want: values as u64,
            });
        }
        Ok(Self {
            rest: stored.take(groups * kind.plane_bytes())?,
            coded: stored.take(coded)?,
            escapes: stored.take(escapes * ESCAPE_BYTES)?.as_chunks().0,
        })
    }

    fn decode(
        mut self,
        (kind, window, slots): (Kind, Window, &Slots),
        groups: &mut [[u8; GROUP_BYTES]],
        crc: &mut crc32fast::Hasher,
    ) -> Result<(), StreamError> {
        let mut decoder = Decoder::new(self.coded)?;
        let rests = self.rest.chunks(CHUNK_GROUPS * kind.plane_bytes());
        let mut first = 0;
        for (chunk, rest) in groups.chunks_mut(CHUNK_GROUPS).zip(rests) {
            let raw = chunk.as_flattened_mut();
            simd::join((&mut decoder, slots), (kind, window), rest, raw)?;
            self.put_escapes(kind, first, raw);
            first += raw.len() / 2;
            crc.update(raw);
        }
        decoder.end()
    }

    /// Puts the exponents that were kept apart into the values from number `first` on.
    fn put_escapes(&mut self, kind: Kind, first: usize, raw: &mut [u8]) {
        let values = raw.as_chunks_mut::<2>().0;
        while let Some(([v0, v1, exponent], rest)) = self.escapes.split_first() {
            let number = usize::from(u16::from_le_bytes([*v0, *v1]));
            let place = number.checked_sub(first);
            let Some(value) = place.and_then(|place| values.get_mut(place)) else {
                break;
            };
            let bits = u16::from_le_bytes(*value);
            *value = kind.with_exponent(bits, *exponent).to_le_bytes();
            self.escapes = rest;
        }
    }
}

#[cfg(test)]
mod tests;
