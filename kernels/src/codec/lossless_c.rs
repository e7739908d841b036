//! Level 9, lossless_c: sign, exponent and the first bit of the mantissa of 16-bit floats through
//! interleaved rANS with frequencies by class of channel. Bit-exact.
//!
//! Upstairs:   [`super::registry`].
//! Downstairs: `values` takes values apart, `classes` finds what channels share, `tiles`
//!             puts channels one after the other, [`crate::rans`] codes.
//!
//! Level lossless knows one distribution a part; channels differ, those of K most (CODECS.md has
//! the measurements). Here up to `CLASSES_MAX` classes of channels have one each, and the part
//! carries them, so that no tables of a model are needed. What is no 16-bit float goes as
//! [`byte_planes`] has it. Else, after the [header](super::header):
//!
//! | off | len | field   | meaning                                                             |
//! |----:|----:|---------|---------------------------------------------------------------------|
//! |   0 |   1 | base    | least exponent of the window ([`Window`])                           |
//! |   1 |   1 | classes | how many; with 1 all values are of one channel                      |
//! |   2 |   2 | side    | bytes of frequencies and classes                                    |
//! |   4 | 4 t | escapes | u32 for each tile: its exponents outside the window                 |
//! |     |   s | side    | frequencies and classes, see `classes`                            |
//! |     |   r | rest    | tile after tile, group after group (`values`); the last group of  |
//! |     |     |         | a tile as if zeros followed                                         |
//! |     | 3 e | escaped | tile after tile: u16 value of the tile, u8 exponent; by rising value |
//! |     |   8 | coded   | u32 bytes of each of two rANS streams                               |
//! |     |     | symbols | the two: tile after tile, in the order of `tiles`, of each class  |
//! |     |     |         | its first half of steps in the one, its second in the other; the    |
//! |     |     |         | likeliest symbol pads a class to whole steps                        |
//!
//! Two streams, so that a core decodes one while it waits for the table of the other.
//!
//! Invariants kept here
//!   K2  Decoding keeps 128 KiB a thread and 16 KiB for each class that it met; encoding 256 bytes
//!       a channel beside that.
//!
//! Not here on purpose: no look at the previous token. Classes alone gain what this level is for,
//! and tokens of a channel are decoded side by side, a lane each: none could wait for another.

use std::cell::RefCell;

use kvtier_proto::Level;

use super::halves::{ESCAPE, GROUP, Kind, Window};
use super::raw::exact_length;
use super::reader::Reader;
use super::{Codec, DecodeError, EncodeError, byte_planes, envelope};
use crate::rans::reference::Encoder;
use crate::rans::{Codes, Decoder, Frequencies, LANES, Slots};
use crate::shape::PartShape;
use crate::simd;

mod bits;
mod classes;
mod tiles;
pub(crate) mod values;

use classes::{CLASSES_MAX, Classes, Counts, likeliest};
use tiles::{Order, TILE_SYMBOLS, TILE_VALUES, Tile, channels, tiles};
use values::{GROUP_BYTES, SYMBOLS, Symbols, rest_bytes};

/// Bytes before the counts of escapes.
const LEAD_BYTES: usize = 4;
/// Bytes of an escaped exponent.
const ESCAPE_BYTES: usize = 3;
/// Fewest rows for which classes are looked for: fewer do not pay for a channel's class.
const ROWS_MIN: usize = 32;
/// Classes that are tried, and the values of a part from which on they are.
const TRIES: [(usize, usize); 2] = [(8, 0), (CLASSES_MAX, 1 << 17)];

/// Level 9. One value serves all threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct LosslessC;

impl LosslessC {
    /// The codec; it has no settings.
    pub const fn new() -> Self {
        Self
    }
}

impl Codec for LosslessC {
    fn level(&self) -> Level {
        Level::LOSSLESS_C
    }

    fn applies(&self, _shape: &PartShape) -> bool {
        true
    }

    fn encode(&self, shape: &PartShape, raw: &[u8], out: &mut [u8]) -> Result<usize, EncodeError> {
        envelope::seal(self, shape, (raw, out), |body| {
            match Kind::of(shape.element()) {
                Some(kind) => Ok(SCRATCH.with_borrow_mut(|scratch| {
                    scratch.make_room();
                    encode_part(kind, shape, (raw, body), scratch)
                })),
                None => byte_planes::encode_body(shape.element(), raw, body)
                    .map_err(EncodeError::Compressor),
            }
        })
    }

    fn decode(&self, shape: &PartShape, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        envelope::open(self, shape, (stored, out), |body, out| {
            match Kind::of(shape.element()) {
                Some(kind) => SCRATCH.with_borrow_mut(|scratch| {
                    scratch.make_room();
                    decode_part(kind, shape, (body, out), scratch)
                }),
                None => byte_planes::decode_body(shape.element(), body, out),
            }
        })
    }
}

/// Symbols of a tile, in the order of values and in that of coding, and the slots of each class.
#[derive(Default)]
struct Scratch {
    rows: Vec<u8>,
    columns: Vec<u8>,
    slots: Vec<Slots>,
}

impl Scratch {
    fn make_room(&mut self) {
        self.rows.resize(TILE_VALUES, 0);
        self.columns.resize(TILE_SYMBOLS, 0);
    }

    /// The slots of each class: in memory that the part before had.
    fn fill_slots(&mut self, frequencies: &[Frequencies]) {
        for (slots, frequencies) in self.slots.iter_mut().zip(frequencies) {
            slots.fill(frequencies);
        }
        let more = frequencies.get(self.slots.len()..).unwrap_or_default();
        self.slots.extend(more.iter().map(Slots::new));
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The classes of a part's channels, and its window.
fn model_of(kind: Kind, shape: &PartShape, raw: &[u8], rows: &mut [u8]) -> (Symbols, u8, Classes) {
    let mut counts = [[0_u32; 256]; 4];
    for values in raw.as_chunks::<2>().0.as_chunks::<4>().0 {
        for (value, counts) in values.iter().zip(&mut counts) {
            let exponent = kind.exponent(u16::from_le_bytes(*value));
            if let Some(count) = counts.get_mut(usize::from(exponent)) {
                *count += 1;
            }
        }
    }
    let mut exponents = [0_u64; 256];
    for counts in counts {
        for (sum, count) in exponents.iter_mut().zip(counts) {
            *sum += u64::from(count);
        }
    }
    let window = Window::of(&exponents);
    let symbols = Symbols::new(kind, window);
    let mut all: Counts = [0; SYMBOLS];
    let width = channels(shape);
    let width = if raw.len() / 2 / width < ROWS_MIN {
        1
    } else {
        width
    };
    let mut by_channel = vec![[0; SYMBOLS]; width];
    for tile in tiles(shape, width) {
        let rows = rows.get_mut(..tile.values()).unwrap_or_default();
        symbols.of(raw.get(tile.bytes()).unwrap_or_default(), rows);
        let own = by_channel.get_mut(tile.channel..).unwrap_or_default();
        for row in rows.chunks(tile.columns) {
            for (symbol, counts) in row.iter().zip(&mut *own) {
                if let Some(count) = counts.get_mut(usize::from(*symbol)) {
                    *count += 1;
                }
            }
        }
    }
    for counts in &by_channel {
        for (sum, count) in all.iter_mut().zip(counts) {
            *sum += *count;
        }
    }
    let mut best = (Classes::one(&all), Classes::cost_of_one(&all));
    let tries = TRIES.iter().filter(|(_, least)| raw.len() / 2 >= *least);
    for (count, _) in tries.filter(|_| width > 1) {
        let (classes, cost) = Classes::find(&by_channel, *count);
        // With one class there are no channels.
        if cost < best.1 && classes.count() > 1 {
            best = (classes, cost);
        }
    }
    (symbols, window.base, best.0)
}

/// Encoded size, or `None` when the part does not shrink. `out` is as long as `raw`.
fn encode_part(
    kind: Kind,
    shape: &PartShape,
    (raw, out): (&[u8], &mut [u8]),
    scratch: &mut Scratch,
) -> Option<usize> {
    let Scratch { rows, columns, .. } = scratch;
    let (symbols, base, classes) = model_of(kind, shape, raw, rows);
    let tiles = tiles(shape, classes.of.len());
    let side = classes.write();
    let (lead, room) = out.split_first_chunk_mut::<LEAD_BYTES>()?;
    let [s0, s1] = u16::try_from(side.len()).ok()?.to_le_bytes();
    *lead = [base, u8::try_from(classes.count()).ok()?, s0, s1];
    let (counts, room) = room.split_at_mut_checked(4 * tiles.len())?;
    let (to, room) = room.split_at_mut_checked(side.len())?;
    to.copy_from_slice(&side);
    let groups: usize = tiles.iter().map(|tile| tile.values().div_ceil(GROUP)).sum();
    let (mut rest, room) = room.split_at_mut_checked(groups * rest_bytes(kind))?;
    let mut at = 0;
    for (tile, count) in tiles.iter().zip(counts.as_chunks_mut::<4>().0) {
        let raw = raw.get(tile.bytes())?;
        let len = tile.values().div_ceil(GROUP) * rest_bytes(kind);
        let (to, left) = rest.split_at_mut_checked(len)?;
        symbols.rest(raw, to);
        rest = left;
        let rows = rows.get_mut(..tile.values())?;
        symbols.of(raw, rows);
        let before = at;
        at += put_escapes(kind, rows, raw, room.get_mut(at..)?)?;
        *count = u32::try_from((at - before) / ESCAPE_BYTES)
            .ok()?
            .to_le_bytes();
    }
    let (lengths, room) = room.get_mut(at..)?.split_first_chunk_mut::<8>()?;
    // The second stream is made in the second half, and moves to the end of the first.
    let middle = room.len() / 2;
    let (first, second) = room.split_at_mut(middle);
    let (mut first, mut second) = (Encoder::new(first), Encoder::new(second));
    let frequencies = classes.frequencies()?;
    let codes: Vec<_> = frequencies
        .iter()
        .map(|one| (Codes::new(one), likeliest(one)))
        .collect();
    for tile in tiles.iter().rev() {
        let rows = rows.get_mut(..tile.values())?;
        symbols.of(raw.get(tile.bytes())?, rows);
        let own = tile.channel..tile.channel + tile.columns;
        let (of, masks) = (classes.of.get(own.clone())?, classes.masks.get(own)?);
        let order = Order::new(tile, of, classes.count());
        order.to_columns(tile, rows, masks, columns);
        for ((run, size), (codes, likeliest)) in order.runs().iter().zip(&codes).rev() {
            let run = columns.get_mut(run.clone())?;
            run.get_mut(*size..)?.fill(*likeliest);
            let (a, b) = run.split_at(half(run.len()));
            simd::rans_encode_run(&mut first, codes, a)?;
            simd::rans_encode_run(&mut second, codes, b)?;
        }
    }
    let (a, b) = (first.end()?, second.end()?);
    for (bytes, len) in lengths.as_chunks_mut::<4>().0.iter_mut().zip([a, b]) {
        *bytes = u32::try_from(len).ok()?.to_le_bytes();
    }
    let whole = room.len();
    room.copy_within(middle..middle + b, a);
    let len = raw.len() - whole + a + b;
    (len < raw.len()).then_some(len)
}

/// How many of a run's symbols are of the first stream: its steps halved, rounded up.
const fn half(symbols: usize) -> usize {
    (symbols / LANES).div_ceil(2) * LANES
}

/// Writes numbers and exponents of the values of a tile whose nibble is [`ESCAPE`] to the front of
/// `room`. Returns how many bytes they take.
fn put_escapes(kind: Kind, symbols: &[u8], raw: &[u8], room: &mut [u8]) -> Option<usize> {
    let mut entries = room.as_chunks_mut::<ESCAPE_BYTES>().0.iter_mut();
    let mut bytes = 0;
    let groups = symbols.chunks(GROUP).zip(raw.chunks(GROUP_BYTES));
    for ((symbols, raw), first) in groups.zip((0..=u16::MAX).step_by(GROUP)) {
        let any = symbols
            .iter()
            .fold(false, |any, symbol| any | (symbol & 15 == ESCAPE));
        if !any {
            continue;
        }
        let values = symbols.iter().zip(raw.as_chunks::<2>().0);
        for ((symbol, value), number) in values.zip(first..=u16::MAX) {
            if symbol & 15 == ESCAPE {
                let [v0, v1] = number.to_le_bytes();
                *entries.next()? = [v0, v1, kind.exponent(u16::from_le_bytes(*value))];
                bytes += ESCAPE_BYTES;
            }
        }
    }
    Some(bytes)
}

/// CRC of the decoded bytes.
fn decode_part(
    kind: Kind,
    shape: &PartShape,
    (body, out): (&[u8], &mut [u8]),
    scratch: &mut Scratch,
) -> Result<u32, DecodeError> {
    let mut stored = Reader {
        left: body,
        total: body.len(),
    };
    let [base, count, s0, s1] = *stored.chunk::<LEAD_BYTES>()?;
    let window = Window { base };
    let count = usize::from(count);
    let want = CLASSES_MAX as u64;
    if count == 0 || count > CLASSES_MAX {
        let (field, got) = ("classes", count as u64);
        return Err(DecodeError::Header { field, got, want });
    }
    let width = if count > 1 { channels(shape) } else { 1 };
    let tiles = tiles(shape, width);
    let escapes = stored.take(4 * tiles.len())?.as_chunks::<4>().0;
    let side = stored.take(u16::from_le_bytes([s0, s1]).into())?;
    let classes = Classes::read(side, count, width)
        .filter(|classes| {
            let frequencies = classes.frequencies();
            frequencies.map(|all| scratch.fill_slots(&all)).is_some()
        })
        .ok_or(DecodeError::Header {
            field: "bytes of classes that are none,",
            got: side.len() as u64,
            want: 0,
        })?;
    let groups: usize = tiles.iter().map(|tile| tile.values().div_ceil(GROUP)).sum();
    let rest = stored.take(groups * rest_bytes(kind))?;
    let mut lists = Vec::with_capacity(tiles.len());
    for (tile, count) in tiles.iter().zip(escapes) {
        let (count, values) = (u32::from_le_bytes(*count) as usize, tile.values());
        if count > values {
            let (field, got, want) = ("escapes", count as u64, values as u64);
            return Err(DecodeError::Header { field, got, want });
        }
        lists.push(stored.take(count * ESCAPE_BYTES)?.as_chunks().0);
    }
    let lengths = [*stored.chunk()?, *stored.chunk()?].map(|len| u32::from_le_bytes(len) as usize);
    let [first, second] = lengths;
    let streams = [stored.take(first)?, stored.take(second)?];
    exact_length(stored.left, 0)?;
    let part = Part {
        kind,
        window,
        classes,
    };
    part.decode((&tiles, &lists), (rest, streams), out, scratch)
        .map_err(|source| DecodeError::Stream { stream: 0, source })
}

/// What a part's tiles are decoded with.
struct Part {
    kind: Kind,
    window: Window,
    classes: Classes,
}

impl Part {
    fn decode(
        &self,
        (tiles, escapes): (&[Tile], &[&[[u8; ESCAPE_BYTES]]]),
        (mut rest, [first, second]): (&[u8], [&[u8]; 2]),
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<u32, crate::rans::StreamError> {
        let Scratch {
            rows,
            columns,
            slots,
        } = scratch;
        let (mut first, mut second) = (Decoder::new(first)?, Decoder::new(second)?);
        let mut crc = crc32fast::Hasher::new();
        for (tile, escapes) in tiles.iter().zip(escapes) {
            let own = tile.channel..tile.channel + tile.columns;
            let of = self.classes.of.get(own.clone()).unwrap_or_default();
            let masks = self.classes.masks.get(own).unwrap_or_default();
            let order = Order::new(tile, of, self.classes.count());
            let raw = out.get_mut(tile.bytes()).unwrap_or_default();
            for ((run, _), slots) in order.runs().iter().zip(&*slots) {
                let soon = raw.get(2 * run.start..).unwrap_or_default();
                let run = columns.get_mut(run.clone()).unwrap_or_default();
                let (to_first, to_second) = run.split_at_mut(half(run.len()));
                let to = [to_first, to_second];
                simd::rans_decode_two([&mut first, &mut second], slots, to, soon)?;
            }
            order.to_rows(tile, columns, masks, rows);
            let groups = tile.values().div_ceil(GROUP);
            let len = groups * rest_bytes(self.kind);
            let (own, left) = rest.split_at_checked(len).unwrap_or_default();
            simd::join_signed((self.kind, self.window), rows, own, raw);
            rest = left;
            for [v0, v1, exponent] in *escapes {
                let number = usize::from(u16::from_le_bytes([*v0, *v1]));
                if let Some(value) = raw.as_chunks_mut::<2>().0.get_mut(number) {
                    let bits = u16::from_le_bytes(*value);
                    *value = self.kind.with_exponent(bits, *exponent).to_le_bytes();
                }
            }
            crc.update(raw);
        }
        first.end()?;
        second.end()?;
        Ok(crc.finalize())
    }
}

#[cfg(test)]
mod tests;
